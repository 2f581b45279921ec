"""What a newcomer runs: the notebook, the Python of the guide, and the published numbers that results stand next to."""

import json
import re
import shutil
import subprocess

import pytest

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
PYTHON_GUIDE = ROOT / "docs" / "python.md"
REPRODUCE = ROOT / "docs" / "reproduce.md"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_stored_without_outputs():
    for cell in cells():
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.long
def test_the_notebooks_cells_run_in_order(tmp_path, monkeypatch):
    """As the kernel of a notebook would run them, with its one variable for small sizes set."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OUT", str(tmp_path))
    codes = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    assert codes[0].startswith("SMALL = False")
    codes[0] = codes[0].replace("SMALL = False", "SMALL = True")
    variables: dict = {}
    for code in codes:
        exec(compile(code, NOTEBOOK.name, "exec"), variables)
    assert (tmp_path / "photos_index" / "index.json").exists()


def test_the_python_of_the_guide_runs_as_it_stands(
    drawn, stage_1, stage_2, index, tmp_path, monkeypatch, capsys
):
    """All of its blocks in order, in a folder with weights, photos, a dataset and an index of the names it uses."""
    folder = tmp_path / "project"
    (folder / "models_final").mkdir(parents=True)
    short = ["--save-best", "--num-epochs", 1]
    clip = stage_1("CIRR", *short)
    tuned = clip / "saved_models" / "tuned_clip_arithmetic.pt"
    combiner = stage_2("CIRR", *short, "--clip-model-path", tuned)
    shutil.copy(tuned, folder / "models_final" / "clip.pt")
    shutil.copy(
        combiner / "saved_models" / "combiner_arithmetic.pt",
        folder / "models_final" / "combiner.pt",
    )
    shutil.copytree(drawn / "cirr_dataset" / "dev", folder / "photos")
    (folder / "data").symlink_to(drawn)
    monkeypatch.chdir(folder)
    index("photos", output="photos_index", flags=["--clip-model-path", tuned])
    blocks = re.findall(r"```python\n(.*?)```", PYTHON_GUIDE.read_text(), re.DOTALL)
    assert len(blocks[0].strip().splitlines()) <= 11  # ten, and an empty one
    variables: dict = {}
    for block in blocks:
        exec(compile(block, PYTHON_GUIDE.name, "exec"), variables)
    photos, found = variables["photos"], variables["found"]
    ten_lines = variables["ranking"]
    assert sorted(ten_lines[0].tolist()) == list(range(len(photos)))
    similarity = variables["query"] @ variables["gallery"].T
    best = [str(photos[place].resolve()) for place in similarity[0].topk(3).indices]
    assert [str(image.path) for image in found.results] == best
    assert 0 <= variables["metrics"]["recall_at5"] <= 100


@pytest.mark.parametrize("dataset", ["CIRR", "FashionIQ"])
def test_the_guides_published_numbers_are_those_of_the_table(dataset):
    published = json.loads((ROOT / "reproduce" / "published.json").read_text())[dataset]
    section = REPRODUCE.read_text().split(f"\n### {dataset}: ")[1].split("\n#")[0]
    rows = re.findall(r"^\| ([a-z].*?) \| ([\d.].*) \|$", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(published["results"])
    for name, numbers in rows:
        values = [float(number) for number in re.split(r" \| |/", numbers)]
        assert values == list(published["results"][name].values()), name


@pytest.mark.parametrize("script", ["cirr", "fashioniq"])
def test_the_scripts_flags_exist(script):
    """What `make reproduce-smoke` runs for real, read by bash, and the flags of its real sizes parsed."""
    file = ROOT / "reproduce" / f"{script}.sh"
    subprocess.run(["bash", "-n", file], check=True)
    import clip_fine_tune
    import combiner_train

    text = (ROOT / "reproduce" / "common.sh").read_text().split("\nelse\n")[1]
    batch = re.search(r"batch_2=(\d+)", file.read_text())[1]
    dataset = re.search(r"^dataset=(\w+)", file.read_text(), re.MULTILINE)[1]
    for name, module in (("stage_1", clip_fine_tune), ("stage_2", combiner_train)):
        words = re.search(rf"{name}=\((.*?)\)", text)[1].replace('"$batch_2"', batch).split()
        module.parse(["--dataset", dataset, "--clip-model-name", "RN50x4", *words])
