"""Stage 1: the loader from a warm image cache, a step's memory, and on a GPU its speed."""

import functools
import random
import tempfile
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

import shapes_dataset
from data_utils import ImageLoader, load_image, make_preprocess, normalise
from models.architectures import ARCHITECTURES
from models.clip_model import CLIP, load_clip, ready, tokenize, write_tiny_clip
from runtime import distributed
from timing import in_turns, saved_activations
from training.image_cache import ImageCache
from training.loop import Stepper, Task
from training.schedule import Precision, Schedule
from training.stage1 import SumFeatures
from twins import plain_clip_step

GIB = 2**30


def loader(device: torch.device) -> list[dict]:
    """256 photos-sized JPEG files to batches of 384 px, in this process alone."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(256)]
        for path in paths:
            drawn = shapes_dataset.draw(shapes_dataset.random_scene(rng), rng)
            drawn.resize((rng.randint(400, 700), rng.randint(500, 800))).save(path)
        read = functools.partial(load_image, preprocess=make_preprocess("targetpad", 1.25, 384))
        cached = ImageCache(
            folder=Path(folder) / "cache", paths=paths, read=read, recipe={"resolution": 384}
        ).open()
        chunks = [paths[i : i + 32] for i in range(0, 256, 32)]

        def load(reader):
            return lambda: [None for _ in ImageLoader(reader, 0, device).batches(chunks)]

        ours, twin = in_turns(load(cached), load(read), device)
    what = "stage-1 loader, 256 images, 384 px, warm image cache / decoding"
    return [{"figure": what, "ours": ours, "twin": twin, "must": "10 x"}]


def make_step(model: CLIP, batch: int, micro_batch: int | None, device: torch.device):
    """A function that takes one of our steps on random images."""
    model.logit_scale.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(learned, lr=1e-6, eps=1e-7, fused=device.type == "cuda")
    task = Task(
        batches=lambda *_: [],
        steps=1,
        model=distributed.parallel(SumFeatures(model), device),
        optimizer=optimizer,
        validate=dict,
        module=model,
    )
    schedule = Schedule(num_epochs=1, validation_frequency=1, micro_batch_size=micro_batch)
    stepper = Stepper(task, schedule, Precision("amp", device))
    pixels = model.visual.input_resolution
    images = torch.randint(256, (2, batch, 3, pixels, pixels), dtype=torch.uint8).to(device)
    tokens = tokenize([f"has {i} more stripes and is red" for i in range(batch)]).to(device)
    ids = torch.arange(batch, device=device)
    return lambda: stepper.step([images[0], images[1], tokens], ids)


def step_memory(device: torch.device) -> list[dict]:
    """Activations of a step of 256 triplets, all at once and 16 at a time, on the tiny ResNet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.pt"
        write_tiny_clip(path, "resnet", image_resolution=96)
        used = []
        for micro_batch in (16, None):
            model = load_clip(str(path), device)
            used.append(saved_activations(make_step(model, 256, micro_batch, device), model))
    note = f"{used[0] / 2**20:.0f} MiB / {used[1] / 2**20:.0f} MiB"
    what = "stage-1 step, batch 256, activations with micro-batch 16 / plain step"
    return [
        {
            "figure": what,
            "ours / twin": used[0] / used[1],
            "note": note,
            "must": "at most a quarter",
        }
    ]


def speed(name: str, device: torch.device, batch: int = 128) -> list[dict]:
    """Images a second of a step on a GPU against the plain twin, true architecture, random weights."""
    model = ready(CLIP(*ARCHITECTURES[name]), device)
    ours = make_step(model, batch, None, device)
    other = CLIP(*ARCHITECTURES[name]).float().to(device).eval()
    optimizer, scaler = (
        AdamW(other.parameters(), lr=1e-6, eps=1e-7),
        torch.amp.GradScaler(device.type),
    )
    pixels = other.visual.input_resolution
    images = normalise(torch.randint(256, (2, batch, 3, pixels, pixels), dtype=torch.uint8)).to(
        device
    )
    tokens = tokenize(["has more stripes"] * batch).to(device)
    fast, slow = in_turns(
        ours,
        lambda: plain_clip_step(other, optimizer, scaler, images[0], images[1], tokens),
        device,
    )
    with FlopCounterMode(display=False) as counter:
        ours()
    share = counter.get_total_flops() / fast / matrix_rate(device)
    note = f"{2 * batch / fast:.0f} images/s, {100 * share:.0f} % of the measured matrix rate"
    what = f"stage-1 step of {name}, batch {batch} / plain step"
    return [{"figure": what, "ours": fast, "twin": slow, "note": note, "must": "1.5 x"}]


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations a second of a large fp16 matrix product on random data."""
    left, right = torch.randn(2, size, size, device=device, dtype=torch.float16)
    taken, _ = in_turns(lambda: left @ right, lambda: None, device, rounds=10, twin_rounds=10)
    return 2 * size**3 / taken


def large_batch(device: torch.device) -> list[dict]:
    """Memory of a step of 1,024 triplets of RN50x16 in micro-batches of 16."""
    step = make_step(ready(CLIP(*ARCHITECTURES["RN50x16"]), device), 1024, 16, device)
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = torch.cuda.max_memory_allocated(device)
    what = "stage-1 step of RN50x16, batch 1,024 in micro-batches of 16, all memory"
    return [{"figure": what, "note": f"{peak / GIB:.1f} GiB", "must": "within 24 GiB"}]


def figures(device: torch.device) -> list[dict]:
    """Rows of the results table."""
    rows = loader(device) + step_memory(device)
    if device.type == "cuda":
        rows += large_batch(device) + speed("ViT-L/14", device)
    return rows


def figures_of_resnet(device: torch.device) -> list[dict]:
    """Apart from the rest: its plain step at batch 128 needs more than 96 GiB."""
    return speed("RN50x16", device) if device.type == "cuda" else []
