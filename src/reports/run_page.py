"""The page of a run: what it is, how far it came, and how to go on with it."""

import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports import pages
from reports.curves import EpochRows, Panel, can_draw, drawing, panels_of, training_curves
from runtime.files import write_bytes, write_text
from utils import format_metric

DRAWING_SHARE = 0.05  # of the time, which drawing may take
FIRST_COST = 2.0  # seconds, for it loads matplotlib

CURVES_STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 1rem; }
.curves img { width: 100%; }
"""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a page says of its run beside its records.

    Attributes:
        title: dataset and method.
        titles: metrics to show -> what they are called.
        units: metrics -> what they are measured in; those that are not named, in %.
        chosen_by: the metrics that select checkpoints.
        hyper_parameters: of the run.
        commands: what for -> a command: to resume, to validate, to reproduce.
    """

    title: str
    titles: Mapping[str, str]
    chosen_by: tuple[str, ...]
    hyper_parameters: Mapping[str, Any]
    commands: Mapping[str, str]
    units: Mapping[str, str] = field(default_factory=dict)


class RunPage:
    """Draws a run's curves and page, at validations as long as that takes a small share of the time, and at the end.

    Where matplotlib is not installed, the page has no curves.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.about = about
        self.drawn_at = time.monotonic()
        self.cost = FIRST_COST  # seconds that the last drawing took

    def refresh(self, rows: Mapping[str, EpochRows], *, complete: bool) -> None:
        """Draw, if it is due.

        Args:
            rows: see `Run`.
            complete: the training is over.
        """
        start = time.monotonic()
        if not complete and (start - self.drawn_at) * DRAWING_SHARE < self.cost:
            return
        panels = panels_of(rows, self.about.titles, self.about.units) if can_draw() else []
        page = run_page(self.folder, self.about, rows, panels=panels, complete=complete)
        if panels:
            write_bytes(self.folder / "training_curves.png", training_curves(panels))
        write_text(self.folder / "index.html", page)
        self.drawn_at = time.monotonic()
        self.cost = self.drawn_at - start


def run_page(
    folder: Path,
    about: About,
    rows: Mapping[str, EpochRows],
    *,
    panels: Sequence[Panel],
    complete: bool,
) -> str:
    """The page of a run."""
    wanted = about.hyper_parameters["num_epochs"]
    trained = rows["train"]
    state = "complete" if complete else "not complete"
    loss = trained[-1]["train_epoch_loss"]
    parts = [
        _place(folder),
        f"<p>{len(trained)} of {wanted} epochs, {state}; last loss {loss:.4f}</p>",
    ]
    if scaling := rows.get("loss_scaling"):
        skipped = sum(row["skipped_steps"] for row in scaling)
        parts.append(f"<p>loss scale {scaling[-1]['loss_scale']:g}, {skipped} skipped steps</p>")
    parts += [_curves(panels), "<h2>Best validations</h2>"]
    parts.append(_best(about, rows.get("validation", [])))
    for purpose, line in about.commands.items():
        if not (complete and purpose == "resume"):
            parts += [f"<h2>To {pages.text(purpose)}</h2>", pages.command(line)]
    parts += [
        "<h2>Hyper-parameters</h2>",
        pages.table(dict(sorted(about.hyper_parameters.items()))),
    ]
    return pages.page(about.title, parts, style=CURVES_STYLE, script=pages.COPYING)


def _place(folder: Path) -> str:
    """Where a run lies."""
    return f"<p><code>{pages.text(folder.absolute())}</code></p>"


def _curves(panels: Sequence[Panel]) -> str:
    """The drawings of some panels, beside each other where the screen is wide enough."""
    images = []
    for panel in panels:
        images.append(f'<img src="{drawing(panel)}" alt="{pages.text(panel.label)} by epoch">')
    return f'<div class="curves">{"".join(images)}</div>'


def _best(about: About, validations: EpochRows) -> str:
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
            format_metric(row[metric]) for metric in about.titles
        ]
    return pages.matrix(list(about.titles.values()), lines)


def seeds_page(
    about: About,
    folder: Path,
    best: Mapping[str, Sequence[str]],
    *,
    validations: Panel,
    addresses: Mapping[str, str],
) -> str:
    """The page of a run with several seeds, which leads to those of each.

    Args:
        about: of all of them together.
        best: each seed, and all together -> the best validation, as it is written.
        validations: the metric that chose it, of each seed over the epochs.
        addresses: each seed -> where its own page lies.
    """
    links = []
    for seed, address in addresses.items():
        links.append(f'<li><a href="{pages.text(address)}">{pages.text(seed)}</a></li>')
    parts = [
        _place(folder),
        f"<p>The validation with the best {pages.text(about.chosen_by[0])} of each seed:</p>",
        pages.matrix(list(about.titles.values()), best),
        _curves([validations] if can_draw() else []),
        "<h2>Their pages</h2>",
        f"<ul>{''.join(links)}</ul>",
    ]
    reproduce = pages.command(about.commands["reproduce"])
    parts += ["<h2>To reproduce</h2>", reproduce]
    return pages.page(about.title, parts, style=CURVES_STYLE, script=pages.COPYING)
