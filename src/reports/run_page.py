"""The pictures of a run: training_curves.png and a page that says what it is and how to go on with it."""

import functools
import importlib.util
import io
import logging
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import pages
from runtime.files import write_bytes, write_text
from utils import two_decimals

logger = logging.getLogger(__name__)

Rows = Sequence[dict[str, float]]  # of a run's CSV file

DRAWING_SHARE = 0.05  # of the time, which drawing may take


@dataclass(frozen=True, kw_only=True)
class About:
    """What a page says of its run beside its records.

    Attributes:
        titles: metrics to show -> what they are called.
        chosen_by: the metrics that select checkpoints.
        hyper_parameters: of the run.
        commands: what for -> a command: to resume, to validate, to reproduce.
    """

    titles: Mapping[str, str]
    chosen_by: tuple[str, ...]
    hyper_parameters: Mapping[str, Any]
    commands: Mapping[str, str]


class RunPage:
    """Draws a run's curves and page, at validations as long as that takes a small share of the time, and at the end.

    Where matplotlib is not installed, the page has no curves.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.about = about
        self.drawn_at = time.monotonic()
        self.cost = 0.0  # seconds that the last drawing took

    def refresh(self, rows: Mapping[str, Rows], *, complete: bool) -> None:
        """Draw, if it is due.

        Args:
            rows: see `Run`.
            complete: the training is over.
        """
        start = time.monotonic()
        if not complete and (start - self.drawn_at) * DRAWING_SHARE < self.cost:
            return
        curves = training_curves(rows, self.about.titles) if can_draw() else None
        page = run_page(self.folder.name, self.about, rows, curves=curves, complete=complete)
        if curves is not None:
            write_bytes(self.folder / "training_curves.png", curves)
        write_text(self.folder / "index.html", page)
        self.drawn_at = time.monotonic()
        self.cost = self.drawn_at - start


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is installed; if not, this is said once."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        logger.warning("no training_curves.png: matplotlib is not installed")
    return there


def run_page(
    name: str, about: About, rows: Mapping[str, Rows], *, curves: bytes | None, complete: bool
) -> str:
    """The page of a run; curves are a PNG, or None."""
    wanted = about.hyper_parameters["num_epochs"]
    trained = rows["train"]
    state = "complete" if complete else "not complete"
    loss = trained[-1]["train_epoch_loss"]
    parts = [f"<p>{len(trained)} of {wanted} epochs, {state}; last loss {loss:.4f}</p>"]
    if curves is not None:
        source = pages.data_url(curves, "image/png")
        parts.append(f'<img src="{source}" alt="loss, recalls and expert load by epoch">')
    parts += ["<h2>Best validations</h2>", _best(about, rows.get("validation", []))]
    if scaling := rows.get("loss_scaling"):
        skipped = sum(row["skipped_steps"] for row in scaling)
        parts.insert(1, f"<p>loss scale {scaling[-1]['loss_scale']:g}, {skipped} skipped steps</p>")
    for purpose, line in about.commands.items():
        if not (complete and purpose == "resume"):
            parts += [f"<h2>To {pages.text(purpose)}</h2>", pages.command(line)]
    parts += [
        "<h2>Hyper-parameters</h2>",
        pages.table(dict(sorted(about.hyper_parameters.items()))),
    ]
    return pages.page(name, parts)


def _best(about: About, validations: Rows) -> str:
    """The best validation by each metric that selects checkpoints, and the last one."""
    if not validations:
        return "<p>none yet</p>"
    named = {
        f"best {metric}": max(validations, key=operator.itemgetter(metric))
        for metric in about.chosen_by
    }
    named["last"] = validations[-1]
    lines = {}
    for name, row in named.items():
        lines[f"{name}, epoch {row['epoch']}"] = [
            two_decimals(row[metric]) for metric in about.titles
        ]
    return pages.matrix(list(about.titles.values()), lines)


def seeds_page(
    name: str, about: str, table: Mapping[str, Mapping[str, str]], addresses: Mapping[str, str]
) -> str:
    """The page of a run with several seeds.

    Args:
        table: of each seed, and of all together -> title of a metric -> how it is written.
        addresses: seed -> where its own page lies.
    """
    columns = list(next(iter(table.values())))
    links = []
    for seed, address in addresses.items():
        links.append(f'<li><a href="{pages.text(address)}">{pages.text(seed)}</a></li>')
    parts = [
        f"<p>{pages.text(about)}</p>",
        pages.matrix(columns, {row: list(cells.values()) for row, cells in table.items()}),
        "<h2>Their pages</h2>",
        f"<ul>{''.join(links)}</ul>",
    ]
    return pages.page(name, parts)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the pictures beside each other: columns of a CSV file over the epochs."""

    label: str
    rows: Rows
    titles: Mapping[str, str]  # column -> what it is called


def training_curves(rows: Mapping[str, Rows], titles: Mapping[str, str]) -> bytes:
    """A PNG of what a run recorded so far: loss, recalls, and the load of the experts.

    Args:
        rows: "train", "validation", "router" -> the rows of the CSV files, see `Run`.
        titles: metrics to draw -> what they are called.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = [
        Panel(label="loss", rows=rows["train"], titles={"train_epoch_loss": "training"}),
        Panel(label="recall, %", rows=rows.get("validation", []), titles=titles),
    ]
    if routed := rows.get("router"):
        shares = {name: name.split("_")[0] for name in routed[0] if name.endswith("_share")}
        panels.append(Panel(label="share of queries", rows=routed, titles=shares))
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw(axes, panel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, panel: Panel) -> None:
    epochs = [row["epoch"] for row in panel.rows]
    for name, title in panel.titles.items():
        axes.plot(epochs, [row[name] for row in panel.rows], label=title, marker=".")
    axes.set(xlabel="epoch", ylabel=panel.label)
    axes.grid(alpha=0.3)
    if len(panel.titles) > 1:
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7, ncols=3, frameon=False
        )
