"""The page of a training run: its settings, progress and results, and the commands to resume or reproduce it."""

import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports import pages
from reports.curves import (
    CHART_STYLE,
    EpochRows,
    Panel,
    can_draw,
    charts,
    charts_script,
    experts_of,
    panels_of,
    training_curves,
)
from runtime.files import write_bytes, write_text
from utils import format_metric

DRAWING_SHARE = 0.05  # largest fraction of the run time that is spent on drawing
FIRST_COST = 2.0  # estimated seconds of the first drawing, which loads matplotlib

COLLAPSE_REMEDY = "train with --load-balancing-weight 0.1"
IDLE = 0.01  # fraction of the queries below which an expert counts as idle
RUN_STYLE = f"""{CHART_STYLE}
.facts {{ display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .8rem 0; }}
.facts dt {{ color: var(--quiet); font-size: 13px; }} .facts dd {{ margin: 0; overflow-wrap: anywhere; }}
.remark {{ border-left: 4px solid #e08214; background: var(--soft); padding: .5rem .8rem; }}
"""


@dataclass(frozen=True, kw_only=True)
class About:
    """Description of a run for its page, apart from the records of its epochs.

    Attributes:
        title: dataset and method.
        titles: metric to show -> its name.
        units: metric -> its unit, if this is not %.
        chosen_by: metrics that select checkpoints.
        hyper_parameters: hyper-parameters of the run.
        made_by: environment of the run, such as host and commit.
        overview: URL of the page of all seeds; "" for a run with a single seed.
        commands: purpose ("resume", "validate", "reproduce") -> command.
    """

    title: str
    titles: Mapping[str, str]
    chosen_by: tuple[str, ...]
    hyper_parameters: Mapping[str, Any]
    commands: Mapping[str, str]
    units: Mapping[str, str] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)
    overview: str = ""

    def called(self, metric: str) -> str:
        """Return the name of a metric in tables and plots."""
        return self.titles.get(metric, metric.replace("_", " "))


class RunPage:
    """Write the page and curves of a run at its end, and after a validation if drawing takes little of the run time.

    Without matplotlib, no image file of the curves is written.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.about = about
        self.drawn_at = time.monotonic()
        self.cost = FIRST_COST  # seconds of the last drawing

    def refresh(
        self, rows: Mapping[str, EpochRows], spent: Mapping[str, str], *, complete: bool
    ) -> None:
        """Write page and curves if the run is complete, or if the last drawing is long enough ago.

        Args:
            rows: records of the run, see `Run`.
            spent: start time, duration and memory of the run, by name.
            complete: whether the training run is complete.
        """
        start = time.monotonic()
        if not complete and (start - self.drawn_at) * DRAWING_SHARE < self.cost:
            return
        panels = panels_of(rows, self.about.titles, self.about.units)
        facts = {**spent, **self.about.made_by}
        page = run_page(
            self.folder, self.about, rows, facts=facts, panels=panels, complete=complete
        )
        if can_draw():
            write_bytes(self.folder / "training_curves.png", training_curves(panels))
        write_text(self.folder / "index.html", page)
        self.drawn_at = time.monotonic()
        self.cost = self.drawn_at - start


def run_page(
    folder: Path,
    about: About,
    rows: Mapping[str, EpochRows],
    *,
    facts: Mapping[str, str],
    panels: Sequence[Panel],
    complete: bool,
) -> str:
    """Return the page of a run as HTML.

    Args:
        facts: name -> value, shown at the top of the page.
    """
    wanted = about.hyper_parameters["num_epochs"]
    trained = rows["train"]
    state = "complete" if complete else "not complete"
    loss = trained[-1]["train_epoch_loss"]
    parts = [
        _head(folder, facts),
        f"<p>{len(trained)} of {wanted} epochs, {state}; last loss {loss:.4f}</p>",
    ]
    if scaling := rows.get("loss_scaling"):
        skipped = sum(row["skipped_steps"] for row in scaling)
        parts.append(f"<p>loss scale {scaling[-1]['loss_scale']:g}, {skipped} skipped steps</p>")
    if about.overview:
        link = f'<a href="{pages.text(about.overview)}">all seeds together</a>'
        parts.append(
            f"<p>One of several seeds; results of all seeds, once they are complete: {link}</p>"
        )
    parts += [_idle_experts(about, rows), charts(panels), "<h2>Best validations</h2>"]
    parts.append(_best(about, rows.get("validation", [])))
    for purpose, line in about.commands.items():
        if not (complete and purpose == "resume"):
            parts += [f"<h2>To {pages.text(purpose)}</h2>", pages.command(line)]
    parts += [
        "<h2>Hyper-parameters</h2>",
        pages.table(dict(sorted(about.hyper_parameters.items()))),
    ]
    return _page(about, parts, panels)


def _page(about: About, parts: Sequence[str], panels: Sequence[Panel]) -> str:
    """Return a page of these parts, with the scripts of the copy buttons and of the charts."""
    script = pages.COPYING + charts_script(panels)
    return pages.page(about.title, parts, style=RUN_STYLE, script=script)


def _head(folder: Path, facts: Mapping[str, str]) -> str:
    """Return HTML with the folder of a run, and with facts about it by name."""
    told = []
    for name, fact in facts.items():
        told.append(f"<div><dt>{pages.text(name)}</dt><dd>{pages.text(fact)}</dd></div>")
    place = f"<p><code>{pages.text(folder.absolute())}</code></p>"
    return f'{place}<dl class="facts">{"".join(told)}</dl>'


def _idle_experts(about: About, rows: Mapping[str, EpochRows]) -> str:
    """Return HTML that advises how to keep the experts of a mixture busy; "" if no expert is idle."""
    last = rows["router"][-1] if rows.get("router") else {}
    experts = experts_of(last)
    idle = [expert for name, expert in experts.items() if last[name] < IDLE]
    if not idle:
        return ""
    weight = about.hyper_parameters.get("load_balancing_weight", 0)
    remedy = f"raise --load-balancing-weight, now {weight:g}" if weight else COLLAPSE_REMEDY
    return (
        f'<p class="remark">The router has collapsed: {" and ".join(idle)} of {len(experts)} experts received less '
        f"than {IDLE:.0%} of the queries in the last epoch. To balance the load, {remedy}.</p>"
    )


def _best(about: About, validations: EpochRows) -> str:
    """Return HTML of the best validation by each metric that selects checkpoints, and of the last validation."""
    if not validations:
        return "<p>none yet</p>"
    named = {
        f"best {about.called(metric)}": max(validations, key=operator.itemgetter(metric))
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
    """Return the page of a run with several seeds, with links to the pages of the seeds.

    Args:
        about: description of the whole run.
        best: each seed, and the summary of all seeds -> formatted metrics of the best validation.
        validations: the metric that selects the best validation, over the epochs, with one curve per seed.
        addresses: seed -> URL of its page.
    """
    links = []
    for seed, address in addresses.items():
        links.append(f'<li><a href="{pages.text(address)}">{pages.text(seed)}</a></li>')
    parts = [
        _head(folder, about.made_by),
        f"<p>The validation with the best {pages.text(about.called(about.chosen_by[0]))} of each seed:</p>",
        pages.matrix(list(about.titles.values()), best),
        charts([validations]),
        "<h2>Pages of the seeds</h2>",
        f"<ul>{''.join(links)}</ul>",
        "<h2>To reproduce</h2>",
        pages.command(about.commands["reproduce"]),
    ]
    return _page(about, parts, [validations])
