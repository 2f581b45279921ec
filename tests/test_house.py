"""The plan of the house: imports go down, one importer of clip, one place for benchmark names, short functions."""

import ast
import graphlib
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
FILES = sorted(SRC.rglob("*.py"))
FLOORS = [
    {"utils"},
    {"runtime"},
    {"data_utils", "combiner"},
    {"benchmarks", "reports"},
    {"models"},
    {"training", "evaluation", "image_search"},
    {"cli"},
    {file.stem for file in SRC.glob("*.py")} - {"utils", "data_utils", "combiner"},  # the scripts
]
FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}


def name(file: Path) -> str:
    """A file as it is imported: `benchmarks.splits`, `benchmarks` for its __init__."""
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {name(file) for file in FILES}


def imported(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; of ours, the file that a name comes from."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            rooms = {f"{node.module}.{alias.name}" for alias in node.names} & OURS
            modules |= rooms or {node.module}
    return modules


def wing(module: str) -> str:
    """The folder of a file, or the file that lies in src/ itself."""
    return module.split(".")[0]


def test_every_file_has_a_floor():
    assert {wing(module) for module in OURS} == set(FLOOR_OF)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_down(file):
    own = wing(name(file))
    others = {wing(module) for module in imported(file) & OURS} - {own}
    assert {other for other in others if FLOOR_OF[other] >= FLOOR_OF[own]} == set()


def test_imports_make_no_circle_inside_a_wing():
    graphlib.TopologicalSorter({name(file): imported(file) & OURS for file in FILES}).prepare()


def test_only_clip_model_imports_clip():
    assert [file.stem for file in FILES if "clip" in imported(file)] == ["clip_model"]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_only_the_benchmarks_know_a_benchmarks_name(file):
    """The drawing and the demo, which make both layouts, may name them too, but compare with neither."""
    if file.parent.name == "benchmarks":
        return
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
            assert not {word.lower() for word in words} & {"fashioniq", "cirr", "fiq"}, f"{file.name}:{node.lineno}"
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"CIRR", "FashionIQ"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_functions_are_short_and_errors_are_not_swallowed(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{file.name}:{node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{file.name}:{node.lineno}"
            assert ast.unparse(node.type) != "Exception", f"{file.name}:{node.lineno}"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LITERALS = (ast.Dict, ast.Set, ast.DictComp, ast.SetComp)


def is_nested(node: ast.AST) -> bool:
    """A comprehension with two loops, or with another one inside."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS) and child is not node]
    return len(node.generators) > 1 or bool(inner)


def is_merge(node: ast.AST) -> bool:
    """A dict or set that is written down to be merged by |."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return isinstance(node.left, LITERALS) or isinstance(node.right, LITERALS)
    return isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr) and isinstance(node.value, LITERALS)


def test_lines_hold_one_idea():
    """No denser than the field's models: see "How a line reads" in CONTRIBUTING.md."""
    lines, nested, merged = [], [], []
    for file in FILES:
        text = file.read_text()
        lines += text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if is_nested(node):
                nested.append(f"{name(file)}:{node.lineno}")
            if is_merge(node):
                merged.append(f"{name(file)}:{node.lineno}")
    assert len(merged) <= len(lines) / 1000, merged
    assert len(nested) <= 2 * len(lines) / 1000, nested
    assert sum(len(line) > 100 for line in lines) <= 0.05 * len(lines)


def test_no_wing_bears_the_name_of_a_package():
    taken = {
        "clip", "comet_ml", "datasets", "evaluate", "faiss", "gradio", "hypothesis", "logging", "matplotlib", "numpy",
        "open_clip", "pandas", "pip", "profile", "pymilvus", "pytest", "torch", "torchvision", "tqdm",
        "transformers", "types",
    }  # fmt: skip
    assert not taken & {module.split(".")[0] for module in OURS}


def test_the_readmes_tree_names_every_script_and_wing():
    readme = (SRC.parent / "README.md").read_text()
    for entry in SRC.iterdir():
        if entry.name != "__pycache__":
            shown = f"{entry.name}/ " if entry.is_dir() else f"{entry.name} "
            assert shown in readme, f"{entry.name} is missing in the README's file tree"
