"""A benchmark of one file (see fourth_benchmark.py): every script that takes a --dataset runs on it."""

import csv
import json
import shutil

import pytest

import check_dataset
import check_submission
import compare
import export
import plan
import visualize
from benchmarks import BENCHMARKS
from conftest import ROOT, read_csv
from demo import best_weights
from evaluation.result_file import read_result
from fourth_benchmark import Fourth

pytestmark = pytest.mark.slow


@pytest.fixture
def root(drawn, tmp_path, monkeypatch):
    """Its data: the drawn queries of CIRCO, to train on and to validate on."""
    monkeypatch.setitem(BENCHMARKS, "Fourth", Fourth)
    circo = drawn / "circo_dataset"
    folder = tmp_path / "root" / "fourth_dataset"
    shutil.copytree(circo / "COCO2017_unlabeled/unlabeled2017", folder / "images")
    names = sorted(file.stem for file in (folder / "images").iterdir())
    (folder / "gallery.txt").write_text("\n".join(names))
    entries = json.loads((circo / "annotations/val.json").read_text())
    for split in ("train", "val"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["reference", "caption", "targets"])
            for entry in entries:
                targets = " ".join(f"{image:012d}" for image in entry["gt_img_ids"])
                rows.writerow(
                    [f"{entry['reference_img_id']:012d}", entry["relative_caption"], targets]
                )
    return folder.parent


def test_every_script_runs_on_a_benchmark_of_one_file(
    root, stage_1, stage_2, run, tmp_path, capsys
):
    short = ["--save-best", "--num-epochs", 1]
    clip = stage_1("Fourth", *short, "--no-image-cache", data_root=root)
    tuned = best_weights(clip, Fourth.best_clips())
    combiner = stage_2("Fourth", *short, "--clip-model-path", tuned, data_root=root)
    trained = best_weights(combiner, Fourth.best_combiners())
    triplets = Fourth(root).train().triplets
    assert len(triplets) == sum(len(triplet.targets) for triplet in Fourth(root).val()[0].triplets)
    assert set(Fourth.titles) < set(read_csv(combiner / "validation_metrics.csv"))
    weights = ["--clip-model-path", tuned, "--combiner-path", trained]
    flags = ["--dataset", "Fourth", "--combining-function", "combiner", *weights]
    files = [tmp_path / "result.json", tmp_path / "rankings.json"]
    run("validate", root, *flags, "--metrics-json", files[0], "--rankings", files[1])
    result = read_result(files[0])
    assert list(result["protocols"]) == ["original-kept", "original-removed"]
    for words in ([files[0]], [files[0], files[0]]):
        compare.main([*map(str, words), "--resamples", "50"])
    capsys.readouterr()
    where = ["--data-root", str(root)]
    check_submission.main([str(files[1]), "--split", "val", *where])
    assert f"map_at10 = {result['metrics']['map_at10']}" in capsys.readouterr().out
    sheets = tmp_path / "sheets"
    visualize.main(["--rankings", str(files[1]), "--output-dir", str(sheets), *where])
    assert "targets at ranks" in (sheets / "sheet.html").read_text()
    export.main(
        [*map(str, weights), "--results", str(files[0]), "--output", str(tmp_path / "pair")]
    )
    assert "| mAP@10 |" in (tmp_path / "pair/README.md").read_text()
    check_dataset.main(["--dataset", "Fourth", "--num-workers", "0", *where])


def test_what_it_lacks_is_said(root, capsys):
    for script, words in (
        (plan, ["stage1", "--gpu", "t4"]),
        (check_dataset, ["--splits", "test", "--data-root", str(root)]),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main([*words, "--dataset", "Fourth"])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere,is red,{first}", "line 10: the image nowhere is not in"),
        ("{first},is red,{first}", "line 10: its target is also its reference: correct it"),
        ("{first},is red,{second} {second}", "line 10: a target is listed twice: correct it"),
    ],
)
def test_a_line_that_is_no_good_is_named(line, message, root, fails, drawn):
    first, second = (root / "fourth_dataset/gallery.txt").read_text().split()[:2]
    with (root / "fourth_dataset/val.csv").open("a") as file:
        file.write(line.format(first=first, second=second) + "\n")
    pair = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--combining-function", "sum"]
    assert message in fails("validate", root, "--dataset", "Fourth", *pair)


def test_it_is_one_file_of_sixty_lines_at_most():
    """What a new benchmark has to say; one that needs more shows that the base class lacks a default."""
    assert len((ROOT / "tests" / "fourth_benchmark.py").read_text().splitlines()) <= 60
