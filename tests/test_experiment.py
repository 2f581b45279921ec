"""A run on disk: what is kept and when, and a tracker whose failures cost nothing."""

import contextlib
import io

import pytest
import torch
from torch import nn
from torch.optim import SGD

from conftest import read_csv
from runtime import tensors
from runtime.files import written_whole
from trainers import checkpoints_in, run_in, stage_1_flags, trainer_in
from training.data import Order
from training.losses import ContrastiveLoss
from training.run_folder import make_folder, run_name
from training.saving import Checkpoints
from training.step import Task
from utils import UserError


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
        module=model,
        loss=ContrastiveLoss(),
        optimizer=SGD(model.parameters(), 0.1),
        validate=validate,
    )


NAMES = {"recall": "best_recall", "mean": "best_mean"}
MODEL = nn.Linear(2, 2)


def checkpoints(folder, *kept: str) -> Checkpoints:
    return checkpoints_in(folder, stage_1_flags(*kept), NAMES)


def files(folder) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.pt"))


def test_the_best_of_each_metric_is_kept(tmp_path):
    kept = checkpoints(tmp_path, "--save-training", "--save-best")
    history = [(10, 5), (9, 6), (12, 6), (12, 7)]
    for epoch, (recall, mean) in enumerate(history):
        kept.update(epoch, {"recall": recall, "mean": mean}, MODEL)
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
    kept = checkpoints(tmp_path, "--save-training")
    for epoch in (0, 3):
        kept.update(epoch, {"recall": 1, "mean": 1}, MODEL)
    assert files(tmp_path) == ["combiner_0.pt", "combiner_3.pt"]


def test_a_recall_of_zero_can_be_the_best(tmp_path):
    kept = checkpoints(tmp_path, "--save-training", "--save-best")
    kept.update(0, {"recall": 0.0, "mean": 0.0}, MODEL)
    kept.write()
    assert len(files(tmp_path)) == 2


def test_nothing_is_kept_unless_asked_for(tmp_path):
    kept = checkpoints(tmp_path)
    kept.update(0, {"recall": 3, "mean": 4}, MODEL)
    kept.write()
    assert files(tmp_path) == []
    assert kept.best == {"recall": 3, "mean": 4}


def test_csv_files(tmp_path):
    run = run_in(tmp_path)
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
    def validate(measured):
        raise UserError("similarities that are not finite")

    trainer = trainer_in(tmp_path, toy_task(validate), stage_1_flags())
    with pytest.raises(UserError, match="after epoch 0: similarities"):
        trainer.fit()


def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path):
    """Losses are read every few steps, but the step named is the one that failed."""
    task = toy_task(lambda measured: {}, steps=17, bad_step=13)
    trainer = trainer_in(tmp_path, task, stage_1_flags())
    trainer.progress.epoch = 4
    with pytest.raises(UserError, match="the loss is nan at epoch 4, step 13"):
        trainer.train_one_epoch()


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
