"""Curves of a training: loss, recalls, and the load of the experts, as a PNG."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]


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
