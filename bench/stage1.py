"""Measure stage 1: the loader with a warm image cache, the memory of a step, and on a GPU the speed of steps."""

import functools
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

import shapes_dataset
from data_utils import ImageLoader, Reader, load_image, make_preprocess, normalise
from models import lean_clip
from models.architectures import ARCHITECTURES
from models.clip_model import (
    CLIP,
    CLIP_MEAN,
    CLIP_STD,
    backbone,
    load_clip,
    ready,
    tokenize,
    write_tiny_clip,
)
from runtime.tensors import save_tensors
from timing import Cost, Row, Setting, Step, cost, in_turns, saved_activations, seconds, typical
from trainers import stage_1_flags
from training.image_cache import ImageCache
from training.losses import ContrastiveLoss
from training.saving import Progress, save_state
from training.schedule import Precision
from training.stage1 import SumFeatures
from training.step import Stepper, Task
from twins import plain_clip_step

FUSED = (
    torch.ops.aten.cudnn_convolution_relu,
    torch.ops.aten.cudnn_convolution_add_relu,
)
TIMED = ("RN50x16", "ViT-L/14")
TINY_ARCHITECTURES = {
    "RN50x16": (16, 64, (1, 1, 1, 1), 16, None, 77, 49408, 16, 1, 1),
    "ViT-L/14": (16, 32, 1, 64, 8, 77, 49408, 16, 1, 1),
}


def photos(folder: Path, count: int) -> list[Path]:
    """Write synthetic JPEG files of the size of photos on the web, and return their paths."""
    rng = random.Random(0)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        drawn = shapes_dataset.draw(shapes_dataset.random_scene(rng), rng)
        drawn.resize((rng.randint(400, 700), rng.randint(500, 800))).save(path)
    return paths


def loading(
    paths: list[Path], read: Reader, workers: int, device: torch.device
) -> Callable[[], None]:
    """Return a function that loads all images in batches of 32."""
    chunks = [paths[i : i + 32] for i in range(0, len(paths), 32)]

    def load() -> None:
        for _ in ImageLoader(read, workers, device).batches(chunks):
            pass

    return load


def loader(setting: Setting) -> Iterator[Row]:
    """Time the loading of photos at 384 px with and without cache; on a GPU machine, also decoding in workers."""
    device = setting.device
    count, rounds = setting.choose(gpu=(128, 1), cpu=(256, 5), tiny=(8, 1))
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), count)
        read = functools.partial(load_image, preprocess=make_preprocess("targetpad", 1.25, 384))
        cache = Path(folder) / "cache"
        cached = ImageCache(
            folder=cache, paths=paths, read=read, preprocessing={"resolution": 384}
        ).open()
        quick, slow = loading(paths, cached, 0, device), loading(paths, read, 0, device)
        ours, twin = in_turns(quick, slow, device, rounds=rounds, twin_rounds=rounds)
        what = f"stage-1 loader, {count} images, 384 px, warm image cache / decoding"
        yield {"figure": what, "ours": ours, "twin": twin, "must": "10 x"}
        for workers in setting.choose(gpu=(8, 16), cpu=(), tiny=(1,)):
            many = paths * 8
            taken = seconds(loading(many, read, workers, device), device)
            what = (
                f"decoding {len(many)} images to 384 px, {workers} processes, their start included"
            )
            yield {"figure": what, "ours": taken, "note": f"{len(many) / taken:.0f} images/s"}


def random_clip(name: str, setting: Setting) -> CLIP:
    """Return the clip package's CLIP of an architecture with random weights; in a dry run, a tiny CLIP of its kind."""
    sizes = (TINY_ARCHITECTURES if setting.rehearses else ARCHITECTURES)[name]
    with setting.device:  # drawing so many random numbers on the CPU would take seconds
        return CLIP(*sizes).float().eval()


def make_stepper(
    model: CLIP, device: torch.device, micro_batch: int | None = None, compiled: bool = False
) -> Stepper:
    """Return stage 1's optimizer steps on a model, all of whose weights are trained."""
    ready(model, device)
    model.logit_scale.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(learned, lr=1e-6, eps=1e-7, fused=True)
    task = Task(
        batches=lambda *_: [],
        steps=1,
        model=SumFeatures(model, backbone(model)),
        module=model,
        loss=ContrastiveLoss(),
        optimizer=optimizer,
        validate=lambda measured: {},
        micro_batch=micro_batch,
    )
    flags = stage_1_flags(*["--compile"] * compiled)
    return Stepper(task, flags, Precision("amp", device))


def random_batch(model: CLIP, batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return random references and targets (B, 3, R, R) uint8, and the tokens (B, 77) of different captions."""
    pixels = model.visual.input_resolution
    images = torch.randint(256, (2, batch, 3, pixels, pixels), dtype=torch.uint8, device=device)
    tokens = tokenize([f"has {i} more stripes and is red" for i in range(batch)]).to(device)
    return images[0], images[1], tokens


def make_step(model: CLIP, batch: int, device: torch.device, **how: object) -> Step:
    """Return a function that runs one of our steps on random images; for `how` see `make_stepper`."""
    stepper = make_stepper(model, device, **how)
    inputs = random_batch(model, batch, device)
    ids = torch.arange(batch, device=device)
    return lambda: stepper.step(list(inputs), ids)


def make_plain_step(model: CLIP, batch: int, device: torch.device) -> Step:
    """Return a function that runs a step of the reference implementation on random images."""
    optimizer = AdamW(model.parameters(), lr=1e-6, eps=1e-7)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    references, targets, tokens = random_batch(model, batch, device)
    images = [normalise(part, CLIP_MEAN, CLIP_STD) for part in (references, targets)]
    return lambda: plain_clip_step(model, optimizer, scaler, *images, tokens)


def step_memory(setting: Setting) -> Iterator[Row]:
    """Compare the activations of a step in micro-batches of 16 with those of a plain step, on the tiny ResNet."""
    device = setting.device
    batch = setting.choose(gpu=256, cpu=256, tiny=32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.pt"
        write_tiny_clip(path, "resnet", image_resolution=setting.choose(gpu=96, cpu=96, tiny=32))
        used = []
        for micro_batch in (16, None):
            model = load_clip(str(path), device)
            step = make_step(model, batch, device, micro_batch=micro_batch)
            used.append(saved_activations(step, model))
    what = f"stage-1 step, batch {batch}, activations with micro-batch 16 / plain step"
    yield {
        "figure": what,
        "ours / twin": used[0] / used[1],
        "note": f"{used[0] / 2**20:.0f} MiB / {used[1] / 2**20:.0f} MiB",
        "must": "at most a quarter",
    }


def figures(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the results table."""
    yield from loader(setting)
    yield from step_memory(setting)


def costs(name: str, batch: int, setting: Setting, **how: object) -> Cost | None:
    """Measure the cost of our step for an architecture."""
    return cost(
        lambda: make_step(random_clip(name, setting), batch, setting.device, **how), setting
    )


def speed(name: str, batches: tuple[int, ...], setting: Setting) -> Iterator[Row]:
    """Measure images/s of our step and of the reference step; only one of the models is in memory at a time."""
    rate = matrix_rate(setting)
    operations = operations_a_triplet(name, setting)
    for batch in setting.choose(gpu=batches, tiny=(2,)):
        ours = costs(name, batch, setting)
        plain = cost(
            lambda batch=batch: make_plain_step(random_clip(name, setting), batch, setting.device),
            setting,
            rounds=3,
        )
        row: Row = {
            "figure": f"stage-1 step of {name}, batch {batch} / plain step",
            "must": "1.5 x",
            "note": f"{gib(ours)} / {gib(plain)}",
        }
        if ours is not None:
            row["ours"] = ours.seconds
            row["images/s"] = 2 * batch / ours.seconds
            row["share of matrix rate"] = batch * operations / ours.seconds / rate
            share = f"{100 * row['share of matrix rate']:.0f} % of the measured matrix rate"
            row["note"] += f"; {row['images/s']:.0f} images/s, {share}"
            if plain is not None:
                row["twin"] = plain.seconds
        yield row


def gib(spent: Cost | None) -> str:
    """Format the memory of a step."""
    return "out of memory" if spent is None else f"{spent.peak:.1f} GiB"


def operations_a_triplet(name: str, setting: Setting, batch: int = 2) -> float:
    """Count the floating-point operations of a step per triplet."""
    step = make_step(random_clip(name, setting), batch, setting.device)
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(FUSED, fused)) as counter:
        step()
    return counter.get_total_flops() / batch


def fused(images, weight, *rest, out_shape, **more) -> int:
    """Count the operations of a convolution in a fused cuDNN kernel, which torch's counter does not know."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def matrix_rate(setting: Setting) -> float:
    """Measure the floating-point operations per second of a large matrix multiplication, in fp16 on a GPU."""
    size, dtype = setting.choose(gpu=(8192, torch.float16), tiny=(64, torch.float32))
    left, right = torch.randn(2, size, size, device=setting.device, dtype=dtype)
    return 2 * size**3 / typical(lambda: left @ right, setting, rounds=10)


def figures_of_resnet(setting: Setting) -> Iterator[Row]:
    """Measure RN50x16, at a batch size that fits small GPUs and at the original's."""
    yield from speed("RN50x16", (32, 128), setting)


def figures_of_vit(setting: Setting) -> Iterator[Row]:
    """Measure ViT-L/14, at a batch size that fits small GPUs and at the original's."""
    yield from speed("ViT-L/14", (64, 128), setting)


def large_batch(setting: Setting) -> Iterator[Row]:
    """Measure the memory of a step of RN50x16 with 1,024 triplets in micro-batches of 16."""
    batch, micro = setting.choose(gpu=(1024, 16), tiny=(4, 2))
    make = functools.partial(
        make_step, random_clip("RN50x16", setting), batch, setting.device, micro_batch=micro
    )
    spent = cost(make, setting, rounds=1, unmeasured=0)
    yield {
        "figure": f"stage-1 step of RN50x16, batch {batch:,} in micro-batches of {micro}, all memory",
        "note": gib(spent),
        "must": "within 24 GiB",
    }


def memory(setting: Setting) -> Iterator[Row]:
    """Measure the peak memory of a step with the original's batch size in micro-batches."""
    batch, micro_batch = setting.choose(gpu=(128, 32), tiny=(4, 2))
    for name in TIMED:
        spent = costs(name, batch, setting, micro_batch=micro_batch)
        row: Row = {
            "figure": f"stage-1 step of {name}, batch {batch} in micro-batches of {micro_batch}, all memory",
            "note": gib(spent),
        }
        if spent is not None:
            row["ours"] = spent.seconds
        yield row


def variants(setting: Setting) -> Iterator[Row]:
    """Compare a step of RN50x16 with its variants: channels first, cuDNN's benchmark mode, and no fused kernels."""
    name, device = "RN50x16", setting.device
    batch = setting.choose(gpu=32, tiny=2)
    ours = costs(name, batch, setting)

    def channels_first() -> Step:
        model = random_clip(name, setting)
        step = make_step(model, batch, device)
        model.visual.to(memory_format=torch.contiguous_format)
        return step

    first = cost(channels_first, setting)
    torch.backends.cudnn.benchmark = True
    timed = costs(name, batch, setting)
    torch.backends.cudnn.benchmark = False
    with mock.patch.object(lean_clip, "has_fused_kernel", lambda _: False):
        unfused = costs(name, batch, setting)
    for what, other in (
        ("channels first", first),
        ("cudnn.benchmark", timed),
        ("convolution, sum and ReLU apart", unfused),
    ):
        yield beside(f"stage-1 step of {name}, batch {batch} / {what}", ours, other)


def beside(what: str, ours: Cost | None, other: Cost | None) -> Row:
    """Return the row that compares a step with a variant."""
    row: Row = {"figure": what, "note": f"{gib(ours)} / {gib(other)}"}
    if ours is not None and other is not None:
        row.update({"ours": ours.seconds, "twin": other.seconds})
    return row


def compiled(name: str, batch: int, setting: Setting) -> Iterator[Row]:
    """Compare a step with `--compile` and a plain step, and time the first compiled step."""
    # In a dry run, the compiler is called, but compiles nothing.
    torch.compiler.set_stance("force_eager" if setting.rehearses else "default")
    batch = setting.choose(gpu=batch, tiny=2)
    plain = costs(name, batch, setting)
    first: list[float] = []

    def make() -> Step:
        step = make_step(random_clip(name, setting), batch, setting.device, compiled=True)
        first.append(seconds(step, setting.device))
        return step

    row = beside(
        f"stage-1 step of {name}, batch {batch}, --compile / as it is", cost(make, setting), plain
    )
    row["note"] += f"; the first step takes {first[0]:.0f} s" if first else ""
    yield row


def compiled_resnet(setting: Setting) -> Iterator[Row]:
    """Measure a compiled step of RN50x16."""
    yield from compiled("RN50x16", 32, setting)


def compiled_vit(setting: Setting) -> Iterator[Row]:
    """Measure a compiled step of ViT-L/14."""
    yield from compiled("ViT-L/14", 64, setting)


def saving(setting: Setting) -> Iterator[Row]:
    """Time the saving of a training run's state and of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TIMED:
            model = random_clip(name, setting)
            stepper = make_stepper(model, setting.device)
            inputs = random_batch(model, 2, setting.device)
            stepper.step(list(inputs), torch.arange(2, device=setting.device))
            file = Path(folder) / "saved.pt"
            state = functools.partial(save_state, file, stepper.parts, Progress(), setting.device)
            weights = functools.partial(save_tensors, file, {"CLIP": model.state_dict()})
            for what, save in (("state", state), ("weights", weights)):
                taken = seconds(save, setting.device)
                size = f"{file.stat().st_size / 1e9:.2f} GB"
                yield {"figure": f"saving the {what} of {name}", "ours": taken, "note": size}
            file.unlink()
