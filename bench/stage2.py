"""Time an epoch of stage 2 with its validation on frozen features, against encoding everything again."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim import Adam

import shapes_dataset
from benchmarks import CIRR
from combiner import Combiner
from evaluation.retrieval import evaluate
from models.configuration import resolve_clip_options
from models.encoder import load_encoder
from models.features import FeatureCache, FrozenSplit, freeze, freeze_queries
from ranking import random_cirr
from settings.groups import Clip
from timing import GIB, Row, Setting, extra_memory, in_turns, peak_memory, typical
from trainers import stage_2_flags, trainer_in
from training.data import Order
from training.losses import BankLoss, ContrastiveLoss, Loss
from training.saving import Progress
from training.schedule import Precision
from training.stage2 import ComposedFeatures, combiner_training
from training.step import Gradient
from twins import re_encoding_epoch


def epoch(
    combiner,
    frozen_train: FrozenSplit,
    frozen_val: list[FrozenSplit],
    order: Order,
    device: torch.device,
):
    """Return a function that trains an epoch and validates."""
    flags = stage_2_flags("--checkpoint-every-minutes", 1000)
    task = combiner_training(
        combiner,
        frozen_train,
        frozen_val,
        order=order,
        flags=flags,
        measure=functools.partial(evaluate, CIRR(Path()), frozen_val),
    )
    trainer = trainer_in(Path(), task, flags, precision=Precision("amp", device))

    def run() -> None:
        trainer.progress = Progress()
        trainer.train_one_epoch()
        task.validate(combiner)
        task.router(combiner)

    return run


def drawn(setting: Setting) -> Iterator[Row]:
    """Time an epoch of 6,000 synthetic triplets, with projection size P 256, hidden size H 512, batch size 256."""
    device = setting.device
    train_groups, val_groups = setting.choose(gpu=(600, 60), cpu=(600, 60), tiny=(3, 2))
    batch = setting.choose(gpu=256, cpu=256, tiny=8)
    p, h = setting.choose(gpu=(256, 512), cpu=(256, 512), tiny=(16, 24))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = f"--train-groups {train_groups} --val-groups {val_groups}"
        sizes += " --train-triplets 1 --val-triplets 1"
        shapes_dataset.main(["--output-dir", folder, *sizes.split()])
        choice = resolve_clip_options(Clip(clip_model_name=str(root / "tiny_clip_vit.pt")), [])
        encoder = load_encoder(choice, None, device, workers=2)
        benchmark = CIRR(root)
        train, val = benchmark.train(), benchmark.val()
        captions = [benchmark.caption(t.captions) for t in train.triplets]
        cache = FeatureCache(None, encoder)
        frozen_val = freeze_queries(cache, val, benchmark, "val")
        frozen_train = freeze(cache, train, [[caption] for caption in captions], label="train")
        order = Order(triplets=len(captions), variants=1, batch_size=batch, seed=0)
        combiner = Combiner(64, p, h).to(device)
        ours = epoch(combiner, frozen_train, frozen_val, order, device)
        optimizer = Adam(combiner.parameters(), lr=2e-5)

        def twin() -> None:
            re_encoding_epoch(encoder, combiner, optimizer, train, captions, order.batches(0)[0])
            # Validation encodes only the captions again, since galleries are encoded once.
            encoder.captions([benchmark.caption(t.captions) for t in val[0].triplets])
            evaluate(benchmark, frozen_val, combiner.eval())

        rounds, twin_rounds = setting.choose(gpu=(5, 2), cpu=(5, 2), tiny=(1, 1))
        fast, slow = in_turns(ours, twin, device, rounds=rounds, twin_rounds=twin_rounds)
    what = f"stage-2 epoch, {len(captions):,} drawn triplets, P {p}, H {h}, batch {batch}"
    yield {
        "figure": f"{what}, with validation / re-encoding",
        "ours": fast,
        "twin": slow,
        "must": "15 x",
    }


def full_size_epoch(setting: Setting) -> Callable[[], None]:
    """Return a function that trains an epoch at CIRR's real size on random features, only for a GPU."""
    device = setting.device
    triplets, images, queries, gallery = setting.choose(
        gpu=(28_225, 16_939, 4181, 2297), tiny=(40, 30, 20, 15)
    )
    d, p, h, batch = setting.choose(gpu=(768, 2560, 5120, 4096), tiny=(8, 16, 24, 16))
    return epoch(
        Combiner(d, p, h).to(device),
        random_cirr(triplets, images, d, device, grouped=False),
        [random_cirr(queries, gallery, d, device, grouped=True)],
        Order(triplets=triplets, variants=1, batch_size=batch, seed=0),
        device,
    )


def bank(setting: Setting) -> Iterator[Row]:
    """Compare steps with a bank of 28,225 targets and with only the batch's targets, D 768, P 2560, H 5120."""
    device = setting.device
    targets = setting.choose(gpu=28_225, cpu=28_225, tiny=40)
    d, p, h = setting.choose(gpu=(768, 2560, 5120), cpu=(768, 2560, 5120), tiny=(8, 16, 24))
    features = F.normalize(torch.randn(targets, d, device=device), dim=-1)
    combiner = Combiner(d, p, h).to(device)
    model = ComposedFeatures(combiner, with_router=False).train()
    optimizer = Adam(combiner.parameters(), lr=2e-5, fused=True)
    precision = Precision("amp", device)
    scaler = precision.scaler()
    bank = BankLoss(features)
    own_batch = ContrastiveLoss()
    for batch in setting.choose(gpu=(64, 512, 4096), cpu=(64, 256, 1024), tiny=(8,)):
        images = torch.randn(batch, d, device=device)
        rows = torch.randint(targets, (batch,), device=device)

        def step(loss: Loss, images: torch.Tensor = images, rows: torch.Tensor = rows) -> None:
            optimizer.zero_grad(set_to_none=True)
            gradient = Gradient(model=model, loss=loss, precision=precision, scaler=scaler)
            gradient.add([images, images, features[rows]], rows)
            scaler.step(optimizer)
            scaler.update()

        ours, twin = in_turns(lambda: step(bank), lambda: step(own_batch), device, 3, 3)
        memory = [
            extra_memory(lambda loss=loss: step(loss), device) / GIB for loss in (bank, own_batch)
        ]
        yield {
            "figure": f"stage-2 step against a bank of {targets:,} targets / its batch, batch {batch:,}",
            "ours": ours,
            "twin": twin,
            "ours / twin": ours / twin,
            "must": "at most 1.33 of it",
            "note": f"{memory[0]:.2f} GiB for {memory[1]:.2f}",
        }


def full_size(setting: Setting) -> Iterator[Row]:
    """Time an epoch at CIRR's real size, D 768, P 2560, H 5120, batch size 4096."""
    taken = typical(full_size_epoch(setting), setting)
    yield {
        "figure": "stage-2 epoch at CIRR's real size, D 768, P 2560, H 5120, batch 4096, with validation",
        "ours": taken,
        "must": "at most 0.5 s",
        "note": f"{peak_memory(setting.device) / GIB:.1f} GiB",
    }
