"""What trainings learn in spite of, each part against its definition."""

import itertools
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.splits import Split, Triplet
from models.clip_model import backbone, load_clip, resolution, tokenize
from runtime import distributed
from trainers import stage_1_flags, stage_2_flags
from training.augmentation import augmented, cropped
from training.data import Order, with_noise
from training.regularisation import mixed, noisy, parts_kept, regularised, told_what_is_kept
from training.stage1 import SumFeatures
from utils import UserError

ORDER = Order(triplets=400, variants=1, batch_size=100, seed=3)


def features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def steps_of(inputs: list[torch.Tensor], ids: torch.Tensor):
    """The same batch in each step."""
    return lambda epoch, first_step=0: [(inputs, ids)] * (ORDER.steps - first_step)


def test_a_share_of_the_queries_loses_its_text_or_its_image_and_none_both(monkeypatch):
    flags = stage_2_flags("--drop-text", 0.5, "--drop-image", 0.25)
    kept = parts_kept(ORDER, 2, flags)
    assert kept.shape == (4, 100, 2)
    assert kept.any(dim=2).all()
    assert (~kept).float().mean(dim=(0, 1)).tolist() == pytest.approx([0.25, 0.5], abs=0.08)
    assert torch.equal(kept, parts_kept(ORDER, 2, flags))
    assert not torch.equal(kept, parts_kept(ORDER, 3, flags))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(parts_kept(ORDER, 2, flags))
    assert torch.equal(torch.cat(shares, dim=1), kept)


def test_what_is_left_out_is_zero_in_both_stages(golden):
    words = ["--drop-text", 0.5, "--drop-image", 0.25]
    inputs = [features(100, 8), features(100, 8) + 1, features(100, 8) + 2]
    ids = torch.arange(100)
    batches = regularised(steps_of(inputs, ids), ORDER, stage_2_flags(*words))
    kept = parts_kept(ORDER, 0, stage_2_flags(*words))
    for step, (found, _) in enumerate(batches(0, 1), start=1):
        for row, (image, text) in enumerate(kept[step].tolist()):
            assert torch.equal(found[0][row], inputs[0][row] if image else torch.zeros(8))
            assert torch.equal(found[1][row], inputs[1][row] if text else torch.zeros(8))
        assert found[2] is inputs[2]

    model = load_clip(str(golden / "clip_vit.pt"), torch.device("cpu"))
    pixels = resolution(model)
    images = torch.randint(256, (3, 3, pixels, pixels), dtype=torch.uint8)
    tokens = tokenize(["is red", "is blue", "is small"])
    sums = SumFeatures(model, backbone(model))
    told = told_what_is_kept(steps_of([images], ids), ORDER, stage_1_flags(*words))
    assert torch.equal(next(iter(told(0)))[0][1], kept[0])
    only = torch.tensor([[True, True], [True, False], [False, True]])
    queries, answers = sums(images, images, tokens, only)
    both, _ = sums(images, images, tokens)
    texts = F.normalize(model.encode_text(tokens), dim=-1)
    expected = torch.stack([both[0], answers[1], texts[2]])
    torch.testing.assert_close(queries, expected)


def test_triplets_are_mixed_in_pairs():
    ids = torch.tensor([4, 7, 4, 7, 9])
    inputs = [features(5, 8), features(5, 8) + 1, F.normalize(features(5, 8), dim=-1)]
    partners = torch.randperm(5, generator=torch.Generator().manual_seed(11)).tolist()
    share = random.Random(11).betavariate(0.4, 0.4)
    found, pairs = mixed(inputs, ids, alpha=0.4, seed=11)
    for row, partner in enumerate(partners):
        for kind, of_kind in enumerate(found):
            expected = share * inputs[kind][row] + (1 - share) * inputs[kind][partner]
            if kind == 2:
                expected = expected / expected.norm()
            torch.testing.assert_close(of_kind[row], expected)
    of_rows = [(int(ids[row]), int(ids[partner])) for row, partner in enumerate(partners)]
    for one, other in itertools.product(range(5), repeat=2):
        assert (pairs[one] == pairs[other]) == (of_rows[one] == of_rows[other])


def test_noise_has_a_share_of_the_length_of_its_feature():
    clean = features(4, 4096) * torch.tensor([[1e-3], [1], [10], [0]])
    found = noisy(clean, 0.5, torch.Generator().manual_seed(1)) - clean
    assert found.norm(dim=1).tolist() == pytest.approx((0.5 * clean.norm(dim=1)).tolist(), rel=0.05)
    assert abs(F.cosine_similarity(found[1], found[2], dim=0)) < 0.1


def pixel(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """An image between its pixels, whose middles are at whole numbers, by bilinear interpolation."""
    last = image.shape[-1] - 1
    value = torch.zeros(3)
    for column, row in itertools.product(
        (int(x // 1), int(x // 1) + 1), (int(y // 1), int(y // 1) + 1)
    ):
        weight = (1 - abs(x - column)) * (1 - abs(y - row))
        value += weight * image[:, min(max(row, 0), last), min(max(column, 0), last)]
    return value


def test_a_crop_is_a_square_of_the_image_in_its_size():
    images = torch.randint(256, (2, 3, 6, 6), dtype=torch.uint8)
    found = cropped(images, torch.tensor([1.0, 0.25]), torch.tensor([[0.3, 0.9], [1.0, 0.2]]))
    assert torch.equal(found[0], images[0])
    side = 3  # half of 6
    for row, column in itertools.product(range(6), repeat=2):
        x = 1.0 * (6 - side) + (column + 0.5) / 6 * side - 0.5
        y = 0.2 * (6 - side) + (row + 0.5) / 6 * side - 0.5
        expected = pixel(images[1].float(), x, y)
        assert (found[1, :, row, column] - expected).abs().max() <= 0.501


def test_images_are_mirrored_together_unless_a_caption_says_what_a_mirror_changes():
    captions = [
        "is red",
        "faces left",
        "has a Logo on it",
        "is rightmost",
        "quay trái",
        "is brighter",
    ]
    triplets = [SimpleNamespace(captions=(caption,)) for caption in captions]
    order = Order(triplets=6, variants=1, batch_size=6, seed=0)
    data = SimpleNamespace(order=order, train=SimpleNamespace(triplets=triplets))
    references = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    compared = torch.randint(256, (6, 2, 3, 4, 4), dtype=torch.uint8)  # targets, hard negatives
    batch = [references, compared, torch.zeros(6, 1)], torch.arange(6)
    batches = augmented(lambda epoch, first: [batch], data, stage_1_flags("--flip", 1), 3)
    ((found, _),) = batches(0)
    for place, row in enumerate(order.batches(0)[0][0].tolist()):
        for image, given in zip(found, (references, compared), strict=False):
            wanted = given[place].flip(-1) if row in (0, 5) else given[place]
            assert torch.equal(image[place], wanted)
    flags = stage_1_flags("--flip", 0.5, "--crop", 0.3)
    both = augmented(lambda epoch, first: [batch], data, flags, 3)
    runs = [next(iter(both(epoch)))[0][:2] for epoch in (0, 0, 1)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_noise_shuffles_the_targets_of_a_share_and_none_keeps_its_own():
    targets = ["a"] * 9 + ["b"] * 5 + [f"t{number}" for number in range(26)]
    triplets = [Triplet(reference=f"r{n}", captions=("",), target=t) for n, t in enumerate(targets)]
    clean = Split(name="train", triplets=triplets, image_paths={})
    noisy_ones = []
    for seed in range(20):
        found = with_noise(clean, 0.75, seed).triplets
        changed = [t for t, old in zip(found, triplets, strict=True) if t.target != old.target]
        assert len(changed) == 30
        assert Counter(t.target for t in found) == Counter(targets)
        assert [t.reference for t in found] == [t.reference for t in triplets]
        noisy_ones.append([t.target for t in found])
    assert with_noise(clean, 0.75, 3).triplets == with_noise(clean, 0.75, 3).triplets
    assert len(set(map(tuple, noisy_ones))) == 20
    with pytest.raises(UserError, match="--noise 1: 40 of 40 triplets have the same target"):
        one = [Triplet(reference=t.reference, captions=("",), target="a") for t in triplets]
        with_noise(Split(name="train", triplets=one, image_paths={}), 1, 0)
