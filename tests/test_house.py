"""The plan of the house: imports go down, one importer of clip, one place for benchmark names, short functions."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
FLOORS = [
    {"utils"},
    {"curves", "distributed", "files", "metrics", "pages", "rankings"},
    {"tensors"},
    {"annotations", "checkpoints", "clip_model", "combiner", "contrastive", "expert_report", "interruption", "regime"}
    | {"routing", "run_page", "snapshot", "splits", "tracker", "vectors"},
    {"data_utils", "exclusions", "experiment", "protocols"},
    {"benchmarks", "features", "image_cache", "image_check", "keeper", "photos", "sheets"},
    {"dataset_report", "image_index", "options", "pair", "records", "results", "retrieval", "startup", "submission"}
    | {"training", "training_data"},
    {"comparison", "evaluation", "searcher", "submit"},
    {"dialogue"},
    {"clip_fine_tune", "combiner_train", "validate", "cirr_test_submission", "fashioniq_test_submission", "compare"}
    | {"check_dataset", "check_submission", "visualize", "search", "demo_app", "shapes_dataset", "demo"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(room for room in SRC.rglob("*.py") if room.stem != "__init__")


def tree(room: Path) -> ast.Module:
    return ast.parse(room.read_text())


def imported(room: Path) -> set[str]:
    modules = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[-1] if (SRC / node.module.split(".")[0]).is_dir() else node.module)
            modules |= {alias.name for alias in node.names if (SRC / node.module / f"{alias.name}.py").exists()}
    return modules


def test_every_room_has_a_floor():
    assert {room.stem for room in ROOMS} == set(FLOOR_OF)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_imports_go_down(room):
    ours = imported(room) & set(FLOOR_OF)
    assert {name for name in ours if FLOOR_OF[name] >= FLOOR_OF[room.stem]} == set()


def test_only_clip_model_imports_clip():
    assert [room.stem for room in ROOMS if "clip" in imported(room)] == ["clip_model"]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_only_benchmarks_and_the_submission_know_a_benchmarks_name(room):
    """The drawing and the demo, which make both layouts, may name them too, but compare with neither."""
    names = {"fashioniq", "cirr", "fiq"}
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Compare):
            words = {
                c.value.lower() for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)
            }
            assert not words & names, f"{room.name}:{node.lineno}"
    allowed = {"benchmarks", "submission"}
    if room.stem not in allowed:
        used = {node.id for node in ast.walk(tree(room)) if isinstance(node, ast.Name)}
        assert not used & {"CIRR", "FashionIQ"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_functions_are_short_and_errors_are_not_swallowed(room):
    for node in ast.walk(tree(room)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, f"{room.name}:{node.name}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{room.name}:{node.lineno}"
            assert ast.unparse(node.type) != "Exception", f"{room.name}:{node.lineno}"


def test_no_room_bears_the_name_of_a_package():
    taken = {
        "clip",
        "datasets",
        "faiss",
        "gradio",
        "matplotlib",
        "evaluate",
        "types",
        "logging",
        "profile",
        "torch",
        "pandas",
        "numpy",
        "tqdm",
    }
    assert not taken & set(FLOOR_OF)


def test_the_readmes_tree_names_every_room():
    readme = (SRC.parent / "README.md").read_text()
    for room in ROOMS:
        assert f"{room.name} " in readme, f"{room.name} is missing in the README's file tree"
