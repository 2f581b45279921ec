"""List the nine layers of src/, and read the imports between its files and packages from the code."""

import ast
import functools
from collections import Counter
from pathlib import Path

SRC = Path(__file__).resolve().parents[2] / "src"
FILES = sorted(SRC.rglob("*.py"))
SHARED = {"utils", "data_utils", "combiner"}  # files of src/ itself that are not scripts
SCRIPTS = {file.stem for file in SRC.glob("*.py")} - SHARED
# From the lowest layer up. A package imports only packages of lower layers.
LAYERS = [
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
LAYER_OF = {
    box: layer for layer, boxes in enumerate(LAYERS) for box in (boxes - SCRIPTS or {"scripts"})
}


def name(file: Path) -> str:
    """Return a file's module name: `benchmarks.splits`, or `benchmarks` for its `__init__.py`."""
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {name(file) for file in FILES}


@functools.cache
def tree(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imported(file: Path) -> set[str]:
    """Return all modules that a file imports, also inside functions; for ours, the modules that define the names."""
    modules = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            rooms = {f"{node.module}.{alias.name}" for alias in node.names} & OURS
            modules |= rooms or {node.module}
    return modules


def package(module: str) -> str:
    """Return the package of a module, or the module itself if it is not in a package."""
    return module.split(".")[0]


def box_of(module: str) -> str:
    """Return the package of a module; all scripts count as one."""
    return "scripts" if package(module) in SCRIPTS else package(module)


def imports() -> Counter[tuple[str, str]]:
    """Return (importing package, imported package) -> number of imports between their files."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in FILES:
        counts.update((box_of(name(file)), box_of(module)) for module in imported(file) & OURS)
    return Counter({pair: count for pair, count in counts.items() if pair[0] != pair[1]})


def direct(counts: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the imports that are not implied by a longer path, which are the arrows of the picture."""
    below: dict[str, set[str]] = {}
    for box in sorted(LAYER_OF, key=LAYER_OF.__getitem__):
        below[box] = {lower for upper, lower in counts if upper == box}
        below[box] |= {lowest for lower in below[box] for lowest in below[lower]}
    return sorted(p for p in counts if not any(p[1] in below[box] for box in below[p[0]]))
