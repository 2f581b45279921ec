"""Plans: what is counted without data against what torch keeps and formulas say; what fits; what is refused."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

import clip_fine_tune
import combiner_train
import data_utils
import gpus
import plan
from combiner import build_combiner
from data_utils import normalise
from models.architectures import ARCHITECTURES
from models.backbone import choose_trained
from models.clip_model import (
    CLIP,
    CLIP_MEAN,
    CLIP_STD,
    TINY_VISION,
    backbone,
    checkpoint_gradients,
    load_clip,
    tokenize,
    write_tiny_clip,
)
from models.encoder import load_backbone
from runtime.choices import OPENAI_CLIPS
from runtime.gpus import GPUS, seconds
from settings.groups import WantedCombiner
from test_backbones import FORMS, models_made  # noqa: F401
from timing import saved_activations
from training import losses, planning
from training.losses import ContrastiveLoss
from training.planning import (
    CountedClip,
    PlannedCombinerTraining,
    PlannedFineTuning,
    Sizes,
    Way,
    combiner_to_count,
    count,
    empty,
    without_data,
)
from training.schedule import Precision
from training.stage1 import SumFeatures
from training.stage2 import ComposedFeatures
from training.step import Gradient

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
PIXELS = 64
SIZES = Sizes(name="data", triplets=1000, variants=1, images=200, val=[(50, 100), (30, 80)])
# As OpenAI published them.
PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    """Paths of tiny CLIPs by kind; the ViT has two blocks, as every block costs time to be counted."""
    paths = {kind: tmp_path_factory.mktemp("clip") / f"{kind}.pt" for kind in ("vit", "resnet")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_VISION["vit"], "vision_layers", 2)
        for kind, path in paths.items():
            write_tiny_clip(path, kind, image_resolution=PIXELS)
    return {kind: str(path) for kind, path in paths.items()}


@pytest.fixture(params=["vit", "resnet"])
def tiny(request, clips) -> str:
    """The path of a tiny CLIP."""
    return clips[request.param]


@pytest.fixture
def vit(clips) -> str:
    """The path of a tiny ViT."""
    return clips["vit"]


# One for all tests, as it remembers what it counted.
counted_clip = functools.cache(CountedClip)


def exact_step(model, micro_batch: int | None = None) -> Gradient:
    """A step of a training in float32."""
    return Gradient(
        model=model,
        loss=ContrastiveLoss(),
        precision=FP32,
        scaler=FP32.scaler(),
        micro_batch=micro_batch,
    )


def largest_gradient(model) -> int:
    """Bytes of a gradient before it is added to that of earlier rows, at the most."""
    return max(weight.numel() * weight.element_size() for weight in model.parameters())


def fine_tuning(name: str, trained: str = "both", **changes) -> PlannedFineTuning:
    clip = counted_clip(name, trained)
    return PlannedFineTuning(**{"clip": clip, "sizes": SIZES, "precision": "fp32", **changes})


@functools.cache
def combiner_training(
    name: str, projection_dim: int = 64, hidden_dim: int = 96
) -> PlannedCombinerTraining:
    clip = counted_clip(name, "both")
    choice = WantedCombiner(
        combiner_type="moe",
        projection_dim=projection_dim,
        hidden_dim=hidden_dim,
        num_experts=4,
        top_k=2,
    )
    return PlannedCombinerTraining(
        clip=clip,
        sizes=SIZES,
        precision="fp16",
        combiner=combiner_to_count(clip, choice),
        experts=4,
    )


def work(parts) -> dict[str, float]:
    return {part.part: part.operations for part in parts}


def test_architectures_are_those_that_openai_published():
    assert tuple(ARCHITECTURES) == OPENAI_CLIPS
    for name, sizes in ARCHITECTURES.items():
        with torch.device("meta"):
            model = CLIP(*sizes)
        assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_stage_1_keeps_is_what_autograd_keeps(tiny, micro_batch, checkpointed):
    batch = 16
    model = load_clip(tiny, CPU)
    choose_trained(model, "both")
    if checkpointed:
        checkpoint_gradients(model)
    images = torch.randint(256, (2, batch, 3, PIXELS, PIXELS), dtype=torch.uint8)
    tokens = tokenize(["has more stripes"] * batch)
    features = SumFeatures(model, backbone(model))
    inputs = [images[0], images[1], tokens]
    gradient = exact_step(features, micro_batch)
    saved = saved_activations(lambda: gradient.add(inputs, torch.arange(batch)), model)
    way = Way(batch_size=batch, micro_batch_size=micro_batch, gradient_checkpointing=checkpointed)
    planned = counted_clip(tiny, "both").activations(way, "fp32")
    if checkpointed:  # and one block's again
        whole = Way(batch_size=batch, micro_batch_size=micro_batch)
        kept = counted_clip(tiny, "both").activations(whole, "fp32")
        assert saved < planned < kept + largest_gradient(model)
    else:
        assert planned == pytest.approx(saved, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_other_clips_keep_is_what_autograd_keeps(form, models_made):  # noqa: F811
    """Counted without their weights."""
    name = f"local-dir:{models_made / form}"
    batch = 8
    model, about = load_backbone(name, CPU)
    choose_trained(model, "both")
    images = torch.randint(256, (2, batch, 3, about.resolution, about.resolution)).byte()
    tokens = about.tokenizer(["has more stripes"] * batch)
    features = SumFeatures(model, about)
    inputs = [images[0], images[1], tokens]
    gradient = exact_step(features)
    saved = saved_activations(lambda: gradient.add(inputs, torch.arange(batch)), model)
    clip = counted_clip(name, "both")
    assert (clip.dim, clip.backbone.resolution) == (about.dim, about.resolution)
    planned = clip.activations(Way(batch_size=batch), "fp32")
    assert planned == pytest.approx(saved, rel=0.15)
    if form in (
        "resnet",
        "timm",
        "hf",
    ):  # blocks of three packages; those of the others are timm's or hf's
        again = clip.activations(Way(batch_size=batch, gradient_checkpointing=True), "fp32")
        assert again < planned + largest_gradient(model)


@pytest.mark.parametrize("kind", ["moe", "clip4cir"])
def test_what_stage_2_keeps_is_what_autograd_keeps(kind):
    batch, dim = 64, 32
    combiner = build_combiner(
        {
            "combiner_type": kind,
            "clip_dim": dim,
            "projection_dim": 64,
            "hidden_dim": 96,
            "num_experts": 4,
            "top_k": 2,
        }
    )
    model = ComposedFeatures(combiner, with_router=False).train()
    inputs = list(F.normalize(torch.randn(3, batch, dim), dim=-1))
    gradient = exact_step(model)
    saved = saved_activations(
        lambda: gradient.add(inputs, torch.arange(batch)),
        model,
    )
    features = [empty(batch, dim) for _ in range(3)]
    ids = empty(batch, dtype=torch.long)
    counted = count(
        lambda: [ContrastiveLoss()(*model(*features), ids)],
        given=[without_data(model), *features, ids],
        backward=True,
        value_read=batch * combiner.top_k // 4,
    )
    assert counted.peak == pytest.approx(saved, rel=0.1)


@pytest.mark.slow
def test_activations_between_two_counts_are_never_too_few(clips):
    clip = counted_clip(clips["resnet"], "both")
    for checkpointed in (False, True):
        whole = Way(batch_size=16, gradient_checkpointing=checkpointed)
        part = dataclasses.replace(whole, micro_batch_size=4)
        alone = dataclasses.replace(whole, batch_size=4)
        exact = clip.activations(alone, "fp32")
        assert exact <= clip.activations(part, "fp32") < clip.activations(whole, "fp32")


def test_operations_of_a_vit_are_those_of_its_matrix_products(vit):
    def layer(length: int, width: int) -> int:
        """Queries, keys and values; both products of attention; its output; two layers of 4 widths."""
        products = 3 * length * width**2 + 2 * length**2 * width
        return 2 * (products + length * width**2 + 8 * length * width**2)

    patches = (PIXELS // 8) ** 2
    image = 2 * patches * 3 * 8**2 * 64 + 2 * layer(patches + 1, 64) + 2 * 64 * 64
    text = 2 * layer(77, 64) + 2 * 64 * 64
    step = work(fine_tuning(vit).step(Way(batch_size=16)))
    assert step["forward"] == 16 * (2 * image + text)
    assert step["backward"] == 2 * step["forward"]
    assert step["loss"] == 3 * 2 * 16 * 16 * 64
    text_alone = work(fine_tuning(vit, "text").step(Way(batch_size=16)))
    assert text_alone["backward"] == 2 * 16 * text
    careful = Way(batch_size=16, micro_batch_size=4, gradient_checkpointing=True)
    again = work(fine_tuning(vit, "text").step(careful))
    assert again["forward again, for micro-batches"] == step["forward"]
    assert again["forward again, for checkpointing"] == 16 * text


def test_operations_of_the_combiners_grow_with_the_rows_of_their_experts(vit):
    """k of 4 experts run for each row; all else is dense."""
    one, two = (
        work(combiner_training(vit).step(Way(batch_size=rows)))["forward"] for rows in (40, 80)
    )
    assert two == 2 * one
    joint, hidden, dim = 128, 96, 64
    projections = 2 * dim * 64
    attention = 2 * (3 * 64 * 64 + 2 * 2 * 64 + 64 * 64)
    moe = joint * 4 + 2 * joint * hidden
    gate = joint * hidden + hidden * dim
    assert one == 2 * 40 * (projections + attention + moe + gate + hidden * dim)
    composed = work(combiner_training(vit).validation())[f"composing {SIZES.queries} queries"]
    assert composed == one * SIZES.queries / 40


def test_a_bank_is_counted_by_its_targets_and_in_blocks(vit, monkeypatch):
    """Two products of all queries with all targets, and no more logits in memory than a block's."""
    way = Way(batch_size=80)
    batch = combiner_training(vit)
    bank = dataclasses.replace(batch, negatives="bank")
    product = 2 * 80 * SIZES.images * 64
    assert work(bank.step(way))["loss"] == work(bank.step(way))["loss's gradients"] == product
    assert [part.precision for part in bank.step(way)] == ["fp16", "fp16", "fp32", "fp16"]
    kept = {name: size for name, size in batch.passing(way).items() if name[:4] != "loss"}
    assert kept.items() <= bank.passing(way).items()
    of_one_block = bank.passing(way)["loss and its gradients"]
    monkeypatch.setattr(losses, "MOST_LOGITS", 8 * SIZES.images)
    planning._lost.cache_clear()
    assert bank.passing(way)["loss and its gradients"] < of_one_block
    planning._lost.cache_clear()


def test_hard_negatives_are_read_encoded_and_compared(vit):
    way = Way(batch_size=16)
    plain, hard = (fine_tuning(vit, hard_negatives=number) for number in (0, 2))
    (image, _) = plain.clip.encoding(2 * 16, 0)
    assert work(hard.step(way))["forward"] - work(plain.step(way))["forward"] == image.operations
    assert work(hard.step(way))["loss"] == 3 * work(plain.step(way))["loss"] > 0
    for training in (plain, combiner_training(vit)):
        more = dataclasses.replace(training, hard_negatives=2).passing(way)
        assert more["this batch and the next"] > training.passing(way)["this batch and the next"]


def test_memory_of_weights_gradients_optimizer_and_average(vit):
    model = load_clip(vit, CPU)
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    image = sum(count for name, count in counts.items() if name.startswith("visual."))
    everything = 4 * sum(counts.values())
    both = fine_tuning(vit, averaged=True).lasting()
    assert both["weights"] == both["moving average"] == everything
    assert both["gradients"] == everything - 4  # the logit scale does not learn
    assert both["optimizer"] == 2 * both["gradients"]
    alone = fine_tuning(vit, "image").lasting()
    assert alone["gradients"] == 4 * image
    assert alone["moving average"] == 0


# Of true width, and shallow, so that they are quickly counted.
SHALLOW = {
    "shallow RN50x4": (640, 288, (1, 1, 2, 1), 80, None, 77, 49408, 640, 10, 2),
    "shallow ViT-B/32": (512, 224, 2, 768, 32, 77, 49408, 512, 8, 2),
}
# GiB of a training step that torch allocated for CUDA, on a driver that computes nothing.
ALLOCATED = {
    ("shallow RN50x4", Way(batch_size=128)): 8.23,
    ("ViT-B/32", Way(batch_size=128)): 6.75,
    (
        "shallow ViT-B/32",
        Way(batch_size=128, micro_batch_size=64, gradient_checkpointing=True),
    ): 1.27,
}


@pytest.fixture
def shallow(monkeypatch):
    """Models of SHALLOW can be chosen by name."""
    monkeypatch.setattr(planning, "find_clip", lambda name: None)  # none is a file
    for name, sizes in SHALLOW.items():
        monkeypatch.setitem(ARCHITECTURES, name, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name, way", ALLOCATED)
def test_a_step_takes_what_torch_allocates(name, way, shallow):
    planned = fine_tuning(name, precision="fp16").needed(way)
    assert planned / plan.GIB == pytest.approx(ALLOCATED[name, way], rel=0.1)


@pytest.mark.slow
def test_an_epoch_of_stage_2_takes_what_torch_allocates(shallow):
    training = combiner_training("shallow RN50x4", projection_dim=2560, hidden_dim=5120)
    (sizes,) = (sizes for sizes in gpus.SIZES if sizes.name == "CIRR")
    training = dataclasses.replace(training, sizes=sizes)
    assert training.needed(Way(batch_size=4096)) / plan.GIB == pytest.approx(13.36, rel=0.1)


def test_long_heads_take_a_workspace_and_short_ones_do_not(vit):
    short, long = (
        combiner_training(vit, projection_dim=dim).passing(Way(batch_size=32)) for dim in (512, 640)
    )
    assert short["attention's workspace"] == 0
    assert long["attention's workspace"] == 32 * 4 * 256 * 160 * 4


def test_the_first_way_that_fits_is_taken(vit, monkeypatch):
    monkeypatch.setattr(planning, "SMALLEST_MICRO_BATCH", 4)
    training = fine_tuning(vit)
    asked = Way(batch_size=16)
    ways = [asked, *training.ways(asked)]
    assert ways[1:3] == [Way(batch_size=16, micro_batch_size=rows) for rows in (8, 4)]
    assert ways[3] == Way(batch_size=16, gradient_checkpointing=True)
    assert ways[-1] == Way(batch_size=16, micro_batch_size=1, gradient_checkpointing=True)
    for way in ways:
        fitting = training.first_that_fits(asked, training.needed(way))
        assert training.needed(fitting) <= training.needed(way)
        for earlier in ways[: ways.index(fitting)]:
            assert training.needed(earlier) > training.needed(way)
    assert training.first_that_fits(asked, training.needed(asked)) == asked
    assert training.first_that_fits(asked, sum(training.lasting().values())) is None
    assert "no flag makes it fit" in plan.verdict(training, asked, None)


def test_stage_2_takes_a_smaller_batch(vit):
    training = combiner_training(vit)
    asked = Way(batch_size=8192)
    fitting = training.first_that_fits(asked, training.needed(asked) - 1)
    assert fitting == Way(batch_size=4096)


def test_galleries_that_no_epoch_changes_are_encoded_once(vit):
    assert work(fine_tuning(vit, "text").once())["encoding 180 images"] > 0
    assert work(fine_tuning(vit, "text").validation())["encoding 0 images"] == 0
    assert fine_tuning(vit).once() == []
    assert work(fine_tuning(vit).validation())["encoding 180 images"] > 0


def test_time_is_operations_over_a_share_of_the_rate(vit):
    training = fine_tuning(vit, precision="fp16")
    step = training.step(Way(batch_size=100))
    expected = sum(part.operations for part in step[:2]) / (0.4 * 65e12)
    expected += step[2].operations / (0.4 * 8.1e12)  # the loss is in float32
    assert seconds(step, GPUS["t4"]) == pytest.approx(expected)
    assert seconds(training.epoch(Way(batch_size=300)), GPUS["t4"]) == pytest.approx(
        3 * seconds(training.step(Way(batch_size=300)), GPUS["t4"])
    )


def test_sizes_are_those_of_the_official_files():
    by_name = {sizes.name: sizes for sizes in gpus.SIZES}
    fashion = by_name["FashionIQ"]
    assert (fashion.triplets, fashion.images, fashion.variants) == (18_000, 46_609, 4)
    assert (fashion.queries, fashion.gallery) == (6_016, 15_536)
    assert by_name["CIRR"].similarities == 4181 * 2297 * 5


def test_counting_leaves_no_trace(vit):
    resized = torch.UntypedStorage.resize_
    data_utils._on.cache_clear()
    CountedClip(vit, "both", precision="fp16").encoding(1, 1)
    assert torch.UntypedStorage.resize_ is resized
    assert not torch.is_autocast_enabled("cpu")
    pixels = normalise(torch.zeros(3, 2, 2, dtype=torch.uint8), CLIP_MEAN, CLIP_STD)
    black = [-mean / deviation for mean, deviation in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    assert pixels[:, 0, 0].tolist() == pytest.approx(black)


TINY = "--batch-size 64 --num-epochs 4 --triplets 1000 50 --images 200 100"


@pytest.mark.slow
def test_a_plan_of_stage_1_says_what_fits(vit, capsys, monkeypatch):
    monkeypatch.setattr(planning, "CountedClip", counted_clip)  # both plans are of the same
    flags = ["stage1", "--clip-model-name", vit, *TINY.split()]
    plan.main([*flags, "--gpu", "t4"])
    said = capsys.readouterr().out
    assert "It fits." in said
    assert "an epoch of your data, 15 steps" in said
    assert "4 epochs with 4 validations" in said
    plan.main([*flags, "--memory", "0.12"])
    said = capsys.readouterr().out
    assert "It does not fit. This does: --micro-batch-size" in said
    assert "seconds" not in said  # of a GPU without a name


def test_a_plan_of_stage_2_says_what_fits(vit, capsys):
    flags = ["stage2", "--clip-model-name", vit, *TINY.split(), "--projection-dim", "64"]
    plan.main([*flags, "--hidden-dim", "96", "--gpu", "h100"])
    said = capsys.readouterr().out
    assert "It fits." in said
    assert "encoding 300 images" in said
    assert "4 epochs with 2 validations" in said


REFUSED = {
    "--dataset CIRR": "--gpu",
    "--gpu t4": "--dataset",
    "--gpu t4 --triplets 5 5": "--images",
    "--gpu t4 --dataset CIRR --precision bf16": "bf16",
    "--gpu t4 --dataset CIRR --encode-precision tf32": "tf32",
    "--gpu t4 --dataset CIRR --batch-size 8 --micro-batch-size 9": "--micro-batch-size 9",
    "--gpu t4 --dataset CIRR --batch-size 30000": "28225",
    "--gpu t4 --dataset CIRR --resume run": "--resume",
    "--gpu t4 --dataset CIRR --clip-model-name RN51": "RN51",
    "--gpu t5 --dataset CIRR": "t5",
    "--gpu t4 --dataset CIRR --memory 0": "--memory",
    "--gpu t4 --dataset CIRR --triplets 5 --images 5 5": "--triplets",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_planned_is_refused(line, vit, capsys):
    own = [] if "--clip-model-name" in line else ["--clip-model-name", vit]
    with pytest.raises(SystemExit) as stop:
        plan.main(["stage1", *own, *line.split()])
    assert stop.value.code == 2
    assert REFUSED[line] in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_impossible_combiner_is_refused(vit, capsys):
    flags = ["stage2", "--clip-model-name", vit, "--gpu", "t4", "--dataset", "CIRR"]
    with pytest.raises(SystemExit) as stop:
        plan.main([*flags, "--top-k", "5"])
    assert stop.value.code == 2
    assert "--top-k 5" in capsys.readouterr().err


@pytest.mark.parametrize("script, stage", [(clip_fine_tune, "stage1"), (combiner_train, "stage2")])
def test_a_plan_takes_the_flags_of_its_training_with_their_defaults(script, stage):
    training = vars(script.parse(["--dataset", "CIRR"]))
    planned = vars(plan.parse([stage, "--dataset", "CIRR"]))
    own = {
        name: value
        for name, value in training.items()
        if name not in ("script", "command", "started_in")
    }
    assert own.items() <= planned.items()


def test_the_guide_has_a_row_for_every_clip_and_gpu():
    _, _, table = gpus.GUIDE.read_text().partition(gpus.MARK)
    for name in gpus.CLIPS:
        for gpu in GPUS.values():
            assert table.count(f"\n| {name} | {gpu.title} |") == 1


@pytest.mark.slow
def test_the_guides_table_is_what_is_computed(monkeypatch):
    monkeypatch.setattr(gpus, "CountedClip", counted_clip)
    rows = "\n".join(gpus.rows_of("ViT-B/32"))
    assert rows in gpus.GUIDE.read_text(), "write it again: python docs/gpus.py"
