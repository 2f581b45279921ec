"""The nine floors of src/, and the imports between its files and folders, read from the code."""

import ast
from collections import Counter
from pathlib import Path

SRC = Path(__file__).resolve().parents[2] / "src"
FILES = sorted(SRC.rglob("*.py"))
SHARED = {"utils", "data_utils", "combiner"}  # files of src/ itself that are no scripts
SCRIPTS = {file.stem for file in SRC.glob("*.py")} - SHARED
# From the lowest up: a wing imports wings of lower floors alone.
FLOORS = [
    {"utils"},
    {"runtime"},
    {"data_utils", "combiner"},
    {"benchmarks", "reports"},
    {"settings"},
    {"models"},
    {"training", "evaluation", "image_search"},
    {"cli", "openmoji"},
    SCRIPTS,
]
FLOOR_OF = {
    box: floor for floor, wings in enumerate(FLOORS) for box in (wings - SCRIPTS or {"scripts"})
}


def name(file: Path) -> str:
    """A file as it is imported: `benchmarks.splits`, `benchmarks` for its __init__."""
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {name(file) for file in FILES}


def imported(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; of ours, the file that a name comes from."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            rooms = {f"{node.module}.{alias.name}" for alias in node.names} & OURS
            modules |= rooms or {node.module}
    return modules


def wing(module: str) -> str:
    """The folder of a file, or the file that lies in src/ itself."""
    return module.split(".")[0]


def box_of(module: str) -> str:
    """The wing of a module; all scripts count as one."""
    return "scripts" if wing(module) in SCRIPTS else wing(module)


def imports() -> Counter[tuple[str, str]]:
    """(importing wing, imported wing) -> how many imports of a file by a file."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in FILES:
        counts.update((box_of(name(file)), box_of(module)) for module in imported(file) & OURS)
    return Counter({pair: count for pair, count in counts.items() if pair[0] != pair[1]})


def direct(counts: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that no longer way down implies; these are the arrows."""
    below: dict[str, set[str]] = {}
    for box in sorted(FLOOR_OF, key=FLOOR_OF.__getitem__):
        below[box] = {lower for upper, lower in counts if upper == box}
        below[box] |= {lowest for lower in below[box] for lowest in below[lower]}
    return sorted(p for p in counts if not any(p[1] in below[box] for box in below[p[0]]))
