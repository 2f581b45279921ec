"""Check training runs of both stages on synthetic data: against the CPU, repeated, and killed and resumed."""

import contextlib
import itertools
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import clip_fine_tune
import combiner_train
from benchmarks import BENCHMARKS
from report import held
from runs import SKIPPED, Script, columns, draw, start
from timing import Row, Setting

MEAN = next(iter(BENCHMARKS["CIRR"].selection))  # metric that selects checkpoints


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Training of one stage: its script, its flags, and its flags in a dry run."""

    name: str
    main: Callable[[list[str]], None]
    flags: str
    tiny: str


STAGE_1 = Stage(
    name="stage 1",
    main=clip_fine_tune.main,
    flags="--num-epochs 5 --learning-rate 1e-3 --batch-size 120",
    tiny="--num-epochs 2 --learning-rate 1e-4 --batch-size 12",
)
STAGE_2 = Stage(
    name="stage 2",
    main=combiner_train.main,
    flags="--num-epochs 20 --combiner-lr 1e-3 --batch-size 200 --projection-dim 256 --hidden-dim 512",
    tiny="--num-epochs 2 --combiner-lr 1e-3 --batch-size 12 --projection-dim 16 --hidden-dim 24",
)


SHARED = "--dataset CIRR --num-workers 0 --validation-frequency 1"
KEPT = ("--save-training", "--save-best")


class Trainings:
    """Training runs on one synthetic data root, each with an output folder of its own."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder
        self.setting = setting
        self.numbers = itertools.count()
        draw(folder / "data", setting)

    def start(self, stage: Stage, *flags: object, device: object, **how: object) -> "Training":
        """Start a training run; for `how` see `runs.start`."""
        output = self.folder / f"training{next(self.numbers)}"
        data = self.folder / "data"
        words = (stage.tiny if self.setting.rehearses else stage.flags).split()
        words += [
            "--dataset",
            "CIRR",
            "--num-workers",
            "0",
            "--validation-frequency",
            "1",
            "--save-training",
            "--save-best",
        ]
        if stage is STAGE_2:
            words.append("--no-feature-cache")
        named = ["--data-root", data, "--clip-model-name", data / "tiny_clip_vit.pt"]
        named += ["--output-dir", output, "--device", device]
        return Training(start(stage.main, *words, *named, *flags, **how), output)


@contextlib.contextmanager
def trainings(setting: Setting) -> Iterator[Trainings]:
    """Yield training runs in a temporary folder, which is deleted at the end."""
    with tempfile.TemporaryDirectory() as name:
        yield Trainings(Path(name), setting)


@dataclass
class Training:
    """A training run that was started."""

    script: Script
    output: Path

    @property
    def run(self) -> Path:
        """Return the run folder, after the run has ended."""
        (run,) = self.output.iterdir()
        return run

    @property
    def losses(self) -> list[float]:
        """Return the loss of each epoch."""
        return columns(self.run / "train_metrics.csv")["train_epoch_loss"]

    @property
    def recalls(self) -> list[float]:
        """Return the mean recall of each validation."""
        return columns(self.run / "validation_metrics.csv")[MEAN]

    @property
    def best(self) -> float:
        """Return the best recall of all validations."""
        return max(self.recalls)


def learning(setting: Setting) -> Iterator[Row]:
    """Compare both stages with the CPU, over several seeds: recalls, the first epoch's loss, and skipped steps."""
    device, seeds = setting.device, setting.choose(gpu=(0, 1, 2), tiny=(0, 1))
    with trainings(setting) as made:
        clip: list[object] = []
        for stage in (STAGE_1, STAGE_2):
            on_cpu, ours = (
                [made.start(stage, *clip, *KEPT, "--seed", seed, device=where) for seed in seeds]
                for where in ("cpu", device)
            )
            others = {
                precision: made.start(stage, *clip, "--precision", precision, device=device)
                for precision in setting.choose(gpu=("fp32", "bf16"), tiny=("bf16",))
            }
            said = [training.script.wait() for training in ours]
            for training in [*on_cpu, *others.values()]:
                training.script.wait()
            theirs = [training.best for training in on_cpu]
            found = [training.best for training in ours]
            yield like_on_the_cpu(f"{stage.name}, amp, {MEAN}", found, theirs)
            first = [training.losses[0] for training in ours]
            expected = [training.losses[0] for training in on_cpu]
            away = statistics.fmean(first) / statistics.fmean(expected) - 1
            yield held(f"{stage.name}, amp, the first epoch's loss", abs(away), 0.03)
            yield {"figure": f"{stage.name}, amp, steps that were skipped", "note": skips(said)}
            for precision, training in others.items():
                note = f"{training.best:.2f}; the first loss {training.losses[0]:.4f}, on the CPU {expected[0]:.4f}"
                yield {"figure": f"{stage.name}, {precision}, {MEAN}", "note": note}
            weights = f"{BENCHMARKS['CIRR'].best_clips()[MEAN]}.pt"
            clip = ["--clip-model-path", on_cpu[0].run / "saved_models" / weights]


def like_on_the_cpu(what: str, ours: list[float], theirs: list[float]) -> Row:
    """Return the check that means over seeds differ by at most four standard deviations, or two of 300 queries."""
    spread = ((statistics.variance(ours) + statistics.variance(theirs)) / 2) ** 0.5
    mean, expected = statistics.fmean(ours), statistics.fmean(theirs)
    note = f"{mean:.2f}, on the CPU {expected:.2f}, deviation over the seeds {spread:.2f}"
    return held(what, abs(mean - expected), max(4 * spread, 200 / 300), note)


def skips(said: list[str]) -> str:
    """Return the numbers of skipped steps, read from the output of each training run."""
    lines = [line for text in said for line in text.splitlines() if line.startswith(SKIPPED)]
    return ", ".join(line.removeprefix(SKIPPED) for line in lines)


def resuming(setting: Setting) -> Iterator[Row]:
    """Compare killed and resumed runs with uninterrupted runs, and uninterrupted runs with their repetition."""
    device = setting.device
    with trainings(setting) as made:
        often = ["--checkpoint-every-minutes", "0.0001"]
        for stage in (STAGE_1, STAGE_2):
            whole, again = (made.start(stage, device=device) for _ in range(2))
            killed = made.start(stage, *often, device=device, dies_in=1)
            killed.script.wait(-signal.SIGKILL)
            resumed = start(stage.main, "--resume", killed.run)
            for script in (whole.script, again.script, resumed):
                script.wait()
            loss, recall = drift(whole, again)
            note = f"the same run twice: {loss:.3g}"
            loss_after, recall_after = drift(whole, killed)
            what = f"{stage.name}, killed and resumed / never killed"
            yield held(f"{what}, losses", loss_after, max(1e-3, 5 * loss), note)
            note = f"the same run twice: {recall:.3g}"
            yield held(f"{what}, recalls", recall_after, max(200 / 300, 5 * recall), note)


def drift(one: Training, other: Training) -> tuple[float, float]:
    """Return the largest differences of two runs: relative for losses, in percentage points for recalls."""
    losses = zip(one.losses, other.losses, strict=True)
    recalls = zip(one.recalls, other.recalls, strict=True)
    return max(abs(b / a - 1) for a, b in losses), max(abs(b - a) for a, b in recalls)
