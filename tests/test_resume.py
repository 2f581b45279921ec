"""Runs that survive: killed at any point, told to stop, on a full disk, contradicted."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import clip_fine_tune
import combiner_train
import kills
from conftest import CASES, ROOT, SOAK, STAGE_1, STAGE_2, read_csv
from forks import HANG, Script, family, forked, state_of, torchrun, warm_up
from models.encoder import Encoder
from runtime.tensors import load_tensors, save_tensors
from trainers import checkpoints_in, run_in, stage_1_flags
from training.run_folder import make_folder
from training.saving import Progress, load_state, save_state
from training.schedule import Precision
from training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", range(4) if SOAK else [3])
def test_killed_at_any_point_a_run_ends_like_one_that_never_was(number, drawn, tmp_path):
    """Three kills of stage 2; `make soak` does a hundred of each stage, on two layouts."""
    name, door, argv = kills.scenarios(drawn, long=SOAK)[number]
    warm_up()
    start = time.monotonic()
    kills.run_to_the_end(
        door, [*argv, "--output-dir", str(tmp_path / "whole")], tmp_path / "whole.log"
    )
    longest = time.monotonic() - start
    whole = kills.the_run(tmp_path / "whole")
    most, syncs = (25, 60) if SOAK else (3, 20)
    tally = kills.survive(door, argv, whole, tmp_path, most, longest, syncs, seed=number)
    found = {
        "kills": tally.kills,
        "trainings": tally.rounds,
        "files read after kills": tally.files_read,
    }
    found |= {"unreadable files": len(tally.unreadable), "differences": len(tally.differences)}
    CASES.update({(f"killed, {name}", outcome): count for outcome, count in found.items()})
    assert (tally.unreadable, tally.differences) == ([], []), name
    assert tally.files_read > 0


def test_a_signal_before_training_begins(stage_2, monkeypatch, tmp_path, capsys):
    real = Encoder._image_features

    def interrupted(encoder, pixels):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(encoder, pixels)

    monkeypatch.setattr(Encoder, "_image_features", interrupted)
    with pytest.raises(SystemExit) as stop:
        stage_2("CIRR")
    assert stop.value.code == 0
    assert (
        "stopped by SIGTERM; nothing was trained yet: run the same command again"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "combiner").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def resume():
    """Resume a stage-2 run in process."""
    return lambda folder, *flags: combiner_train.main(["--resume", str(folder), *map(str, flags)])


@pytest.fixture
def stopped(stage_2, monkeypatch, tmp_path):
    """A run, of stage 2 unless told, that was told to stop at its n-th look, of which each step has one."""

    def stopped(look: int, *flags: object, output="stopped", train=stage_2, **kwargs) -> Path:
        real, left = Trainer.save_if_due, [look]

        def stopping(trainer, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                trainer.autosave.stop.requested = "SIGTERM"
            return real(trainer, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(Trainer, "save_if_due", stopping)
            train(*flags, output=output, **kwargs)
        assert stop.value.code == 0
        (run,) = (tmp_path / output).iterdir()
        return run

    return stopped


@pytest.fixture
def copied(stage_2, monkeypatch, tmp_path):
    """A whole run of stage 2, and copies of what a stop would leave at some looks, of which each step has one."""

    def copied(looks: list[int], *flags: object) -> tuple[Path, list[Path]]:
        real, number, copies = Trainer.save_if_due, [0], []

        def copying(trainer, **kwargs):
            real(trainer, **kwargs)
            number[0] += 1
            if number[0] in looks:
                trainer.save()
                copies.append(shutil.copytree(trainer.run.folder, tmp_path / f"look_{number[0]}"))

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save_if_due", copying)
            whole = stage_2(*flags, output="whole")
        assert len(copies) == len(looks)
        return whole, copies

    return copied


@pytest.mark.parametrize("kind", ["moe", "clip4cir"])
def test_every_step_can_be_gone_on_from(kind, copied, resume):
    """Within an epoch, at its last step with the validation still to come, and after it."""
    looks = [1, 2, 3, 4, 5] if SOAK else {"moe": [1, 3, 4], "clip4cir": [2]}[kind]
    flags = ["CIRR", "--combiner-type", kind, "--clip-grad-norm", 1, "--precision", "bf16"]
    whole, runs = copied(looks, *flags)
    for look, run in zip(looks, runs, strict=True):
        progress = load_tensors(run / "state.pt")["progress"]
        places = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
        assert (progress["epoch"], len(progress["losses"])) == places[look - 1]
        resume(run)
        assert kills.differences(whole, run) == [], look


def test_a_mixture_with_parts_goes_on_with_its_bias_and_noise(stage_2, stopped, resume):
    flags = ["CIRR", "--shared-expert", "--router-norm", "--router-bias", 0.1, "--router-noise", 1]
    flags += ["--load-balancing-weight", 0.1, "--ema-decay", 0.5]
    whole, run = stage_2(*flags, output="whole"), stopped(2, *flags)
    assert load_tensors(run / "state.pt")["parts"]["module"]["moe_layer.router_bias"].any()
    resume(run)
    assert kills.differences(whole, run) == []


def test_loss_scaling_goes_on_where_it_was(copied, resume, monkeypatch):
    """The scale falls over the first steps and grows after every second one that succeeds."""
    monkeypatch.setattr(
        Precision,
        "scaler",
        lambda precision: torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2),
    )
    flags = ["CIRR", "--precision", "fp16", "--batch-size", 4, "--cosine", "--ema-decay", 0.9]
    whole, runs = copied([3, 7], *flags)
    assert sum(read_csv(whole / "loss_scaling_metrics.csv")["skipped_steps"]) >= 1
    for run in runs:
        assert load_tensors(run / "state.pt")["progress"]["skipped"]
        resume(run)
        assert kills.differences(whole, run) == []


REGULARISED = ["--recipe", "modern", "--drop-text", 0.3, "--drop-image", 0.2, "--noise", 0.3]
REGULARISED_STAGES = {
    "stage_1": (clip_fine_tune, ["--flip", 0.5, "--crop", 0.5, "--micro-batch-size", 4]),
    "stage_2": (combiner_train, ["--feature-noise", 0.2, "--mix", 0.4, "--negatives", "batch"]),
}


@pytest.mark.parametrize("stage", REGULARISED_STAGES)
def test_what_a_training_learns_in_spite_of_goes_on_where_it_was(stage, request, stopped):
    script, own = REGULARISED_STAGES[stage]
    flags = ["CIRR", *REGULARISED, *own, "--num-epochs", 1]
    train = request.getfixturevalue(stage)
    whole, run = train(*flags, output="whole"), stopped(2, *flags, train=train)
    script.main(["--resume", str(run)])
    assert kills.differences(whole, run) == []


def test_epochs_that_are_saved_or_validated_at_the_end_are_gone_on_from(copied, resume):
    """Before and after weights that no validation saves, and before the last validation."""
    flags = ["CIRR", "--num-epochs", 4, "--validation-frequency", 2, "--validate-last"]
    whole, runs = copied([5, 8, 11], *flags, "--save-best", "--save-every", 2)
    assert read_csv(whole / "validation_metrics.csv")["epoch"] == [0, 2, 3]
    for run in runs:
        resume(run)
        assert kills.differences(whole, run) == []


def test_a_stop_in_the_validation_resumes_with_the_validation(
    stage_1, monkeypatch, resume, tmp_path
):
    """The epoch's row is not lost, and not there twice; a long validation needs not be waited for."""
    flags = ["CIRR", "--num-epochs", 1]
    whole = stage_1(*flags, output="whole")
    real, left = Encoder._image_features, [1]

    def interrupted(encoder, pixels):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(encoder, pixels)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Encoder, "_image_features", interrupted)
        stage_1(*flags, output="stopped")
    assert stop.value.code == 0
    (run,) = (tmp_path / "stopped").iterdir()
    progress = load_tensors(run / "state.pt")["progress"]
    assert (progress["epoch"], len(progress["losses"])) == (0, 3)
    assert not (run / "validation_metrics.csv").exists()
    clip_fine_tune.main(["--resume", str(run)])
    assert kills.differences(whole, run) == []


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_a_run_of_several_seeds_goes_on_with_the_seed_it_was_at(stage, request, stopped, capsys):
    train = request.getfixturevalue(stage)
    flags = ["CIRR", "--seeds", 4, 5, "--num-epochs", 1]
    whole, run = train(*flags, output="whole"), stopped(6, *flags, train=train)
    assert (run / "seed_4" / "best_metrics.json").exists()
    assert (run / "seed_5" / "state.pt").exists()
    assert f"--resume {run}\n" in capsys.readouterr().err  # the folder of all seeds
    {"stage_1": clip_fine_tune, "stage_2": combiner_train}[stage].main(["--resume", str(run)])
    assert kills.differences(whole, run) == []


def test_a_complete_run_has_nothing_to_do(stage_2, stopped, resume, caplog):
    """Unless it has a state: it was killed in its last moment, or what is written down is another run's."""
    caplog.set_level("INFO")
    whole = stage_2("CIRR", output="whole")
    assert not (whole / "state.pt").exists()
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    resume(whole)
    assert f"{whole} is complete" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before
    run = stopped(3, "CIRR")
    shutil.copy(whole / "best_metrics.json", run)
    resume(run)
    assert kills.differences(whole, run) == []
    assert not (run / "state.pt").exists()


def test_weights_newer_than_the_state_stay_the_best(tmp_path):
    """A GPU may not give them again to the last bit."""
    model = torch.nn.Linear(2, 2)
    flags = stage_1_flags("--save-training", "--save-best")
    kept = checkpoints_in(tmp_path, flags, {"recall": "best"})
    kept.update(0, {"recall": 1.0}, model)
    kept.update(1, {"recall": 3.0}, model)
    kept.write()
    resumed = checkpoints_in(tmp_path, flags, {"recall": "best"})
    resumed.rewind({"recall": 1.0})
    resumed.update(1, {"recall": 2.9}, model)
    resumed.write()
    assert load_tensors(tmp_path / "saved_models" / "best.pt")["metrics"] == {"recall": 3.0}
    resumed.update(2, {"recall": 3.1}, model)
    resumed.write()
    assert load_tensors(tmp_path / "saved_models" / "best.pt")["epoch"] == 2


def test_weights_that_lie_elsewhere_now(stage_1, stopped, refuses, resume, tmp_path):
    """They are known by what is in them."""
    first = stage_1("CIRR", "--num-epochs", 1, output="first")
    tuned = (first / "saved_models" / "tuned_clip_0.pt").rename(tmp_path / "tuned.pt")
    run = stopped(2, "CIRR", "--clip-model-path", tuned)
    moved = tuned.rename(tmp_path / "moved.pt")
    assert "no checkpoint at" in refuses(run)
    other = load_tensors(moved)
    other["CLIP"]["logit_scale"] += 1
    save_tensors(tmp_path / "other.pt", other)
    assert "the CLIP weights have changed since the run was started" in refuses(
        run, "--clip-model-path", tmp_path / "other.pt"
    )
    resume(run, "--clip-model-path", moved)
    config = load_tensors(next((run / "saved_models").glob("*.pt")))["config"]
    assert config["flags"]["clip_model_path"] == str(moved)


def test_a_state_from_a_cpu_has_no_scalers(tmp_path):
    """A run that began on a CPU goes on where losses are scaled."""
    linear = torch.nn.Linear(2, 2)
    cpu = torch.device("cpu")
    progress = Progress(epoch=1)
    save_state(tmp_path / "state.pt", {"module": linear}, progress, cpu)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parts = {"module": torch.nn.Linear(2, 2), "scaler": scaler}
    with torch.random.fork_rng():
        assert load_state(tmp_path / "state.pt", parts, cpu) == progress
    assert torch.equal(parts["module"].weight, linear.weight)
    assert scaler.get_scale() == 4
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 7})
    save_state(tmp_path / "state.pt", parts, progress, cpu)
    other = torch.amp.GradScaler("cpu")
    with torch.random.fork_rng():
        load_state(tmp_path / "state.pt", parts | {"scaler": other}, cpu)
    assert other.state_dict() == scaler.state_dict()


def test_a_worker_ends_when_its_parent_is_gone(tmp_path, start):
    code = """
import os, signal, time
from runtime import interruption
interruption.LOOK_EVERY = 0.02
if os.fork() == 0:
    real = signal.sigtimedwait
    def sigtimedwait(*wanted):
        taken = real(*wanted)
        if taken:
            print("taken", flush=True)
        return taken
    signal.sigtimedwait = sigtimedwait
    interruption.heed_parent_alone()
    print(os.getpid(), flush=True)
time.sleep(10_000)
"""
    (tmp_path / "parent.py").write_text(code)
    parent = start(tmp_path / "parent.py")
    parent.wait_for(lambda: parent.stdout.endswith("\n"))
    worker = int(parent.stdout)
    os.kill(worker, signal.SIGTERM)  # not from its parent
    parent.wait_for(lambda: "taken" in parent.stdout)
    time.sleep(0.1)  # it looks again
    assert state_of(worker) != "Z"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until_gone([worker])


def wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + HANG
    while any(state_of(process) != "Z" for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.02)


# What is refused


@pytest.fixture
def refuses(resume, capsys):
    """A resumption that must be refused: exit code 2 and one line, which is returned."""

    def refuses(folder: Path, *flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            resume(folder, *flags)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, lines
        assert sum(": error: " in line for line in lines) == 1
        return lines[-1]

    return refuses


def test_flags_that_contradict_the_run(stopped, refuses, resume, drawn):
    run = stopped(2, "CIRR", "--seed", 3)
    state = (run / "state.pt").read_bytes()
    for flags, names in (
        (["--combiner-lr", "0.5"], ["--combiner-lr is 0.5", "started with 0.001"]),
        (["--seed", "4"], ["--seed is 4", "started with 3"]),
        (["--seeds", "3"], ["--seeds is [3]", "started with None"]),
        (["--dataset", "FashionIQ"], ["started with"]),
        (["--transform", "clip"], ["--transform is clip", "started with targetpad"]),
        (["--clip-model-name", drawn / "tiny_clip_resnet.pt"], ["started with"]),
    ):
        error = refuses(run, *flags)
        assert all(name in error for name in names), error
    assert (run / "state.pt").read_bytes() == state
    resume(
        run, "--num-workers", 1, "--combiner-lr", "0.001", "--dataset", "cirr"
    )  # no contradictions


def test_annotations_that_changed(stopped, own_drawn, refuses):
    run = stopped(2, "CIRR", data_root=own_drawn)
    file = own_drawn / "cirr_dataset/cirr/captions/cap.rc2.train.json"
    content = json.loads(file.read_text())
    content[0]["caption"] += " now"
    file.write_text(json.dumps(content))
    assert "the annotations have changed since the run was started" in refuses(run)


def test_a_run_of_an_earlier_version_lacks_later_flags(stopped, resume, refuses):
    """They have their defaults; another value would contradict how the run began."""
    run = stopped(3, "CIRR")
    file = run / "training_hyperparameters.json"
    content = json.loads(file.read_text())
    del content["flags"]["cosine"]
    file.write_text(json.dumps(content))
    assert "the run was started without --cosine: remove --cosine" in refuses(run, "--cosine")
    resume(run)
    assert (run / "best_metrics.json").exists()


def test_a_run_of_an_earlier_version_reads_own_photos_as_it_began(stopped, resume, refuses):
    """Which was as the original does, without a word of it on the disk."""
    run = stopped(2, "Triplets", "--background", "original")
    file = run / "training_hyperparameters.json"
    content = json.loads(file.read_text())
    del content["flags"]["background"], content["recipe"]["background"]
    file.write_text(json.dumps(content))
    told = "--background is white, but the run was started with original"
    assert told in refuses(run, "--background", "white")
    resume(run)
    assert (run / "best_metrics.json").exists()


def test_folders_that_are_no_runs(refuses, stage_1, tmp_path, drawn):
    assert "not a run folder" in refuses(tmp_path / "nowhere")
    assert "not a run folder" in refuses(drawn)
    (tmp_path / "damaged").mkdir()
    file = tmp_path / "damaged" / "training_hyperparameters.json"
    for text in ("{", "[1]", "{}", '{"dataset": "COCO"}', '{"dataset": "CIRR", "num_epochs": 1.5}'):
        file.write_text(text)
        assert "annotation" not in refuses(tmp_path / "damaged")
    assert "clip_fine_tune.py" in refuses(stage_1("CIRR", "--num-epochs", 1))


def test_a_damaged_state(stopped, refuses):
    run = stopped(2, "CIRR")
    whole = (run / "state.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    save_tensors(run / "other.pt", {"Combiner": {}})
    for content in (whole[:-50], flipped, (run / "other.pt").read_bytes()):
        (run / "state.pt").write_bytes(content)
        error = refuses(run)
        assert "state.pt cannot be resumed from" in error
        assert "delete it" in error


def test_two_processes_cannot_train_in_one_folder(stopped, refuses, resume):
    run = stopped(2, "CIRR")
    with run_in(run).locked():
        assert "another process is training in this folder" in refuses(run)
    resume(run)


def test_resuming_drops_what_was_half_made_and_nothing_else(stopped, resume, tmp_path):
    """Files and folders, of weights and of seeds, and no link's target."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".precious.tmp").touch()
    run = stopped(2, "CIRR", "--seeds", 4, 5, "--num-epochs", 1)
    (run / ".seed_5.123.tmp").mkdir()
    (run / ".seed_5.123.tmp" / "training_hyperparameters.json").write_text("{}")
    folders = (run, run / "seed_4", run / "seed_4" / "saved_models")
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / ".file.1.tmp").write_bytes(b"half")
        (folder / ".folder.clip4cir-0.tmp").mkdir()
        (folder / ".folder.clip4cir-0.tmp" / ".nested.1.tmp").touch()
        (folder / ".folder.clip4cir-0.tmp" / "link").symlink_to(outside)
        (folder / ".link.1.tmp").symlink_to(outside)
        (folder / "link").symlink_to(outside)
        (folder / "notes.tmp").touch()
    resume(run)
    assert [path.name for path in run.rglob(".*")] == []
    assert (outside / ".precious.tmp").exists()
    for folder in folders:
        assert (folder / "link").is_symlink()
        assert (folder / "notes.tmp").exists()
    assert sorted(folder.name for folder in run.glob("*seed_?")) == ["seed_4", "seed_5"]
    for seed in ("seed_4", "seed_5"):
        assert (run / seed / "best_metrics.json").exists()
        assert (run / seed / "saved_models" / "combiner_0.pt").exists()


def test_runs_of_one_second_share_no_folder(tmp_path):
    folders = [make_folder(tmp_path, "run", {"number": number}) for number in range(3)]
    assert [folder.name for folder in folders] == ["run", "run_2", "run_3"]
    written = [
        json.loads((folder / "training_hyperparameters.json").read_text())["number"]
        for folder in folders
    ]
    assert written == [0, 1, 2]
    (tmp_path / "run_4").write_text("a file")
    assert make_folder(tmp_path, "run", {}).name == "run_5"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "run",
        "run_2",
        "run_3",
        "run_4",
        "run_5",
    ]


def make_folders(parent: Path, number: int) -> None:
    for _ in range(5):
        make_folder(parent, "run", {"number": number})


def test_processes_that_start_at_once_share_no_folder(tmp_path):
    processes = [forked(make_folders, tmp_path, number) for number in range(4)]
    for process in processes:
        process.join()
    made = [
        json.loads(file.read_text())["number"]
        for file in tmp_path.glob("*/training_hyperparameters.json")
    ]
    assert sorted(made) == [number for number in range(4) for _ in range(5)]
    assert len(list(tmp_path.iterdir())) == 20


# From the command line


def command(
    drawn: Path, output: Path, *flags: object, door: str = "combiner_train", settings: str = STAGE_2
) -> list:
    where = ["--data-root", drawn, "--clip-model-name", drawn / "tiny_clip_vit.pt"]
    where += ["--output-dir", output, "--device", "cpu", "--dataset", "CIRR"]
    own = "--no-feature-cache" if door == "combiner_train" else "--no-image-cache"
    return [f"src/{door}.py", *where, *settings.split(), own, *flags]


def wait_for_epochs(process: Script, output: Path, epochs: int) -> Path:
    """Until the only run in a folder has trained so long, all of its seeds together."""

    def trained() -> bool:
        return (
            sum(
                len(file.read_text().splitlines()) - 1 for file in output.rglob("train_metrics.csv")
            )
            >= epochs
        )

    process.wait_for(trained)
    return kills.the_run(output)


def kill_all(processes: list[int]) -> None:
    """Kill processes and see them gone."""
    for process in processes:
        os.kill(process, signal.SIGKILL)
    wait_until_gone(processes)


STAGES = {"combiner_train": STAGE_2, "clip_fine_tune": STAGE_1}
SIGNALS = [(number, door) for number in (signal.SIGTERM, signal.SIGUSR1) for door in STAGES]


# Each signal, and each stage, once; `make soak` sends both to both.
@pytest.mark.parametrize(("number", "door"), SIGNALS if SOAK else [SIGNALS[0], SIGNALS[3]])
def test_a_signal_saves_and_ends_with_the_command_to_resume(number, door, drawn, tmp_path, start):
    """Sent to the whole group, the processes that load images too, as schedulers do."""
    flags = ["--num-epochs", 4000, "--num-workers", 2, "--checkpoint-every-minutes", 1000]
    process = start(*command(drawn, tmp_path, *flags, door=door, settings=STAGES[door]))
    run = wait_for_epochs(process, tmp_path, 2)
    os.killpg(process.pid, number)
    assert process.wait() == 0, process.stderr
    stderr = process.stderr
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert (
        last
        == f"{door}.py: stopped by {number.name}; resume with: python {ROOT}/src/{door}.py --resume {run}"
    )
    progress = load_tensors(run / "state.pt")["progress"]
    assert progress["epoch"] >= 1
    assert len(read_csv(run / "train_metrics.csv")["epoch"]) - progress["epoch"] in (
        0,
        1,
    )  # 1: it was validating


ENDS = [(door, end) for end in ("killed", "told to stop") for door in STAGES]


# Each end, and each stage, once; `make soak` ends both in both ways.
@pytest.mark.parametrize(("door", "end"), ENDS if SOAK else ENDS[1:3])
def test_torchrun_killed_or_told_to_stop(door, end, drawn, tmp_path, start):
    """Two processes, ended in the middle, resumed: as if nothing had been. The last epoch waits for the end."""
    flags = ["--num-workers", 0, "--batch-size", 8]
    flags += ["--seeds", 0, 1] if door == "combiner_train" else []
    words = [
        command(drawn, tmp_path / name, *flags, door=door, settings=STAGES[door])
        for name in ("whole", "ended")
    ]
    process = start(*torchrun(2), *words[0])
    assert process.wait() == 0, process.stderr
    process = start(*torchrun(2), *words[1], "--checkpoint-every-minutes", 1e-9, hold=1)
    run = wait_for_epochs(process, tmp_path / "ended", 1)
    if end == "killed":
        processes = family(process.pid)
        assert len(processes) == 3  # torchrun and both of its processes
        kill_all(processes)
        tally = kills.Tally()
        kills.read_everything(run, tally)
        assert tally.unreadable == []
    else:
        process.send_signal(signal.SIGTERM)  # which torchrun passes on
        process.wait()
        resumption = f"torchrun --nproc-per-node 2 {ROOT}/src/{door}.py --resume {run}"
        assert f"resume with: {resumption}" in process.stderr
    assert len(list(run.rglob("state.pt"))) == 1
    process = start(*torchrun(2), f"src/{door}.py", "--resume", run)
    assert process.wait() == 0, process.stderr
    assert kills.differences(kills.the_run(tmp_path / "whole"), run) == []


def test_torchrun_ended_by_a_signal_that_it_does_not_pass_on(drawn, tmp_path, resume, start):
    """Its processes notice that it is gone, save, and stop: the run can be resumed at once."""
    flags = ["--num-workers", 0, "--batch-size", 4, "--num-epochs", 4000]
    flags += ["--checkpoint-every-minutes", 1000]
    process = start(*torchrun(2), *command(drawn, tmp_path, *flags))
    run = wait_for_epochs(process, tmp_path, 2)
    processes = family(process.pid)
    assert len(processes) == 3
    process.send_signal(signal.SIGUSR1)
    process.wait()
    wait_until_gone(processes)
    resumption = f"torchrun --nproc-per-node 2 {ROOT}/src/combiner_train.py --resume {run}"
    assert f"stopped by the end of torchrun; resume with: {resumption}" in process.stderr
    assert load_tensors(run / "state.pt")["progress"]["epoch"] >= 1


def test_a_full_disk_stops_with_the_last_good_state(drawn, tmp_path, resume, start):
    """From the third epoch on the kernel refuses files above a size, as a full disk refuses them."""
    code = """
import resource, sys
import combiner_train
from training.trainer import Trainer
real = Trainer.run_epoch
def run_epoch(trainer):
    if trainer.progress.epoch == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    real(trainer)
Trainer.run_epoch = run_epoch
combiner_train.main(sys.argv[1:])
"""
    (tmp_path / "fills.py").write_text(code)
    flags = ["--num-epochs", 3, "--num-workers", 0, "--save-best"]
    flags += ["--checkpoint-every-minutes", 1e-9]
    _, *words = command(drawn, tmp_path / "full", *flags)
    done = start(tmp_path / "fills.py", *words)
    done.wait()
    assert done.returncode == 2, done.stderr
    (run,) = (tmp_path / "full").iterdir()
    last = done.stderr.strip().splitlines()[-1]
    assert "error: could not write" in last
    assert (
        f"the last good state is epoch 2, step 0; resume with: python {ROOT}/src/combiner_train.py --resume {run}"
        in last
    )
    assert not list(run.rglob("*.tmp"))
    resume(run)
    _, *words = command(drawn, tmp_path / "whole", *flags)
    combiner_train.main(list(map(str, words)))
    assert kills.differences(*(tmp_path / "whole").iterdir(), run) == []
