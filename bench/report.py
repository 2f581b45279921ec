"""Build rows of results, and format them as Markdown."""

import platform
from collections.abc import Iterator

import torch

from models.encoder import versions
from timing import GIB, Row, Setting

HEAD = "| figure | ours | twin | ratio | must reach | |\n|---|---|---|---|---|---|"


def held(what: str, measured: float, most: float, note: str = "") -> Row:
    """Return the row of a check, which passes if the measured value is at most a limit; NaN fails."""
    return {
        "figure": what,
        "measured": measured,
        "passed": measured <= most,
        "must": f"at most {most:.3g}",
        "note": f"{measured:.3g}; {note}" if note else f"{measured:.3g}",
    }


def line(row: Row) -> str:
    """Return a row of the table, in Markdown."""
    cells = [
        row["figure"],
        f"{row['ours']:.4g} s" if "ours" in row else "",
        f"{row['twin']:.4g} s" if "twin" in row else "",
    ]
    ratio = f"{row['twin'] / row['ours']:.1f} x" if "twin" in row else ""
    if "ours / twin" in row:
        ratio = f"{row['ours / twin']:.2f} of it"
    return "| " + " | ".join([*cells, ratio, row.get("must", ""), row.get("note", "")]) + " |"


def machine(setting: Setting) -> Iterator[Row]:
    """Yield a description of the machine; this is a case like the others, since asking a GPU for its name uses it."""
    name = platform.processor() or platform.machine()
    if setting.on_gpu:
        about = torch.cuda.get_device_properties(setting.device)
        name = f"{about.name}, {about.total_memory / GIB:.0f} GiB"
    yield {
        "device": name,
        "threads": torch.get_num_threads(),
        "forks may use a GPU": not torch.cuda._is_in_bad_fork(),
        "python": platform.python_version(),
        **versions(),
    }
