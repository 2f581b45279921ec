"""An epoch of stage 2 with its validation: on frozen features, against encoding everything again."""

import functools
import tempfile
from pathlib import Path

import torch
from torch.optim import Adam

import shapes_dataset
from benchmarks import CIRR
from combiner import Combiner
from evaluation.retrieval import evaluate
from models.configuration import settle
from models.encoder import load_encoder
from models.features import FeatureCache, FrozenSplit, freeze, freeze_queries
from ranking import random_cirr
from reports.run_page import About
from runtime.choices import ClipChoice
from runtime.interruption import StopRequest
from timing import in_turns, seconds
from training.autosave import Autosave
from training.checkpoints import Checkpoints
from training.data import Order
from training.loop import Stepper, train_one_epoch
from training.run import Run
from training.schedule import Precision, Schedule
from training.stage2 import combiner_training
from training.tracker import NoTracker
from twins import re_encoding_epoch


def epoch(
    combiner,
    frozen_train: FrozenSplit,
    frozen_val: list[FrozenSplit],
    order: Order,
    device: torch.device,
):
    """A function that trains an epoch and validates."""
    task, _ = combiner_training(
        combiner,
        frozen_train,
        frozen_val,
        order=order,
        learning_rate=2e-5,
        ema_decay=None,
        compiled=False,
        penalty=None,
        measure=functools.partial(evaluate, CIRR(Path()), frozen_val),
    )
    stepper = Stepper(
        task, Schedule(num_epochs=1, validation_frequency=1), Precision("amp", device)
    )
    checkpoints = Checkpoints(
        Path(),
        combiner,
        key="Combiner",
        prefix="combiner",
        best_names={},
        config={},
        kept="nothing",
    )
    about = About(titles={}, chosen_by=(), hyper_parameters={}, commands={"resume": ""})
    autosave = functools.partial(
        Autosave,
        run=Run(Path(), NoTracker(), about),
        checkpoints=checkpoints,
        parts=stepper.parts,
        device=device,
        stop=StopRequest(),
        minutes=1000,
    )

    def run() -> None:
        train_one_epoch(task, stepper, autosave())
        task.validate()
        task.router()

    return run


def drawn(device: torch.device) -> list[dict]:
    """6,000 drawn triplets, P 256, H 512, batch 256."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = [
            "--train-triplets",
            "1",
            "--val-triplets",
            "1",
            "--train-groups",
            "600",
            "--val-groups",
            "60",
        ]
        shapes_dataset.main(["--output-dir", folder, *sizes])
        choice = settle(ClipChoice(clip_model_name=str(root / "tiny_clip_vit.pt")), [])
        encoder = load_encoder(choice, None, device, workers=2)
        benchmark = CIRR(root)
        train, val = benchmark.train(), benchmark.val()
        captions = [benchmark.caption(t.captions) for t in train.triplets]
        cache = FeatureCache(None, encoder)
        frozen_val = freeze_queries(cache, val, benchmark.caption, "val")
        frozen_train = freeze(cache, train, [[caption] for caption in captions], "train")
        order = Order(triplets=len(captions), variants=1, batch_size=256, seed=0)
        combiner = Combiner(64, 256, 512).to(device)
        ours = epoch(combiner, frozen_train, frozen_val, order, device)
        optimizer = Adam(combiner.parameters(), lr=2e-5)

        def twin() -> None:
            re_encoding_epoch(encoder, combiner, optimizer, train, captions, order.batches(0)[0])
            # Galleries it encodes once.
            encoder.captions([benchmark.caption(t.captions) for t in val[0].triplets])
            evaluate(benchmark, frozen_val, combiner.eval())

        fast, slow = in_turns(ours, twin, device, rounds=5, twin_rounds=2)
    what = f"stage-2 epoch, {len(captions):,} drawn triplets, P 256, H 512, batch 256, with validation / re-encoding"
    return [{"figure": what, "ours": fast, "twin": slow, "must": "15 x"}]


def full_size(device: torch.device) -> list[dict]:
    """CIRR's real sizes on random features, D 768, P 2560, H 5120, batch 4096: a GPU's work."""
    frozen_val = [random_cirr(4181, 2297, 768, device, grouped=True)]
    frozen_train = random_cirr(28_225, 16_939, 768, device, grouped=False)
    combiner = Combiner(768, 2560, 5120).to(device)
    run = epoch(
        combiner,
        frozen_train,
        frozen_val,
        Order(triplets=28_225, variants=1, batch_size=4096, seed=0),
        device,
    )
    run()
    taken = sorted(seconds(run, device) for _ in range(5))[2]
    what = "stage-2 epoch, 28,225 triplets, D 768, P 2560, H 5120, batch 4096, with validation of 4,181 x 2,297"
    return [{"figure": what, "ours": taken, "must": "at most 0.5 s"}]


def figures(device: torch.device) -> list[dict]:
    """Rows of the results table."""
    return drawn(device) + (full_size(device) if device.type == "cuda" else [])
