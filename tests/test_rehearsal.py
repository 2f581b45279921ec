"""Both stages, encoding and ranking at true size on a GPU that computes nothing: devices, types, and every wait.

That tensors of two devices never meet, torch sees to (`fake_gpu.py`). Gradients in half precision are tested elsewhere,
on the CPU and with numbers: here every weight gets one, so that the rest of a step can go on.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import CIRR, FashionIQ
from combiner import Combiner, PlainCombiner, Sum
from data_utils import ImageLoader
from evaluation.retrieval import explain_all, rank, rank_all
from fake_gpu import GPU, Seen, fake_gpu
from models.backbone import Tokenizer
from models.clip_model import CLIP, backbone, ready
from models.encoder import Encoder
from models.features import FrozenSplit
from ranking import random_cirr
from trainers import stage_1_flags, stage_2_flags
from training.data import Order, TrainingData
from training.schedule import Precision
from training.stage1 import fine_tuning
from training.stage2 import combiner_training
from training.step import Stepper

# What waits for the GPU, "file function: what for" -> how often. A wait that is added, or taken away, is changed here.
FIRST_IMAGES = {"data_utils.py _on: to the GPU": 2}
STAGE_1_BATCH = {"stage1.py batches: to the GPU": 2}  # a whole epoch's tokens and ids
STAGE_2_BATCH = {
    "features.py _table: to the GPU": 1,  # references, once a training
    "stage2.py batches: to the GPU": 2,  # a whole epoch's rows and variants
}
MIXTURE = {"combiner.py run_experts: read": 1}
SCALED = {"step.py _move: read": 1}  # whether loss scaling skipped a step
LENGTHS = {"encoder.py check_lengths: read": 2}  # of images and of captions, once each
CAPTIONS = {"encoder.py captions: to the GPU": 2}  # tokens, in each batch, and their order
SCALER_STATE = {"grad_scaler.py get_scale: read": 1, "grad_scaler.py _get_growth_tracker: read": 1}
ROUTER_REPORT = {"routing.py router_statistics: read": 3, "routing.py _entropy: read": 2}
TABLES = {"features.py _table: to the GPU": 3}  # references, targets, groups; once a training
OUTSIDE = {"features.py _table: to the GPU": 1}  # what is in no VAL gallery
RANKS = {  # of a block of queries, in the group or under one protocol
    "ranking.py _check: read": 1,
    "ranking.py target_ranks: read": 3,  # whether one was excluded, which rows have ties, a tie
    "ranking.py target_ranks: nonzero": 1,
}
EQUAL = {"retrieval.py _are_equal: read": 1}  # whether the first query tells images apart
NEAREST = {"ranking.py _check: read": 1, "ranking.py nearest: nonzero": 1}
ON_THE_CPU = {"ranking.py joined: to the CPU": 6}  # the columns of a ranking

# Where matrix products are exact, whatever the precision.
EXACT = {
    "losses.py logits",
    "losses.py forward",
    "combiner.py route",
    "retrieval.py similarity_blocks",
}
ATTENTION = "_scaled_dot_product_efficient_attention"
PRODUCTS = ("convolution", "addmm", "mm", "bmm", "baddbmm", "_grouped_mm", ATTENTION)
# What takes halves, and computes in float32 inside: the means and variances of CLIP's blocks.
EXACT_INSIDE = {"lean_clip.py _normalised"}
NEVER_HALF = (
    "native_layer_norm", "_softmax", "_log_softmax", "nll_loss_forward", "logsumexp", "topk",
    "masked_fill", "masked_fill_",
)  # fmt: skip

QUERIES = 4096
# What is read where a program goes on by it: 2 of 4 experts for each query; finite similarities; an average that began.
ANSWERS = {
    "combiner.py run_experts": [QUERIES // 2] * 4,
    "ranking.py _check": True,
    "step.py update_parameters": True,
    "step.py _move": True,
}


@pytest.fixture
def gpu():
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA and makes no fake CUDA tensors")
    with fake_gpu():
        yield GPU


def waits(*parts: Mapping[str, int], times: int = 1) -> Counter[str]:
    """Several tables as one."""
    whole: Counter[str] = Counter()
    for part in parts:
        whole.update({what: number * times for what, number in part.items()})
    return whole


def assert_types(seen: Seen, products: torch.dtype, expected: str) -> None:
    """Products are in one type, but for the exact ones, and what must never be in half precision is not.

    Args:
        expected: operations that must have been there.
    """
    for operation in PRODUCTS:
        for where, types in seen.types[operation].items():
            wanted = torch.float32 if where in EXACT else products
            assert types == {wanted}, (operation, where)
    for operation in NEVER_HALF:
        for where, types in seen.types[operation].items():
            assert types <= {torch.float32} or where in EXACT_INSIDE, (operation, where)
    for operation in expected.split():
        assert seen.types[operation], operation


def frozen_split(queries: int, gallery: int, *, grouped: bool = True) -> FrozenSplit:
    """A split with features of length 768 on the GPU."""
    with unset_fake_temporarily():
        drawn = random_cirr(queries, gallery, 1, torch.device("cpu"), grouped=grouped)
    return FrozenSplit(
        split=drawn.split,
        images=torch.empty(gallery, 768, device=GPU),
        captions=torch.empty(queries, 1, 768, device=GPU),
    )


class Unread(Tokenizer):
    """A tokenizer whose tokens have no values here, so that nothing can be said of them."""

    def __call__(self, captions: list[str]) -> Tensor:
        return self.encode(captions, self.context)

    def warn_of_cuts(self, captions: list[str], tokens: Tensor) -> None: ...


# CLIPs of true width with few of their blocks, which are all alike.
CLIPS = {
    "RN50x16": (768, 384, (2, 1, 1, 1), 96, None, 77, 49408, 768, 12, 2),
    "ViT-L/14": (768, 224, 2, 1024, 14, 77, 49408, 768, 12, 2),
}


def wide_encoder(name: str) -> Encoder:
    """A CLIP of CLIPS, and images that are there."""
    model = ready(CLIP(*CLIPS[name]), GPU)
    side = model.visual.input_resolution
    about = backbone(model)
    return Encoder(
        model=model,
        backbone=replace(about, tokenizer=Unread(about.tokenizer.encode, about.tokenizer.context)),
        loader=ImageLoader(lambda path: torch.empty(3, side, side, dtype=torch.uint8), 0, GPU),
        preprocessing={"resolution": side},
        device=GPU,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize(
    ("name", "ema_decay", "steps"),
    [
        ("RN50x16", None, {None: waits(FIRST_IMAGES, SCALED)}),
        (
            "ViT-L/14",
            0.99,
            {
                None: waits(FIRST_IMAGES, SCALED),
                8: waits(SCALED),
            },
        ),
    ],
    ids=["RN50x16", "ViT-L/14"],
)
def test_steps_and_a_validation_of_stage_1(name, ema_decay, steps, gpu):
    encoder = wide_encoder(name)
    data = TrainingData(
        benchmark=CIRR(Path()),
        train=frozen_split(32, 12).split,
        val=[frozen_split(8, 12).split],
        texts=[["is red"]] * 32,
        order=Order(triplets=32, variants=1, batch_size=16, seed=0),
    )
    measured: list[FrozenSplit] = []
    words = ["--num-epochs", 1, "--learning-rate", 1e-6, "--mask-duplicate-targets"]
    words += ["--clip-grad-norm", 1]
    if ema_decay is not None:
        words += ["--ema-decay", ema_decay]
    flags = stage_1_flags(*words)
    task = fine_tuning(encoder, data, flags, lambda splits: measured.extend(splits) or {})
    with Seen() as loading:
        inputs, ids = next(iter(task.batches(0, 0)))
    assert loading.waits == waits(STAGE_1_BATCH)

    for micro_batch, expected in steps.items():
        stepper = Stepper(replace(task, micro_batch=micro_batch), flags, Precision("amp", gpu))
        with Seen(ANSWERS) as step:
            loss = stepper.step(inputs, ids)
        assert step.waits == expected
        assert (loss.dtype, loss.device, loss.requires_grad) == (torch.float32, gpu, False)
        learned = [weight for weight in encoder.model.parameters() if weight.requires_grad]
        assert all(weight.grad.device == gpu for weight in learned)
        others = "native_layer_norm _log_softmax masked_fill"
        assert_types(step, torch.float16, f"convolution addmm mm {ATTENTION} {others}")
    with Seen() as validation:
        task.validate(stepper.measured)
    assert validation.waits == waits(CAPTIONS, LENGTHS)
    assert_types(validation, torch.float32, f"convolution addmm {ATTENTION}")
    assert {(of.images.dtype, of.captions.dtype) for of in measured} == {(torch.float32,) * 2}


def combiner_stepper(
    composer, train: FrozenSplit, precision: str, micro_batch: int | None = None
) -> Stepper:
    """Stage 2 at its real size, with all that a step can have: penalties only without micro-batches."""
    words = ["--num-epochs", 1, "--ema-decay", 0.99, "--clip-grad-norm", 1]
    if micro_batch is None:
        words += ["--load-balancing-weight", 0.1, "--router-z-weight", 0.1]
    flags = stage_2_flags(*words)
    task = combiner_training(
        composer,
        train,
        [frozen_split(QUERIES, 2297)],
        order=Order(triplets=QUERIES, variants=1, batch_size=QUERIES, seed=0),
        flags=flags,
        measure=lambda _: {},
    )
    task = replace(task, micro_batch=micro_batch)
    return Stepper(task, flags, Precision(precision, GPU))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "capability", "waiting", "products"),
    [
        (PlainCombiner, "amp", 9, {}, "addmm"),
        (Combiner, "amp", 9, MIXTURE, "addmm mm topk _softmax logsumexp native_layer_norm"),
        (Combiner, "bf16", 8, MIXTURE, "addmm"),
        pytest.param(
            *(Combiner, "bf16", 9, {}, "addmm _grouped_mm"),
            marks=pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10"),
        ),
        # Where an expert without rows has a gradient that is not zero.
        (Combiner, "bf16", 10, MIXTURE, "addmm"),
        (Combiner, "fp32", 9, MIXTURE, "addmm"),
    ],
)
def test_a_step_of_stage_2(kind, precision, capability, waiting, products, gpu, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=capability)
    )
    composer = kind(768, 2560, 5120).to(gpu)
    stepper = combiner_stepper(composer, frozen_split(QUERIES, 2297, grouped=False), precision)
    with Seen(ANSWERS) as loading:
        inputs, ids = next(iter(stepper.task.batches(0, 0)))
    assert loading.waits == waits(STAGE_2_BATCH)
    with Seen(ANSWERS) as step:
        loss = stepper.step(inputs, ids)
    assert step.waits == waits(waiting, SCALED if precision == "amp" else {})
    assert (loss.dtype, loss.device) == (torch.float32, gpu)
    assert all(weight.grad.device == gpu for weight in composer.parameters())
    half = {"amp": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert_types(step, half, f"{products} _log_softmax")


@pytest.mark.slow
def test_micro_batches_of_stage_2(gpu):
    composer = Combiner(768, 2560, 5120).to(gpu)
    train = frozen_split(QUERIES, 2297, grouped=False)
    stepper = combiner_stepper(composer, train, "amp", micro_batch=QUERIES // 4)
    inputs, ids = next(iter(stepper.task.batches(0, 0)))
    with Seen(ANSWERS | {"combiner.py run_experts": [QUERIES // 8] * 4}) as step:
        stepper.step(inputs, ids)
    assert step.waits == waits(waits(MIXTURE, times=8), SCALED)  # each is computed twice
    assert_types(step, torch.float16, "addmm mm")


@pytest.mark.slow
def test_a_state_goes_to_the_cpu_and_back(gpu):
    train = frozen_split(QUERIES, 2297, grouped=False)
    first, second = (
        combiner_stepper(Combiner(768, 2560, 5120).to(gpu), train, "amp") for _ in range(2)
    )
    inputs, ids = next(iter(first.task.batches(0, 0)))
    with Seen(ANSWERS):
        first.step(inputs, ids)
    with Seen() as saving:
        states = {name: part.state_dict() for name, part in first.parts.items()}
    assert saving.waits == waits(SCALER_STATE)
    saved = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, states)
    for name, part in second.parts.items():
        part.load_state_dict(saved[name])
    for leaf in tree_leaves([second.parts["module"].state_dict(), second.task.optimizer.state]):
        assert not isinstance(leaf, Tensor) or leaf.device == gpu
    with Seen(ANSWERS) as step:
        second.step(inputs, ids)
    assert step.waits == waits(MIXTURE, SCALED)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [CIRR(Path()), FashionIQ(Path())], ids=lambda b: b.name)
@pytest.mark.parametrize("kind", [Combiner, PlainCombiner, Sum])
def test_ranking_under_all_protocols(kind, dataset, gpu):
    composer = Sum() if kind is Sum else kind(768, 2560, 5120).to(gpu)
    mixture = MIXTURE if kind is Combiner else {}
    split = frozen_split(QUERIES, 2297)
    with Seen(ANSWERS) as validation:
        rank(split, composer.eval(), dataset.protocols[:1])
    assert validation.waits == waits(mixture, TABLES, EQUAL, RANKS, RANKS, ON_THE_CPU)
    with Seen(ANSWERS) as all_of_it:
        rank_all([split], composer, dataset.protocols, k=50, block=None)
    one_protocol = waits(RANKS, NEAREST, ON_THE_CPU)
    protocols = waits(one_protocol, times=len(dataset.protocols))
    galleries = {protocol.gallery for protocol in dataset.protocols}
    tables = OUTSIDE if "VAL" in galleries else {}
    assert all_of_it.waits == waits(mixture, tables, EQUAL, RANKS, NEAREST, protocols)
    assert_types(all_of_it, torch.float32, "mm masked_fill_ topk")


@pytest.mark.slow
def test_what_is_said_of_the_experts(gpu):
    composer = Combiner(768, 2560, 5120).to(gpu)
    stepper = combiner_stepper(composer, frozen_split(QUERIES, 2297, grouped=False), "amp")
    with Seen(ANSWERS) as report:
        stepper.task.router(stepper.measured)
    tables = {"features.py _table: to the GPU": 1}
    assert report.waits == waits(tables, ROUTER_REPORT)  # no expert runs
    with Seen(ANSWERS) as insight:
        explain_all([frozen_split(QUERIES, 2297)], composer)
    composed = {"combiner.py run_experts: read": 1, "combiner.py cpu: to the CPU": 2}
    assert insight.waits == waits(tables, composed)
