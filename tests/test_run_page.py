"""The pictures of a run: drawn at validations, self-contained, with commands that work as they stand."""

import html
import io
import json
import os
import re
import shlex
import statistics
from pathlib import Path

import pytest
from PIL import Image

import clip_fine_tune
import combiner_train
import validate
from conftest import ROOT
from models.configuration import Settings
from reports import curves, run_page
from reports.run_page import About, RunPage
from training.run_folder import reproducing, run_title

TITLES = {
    "stage_1": "<h1>CIRR: tiny_clip_vit fine-tuned, both encoders</h1>",
    "stage_2": "<h1>CIRR: MoE Combiner on tiny_clip_vit, seed 0</h1>",
}
pytestmark = pytest.mark.draws
ROWS = {"train": [{"epoch": 0, "train_epoch_loss": 1.5}]}


def commands(page: str) -> dict[str, str]:
    """Purpose -> the command that a page gives for it."""
    found = re.findall(
        r'<h2>To (.*?)</h2>\s*<div class="command"><pre>(.*?)</pre>', page, re.DOTALL
    )
    return {purpose: html.unescape(line) for purpose, line in found}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "best"), [("stage_1", []), ("stage_2", ["--save-best"])])
def test_a_run_has_its_curves_and_its_page(stage, best, request, tmp_path, drawn):
    folder = request.getfixturevalue(stage)("CIRR", *best)
    with Image.open(folder / "training_curves.png") as curves:
        assert curves.width > 900
    page = (folder / "index.html").read_text()
    assert "2 of 2 epochs, complete" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # self-contained
    assert page.count('<figure class="chart">') == (3 if stage == "stage_2" else 2)
    for fact in ("began", "took", "host", "commit", "most memory"):
        assert re.search(f"<dt>{fact}</dt><dd>[^<]+</dd>", page), fact
    assert re.search(r"<h1>CIRR: .*</h1>", page)[0] == TITLES[stage]
    assert f"<code>{folder}</code>" in page
    assert "learning_rate" in page or "combiner_lr" in page
    best_of = json.loads((folder / "best_metrics.json").read_text())["arithmetic_mean"]
    assert f"best arithmetic mean, epoch {best_of['epoch']}" in page
    found = commands(page)
    assert set(found) == {"validate", "reproduce"}  # nothing to resume
    script = {"stage_1": "clip_fine_tune", "stage_2": "combiner_train"}[stage]
    here = shlex.quote(str(Path.cwd()))
    assert found["reproduce"].startswith(f"cd {here} && python {ROOT}/src/{script}.py --")
    script, *words = shlex.split(found["validate"])[1:]
    assert script == f"{ROOT}/src/validate.py"
    paths = [word for word in words if "/" in word]
    assert paths and all(Path(path).is_absolute() for path in paths)
    words += ["--num-workers", "0", "--device", "cpu", "--metrics-json", str(tmp_path / "m.json")]
    validate.main(words)
    shown = json.loads((tmp_path / "m.json").read_text())["metrics"]["recall_at10"]
    assert f"{shown:.2f}" in page


def test_without_weights_there_is_nothing_to_validate(run, drawn):
    flags = "--num-epochs 1 --batch-size 12 --projection-dim 16 --hidden-dim 24 --no-feature-cache"
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    (folder,) = run("combiner_train", drawn, "--dataset", "CIRR", *name, *flags.split()).iterdir()
    assert set(commands((folder / "index.html").read_text())) == {"reproduce"}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[7], [0, 3]])
def test_a_run_of_several_seeds_has_a_page_that_leads_to_theirs(seeds, stage_2):
    folder = stage_2("CIRR", "--seeds", *seeds, "--num-epochs", 1)
    page = (folder / "index.html").read_text()
    links = re.findall(r'<a href="([^"]*)">(.*?)</a>', page)
    assert links == [(f"seed_{seed}/index.html", f"seed {seed}") for seed in seeds]
    for address, _ in links:
        of_seed = (folder / address).read_text()
        assert "1 of 1 epochs, complete" in of_seed
        assert '<a href="../index.html">' in of_seed
    summary = json.loads((folder / "best_metrics.json").read_text())
    assert "best arithmetic mean of each seed" in page  # as the axis says it
    assert re.search("<figcaption>arithmetic mean ", page)
    for metrics in summary["seeds"].values():
        assert f">{metrics['recall_at1']:.2f}<" in page
    recalls = [best["recall_at1"] for best in summary["seeds"].values()]
    if len(seeds) > 1:
        told = f"{statistics.fmean(recalls):.2f} ± {statistics.stdev(recalls):.2f}"
        assert f">{told}<" in page
    assert ("mean ± standard deviation" in page) == (len(seeds) > 1)
    named = {1: "seed 7", 2: "seeds 0, 3"}[len(seeds)]
    assert f"<h1>CIRR: MoE Combiner on tiny_clip_vit, {named}</h1>" in page
    assert set(commands(page)) == {"reproduce"}
    assert not re.search(r"src=\"(?!data:)", page)


def about(**changes) -> About:
    return About(
        title="a run",
        titles={"r": "R@1"},
        chosen_by=("r",),
        hyper_parameters={"num_epochs": 3, **changes},
        commands={"resume": "python src/x.py --resume 'a b'"},
    )


def test_a_run_that_is_not_complete_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_page, "FIRST_COST", 0.0)  # its first drawing is due at once
    page = RunPage(tmp_path, about(note="<script>alert(1)</script>"))
    page.refresh(ROWS | {"validation": [{"epoch": 0, "r": 12.5}]}, {}, complete=False)
    text = (tmp_path / "index.html").read_text()
    assert commands(text) == {"resume": "python src/x.py --resume 'a b'"}
    assert "1 of 3 epochs, not complete" in text
    assert "<script>alert" not in text


def test_drawing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """Guards against epochs of half a second that are followed by a second of drawing."""
    clock, drawn = [0.0], []
    monkeypatch.setattr(run_page.time, "monotonic", lambda: clock[0])

    def draw(panels):
        drawn.append(clock[0])
        clock[0] += 1.0
        return b""

    monkeypatch.setattr(run_page, "training_curves", draw)
    page = RunPage(tmp_path, about())
    for _ in range(200):
        clock[0] += 0.5
        page.refresh(ROWS, {}, complete=False)
    assert drawn[0] >= run_page.FIRST_COST / run_page.DRAWING_SHARE  # a short run is drawn once
    assert 2 <= len(drawn) <= 4
    page.refresh(ROWS, {}, complete=True)
    assert drawn[-1] == clock[0] - 1.0  # always at the end


@pytest.mark.parametrize("router", [False, True])
def test_curves_of_every_kind(router):
    rows = ROWS | {"validation": [{"epoch": 0, "r": 12.5}]}
    if router:
        rows["router"] = [{"epoch": 0, "expert0_share": 1.0, "load_entropy": 0.0}]
    panels = curves.panels_of(rows, {"r": "R@1"})
    with Image.open(io.BytesIO(curves.training_curves(panels))) as picture:
        assert picture.width == (1650 if router else 1100)


@pytest.mark.parametrize(
    ("shares", "weight", "said"),
    [
        ([0.9, 0.1, 1.0, 0.0], 0.0, "expert3 of 4 experts .* train with --load-balancing-weight"),
        ([1.0, 0.005, 1.0, 0.0], 0.5, "expert1 and expert3 of 4 .*-weight, now 0.5"),
        ([0.5, 0.5, 0.5, 0.5], 0.0, None),
    ],
)
def test_idle_experts_are_remarked_with_the_flag_that_helps(
    shares, weight, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_page, "can_draw", lambda: False)
    earlier = {f"expert{number}_share": 0.5 for number in range(4)}
    last = {f"expert{number}_share": share for number, share in enumerate(shares)}
    rows = ROWS | {"router": [{"epoch": 0, **earlier}, {"epoch": 1, **last}]}
    RunPage(tmp_path, about(load_balancing_weight=weight)).refresh(rows, {}, complete=True)
    remark = re.search('<p class="remark">(.*?)</p>', (tmp_path / "index.html").read_text())
    assert (remark is None) if said is None else re.search(said, remark[1])


def test_a_run_is_reproduced_from_where_it_was_started():
    flags = {
        "command": "python src/combiner_train.py --dataset CIRR",
        "script": "combiner_train.py",
        "started_in": "/a b",
    }
    assert reproducing(flags) == f"cd '/a b' && python {ROOT}/src/combiner_train.py --dataset CIRR"


def test_a_folder_without_a_name_that_files_can_hold_is_not_said(tmp_path, monkeypatch):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    odd.mkdir()
    for folder, said in ((tmp_path, str(tmp_path)), (odd, None)):
        monkeypatch.chdir(folder)
        assert combiner_train.parse(["--dataset", "CIRR"]).started_in == said
    odd.rmdir()
    assert combiner_train.parse(["--dataset", "CIRR"]).started_in is None
    flags = {"command": "python src/x.py", "script": "x.py", "started_in": None}
    assert reproducing(flags) == flags["command"]


@pytest.mark.parametrize(
    ("script", "words", "title"),
    [
        (combiner_train, "", "CIRR: MoE Combiner on RN50x4, seed 0"),
        (clip_fine_tune, "", "CIRR: RN50x4 fine-tuned, both encoders"),
        (clip_fine_tune, "--encoder text", "CIRR: RN50x4 fine-tuned, text encoder"),
        (
            combiner_train,
            "--combiner-type clip4cir --clip-model-path a --seeds 1 4",
            "CIRR: CLIP4Cir's Combiner on fine-tuned RN50x4, seeds 1, 4",
        ),
    ],
)
def test_titles_say_dataset_and_method(script, words, title):
    flags = vars(script.parse(["--dataset", "CIRR", *words.split()]))
    settings = Settings(
        flags=flags, preprocessing={"clip_model_name": "RN50x4"}, data={}, versions={}
    )
    assert run_title("CIRR", settings) == title
