"""Losses with label smoothing and hard negatives against their definitions; what is mined, named and drawn."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import clip_fine_tune
import combiner_train
import kills
from benchmarks import CIRR, FashionIQ, Triplets
from benchmarks.splits import NO_ROW, Split, Triplet, split_digest
from test_learning import gradient_of
from test_resume import stopped  # noqa: F401
from trainers import stage_2_flags
from training import losses
from training.losses import make_loss
from training.negatives import HardNegatives, mined
from utils import UserError

SMOOTHING = 0.2
SCALE = 7.0
# Seven rows of two hard negatives, which some lack; the third and the last look for the target of others.
IDS = torch.tensor(
    [[3, 0, 9], [8, 9, 4], [3, 8, NO_ROW], [0, 6, 7], [5, NO_ROW, NO_ROW], [1, 5, 2], [0, 4, 6]]
)


def unit(*shape: int) -> torch.Tensor:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1)


def of_row(cosines: list[torch.Tensor], answer: int) -> torch.Tensor:
    """The smoothed cross entropy of one row over the columns that it has."""
    shares = (SCALE * torch.stack(cosines)).softmax(0)
    wanted = torch.full_like(shares, SMOOTHING / len(shares))
    wanted[answer] += 1 - SMOOTHING
    return -(wanted * shares.log()).sum()


def defined(queries, targets, *, symmetric: bool, masked: bool, bank=None) -> torch.Tensor:
    """The loss a row after another, from the columns that are negatives of it."""
    named = IDS[:, 0]
    forth, back = [], []
    for row, own in enumerate(named):
        others = [i for i in range(len(named)) if i != row and not (masked and named[i] == own)]
        back.append(of_row([targets[row, 0] @ queries[i] for i in (row, *others)], 0))
        columns = [targets[i, 0] for i in (row, *others)]
        for i, place in torch.cartesian_prod(torch.arange(len(IDS)), torch.arange(1, 3)):
            if IDS[i, place] not in (own, NO_ROW):
                columns.append(targets[i, place])
        if bank is None:
            forth.append(of_row([queries[row] @ column for column in columns], 0))
        else:
            forth.append(of_row([queries[row] @ column for column in bank], int(own)))
    forth_mean, back_mean = torch.stack(forth).mean(), torch.stack(back).mean()
    return (forth_mean + back_mean) / 2 if symmetric else forth_mean


def scaled(name: str, *, masked: bool, bank=None) -> losses.Loss:
    flags = ["--loss", name, "--learn-temperature", "--label-smoothing", SMOOTHING]
    flags += ["--mask-duplicate-targets"] if masked else []
    loss = make_loss(stage_2_flags(*flags), bank=bank).double()
    loss.log_scale.data.fill_(SCALE).log_()
    return loss


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["contrastive", "symmetric"])
@pytest.mark.parametrize("over", ["batch", "bank"])
def test_losses_and_their_gradients_equal_the_definition(over, name, masked, monkeypatch):
    monkeypatch.setattr(losses, "MOST_LOGITS", 30)  # blocks of three queries
    features = unit(7, 4, 5).requires_grad_()
    queries, targets = features[:, 0], features[:, 1:]
    bank = unit(10, 5) if over == "bank" else None
    expected = defined(queries, targets, symmetric=name == "symmetric", masked=masked, bank=bank)
    loss = scaled(name, masked=masked, bank=bank)
    given = (targets, IDS) if bank is None else (targets[:, 0], IDS[:, 0])
    ours = loss(queries, *given)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(of, features)[0] for of in (ours, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.01


def test_the_gradient_of_a_smoothed_bank_is_that_of_small_steps():
    bank = unit(10, 5)

    def of(queries, scale):
        return losses._BankLoss.apply(queries, bank, IDS[:, 0], bank, scale, SMOOTHING)

    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (unit(7, 5).requires_grad_(), scale))


class Turned(nn.Module):
    """Queries, and targets with their negatives, made with one learned matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5, dtype=torch.float64) + 0.1)

    def forward(self, queries, targets):
        return [nn.functional.normalize(rows @ self.weight, dim=-1) for rows in (queries, targets)]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_with_hard_negatives_give_the_plain_steps_gradient(micro_batch):
    features = unit(7, 4, 5)
    found = []
    for rows in (None, micro_batch):
        model = Turned()
        loss = scaled("symmetric", masked=True)
        value = gradient_of(model, loss, micro_batch=rows).add(
            [features[:, 0], features[:, 1:]], IDS
        )
        found.append([value, model.weight.grad, loss.log_scale.grad])
    torch.testing.assert_close(*found)
    assert found[0][1].abs().max() > 0.01


# Where they are from


def split_of(images: int, triplets: list[tuple[int, str, int]]) -> Split:
    """A split of numbered images, from references, captions and targets."""
    return Split(
        name="train",
        triplets=[
            Triplet(reference=str(reference), captions=(caption,), target=str(target))
            for reference, caption, target in triplets
        ],
        image_paths={str(number): None for number in range(images)},
    )


def test_mined_are_the_nearest_that_answer_nothing(monkeypatch):
    """Against a loop; the last image is nearly the first, and the second query has two targets."""
    monkeypatch.setattr("training.negatives.MOST_COSINES", 24)  # two triplets at a time
    features = unit(12, 3)
    features[11] = features[0] + 0.01
    asked = [(1, "red", 0), (2, "blue", 3), (2, "blue", 4), (2, "red", 5), (6, "red", 11)]
    found = mined(3 * features, split_of(12, asked), number=9, margin=0.05)
    for row, (reference, caption, target) in enumerate(asked):
        answers = {reference} | {t for r, c, t in asked if (r, c) == (reference, caption)}
        cosines = nn.functional.cosine_similarity(features, features[target][None])
        order = cosines.argsort(descending=True).tolist()
        nearest = [i for i in order if i not in answers and cosines[i] <= 0.95]
        assert 0 < len(nearest) < 12
        expected = [*nearest, *[NO_ROW] * 9][:9]
        assert found[row].tolist() == expected
    assert (found[0] != 11).all() and (found[4] != 0).all()


def drawn_with(pools, *, number: int, seed: int = 0) -> HardNegatives:
    flags = SimpleNamespace(hard_negatives=number, hard_negatives_from="column")
    triplets = []
    for pool in pools:
        triplet = Triplet(
            reference="0", captions=("x",), target="1", negatives=tuple(map(str, pool))
        )
        triplets.append(triplet)
    split = Split(name="train", triplets=triplets, image_paths={str(i): None for i in range(9)})
    return HardNegatives(split, flags, seed=seed, features=lambda: None, every=1)


def test_what_is_drawn_is_of_the_pool_by_seed_and_epoch_alone():
    pools = [[2, 3, 4, 5, 6], [7], [], [8, 2, 3]]
    targets = torch.tensor([1, 1, 1, 1])
    drawn = [drawn_with(pools, number=3).beside(targets, epoch) for epoch in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn_with(pools, number=3, seed=1).beside(targets, 0))
    for pool, (target, *own) in zip(pools, drawn[0].tolist(), strict=True):
        there = [row for row in own if row != NO_ROW]
        assert target == 1
        assert len(set(there)) == len(there) == min(3, len(pool))
        assert set(there) <= set(pool)
    few = drawn_with([[2], [3, 4]], number=5)
    assert few.number == 2
    assert few.beside(targets[:2], 0).shape == (2, 3)


def test_a_group_without_reference_and_target(drawn, fails):
    plain = CIRR(drawn).train()
    benchmark = CIRR(drawn)
    benchmark.negatives_from = "group"
    split = benchmark.train()
    for triplet in split.triplets:
        assert len(triplet.group) == 6
        assert set(triplet.negatives) == set(triplet.group) - {triplet.reference, triplet.target}
        assert set(triplet.negatives) <= set(split.names)
    assert not any(triplet.negatives for triplet in plain.triplets)
    other = FashionIQ(drawn)
    other.negatives_from = "group"
    with pytest.raises(
        UserError, match="--hard-negatives-from group: no training triplet of FashionIQ"
    ):
        other.train()


ROWS = [
    {"reference": "a.jpg", "caption": "x", "target": ["b.jpg", "c.jpg"], "negatives": ["d.jpg", "a.jpg"]},
    {"reference": "b.jpg", "caption": "y", "target": ["c.jpg"], "negatives": []},
    {"reference": "c.jpg", "caption": "z", "target": ["a.jpg"], "negatives": ["e.jpg"]},
]  # fmt: skip


def column_of(tmp_path, form: str, rows: list[dict]) -> Triplets:
    """A benchmark whose training file has such rows, in a form."""
    folder = tmp_path / form / "triplets_dataset"
    folder.mkdir(parents=True)
    if form == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        with (folder / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                cells = {n: v if isinstance(v, str) else " | ".join(v) for n, v in row.items()}
                writer.writerow(cells)
    benchmark = Triplets(tmp_path / form)
    benchmark.negatives_from = "column"
    return benchmark


def test_a_column_of_negatives_in_lines_and_in_a_table(tmp_path):
    splits = [column_of(tmp_path, form, ROWS).train() for form in ("jsonl", "csv")]
    assert splits[0].triplets == splits[1].triplets
    found = [triplet.negatives for triplet in splits[0].triplets]
    assert found == [("d.jpg",), ("d.jpg",), (), ("e.jpg",)]  # of two targets two triplets
    assert {"d.jpg", "e.jpg"} <= set(splits[0].names)
    assert split_digest(splits[0]) == split_digest(splits[1])
    unasked = Triplets(tmp_path / "csv").train()
    assert {"d.jpg", "e.jpg"}.isdisjoint(unasked.names)
    assert split_digest(unasked) != split_digest(splits[1])
    assert splits[0].without({"d.jpg"}).triplets[0].negatives == ()


@pytest.mark.parametrize(
    ("negatives", "said"),
    [
        ("b.jpg", "a target is among its negatives"),
        ("", "no training triplet of Triplets has such"),
    ],
)
def test_a_column_that_is_no_good(negatives, said, tmp_path):
    rows = [{**ROWS[0], "negatives": [negatives]}, ROWS[1]]
    with pytest.raises(UserError, match=said):
        column_of(tmp_path, "csv", rows).train()


# Trainings


HARD = ["--hard-negatives", 2, "--loss", "symmetric", "--label-smoothing", 0.1]
HARD += ["--mask-duplicate-targets", "--learn-temperature"]


def test_a_bank_has_no_hard_negatives(fails, drawn):
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--batch-size", 4]
    error = fails("combiner_train", drawn, "--dataset", "CIRR", *name, *HARD, "--negatives", "bank")
    assert "--hard-negatives adds negatives to a batch" in error


@pytest.mark.slow
def test_stage_1_resumed_between_two_minings(stage_1, stopped, monkeypatch):  # noqa: F811
    """Mined in epochs 0 and 2, stopped in epoch 1."""
    minings = []
    real = HardNegatives.refresh

    def refresh(negatives, epoch):
        before = negatives.pools
        real(negatives, epoch)
        if negatives.pools is not before:
            minings.append(epoch)

    monkeypatch.setattr(HardNegatives, "refresh", refresh)
    flags = ["CIRR", *HARD, "--num-epochs", 3, "--mine-every", 2, "--micro-batch-size", 7]
    flags += ["--learning-rate", 1e-3, "--validation-frequency", 3]
    whole = stage_1(*flags, output="whole")
    cut = stopped(5, *flags, train=stage_1)
    assert minings == [0, 2, 0]
    clip_fine_tune.main(["--resume", str(cut)])
    assert minings == [0, 2, 0, 2]
    assert kills.differences(whole, cut) == []


@pytest.mark.slow
@pytest.mark.parametrize("source", ["mined", "group"])
def test_stage_2_resumed_with_hard_negatives(source, stage_2, stopped):  # noqa: F811
    """Mined before the first epoch and never again, or named; a resumed run ends as an uninterrupted one."""
    flags = ["CIRR", *HARD, "--hard-negatives-from", source]
    whole, cut = stage_2(*flags, output="whole"), stopped(5, *flags)
    combiner_train.main(["--resume", str(cut)])
    assert kills.differences(whole, cut) == []
