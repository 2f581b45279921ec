"""Curves of a training run's records over its epochs: a PNG file, and interactive charts for the run's page."""

import functools
import importlib.util
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import pages

logger = logging.getLogger(__name__)

EpochRows = Sequence[dict[str, float]]  # rows of a run's CSV file, each with its epoch

CURVES_SCRIPT = Path(__file__).with_name("curves.js")
CHART_STYLE = """
:root { --curve: 42%; }
@media (prefers-color-scheme: dark) { :root { --curve: 66%; } }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 1.2rem; }
.curves { margin: 1.2rem 0; }
.chart { margin: 0; min-width: 0; max-width: 720px; }
.chart figcaption { display: flex; justify-content: space-between; color: var(--quiet); }
.chart svg { display: block; width: 100%; height: auto; cursor: crosshair; touch-action: pan-y; }
.chart text { fill: var(--quiet); font-size: 12px; }
.chart .rule { stroke: var(--line); } .chart .at { stroke: var(--quiet); stroke-dasharray: 2 3; }
.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; padding-left: 4%; }
.legend button { display: flex; align-items: center; gap: .35rem; font-size: 13px; padding: .2rem .55rem; }
.legend button { background: none; color: inherit; }
.legend button[aria-pressed=false] { opacity: .55; text-decoration: line-through; }
.legend i { width: 10px; height: 10px; border-radius: 50%; }
.legend output { font-variant-numeric: tabular-nums; min-width: 2.6em; text-align: right; }
"""
MOST_MARKED = 60  # largest number of epochs that are drawn with markers
# Size of a panel in inches.
WIDTH = 5.0
HEIGHT = 3.6
LEGEND_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: columns of a table as curves over the epochs."""

    label: str
    rows: EpochRows
    titles: Mapping[str, str]  # column -> its name in the legend
    digits: int = 2  # decimal places of displayed values


@functools.cache
def can_draw() -> bool:
    """Check whether matplotlib is installed; if not, log a warning once."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        logger.warning("no training_curves.png: matplotlib is not installed")
    return there


def panels_of(
    rows: Mapping[str, EpochRows], titles: Mapping[str, str], units: Mapping[str, str] | None = None
) -> list[Panel]:
    """Return the panels of a run so far: the loss, the metrics with one panel per unit, and the load of the experts.

    Args:
        rows: "train", "validation", "router" -> the rows of the CSV file, see `Run`.
        titles: metric to draw -> its name in the legend.
        units: metric -> its unit, if this is not %.
    """
    loss = {"train_epoch_loss": "training"}
    panels = [Panel(label="loss", rows=rows["train"], titles=loss, digits=4)]
    by_unit: dict[str, dict[str, str]] = {}
    for metric, title in titles.items():
        by_unit.setdefault((units or {}).get(metric, "%"), {})[metric] = title
    for unit, of_unit in by_unit.items():
        label = "recall, %" if unit == "%" else unit
        if validated := rows.get("validation"):
            panels.append(Panel(label=label, rows=validated, titles=of_unit))
    if routed := rows.get("router"):
        panels.append(Panel(label="share of queries", rows=routed, titles=experts_of(routed[0])))
    return panels


def experts_of(routed: Mapping[str, float]) -> dict[str, str]:
    """Map each column with an expert's share of the queries, in a row of the router's table, to the expert's name."""
    return {name: name.split("_")[0] for name in routed if name.endswith("_share")}


def charts(panels: Sequence[Panel]) -> str:
    """Return the HTML elements in which `charts_script` draws panels, side by side if the screen is wide enough."""
    figures = []
    for panel in panels:
        label = pages.text(panel.label)
        figures.append(
            f'<figure class="chart"><figcaption>{label} <b></b></figcaption>'
            f'<svg tabindex="0" role="img" aria-label="{label} by epoch"></svg><div class="legend"></div></figure>'
        )
    without = "<noscript>The curves need JavaScript; training_curves.png has them too.</noscript>"
    return f'<div class="curves">{"".join(figures)}</div>{without}'


def charts_script(panels: Sequence[Panel]) -> str:
    """Return JavaScript that contains the values of panels and draws them."""
    content = []
    for panel in panels:
        series = {}
        for name, title in panel.titles.items():
            series[title] = [_finite(row.get(name)) for row in panel.rows]
        epochs = [row["epoch"] for row in panel.rows]
        content.append({"digits": panel.digits, "epochs": epochs, "series": series})
    values = json.dumps(content).replace("<", "\\u003c")
    return f"const panels = {values};\n{CURVES_SCRIPT.read_text(encoding='utf-8')}"


def _finite(value: float | None) -> float | None:
    """Return a finite value unchanged, and None for any other, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None


def training_curves(panels: Sequence[Panel]) -> bytes:
    """Draw panels side by side, and return the PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(WIDTH * len(panels), HEIGHT))
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        # The margins are computed here, because matplotlib's layout engines would take longer than all the drawing.
        lines = max(len(panel.titles) for panel in panels) / LEGEND_COLUMNS
        legend = 0.2 * math.ceil(lines)  # inches
        figure.subplots_adjust(
            left=0.6 / WIDTH / len(panels),
            right=1 - 0.15 / WIDTH / len(panels),
            bottom=0.5 / HEIGHT,
            top=1 - (0.1 + legend) / HEIGHT,
            wspace=0.2,
        )
        for axes, panel in zip(places, panels, strict=True):
            _draw(axes, panel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, panel: Panel) -> None:
    epochs = [row["epoch"] for row in panel.rows]
    marker = "." if len(epochs) <= MOST_MARKED else ""
    for name, title in panel.titles.items():
        axes.plot(epochs, [row[name] for row in panel.rows], label=title, marker=marker)
    axes.set(xlabel="epoch", ylabel=panel.label)
    axes.grid(alpha=0.3)
    if len(panel.titles) > 1:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            fontsize=7,
            ncols=LEGEND_COLUMNS,
            frameon=False,
        )
