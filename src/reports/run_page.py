"""The pictures of a run: training_curves.png and a page that says what it is and how to go on with it."""

import io
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from reports import pages
from runtime.files import write_bytes, write_text

Rows = Sequence[dict[str, float]]  # of a run's CSV file

DRAWING_SHARE = 0.05  # of the time, which drawing may take


@dataclass(frozen=True)
class About:
    """What a page says of its run beside its records.

    Attributes:
        titles: metrics to show -> what they are called.
        chosen_by: the metrics that choose checkpoints.
        hyper_parameters: of the run.
        commands: what for -> a command: to resume, to validate, to reproduce.
    """

    titles: Mapping[str, str]
    chosen_by: tuple[str, ...]
    hyper_parameters: Mapping[str, Any]
    commands: Mapping[str, str]


class RunPage:
    """Draws a run's curves and page, at validations as long as that takes a small share of the time, and at the end."""

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self.drawn_at, self.cost = time.monotonic(), 0.0

    def refresh(self, rows: dict[str, Rows], complete: bool) -> None:
        """Draw, if it is due.

        Args:
            rows: see `Run`.
            complete: the training is over.
        """
        start = time.monotonic()
        if not complete and (start - self.drawn_at) * DRAWING_SHARE < self.cost:
            return
        curves = training_curves(rows, dict(self.about.titles))
        write_bytes(self.folder / "training_curves.png", curves)
        write_text(self.folder / "index.html", run_page(self.folder.name, self.about, rows, curves, complete))
        self.drawn_at = time.monotonic()
        self.cost = self.drawn_at - start


def run_page(name: str, about: About, rows: dict[str, Rows], curves: bytes, complete: bool) -> str:
    """The page of a run."""
    wanted, done = about.hyper_parameters["num_epochs"], len(rows["train"])
    state = "complete" if complete else "not complete"
    parts = [f"<p>{done} of {wanted} epochs, {state}; last loss {rows['train'][-1]['train_epoch_loss']:.4f}</p>"]
    parts.append(f'<img src="{pages.data_url(curves, "image/png")}" alt="loss, recalls and expert load by epoch">')
    parts += ["<h2>Best validations</h2>", _best(about, rows.get("validation", []))]
    for purpose, line in about.commands.items():
        if not (complete and purpose == "resume"):
            parts += [f"<h2>To {pages.text(purpose)}</h2>", pages.command(line)]
    parts += ["<h2>Hyper-parameters</h2>", pages.table(dict(sorted(about.hyper_parameters.items())))]
    return pages.page(name, parts)


def _best(about: About, validations: Rows) -> str:
    """The best validation by each metric that chooses checkpoints, and the last one."""
    if not validations:
        return "<p>none yet</p>"
    chosen = {f"best {metric}": max(validations, key=operator.itemgetter(metric)) for metric in about.chosen_by}
    chosen |= {"last": validations[-1]}
    cells = {
        f"{what}, epoch {row['epoch']}": [f"{row[metric]:.2f}" for metric in about.titles]
        for what, row in chosen.items()
    }
    return pages.matrix(list(about.titles.values()), cells)


def training_curves(rows: dict[str, Rows], titles: dict[str, str]) -> bytes:
    """A PNG of what a run recorded so far.

    Args:
        rows: "train", "validation" and "router" -> the rows of the CSV files, see `Run`.
        titles: metrics to draw -> what they are called.
    """
    shares = [name for name in (rows["router"][0] if rows.get("router") else {}) if name.endswith("_share")]
    panels = [("loss", rows["train"], {"train_epoch_loss": "training"})]
    panels += [("recall, %", rows.get("validation", []), titles)]
    panels += [("share of queries", rows["router"], {name: name.split("_")[0] for name in shares})] if shares else []
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        for axes, (label, table, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, title in names.items():
                axes.plot([row["epoch"] for row in table], [row[name] for row in table], label=title, marker=".")
            axes.set(xlabel="epoch", ylabel=label)
            axes.grid(alpha=0.3)
            if len(names) > 1:
                axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7, ncols=3, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
