"""Two processes through the real command line against one: the same losses, weights, galleries and files."""

import json
from pathlib import Path

import pytest
import torch

from conftest import DOORS, ROOT, STAGE_2, read_csv
from forks import Script, torchrun
from test_backbones import models_made  # noqa: F401

pytestmark = pytest.mark.slow

HARD = ["--loss", "symmetric", "--label-smoothing", "0.1", "--mask-duplicate-targets"]
STAGE_1 = "--num-epochs 2 --learning-rate 1e-4 --batch-size 12 --save-training --encoder both"


@pytest.fixture
def launch(start):
    """Run a script to its end under torchrun, in two processes of one CPU thread each."""

    def launch(script: str, *flags: object, fresh: bool = False) -> Script:
        process = start(*torchrun(2), f"src/{script}.py", *flags, fresh=fresh)
        process.wait()
        return process

    return launch


@pytest.fixture
def train(launch):
    """Train in this process or in two others; returns the run folder."""

    def train(processes: int, script: str, output: Path, *flags: object) -> Path:
        argv = [*flags, "--output-dir", output, "--device", "cpu", "--num-workers", 0]
        if processes == 1:
            DOORS[script](list(map(str, argv)))
        else:
            done = launch(script, *argv)
            assert done.returncode == 0, done.stderr
        (run,) = output.iterdir()
        return run

    return train


def assert_same_run(one: Path, two: Path, key: str) -> None:
    """The same files, the same losses and metrics, the same final weights up to the order of additions."""
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*"))
    assert files == sorted(str(file.relative_to(two)) for file in two.rglob("*"))
    losses = read_csv(one / "train_metrics.csv")["train_epoch_loss"]
    assert read_csv(two / "train_metrics.csv")["train_epoch_loss"] == pytest.approx(
        losses, rel=1e-5
    )
    scales = [read_csv(run / "train_metrics.csv").get("logit_scale") for run in (one, two)]
    assert scales[0] == scales[1] or scales[1] == pytest.approx(scales[0], rel=1e-6)
    assert read_csv(one / "validation_metrics.csv") == read_csv(two / "validation_metrics.csv")
    last = sorted((one / "saved_models").iterdir())[-1]
    ours, theirs = (torch.load(run / "saved_models" / last.name)[key] for run in (one, two))
    for name, weight in ours.items():
        seen = without_key_bias(name, weight.shape)
        torch.testing.assert_close(theirs[name][seen], weight[seen], rtol=1e-5, atol=1e-5, msg=name)


def without_key_bias(name: str, shape: torch.Size) -> torch.Tensor:
    """Everything but the keys' bias of an attention, the middle third of its input bias.

    A softmax over keys does not see what is added to all of them, so that gradient is exactly zero but for rounding,
    and Adam makes steps of full length out of rounding, on one process as on two.
    """
    seen = torch.ones(shape, dtype=torch.bool)
    if name.endswith("in_proj_bias"):
        seen[len(seen) // 3 : 2 * len(seen) // 3] = False
    return seen


@pytest.mark.parametrize("micro", [[], ["--micro-batch-size", 2]], ids=["plain", "micro-batches"])
def test_stage_1(micro, golden, train, tmp_path):
    name = ["--clip-model-name", golden / "clip_vit.pt", "--data-root", golden]
    flags = ["--dataset", "CIRR", *name, *STAGE_1.split(), "--learn-temperature"]
    flags += ["--drop-text", 0.3, "--drop-image", 0.2, "--flip", 0.5, "--crop", 0.5]
    flags += [*HARD, "--hard-negatives", 2] if micro else []
    one = train(1, "clip_fine_tune", tmp_path / "one", *flags)
    two = train(
        2, "clip_fine_tune", tmp_path / "two", *flags, *micro, "--image-cache", tmp_path / "images"
    )
    assert_same_run(one, two, "CLIP")


@pytest.mark.parametrize("form", ["custom", pytest.param("timm", marks=pytest.mark.long)])
def test_a_model_of_open_clip(form, models_made, golden, train, tmp_path):  # noqa: F811
    """Stage 1; of one form, stage 2 with what it tuned, too."""
    name = ["--clip-model-name", f"local-dir:{models_made / form}"]
    flags = ["--dataset", "CIRR", "--data-root", golden, *name]
    one = train(1, "clip_fine_tune", tmp_path / "one", *flags, *STAGE_1.split())
    two = train(2, "clip_fine_tune", tmp_path / "two", *flags, *STAGE_1.split())
    assert_same_run(one, two, "CLIP")
    if form == "timm":
        tuned = sorted((one / "saved_models").iterdir())[-1]
        flags += ["--clip-model-path", tuned, "--no-feature-cache", *STAGE_2.split()]
        one = train(1, "combiner_train", tmp_path / "stage_2_one", *flags)
        two = train(2, "combiner_train", tmp_path / "stage_2_two", *flags)
        assert_same_run(one, two, "Combiner")


def test_stage_2_with_dropout_and_experts(golden, train, tmp_path):
    name = [
        "--clip-model-name",
        golden / "clip_vit.pt",
        "--clip-model-path",
        golden / "tuned_clip_vit.pt",
    ]
    flags = ["--dataset", "FashionIQ", *name, "--data-root", golden, *STAGE_2.split()]
    flags += ["--drop-text", 0.3, "--feature-noise", 0.2, "--mix", 0.4]
    one = train(
        1, "combiner_train", tmp_path / "one", *flags, "--feature-cache", tmp_path / "cache1"
    )
    two = train(
        2, "combiner_train", tmp_path / "two", *flags, "--feature-cache", tmp_path / "cache2"
    )
    assert_same_run(one, two, "Combiner")
    ours, theirs = sorted((tmp_path / "cache1").iterdir()), sorted((tmp_path / "cache2").iterdir())
    assert [file.name for file in ours] == [file.name for file in theirs]
    for one_file, two_file in zip(
        ours, theirs, strict=True
    ):  # encoded galleries, identical and in order
        features = torch.load(one_file)["features"]
        torch.testing.assert_close(torch.load(two_file)["features"], features, rtol=1e-6, atol=1e-6)
    again = train(
        2, "combiner_train", tmp_path / "again", *flags, "--feature-cache", tmp_path / "cache1"
    )
    assert_same_run(one, again, "Combiner")


def test_stage_2_with_a_bank_and_all_parts_of_a_mixture(golden, train, tmp_path):
    flags = ["--dataset", "CIRR", "--clip-model-name", golden / "clip_vit.pt", "--shared-expert"]
    flags += ["--router-norm", "--router-noise", 0.5, "--router-bias", 0.1, "--ema-decay", 0.5]
    flags += ["--data-root", golden, *STAGE_2.split(), "--negatives", "bank", "--learn-temperature"]
    flags += HARD  # the bank's duplicates are masked in the other direction
    flags += ["--feature-cache", tmp_path / "cache"]
    one = train(1, "combiner_train", tmp_path / "one", *flags)
    two = train(2, "combiner_train", tmp_path / "two", *flags)
    assert_same_run(one, two, "Combiner")


@pytest.fixture
def pair(golden) -> list:
    """A CLIP and a mixture of experts, and where and how they are measured."""
    tuned, combiner = golden / "tuned_clip_vit.pt", golden / "combiner_moe_cirr.pt"
    words = ["--clip-model-name", golden / "clip_vit.pt", "--clip-model-path", tuned]
    words += ["--combining-function", "combiner", "--combiner-path", combiner]
    return [*words, "--data-root", golden, "--device", "cpu", "--num-workers", 0]


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.long)])
def test_validation(fresh, pair, expected, launch, tmp_path):
    """In processes that have all loaded, and as a shell starts torchrun."""
    words = ["--dataset", "CIRR", *pair, "--metrics-json", tmp_path / "metrics.json"]
    done = launch("validate", *words, fresh=fresh)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recall_at50 = ") == 1  # one process prints
    wanted = next(
        e
        for e in expected["validate"]
        if e["args"][1] == "CIRR" and "combiner_moe_cirr.pt" in e["args"]
    )["metrics"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)


def test_submission(golden, pair, launch, tmp_path):
    words = ["--submission-name", "moe", *pair, "--similarity-block", 7, "--output-dir", tmp_path]
    done = launch("cirr_test_submission", *words)
    assert done.returncode == 0, done.stderr
    for name in ("recall_submission_moe.json", "recall_subset_submission_moe.json"):
        assert (tmp_path / name).read_text() == (golden / name).read_text()


def test_bad_input_is_said_once_by_each_process(golden, launch):
    name = ["--clip-model-name", golden / "clip_vit.pt", "--data-root", golden, "--device", "cpu"]
    done = launch("clip_fine_tune", "--dataset", "CIRR", *name, "--batch-size", 13)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "clip_fine_tune.py: error:" in line]
    assert 1 <= len(lines) <= 2  # torchrun may end the second before it speaks
    assert all(
        "--batch-size 13 cannot be divided evenly among 2 processes" in line for line in lines
    )
    assert "exitcode  : 2" in done.stderr


def test_a_process_that_dies_ends_all(golden, start, tmp_path):
    """One of two is killed in the middle; the other is ended too, with a message, instead of waiting for ever."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "src")!r})
import clip_fine_tune
from training.step import Stepper
real = Stepper.step
def step(self, *batch):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *batch)
Stepper.step = step
clip_fine_tune.main(sys.argv[1:])
"""
    killer = tmp_path / "killer.py"
    killer.write_text(code)
    name = ["--clip-model-name", golden / "clip_vit.pt", "--data-root", golden, "--device", "cpu"]
    words = [*torchrun(2), killer, "--dataset", "CIRR", *name, *STAGE_1.split()]
    words += ["--num-workers", 0, "--output-dir", tmp_path / "runs"]
    done = start(*words)
    assert done.wait() != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
