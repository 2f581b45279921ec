"""Steps in bounded memory against the plain step; the optional parts of training against their formulas."""

import copy
import dataclasses
import functools
import itertools
import json
import math
from types import SimpleNamespace

import clip
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import combiner_train
from conftest import SOAK, read_csv
from models.backbone import choose_trained
from models.clip_model import backbone, checkpoint_gradients, load_clip, resolution, tokenize
from models.lean_clip import LeanBlock
from runtime import distributed
from runtime.choices import LOSSES
from test_resume import stopped  # noqa: F401
from trainers import stage_1_flags, stage_2_flags
from training import losses
from training.data import Order, check_learning
from training.losses import BankLoss, ContrastiveLoss, Loss, learned_groups, make_loss
from training.schedule import Precision, learning_rate_factor
from training.stage1 import SumFeatures
from training.step import Gradient, MovingAverage, Stepper, Task
from utils import UserError

CPU = torch.device("cpu")
FULL = Precision("fp32", CPU)


def gradient_of(model: nn.Module, loss: Loss | None = None, precision=FULL, **how) -> Gradient:
    """A step's, of the original's loss unless another is given."""
    loss = loss or ContrastiveLoss()
    return Gradient(model=model, loss=loss, precision=precision, scaler=precision.scaler(), **how)


def contrastive_loss(queries, targets, ids=None, **which) -> torch.Tensor:
    """Of a batch, whose duplicates are masked where the ids of its targets are given."""
    loss = ContrastiveLoss(mask_duplicate_targets=ids is not None, **which)
    return loss(queries, targets, torch.arange(len(queries)) if ids is None else ids)


def bank_loss(queries, bank, rows) -> torch.Tensor:
    return BankLoss(bank)(queries, queries, rows)


def split_of(targets: list[int]) -> SimpleNamespace:
    """Training triplets as far as their targets go."""
    triplets = [SimpleNamespace(target=target) for target in targets]
    return SimpleNamespace(triplets=triplets, target_rows=targets)


@pytest.mark.parametrize("flags_of", [stage_1_flags, stage_2_flags])
def test_steps_without_negatives_are_counted_before_the_first(flags_of, caplog):
    """Against their losses, which are 0; there is no such step without the mask."""
    targets = torch.tensor([0, 0, 0, 0, 0, 1, 2])
    order = Order(triplets=len(targets), variants=1, batch_size=2, seed=3)
    lost = 0
    for rows in torch.cat([order.batches(epoch)[0] for epoch in range(4)]):
        rows = targets[rows]
        features = nn.functional.normalize(torch.randn(2, 8), dim=-1)
        lost += contrastive_loss(features, features.flip(0), rows).item() == 0
    assert 0 < lost < 12
    words = ["--num-epochs", 4, "--batch-size", 2, "--seed", 3]
    check_learning(split_of(targets.tolist()), order, flags_of(*words))
    assert caplog.messages == []
    check_learning(split_of(targets.tolist()), order, flags_of(*words, "--mask-duplicate-targets"))
    (line,) = caplog.messages
    assert line.startswith(
        f"warning: in {lost} of 12 steps of seed 3 all triplets have the same target"
    )


def test_a_training_without_any_negative_is_refused():
    mask = "--mask-duplicate-targets"
    order = Order(triplets=4, variants=1, batch_size=2, seed=0)
    for words in ([], [mask], ["--negatives", "bank"]):
        with pytest.raises(UserError, match="all training triplets have the same target"):
            check_learning(split_of([5] * 4), order, stage_2_flags(*words))
    pairs = split_of([0, 1, 0, 1])  # which fall together in the first epoch of seed 4
    seed = next(s for s in range(99) if len({r % 2 for r in replaced(order, s)}) == 1)
    with pytest.raises(
        UserError, match=f"in 2 of 2 steps of seed {seed} all triplets have the same target"
    ):
        flags = stage_2_flags(mask, "--num-epochs", 1, "--seed", seed)
        check_learning(pairs, order, flags)
    one = Order(triplets=4, variants=1, batch_size=1, seed=0)
    check_learning(pairs, one, stage_2_flags("--negatives", "bank"))


def replaced(order: Order, seed: int) -> list[int]:
    """The first batch of an order with another seed."""
    return dataclasses.replace(order, seed=seed).batches(0)[0][0].tolist()


def test_a_learning_rate_that_never_rises_to_its_value_is_told(caplog):
    order = Order(triplets=4, variants=1, batch_size=2, seed=0)
    for steps in (6, 7):
        check_learning(
            split_of([0, 1, 2, 3]), order, stage_1_flags("--num-epochs", 3, "--warmup-steps", steps)
        )
    (line,) = caplog.messages
    assert line.startswith("warning: --warmup-steps 7 exceeds the run's 6 steps")


@pytest.fixture
def in_double(monkeypatch):
    """CLIP computes its layer norms in float32 whatever the weights are: here in the weights' own float64."""
    monkeypatch.setattr(clip.model.LayerNorm, "forward", nn.LayerNorm.forward)


def clip_step(golden, name: str, encoder: str, micro_batch: int | None, checkpointed: bool = False):
    """Loss and gradients of one stage-1 step in float64."""
    model = load_clip(str(golden / name), CPU).double()
    choose_trained(model, encoder)
    if checkpointed:
        checkpoint_gradients(model)
    generator = torch.Generator().manual_seed(0)
    rows, pixels = 4, resolution(model)
    images = torch.randint(
        256, (2, rows, 3, pixels, pixels), dtype=torch.uint8, generator=generator
    )
    tokens = tokenize([f"is number {i} and has a color" for i in range(rows)])
    inputs = [images[0], images[1], tokens]
    loss = gradient_of(SumFeatures(model, backbone(model)), micro_batch=micro_batch).add(
        inputs, torch.arange(rows)
    )
    return loss, {name: p.grad for name, p in model.named_parameters()}


ENCODERS = ("both", "text", "image")
WAYS = ({"micro_batch": 2, "checkpointed": True}, {"micro_batch": 3}, {"micro_batch": 1})
# Each way and each encoder once for both models; `make soak` tries every way of every encoder.
WAYS_OF_ENCODERS = (
    list(itertools.product(WAYS, ENCODERS)) if SOAK else list(zip(WAYS, ENCODERS, strict=True))
)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "encoder"), WAYS_OF_ENCODERS)
@pytest.mark.parametrize("name", ["clip_vit.pt", "clip_rn.pt"])
def test_gradients_in_bounded_memory_equal_the_plain_steps(way, name, encoder, golden, in_double):
    plain_loss, plain = clip_step(golden, name, encoder, None)
    loss, gradients = clip_step(golden, name, encoder, **way)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-9)
    learned = [key for key, gradient in plain.items() if gradient is not None]
    assert learned
    assert learned == [key for key, gradient in gradients.items() if gradient is not None]
    for key in learned:
        assert (gradients[key] - plain[key]).norm() <= 1e-6 * plain[key].norm() + 1e-12, key


def test_checkpointed_gradients_equal_the_plain_ones(golden, in_double):
    _, plain = clip_step(golden, "clip_rn.pt", "both", None)
    _, gradients = clip_step(golden, "clip_rn.pt", "both", None, checkpointed=True)
    assert all(
        torch.allclose(gradients[k], g, rtol=1e-6) for k, g in plain.items() if g is not None
    )


def test_micro_batches_bound_the_rows_that_have_a_graph(golden):
    """Guards against a cached step that still keeps every row's activations."""
    model = load_clip(str(golden / "clip_vit.pt"), CPU)
    rows_with_graph = []
    model.visual.register_forward_hook(
        lambda module, args, out: rows_with_graph.append(len(out)) if out.requires_grad else None
    )
    images = torch.zeros(2, 8, 3, 64, 64, dtype=torch.uint8)
    inputs = [images[0], images[1], tokenize([str(i) for i in range(8)])]
    gradient_of(SumFeatures(model, backbone(model)), micro_batch=2).add(inputs, torch.arange(8))
    assert rows_with_graph == [4, 4, 4, 4]  # reference and target of two triplets


def test_micro_batches_share_the_weights_that_carry_others(golden, monkeypatch):
    """Made for all passes without graph, for all but the last with graph, and for that one, which is shared."""
    model = load_clip(str(golden / "clip_vit.pt"), CPU)
    made = []
    fold = LeanBlock.fold
    monkeypatch.setattr(LeanBlock, "fold", lambda block: made.append(block) or fold(block))
    images = torch.zeros(2, 8, 3, 64, 64, dtype=torch.uint8)
    inputs = [images[0], images[1], tokenize([str(i) for i in range(8)])]
    gradient_of(SumFeatures(model, backbone(model)), micro_batch=1).add(inputs, torch.arange(8))
    assert len(made) == 3 * len(set(made)) > 0


def test_duplicate_targets_are_not_each_others_negatives():
    torch.manual_seed(0)
    queries, targets = nn.functional.normalize(torch.randn(2, 5, 4), dim=-1)
    ids = torch.tensor([7, 8, 7, 9, 8])
    of_rows = []
    for row in range(5):
        columns = [c for c in range(5) if c == row or ids[c] != ids[row]]
        logits = 100 * (targets[columns] @ queries[row])
        of_rows.append(torch.logsumexp(logits, 0) - logits[columns.index(row)])
    torch.testing.assert_close(contrastive_loss(queries, targets, ids), torch.stack(of_rows).mean())
    distinct = contrastive_loss(queries, targets, torch.arange(5))
    torch.testing.assert_close(distinct, contrastive_loss(queries, targets))


def test_the_loss_is_exact_in_mixed_precision():
    """Guards against logits in bf16, whose steps at 100 are a half."""
    torch.manual_seed(0)
    queries, targets = nn.functional.normalize(torch.randn(2, 64, 8), dim=-1)
    rows = torch.arange(64)
    with Precision("bf16", CPU).autocast():
        mixed = contrastive_loss(queries, targets)
        mixed_bank = bank_loss(queries, targets, rows)
    assert mixed.item() == contrastive_loss(queries, targets).item()
    assert mixed_bank.item() == bank_loss(queries, targets, rows).item()


def factors(steps: int, *, warmup_steps: int = 0, cosine: bool = False) -> list[float]:
    """What the learning rate is multiplied with at each of some steps, and after the last."""
    found = []
    for step in range(steps + 1):
        found.append(learning_rate_factor(step, steps, warmup_steps=warmup_steps, cosine=cosine))
    return found


def test_schedule():
    found = factors(12, warmup_steps=4, cosine=True)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5)
    assert found[10] == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert found[12] == 0.0
    assert set(factors(9)) == {1.0}


class Line(nn.Module):
    """A model of one weight whose loss gradient is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.3], [0.2, 1.0]]))

    def forward(self, rows):
        return nn.functional.normalize(rows @ self.weight, dim=-1), nn.functional.normalize(
            rows, dim=-1
        )


def stepper(model, *flags: object, steps=5) -> Stepper:
    task = Task(
        batches=lambda epoch, first: [],
        steps=steps,
        model=model,
        module=model,
        loss=ContrastiveLoss(),
        optimizer=SGD(model.parameters(), lr=0.1),
        validate=lambda measured: {},
    )
    asked = stage_1_flags("--num-epochs", 1, *flags)
    return Stepper(task, asked, Precision("fp32", CPU))


ROWS = [torch.tensor([[1.0, 0.0], [0.6, 0.8]])]


def test_the_learning_rate_follows_the_schedule():
    steps = stepper(Line(), "--warmup-steps", 2, "--cosine", steps=6)
    rates = []
    for _ in range(6):
        rates.append(steps.task.optimizer.param_groups[0]["lr"])
        steps.step(ROWS, torch.arange(2))
    assert rates == pytest.approx(
        [0.1 * factor for factor in factors(6, warmup_steps=2, cosine=True)[:6]]
    )


def test_moving_average_follows_its_formula():
    model = Line()
    steps = stepper(model, "--ema-decay", 0.9)
    expected = None
    for _ in range(4):
        steps.step(ROWS, torch.arange(2))
        now = model.weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(steps.measured.weight, expected)
    assert list(steps.measured.state_dict()) == list(model.state_dict())
    assert stepper(model).measured is model


def test_the_moving_average_is_torchs_own_without_its_copies(golden):
    """To the last bit, from states of either; a copy of the count or of a buffer would wait for a GPU."""
    model = load_clip(str(golden / "clip_rn.pt"), CPU)
    ours = MovingAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        theirs.update_parameters(model)
        with Operations() as done:
            ours.update_parameters(model)
    assert done.names == ["_foreach_lerp_", "add_"]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    again = MovingAverage(model, 0.9)
    again.load_state_dict(theirs.state_dict())
    again.update_parameters(model)
    theirs.update_parameters(model)
    assert torch.equal(again.module.text_projection, theirs.module.text_projection)


class Operations(TorchDispatchMode):
    """The names of what torch computes with tensors, but for looks at one and other views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name not in ("detach", "is_nonzero", "_local_scalar_dense"):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def test_gradient_clipping():
    plain, clipped = Line(), Line()
    before = plain.weight.detach().clone()
    stepper(plain).step(ROWS, torch.arange(2))
    norm = plain.weight.grad.norm()
    stepper(clipped, "--clip-grad-norm", float(norm) / 4).step(ROWS, torch.arange(2))
    torch.testing.assert_close(
        before - clipped.weight, (before - plain.weight) / 4, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("amp", None), ("fp32", None), ("bf16", torch.bfloat16)]
)
def test_precision_on_the_cpu(name, dtype):
    precision = Precision(name, CPU)
    assert precision.dtype == dtype
    assert not precision.scaler().is_enabled()
    with precision.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)


def test_precision_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    assert Precision("amp", gpu).dtype == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    with pytest.raises(UserError, match="--precision bf16"):
        Precision("bf16", gpu)


def test_a_micro_batch_larger_than_the_batch(fails, drawn):
    flags = [
        "--clip-model-name",
        drawn / "tiny_clip_vit.pt",
        "--batch-size",
        8,
        "--micro-batch-size",
        9,
    ]
    error = fails("clip_fine_tune", drawn, "--dataset", "CIRR", *flags)
    assert "--micro-batch-size 9 is larger than the batch size per process, 8" in error


def test_a_batch_that_cannot_be_shared_equally(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match=r"--batch-size 8 .* 3 processes"):
        Order(triplets=100, variants=1, batch_size=8, seed=0)


def test_shares_of_a_batch_are_its_rows_in_order(monkeypatch):
    rows, variants = Order(triplets=30, variants=4, batch_size=6, seed=0).batches(1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(Order(triplets=30, variants=4, batch_size=6, seed=0).batches(1))
    assert torch.equal(torch.cat([own for own, _ in shares], 1), rows)
    assert torch.equal(torch.cat([own for _, own in shares], 1), variants)


OPTIONS = "--warmup-steps 3 --cosine --ema-decay 0.9 --precision bf16"
MORE_OPTIONS = "--mask-duplicate-targets --clip-grad-norm 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [f"{OPTIONS} --micro-batch-size 5", f"{MORE_OPTIONS} --gradient-checkpointing"]
)
def test_the_options_of_stage_1_run(flags, stage_1):
    folder = stage_1("FashionIQ", *flags.split(), "--num-epochs", 1)
    assert len(list((folder / "saved_models").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f"{OPTIONS} --negatives bank", MORE_OPTIONS, "--compile"])
def test_the_options_of_stage_2_run(flags, stage_2, monkeypatch):
    # Traced, but without the minute that generating code for a CPU takes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    folder = stage_2("CIRR", *flags.split(), "--num-epochs", 1)
    content = torch.load(folder / "saved_models" / "combiner_0.pt", weights_only=True)
    assert "output_layer.weight" in content["Combiner"]  # no prefix of a wrapper
    assert not (folder / "loss_scaling_metrics.csv").exists()


@pytest.mark.slow
def test_the_average_is_what_is_saved_and_measured(stage_1, run, drawn, tmp_path):
    one_epoch = ["CIRR", "--num-epochs", 1]
    folder = stage_1(*one_epoch, "--ema-decay", "0.5")
    weights = folder / "saved_models" / "tuned_clip_0"
    flags = ["--dataset", "CIRR", "--combining-function", "sum", "--clip-model-path", weights]
    run("validate", drawn, *flags, "--metrics-json", tmp_path / "m.json")
    history = read_csv(folder / "validation_metrics.csv")
    expected = {name: values[0] for name, values in history.items() if name != "epoch"}
    assert json.loads((tmp_path / "m.json").read_text())["metrics"] == pytest.approx(expected)
    plain = stage_1(*one_epoch, output="plain") / "saved_models" / "tuned_clip_0.pt"
    averaged = torch.load(f"{weights}.pt")["CLIP"]["visual.proj"]
    assert not torch.equal(averaged, torch.load(plain)["CLIP"]["visual.proj"])


def test_steps_skip_weights_without_a_gradient(golden):
    """Frozen encoders stay as they are under weight decay too."""
    model = load_clip(str(golden / "clip_vit.pt"), CPU)
    before = copy.deepcopy(model.state_dict())
    optimizer = AdamW(choose_trained(model, "text"), lr=0.1)
    optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def bank_case() -> tuple[Line, torch.Tensor, torch.Tensor]:
    """A model to learn, a bank of 9 targets, and 7 queries' rows in it, two of them the same."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    bank = nn.functional.normalize(bank, dim=-1)
    return Line().double(), bank, torch.tensor([3, 8, 3, 0, 5, 1, 2])


@pytest.mark.parametrize("most", [1, 20, 9 * 7, 2**24])
def test_with_a_bank_every_other_target_is_a_negative_once(most, monkeypatch):
    """Loss and gradient as by the definition, a query after another, in whatever blocks it is computed."""
    monkeypatch.setattr(losses, "MOST_LOGITS", most)
    _, bank, rows = bank_case()
    queries = nn.functional.normalize(bank[rows] + 0.3, dim=-1).requires_grad_()
    of_rows = []
    for query, row in zip(queries, rows, strict=True):
        of_rows.append(torch.logsumexp(100 * (bank @ query), 0) - 100 * (bank[row] @ query))
    expected = torch.stack(of_rows).mean()
    loss = bank_loss(queries, bank, rows)
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(2 * loss, queries)
    (theirs,) = torch.autograd.grad(2 * expected, queries)
    torch.testing.assert_close(ours, theirs)


def test_a_bank_of_the_batchs_own_targets_is_the_batch():
    model, bank, rows = bank_case()
    rows = rows.unique()
    queries, targets = model(bank[rows])
    expected = contrastive_loss(queries, targets)
    torch.testing.assert_close(bank_loss(queries, targets, torch.arange(len(rows))), expected)


def gradient_with_bank(**way) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a step with a bank."""
    model, bank, rows = bank_case()
    loss = gradient_of(model, BankLoss(bank), **way).add([bank[rows] + 0.3], rows)
    return loss, model.weight.grad


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_micro_batches_with_a_bank_give_the_plain_steps_gradient(micro_batch):
    plain_loss, plain = gradient_with_bank()
    loss, gradient = gradient_with_bank(micro_batch=micro_batch)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradient, plain)
    assert gradient.abs().max() > 0.1


def test_the_shares_of_several_processes_make_up_the_whole_gradient(monkeypatch):
    """Each weighs its share as if all were averaged, as parallel modules do, which then gives the whole."""
    whole_loss, whole = gradient_with_bank()
    model, bank, rows = bank_case()
    world = 7
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    own_losses = []

    def gather(own):
        """Of losses of other processes only the number matters for the gradient of one's own."""
        own_losses.append(own.detach())
        return torch.cat([own, own.detach().expand(world - 1)])

    monkeypatch.setattr(distributed, "gather_rows", gather)
    for row in rows:
        gradient_of(model, BankLoss(bank)).add([bank[row][None] + 0.3], row[None])
    torch.testing.assert_close(torch.cat(own_losses).mean(), whole_loss)
    torch.testing.assert_close(model.weight.grad / world, whole)


def test_a_bank_is_each_target_once_and_the_batches_know_which(stage_2, monkeypatch, capsys):
    """Of a run by the script: what its batches learn towards are the bank's rows that they name."""
    banks = []

    real = Gradient.add

    def seen(gradient, inputs, target_ids):
        bank = gradient.loss.bank
        assert torch.equal(bank[target_ids], inputs[2])
        banks.append(bank)
        return real(gradient, inputs, target_ids)

    monkeypatch.setattr(Gradient, "add", seen)
    folder = stage_2("CIRR", "--negatives", "bank")
    assert len(banks[0].unique(dim=0)) == len(banks[0]) < 40  # triplets
    settings = json.loads((folder / "training_hyperparameters.json").read_text())
    assert settings["flags"]["negatives"] == "bank"
    (folder / "best_metrics.json").unlink()
    with pytest.raises(SystemExit):
        combiner_train.main(["--resume", str(folder), "--negatives", "batch"])
    assert "--negatives is batch, but the run was started with bank" in capsys.readouterr().err


# Losses with parameters of their own


def defined(queries, targets, scale, symmetric):
    """The loss a row after another."""
    logits = scale * queries @ targets.T
    rows = range(len(logits))
    forth = torch.stack([logits[row].logsumexp(0) - logits[row, row] for row in rows]).mean()
    back = torch.stack([logits[:, row].logsumexp(0) - logits[row, row] for row in rows]).mean()
    return (forth + back) / 2 if symmetric else forth


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_definition(name):
    torch.manual_seed(0)
    queries, targets = nn.functional.normalize(torch.randn(2, 9, 4).double(), dim=-1)
    loss = make_loss(stage_2_flags("--loss", name, "--learn-temperature")).double()
    loss.log_scale.data -= 1
    scale = 100 / math.e
    expected = defined(queries, targets, scale, name == "symmetric")
    torch.testing.assert_close(loss(queries, targets, torch.arange(9)), expected)
    assert loss.report()["logit_scale"] == pytest.approx(scale)


def learned_with(loss: Loss, inputs, ids, **way) -> list[torch.Tensor]:
    """Loss, and the gradients of the model and of the loss's own parameters."""
    model = Line().double()
    value = gradient_of(model, loss, **way).add(inputs, ids)
    return [value, model.weight.grad, *(parameter.grad for parameter in loss.parameters())]


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
@pytest.mark.parametrize("form", ["contrastive", "symmetric", "bank"])
def test_a_losss_own_parameters_have_their_gradient_in_micro_batches(form, micro_batch):
    """Guards against a temperature that silently learns nothing."""
    _, bank, rows = bank_case()
    name = "contrastive" if form == "bank" else form

    flags = stage_2_flags("--loss", name, "--mask-duplicate-targets", "--learn-temperature")

    def loss() -> Loss:
        made = make_loss(flags, bank=bank if form == "bank" else None).double()
        made.log_scale.data -= 2
        return made

    inputs = [bank[rows] + 0.3]
    plain = learned_with(loss(), inputs, rows)
    cached = learned_with(loss(), inputs, rows, micro_batch=micro_batch)
    assert plain[2].abs() > 1e-3
    torch.testing.assert_close(cached, plain)


def test_the_banks_temperature_has_the_gradient_of_autograd():
    _, bank, rows = bank_case()
    queries = nn.functional.normalize(bank[rows] + 0.3, dim=-1)
    ours = BankLoss(bank, learn_temperature=True).double()
    ours(queries, queries, rows).backward()
    log_scale = torch.tensor(math.log(100), dtype=torch.float64, requires_grad=True)
    nn.functional.cross_entropy(log_scale.exp() * queries @ bank.T, rows).backward()
    torch.testing.assert_close(ours.log_scale.grad, log_scale.grad)


def test_shares_of_several_processes_make_up_the_temperatures_gradient(monkeypatch):
    """Each computes the loss of all rows, and all of them are averaged."""
    _, bank, rows = bank_case()
    queries = nn.functional.normalize(bank[rows] + 0.3, dim=-1)
    targets = bank[rows]

    def of_process(world: int, first: int) -> torch.Tensor:
        loss = ContrastiveLoss(learn_temperature=True).double()
        own = slice(first, first + len(rows) // world)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(
            distributed, "gather_rows", lambda part: queries if part is ours else targets
        )
        ours, theirs = queries[own], targets[own]
        (world * loss(ours, theirs, rows[own])).backward()
        return loss.log_scale.grad

    whole = of_process(1, 0)
    shares = [of_process(7, row) for row in range(7)]
    torch.testing.assert_close(torch.stack(shares).mean(0), whole)


def test_the_temperature_stays_within_clips_bound():
    loss = ContrastiveLoss(learn_temperature=True)
    loss.log_scale.data += 1
    assert loss.report() == {"logit_scale": pytest.approx(100)}
    assert loss.log_scale.item() == pytest.approx(math.log(100))
    groups = learned_groups(Line().parameters(), loss)
    assert groups[1] == {"params": [loss.log_scale], "weight_decay": 0.0}
    assert len(learned_groups(Line().parameters(), ContrastiveLoss())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("negatives", ["batch", "bank"])
def test_a_learned_temperature_is_recorded_and_resumed(negatives, stage_2, stopped):  # noqa: F811
    loss = ["--loss", "symmetric"] if negatives == "batch" else []
    flags = ["CIRR", *loss, "--learn-temperature", "--negatives", negatives, "--combiner-lr", 0.01]
    whole, cut = stage_2(*flags, output="whole"), stopped(5, *flags)
    scales = read_csv(whole / "train_metrics.csv")["logit_scale"]
    assert 0 < scales[-1] < 100
    assert len(set(scales)) == 2
    combiner_train.main(["--resume", str(cut)])
    assert (cut / "train_metrics.csv").read_text() == (whole / "train_metrics.csv").read_text()
