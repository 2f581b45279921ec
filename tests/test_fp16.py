"""fp16 with loss scaling, on the CPU as on a GPU: it learns as float32 does, and a skipped step moves nothing."""

import copy
import dataclasses
import functools
import math
import statistics

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cirr import CIRR
from combiner import Combiner, compose_sum
from conftest import read_csv
from evaluation.retrieval import evaluate
from models.clip_model import backbone, load_clip, resolution, tokenize
from models.configuration import resolve_clip_options
from models.encoder import load_encoder
from models.features import FrozenSplit
from settings.groups import Clip
from trainers import stage_1_flags, stage_2_flags, trainer_in
from training.data import Order, TrainingData
from training.losses import ContrastiveLoss
from training.schedule import Precision
from training.stage1 import SumFeatures, fine_tuning
from training.stage2 import combiner_training
from training.step import Gradient, Stepper, Task
from training.trainer import MOST_SKIPPED, Trainer
from utils import UserError

CPU = torch.device("cpu")
FP16 = Precision("fp16", CPU)


def scaler_of(scale: float, **more: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **more)


@pytest.fixture
def scales(monkeypatch):
    """Let trainings begin with a scale of the loss."""

    def begin_with(scale: float, **more: float) -> None:
        monkeypatch.setattr(Precision, "scaler", lambda precision: scaler_of(scale, **more))

    return begin_with


class Turned(nn.Module):
    """Queries are rows times a matrix, targets the rows; it begins with the wrong answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.2, 1.0], [1.0, 0.3]]))

    def forward(self, rows):
        queries = nn.functional.normalize(rows @ self.weight, dim=-1)
        return queries, nn.functional.normalize(rows, dim=-1)


ROWS = [torch.tensor([[1.0, 0.0], [0.6, 0.8]])]
IDS = torch.arange(2)


def task_of(model, optimizer=None, batches=()) -> Task:
    return Task(
        batches=lambda epoch, first: batches[first:],
        steps=max(1, len(batches)),
        model=model,
        module=model,
        loss=ContrastiveLoss(),
        optimizer=optimizer or SGD(model.parameters(), lr=0.1),
        validate=lambda measured: {},
    )


def stepper(model, scale: float, *flags: object, optimizer=None) -> Stepper:
    asked = stage_1_flags("--num-epochs", 9, "--ema-decay", 0.9, *flags)
    steps = Stepper(task_of(model, optimizer), asked, FP16)
    steps.scaler = scaler_of(scale)
    return steps


def state(steps: Stepper) -> dict:
    """What a step moves, but for the scale."""
    parts = {name: part for name, part in steps.parts.items() if name != "scaler"}
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def test_fp16_is_scaled_on_any_device():
    assert FP16.dtype == torch.float16
    assert FP16.scaler().is_enabled()
    with FP16.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16


@pytest.mark.parametrize("clip", [None, 1.0])
def test_skipped_steps_move_nothing(clip):
    model = Turned()
    flags = ["--warmup-steps", 2, "--cosine", *([] if clip is None else ["--clip-grad-norm", clip])]
    optimizer = Adam(model.parameters(), lr=0.1)
    steps = stepper(model, 2.0**6, *flags, optimizer=optimizer)
    steps.step(ROWS, IDS)
    assert not steps.skipped
    before = state(steps)
    broken = model.weight.register_hook(lambda gradient: gradient * math.inf)
    for halved in (2.0**5, 2.0**4):
        steps.step(ROWS, IDS)
        assert steps.skipped
        assert same(state(steps), before)
        assert steps.scaler.get_scale() == halved
    broken.remove()
    steps.step(ROWS, IDS)
    assert not steps.skipped
    after = state(steps)
    assert not any(same(after[name], before[name]) for name in before)  # each part moves


class Waits(TorchDispatchMode):
    """Counts the numbers that are read off tensors, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "waits"), [("fp32", 0), ("bf16", 0), ("fp16", 1)])
def test_only_scaling_waits_and_once_a_step(precision, waits):
    model = Turned()
    optimizer = Adam(model.parameters(), lr=0.1, fused=True)  # as on a GPU
    flags = stage_1_flags("--num-epochs", 9, "--cosine", "--clip-grad-norm", 1)
    steps = Stepper(task_of(model, optimizer), flags, Precision(precision, CPU))
    steps.step(ROWS, IDS)
    with Waits() as seen:
        steps.step(ROWS, IDS)
    assert seen.count == waits


def test_a_scale_that_is_too_large_falls_until_steps_succeed():
    model = Turned()
    steps = stepper(model, 2.0**127)
    before = state(steps)
    skipped = 0
    steps.step(ROWS, IDS)
    while steps.skipped:
        skipped += 1
        assert same(state(steps), before)
        steps.step(ROWS, IDS)
    assert skipped >= 100
    assert steps.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert not same(state(steps), before)


def test_a_scale_that_fell_to_zero_skips():
    """It cannot be halved any more, and would pass for one that was left as it is."""
    steps = stepper(Turned(), 0.0)
    for _ in range(2):
        steps.step(ROWS, IDS)
        assert steps.skipped


def test_the_norm_that_is_clipped_is_that_of_unscaled_gradients():
    moved = []
    for clip, scale in ((None, 2.0**6), (None, 2.0**2), (0.5, 2.0**6), (0.5, 2.0**2)):
        model = Turned()
        before = model.weight.detach().clone()
        flags = [] if clip is None else ["--clip-grad-norm", clip]
        stepper(model, scale, *flags).step(ROWS, IDS)
        moved.append(before - model.weight.detach())
    free, free_again, clipped, clipped_again = moved
    assert free.norm() > 2 * 0.1 * 0.5  # the learning rate times the norm
    torch.testing.assert_close(clipped, free * 0.1 * 0.5 / free.norm(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(free_again, free, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(clipped_again, clipped, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_gradient_caching_equals_the_plain_step(golden):
    """Both round to half precision, in another order; a part that is not scaled would be off by the scale."""
    gradients = []
    for micro_batch in (None, 3):
        model = load_clip(str(golden / "clip_vit.pt"), CPU)
        pixels = resolution(model)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(
            256, (2, 7, 3, pixels, pixels), dtype=torch.uint8, generator=generator
        )
        tokens = tokenize([f"is number {i} and has a color" for i in range(7)])
        gradient = Gradient(
            model=SumFeatures(model, backbone(model)),
            loss=ContrastiveLoss(),
            precision=FP16,
            scaler=scaler_of(2.0**8),
            micro_batch=micro_batch,
        )
        gradient.add([images[0], images[1], tokens], torch.arange(len(tokens)))
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(named)
    plain, cached = gradients
    assert plain.keys() == cached.keys()
    whole = torch.cat([gradient.flatten() for gradient in plain.values()]).norm()
    for name, gradient in plain.items():
        assert (cached[name] - gradient).norm() <= 5e-3 * gradient.norm() + 1e-4 * whole, name


# An epoch


def trainer_of(task: Task, scale: float, folder) -> Trainer:
    flags = stage_1_flags("--ema-decay", 0.9, "--checkpoint-every-minutes", 1000)
    trainer = trainer_in(folder, task, flags, precision=FP16)
    trainer.stepper.scaler = scaler_of(scale)
    return trainer


def epoch_with(bad_steps: set[int], steps: int, folder) -> tuple[Trainer, float]:
    """An epoch with some batches that are not numbers; returns its trainer and its mean loss."""
    rows = [ROWS[0] * (math.nan if step in bad_steps else 1) for step in range(steps)]
    # Without a learning rate, so that all good steps have the same loss.
    model = Turned()
    task = task_of(model, SGD(model.parameters(), lr=0.0), [([row], IDS) for row in rows])
    trainer = trainer_of(task, 2.0**8, folder)
    return trainer, trainer.train_one_epoch()


def test_the_loss_of_a_skipped_step_is_left_out_of_the_mean(tmp_path):
    _, undisturbed = epoch_with(set(), 1, tmp_path)
    trainer, loss = epoch_with({0, 13}, 17, tmp_path)
    assert loss == pytest.approx(undisturbed)
    assert len(trainer.progress.losses) == 17  # a skipped step is a step that was done
    assert trainer.progress.skipped == [0, 13]
    assert trainer.progress.skipped_in_a_row == 0


def test_steps_that_are_all_skipped_stop_the_run(tmp_path):
    first = 3
    bad = set(range(first, 40))
    last = first + MOST_SKIPPED - 1
    with pytest.raises(UserError, match=rf"at epoch 0, step {last}: .* --precision bf16"):
        epoch_with(bad, 40, tmp_path)


def test_what_is_skipped_is_counted_over_epochs_and_interruptions(tmp_path):
    trainer, loss = epoch_with(set(range(MOST_SKIPPED - 1)), MOST_SKIPPED - 1, tmp_path)
    assert math.isnan(loss)
    trainer.save()
    resumed = trainer_of(dataclasses.replace(trainer.task), 1.0, tmp_path)
    resumed.resume()
    assert resumed.progress.skipped == list(range(MOST_SKIPPED - 1))
    resumed.count_step(torch.tensor(1.0), skipped=False)  # which ends the row
    for _ in range(MOST_SKIPPED - 1):
        resumed.count_step(torch.tensor(1.0), skipped=True)
    with pytest.raises(UserError, match="20 steps in a row"):
        resumed.count_step(torch.tensor(1.0), skipped=True)


# From end to end


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_an_overflow_of_the_first_steps_is_survived(stage, request, scales):
    scales(2.0**17)
    flags = ["--precision", "fp16", "--batch-size", 4, "--num-epochs", 1]
    folder = request.getfixturevalue(stage)("CIRR", *flags)
    rows = read_csv(folder / "loss_scaling_metrics.csv")
    assert list(rows) == ["epoch", "loss_scale", "skipped_steps"]
    (skipped,) = rows["skipped_steps"]
    assert 1 <= skipped < 10  # steps
    assert rows["loss_scale"] == [2.0 ** (17 - skipped)]
    shown = f"loss scale {rows['loss_scale'][0]:g}, {skipped:.0f} skipped steps"
    assert shown in (folder / "index.html").read_text()
    assert all(map(math.isfinite, read_csv(folder / "train_metrics.csv")["train_epoch_loss"]))


@pytest.mark.slow
def test_twenty_skipped_steps_in_a_row_end_the_command(fails, drawn, scales):
    scales(2.0**127)
    sizes = "--batch-size 12 --projection-dim 16 --hidden-dim 24 --no-feature-cache"
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--precision", "fp16"]
    error = fails("combiner_train", drawn, "--dataset", "CIRR", *name, *sizes.split())
    assert "20 steps in a row were skipped" in error
    assert "at epoch 6, step 1: lower the learning rate or choose --precision bf16" in error


# Learning


def learned(task: Task, precision: str, epochs: int) -> float:
    """The mean of a benchmark's recalls after some epochs, with a scale that skips no step."""
    steps = Stepper(task, stage_1_flags("--num-epochs", epochs), Precision(precision, CPU))
    if precision == "fp16":
        steps.scaler = scaler_of(2.0**8)
    for epoch in range(epochs):
        steps.model.train()
        for inputs, target_ids in task.batches(epoch, 0):
            steps.step(inputs, target_ids)
            assert not steps.skipped
    return task.validate(steps.measured)["arithmetic_mean"]


def untrained_mean(task: Task) -> float:
    """The same before the first step."""
    return task.validate(task.module)["arithmetic_mean"]


def assert_learns_alike(full: list[float], half: list[float], untrained: float) -> None:
    """Half precision learns, and from full precision it differs by no more than one seed does from another."""
    spread = max(full) - min(full)
    assert min(full) > untrained + 5
    assert min(half) > untrained + 5
    twins = full[: len(half)]
    assert abs(statistics.mean(half) - statistics.mean(twins)) <= spread


@pytest.mark.slow
def test_stage_2_learns_as_in_full_precision(drawn):
    """A Combiner learns drawn triplets by heart, from features that are easy to tell apart."""
    benchmark = CIRR(drawn)
    split = benchmark.val()[0]
    generator = torch.Generator().manual_seed(0)
    frozen = FrozenSplit(
        split=split,
        images=torch.randn(len(split.paths), 64, generator=generator),
        captions=torch.randn(len(split.triplets), 1, 64, generator=generator),
    )

    def task_of(seed: int) -> Task:
        torch.manual_seed(seed)
        return combiner_training(
            Combiner(64, 32, 64),
            frozen,
            [frozen],
            order=Order(triplets=len(split.triplets), variants=1, batch_size=10, seed=seed),
            flags=stage_2_flags("--combiner-lr", 3e-3),
            measure=functools.partial(evaluate, benchmark, [frozen]),
        )

    with torch.random.fork_rng():
        full = [learned(task_of(seed), "fp32", 12) for seed in range(3)]
        half = [learned(task_of(seed), "fp16", 12) for seed in range(3)]
        untrained = untrained_mean(task_of(0))
    assert_learns_alike(full, half, untrained)


@pytest.mark.slow
def test_stage_1_learns_as_in_full_precision(drawn):
    """CLIP learns drawn triplets by heart; half precision, which CPUs emulate, with one seed alone."""
    benchmark = CIRR(drawn)
    val = benchmark.val()
    texts = [[benchmark.caption(triplet.captions)] for triplet in val[0].triplets]
    name = str(drawn / "tiny_clip_vit.pt")

    def task_of(seed: int) -> Task:
        order = Order(triplets=len(texts), variants=1, batch_size=10, seed=seed)
        encoder = load_encoder(
            resolve_clip_options(Clip(clip_model_name=name), []), None, CPU, workers=0
        )
        return fine_tuning(
            encoder,
            TrainingData(benchmark=benchmark, train=val[0], val=val, texts=texts, order=order),
            stage_1_flags("--learning-rate", 1e-4),
            functools.partial(evaluate, benchmark, compose=compose_sum),
        )

    full = [learned(task_of(seed), "fp32", 2) for seed in range(3)]
    half = [learned(task_of(0), "fp16", 2)]
    assert_learns_alike(full, half, untrained_mean(task_of(0)))
