"""The curves of a run: what it recorded over its epochs, as a picture file, and as drawings for its page."""

import functools
import importlib.util
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports import pages

logger = logging.getLogger(__name__)

EpochRows = Sequence[dict[str, float]]  # of a run's CSV file

INK = "#0a0b0c"  # stands in a drawing for the colour of its text and axes
# A drawing's own style: as a picture of a page, it is not reached by the page's.
INK_STYLE = (
    "<style>svg{color:#1b1f23}@media (prefers-color-scheme:dark){svg{color:#d5dae0}}</style>"
)
MOST_MARKED = 60  # epochs, up to which each has a mark
# Of a panel, in inches.
WIDTH = 5.0
HEIGHT = 3.6
LEGEND_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the pictures: columns of a table over the epochs."""

    label: str
    rows: EpochRows
    titles: Mapping[str, str]  # column -> what it is called


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is installed; if not, this is said once."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        logger.warning("no training_curves.png: matplotlib is not installed")
    return there


def panels_of(
    rows: Mapping[str, EpochRows], titles: Mapping[str, str], units: Mapping[str, str] | None = None
) -> list[Panel]:
    """What is drawn of a run so far: loss, metrics of each unit, and the load of the experts.

    Args:
        rows: "train", "validation", "router" -> the rows of the CSV files, see `Run`.
        titles: metrics to draw -> what they are called.
        units: what they are measured in, where that is not %.
    """
    panels = [Panel(label="loss", rows=rows["train"], titles={"train_epoch_loss": "training"})]
    by_unit: dict[str, dict[str, str]] = {}
    for metric, title in titles.items():
        by_unit.setdefault((units or {}).get(metric, "%"), {})[metric] = title
    for unit, of_unit in by_unit.items():
        label = "recall, %" if unit == "%" else unit
        panels.append(Panel(label=label, rows=rows.get("validation", []), titles=of_unit))
    if routed := rows.get("router"):
        shares = {name: name.split("_")[0] for name in routed[0] if name.endswith("_share")}
        panels.append(Panel(label="share of queries", rows=routed, titles=shares))
    return panels


def training_curves(panels: Sequence[Panel]) -> bytes:
    """A PNG of panels beside each other."""
    return _drawn(panels, format="png", dpi=110, metadata={"Software": None})


def drawing(panel: Panel) -> str:
    """A panel as an SVG, as the URL of a picture: its text is dark on a light screen, and light on a dark one."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "svg.fonttype": "none",  # text as text
            "svg.hashsalt": "curves",  # the same drawing is the same file
        }
    ):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        content = _drawn([panel], format="svg", transparent=True, metadata=nothing).decode()
    begin = content.index(">", content.index("<svg")) + 1
    coloured = content[:begin] + INK_STYLE + content[begin:].replace(INK, "currentColor")
    return pages.data_url(coloured.encode(), "image/svg+xml")


def _drawn(panels: Sequence[Panel], **file: Any) -> bytes:
    """Panels beside each other, as a file of the kind that matplotlib is told."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(WIDTH * len(panels), HEIGHT))
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        # A layout of matplotlib's own takes longer than all else.
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
        figure.savefig(buffer, **file)
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
