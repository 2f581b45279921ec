"""A run on disk: what is kept and when, and a tracker whose failures cost nothing."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from conftest import read_csv
from reports.run_page import About
from runtime import tensors
from runtime.files import written_whole
from runtime.interruption import StopRequest
from runtime.trackers import Account, Trackers
from training.autosave import Autosave
from training.checkpoints import Checkpoints
from training.data import Order
from training.loop import Stepper, Task, fit, train_one_epoch
from training.losses import ContrastiveLoss
from training.run import Run, make_folder, run_name
from training.schedule import Precision, Schedule
from utils import UserError

NO_TRACKERS = Trackers([], Account(folder=Path(), name="none"))
CPU = torch.device("cpu")


class Toy(nn.Module):
    """Normalised queries and targets of two rows, scaled by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows):
        return nn.functional.normalize(rows * self.weight, dim=-1), rows


def toy_task(validate, steps=1, bad_step=None) -> Task:
    model = Toy()
    rows = [torch.eye(2) * (float("nan") if step == bad_step else 1) for step in range(steps)]
    batches = [([row], torch.arange(2)) for row in rows]
    return Task(
        batches=lambda epoch, first: batches[first:],
        steps=steps,
        model=model,
        loss=ContrastiveLoss(),
        optimizer=SGD(model.parameters(), 0.1),
        validate=validate,
        module=model,
    )


def new_run(folder, trackers=None, config=None) -> Run:
    about = About(
        title="a run",
        titles={},
        chosen_by=(),
        hyper_parameters={"num_epochs": 3, **(config or {})},
        commands={"resume": "python again"},
    )
    return Run(folder, trackers or NO_TRACKERS, about)


def checkpoints(folder, kept="best") -> Checkpoints:
    names = {"recall": "best_recall", "mean": "best_mean"}
    return Checkpoints(
        folder,
        nn.Linear(2, 2),
        key="Combiner",
        prefix="combiner",
        best_names=names,
        config={"seed": 1},
        kept=kept,
    )


def files(folder) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.pt"))


def test_the_best_of_each_metric_is_kept(tmp_path):
    kept = checkpoints(tmp_path)
    history = [(10, 5), (9, 6), (12, 6), (12, 7)]
    for epoch, (recall, mean) in enumerate(history):
        kept.update(epoch, {"recall": recall, "mean": mean})
        kept.write()
    assert files(tmp_path) == ["best_mean.pt", "best_recall.pt"]
    by_recall, by_mean = (
        torch.load(tmp_path / "saved_models" / f"best_{name}.pt") for name in ("recall", "mean")
    )
    assert by_recall["epoch"] == 2  # the first of equals
    assert (by_recall["config"], by_recall["metrics"]) == ({"seed": 1}, {"recall": 12, "mean": 6})
    assert by_mean["epoch"] == 3
    assert kept.best == {"recall": 12, "mean": 7}


def test_every_validated_epoch_is_kept_without_best_only(tmp_path):
    kept = checkpoints(tmp_path, kept="every epoch")
    for epoch in (0, 3):
        kept.update(epoch, {"recall": 1, "mean": 1})
    assert files(tmp_path) == ["combiner_0.pt", "combiner_3.pt"]


def test_a_recall_of_zero_can_be_the_best(tmp_path):
    kept = checkpoints(tmp_path)
    kept.update(0, {"recall": 0.0, "mean": 0.0})
    kept.write()
    assert len(files(tmp_path)) == 2


def test_nothing_is_kept_unless_asked_for(tmp_path):
    kept = checkpoints(tmp_path, kept="nothing")
    kept.update(0, {"recall": 3, "mean": 4})
    kept.write()
    assert files(tmp_path) == []
    assert kept.best == {"recall": 3, "mean": 4}


def test_csv_files(tmp_path):
    run = new_run(tmp_path)
    run.record("train", 0, {"train_epoch_loss": 0.1})
    run.record("train", 1, {"train_epoch_loss": 1 / 3})
    assert (
        tmp_path / "train_metrics.csv"
    ).read_text() == f"epoch,train_epoch_loss\n0,0.1\n1,{1 / 3!r}\n"
    assert read_csv(tmp_path / "train_metrics.csv")["train_epoch_loss"] == [0.1, 1 / 3]


@pytest.mark.parametrize(
    ("name", "part"),
    [("ViT-B/32", "ViT-B-32"), ("/some/where/tiny clip.pt", "tiny-clip"), ("RN50x16", "RN50x16")],
)
def test_folder_names_are_flat_and_without_colons(name, part, tmp_path):
    """Guards against the original's `:` in the time and nested folders from `/`."""
    folder = make_folder(tmp_path, run_name("clip_finetuned", "fiq", name), {})
    assert folder.parent == tmp_path
    assert folder.name.startswith(f"clip_finetuned_on_fiq_{part}_")
    assert ":" not in folder.name


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_a_validation_names_the_epoch(tmp_path):
    def validate():
        raise UserError("similarities that are not finite")

    task = toy_task(validate)
    with pytest.raises(UserError, match="after epoch 0: similarities"):
        fit(
            task,
            schedule=Schedule(num_epochs=3, validation_frequency=1),
            precision=Precision("fp32", CPU),
            run=new_run(tmp_path),
            checkpoints=checkpoints(tmp_path),
            stop=StopRequest(),
            minutes=10,
        )


def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path):
    """Losses are read every few steps, but the step named is the one that failed."""
    task = toy_task(lambda: {}, steps=17, bad_step=13)
    stepper = Stepper(task, Schedule(num_epochs=1, validation_frequency=1), Precision("fp32", CPU))
    autosave = Autosave(
        run=new_run(tmp_path),
        checkpoints=checkpoints(tmp_path),
        parts=stepper.parts,
        device=CPU,
        stop=StopRequest(),
        minutes=10,
    )
    autosave.progress.epoch = 4
    with pytest.raises(UserError, match="the loss is nan at epoch 4, step 13"):
        train_one_epoch(task, stepper, autosave)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    order = Order(triplets=10, variants=4, batch_size=3, seed=5)
    rows, variants = order.batches(2)
    assert rows.shape == variants.shape == (order.steps, 3) == (3, 3)
    assert len(set(rows.flatten().tolist())) == 9
    again = Order(triplets=10, variants=4, batch_size=3, seed=5).batches(2)
    assert torch.equal(rows, again[0])
    assert torch.equal(variants, again[1])
    assert not torch.equal(rows, order.batches(3)[0])


def test_caption_variants_are_equally_likely():
    _, variants = Order(triplets=40_000, variants=4, batch_size=100, seed=0).batches(0)
    assert torch.bincount(variants.flatten()).tolist() == pytest.approx([10_000] * 4, rel=0.05)


def test_ctrl_c_in_the_middle_of_a_checkpoint_is_no_full_disk(tmp_path, monkeypatch):
    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, content):
            self.writes += 1
            if self.writes == 3:
                raise KeyboardInterrupt
            return super().write(content)

    monkeypatch.setattr(
        tensors, "written_whole", lambda path: contextlib.nullcontext(Interrupted())
    )
    with pytest.raises(KeyboardInterrupt):
        tensors.save_tensors(tmp_path / "a.pt", {"a": torch.zeros(1000)})
