"""What is read from the annotation files, captions, and how scores become metrics."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import audit
import check_submission
import compare
from benchmarks import BENCHMARKS, CIRR, FashionIQ, Split, Triplet
from benchmarks.metrics import Metric, Ranks
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED
from conftest import read_csv
from evaluation.comparison import bootstrap
from evaluation.result_file import read_result
from evaluation.retrieval import evaluate, rank
from models.features import FrozenSplit
from test_protocols import SOME
from training.run_folder import is_complete
from twins import ranks_by_sorting

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("captions", "variants"),
    [
        (
            (" is Red. ", "has no sleeves?"),
            ["Is red and has no sleeves", "Has no sleeves and is Red", "Is red", "Has no sleeves"],
        ),
        (("is red", ""), ["Is red and ", " and is red", "Is red", ""]),
        (("...", "a, b"), [" and a, b", "A, b and ", "", "A, b"]),
    ],
)
def test_fashioniq_captions(captions, variants, tmp_path):
    benchmark = FashionIQ(tmp_path)
    assert benchmark.caption_variants(captions) == variants
    assert benchmark.caption(captions) == variants[0]


def test_cirr_captions_are_used_as_they_are(tmp_path):
    caption = " Same dog. but RUNNING?"
    assert CIRR(tmp_path).caption((caption,)) == caption
    assert CIRR(tmp_path).caption_variants((caption,)) == [caption]


def test_training_reads_only_the_images_that_triplets_use(golden):
    for benchmark in (FashionIQ(golden), CIRR(golden)):
        split = benchmark.train()
        assert set(split.names) == {
            name for t in split.triplets for name in (t.reference, t.target)
        }


def test_fashioniq_splits(golden):
    benchmark = FashionIQ(golden)
    assert [split.name for split in benchmark.val()] == ["dress", "toptee", "shirt"]
    assert len(benchmark.train().triplets) == 48
    assert all(len(split.triplets) == 40 for split in benchmark.val())


def test_cirr_splits(golden):
    split = CIRR(golden).val()[0]
    assert len(split.triplets) == 78
    assert all(
        len(t.group) == 6 and t.reference in t.group and t.target in t.group for t in split.triplets
    )
    assert all(t.target is None for t in CIRR(golden).test()[0].triplets)


def random_split(seed: int, gallery: int) -> FrozenSplit:
    """Five queries with groups of six in a gallery of tied images."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"image{i}" for i in range(gallery)]
    triplets = []
    for _ in range(5):
        members = [names[i] for i in torch.randperm(gallery, generator=generator)[:6]]
        triplets.append(
            Triplet(
                reference=members[0],
                captions=("",),
                target=members[3],
                group=tuple(sorted(members)),
            )
        )
    split = Split(name="val", triplets=triplets, image_paths=dict.fromkeys(names))
    # Signed axes and whole numbers: products are exact in any order, and equal similarities are many.
    axes = torch.eye(4)[torch.randint(4, (gallery,), generator=generator)]
    signs = torch.randint(0, 2, (gallery, 1), generator=generator) * 2 - 1
    captions = torch.randint(-2, 3, (5, 1, 4), generator=generator).float()
    return FrozenSplit(split=split, images=axes * signs, captions=captions)


def compose(image, text):
    return image + 2 * text


def similarities(frozen: FrozenSplit) -> torch.Tensor:
    queries = compose(frozen.references, frozen.captions[:, 0])
    return queries @ torch.nn.functional.normalize(frozen.images, dim=-1).T


@SOME
@given(st.integers(0, 300), st.integers(6, 60))
def test_ranks_equal_brute_force(seed, gallery):
    """Against sorted lists, with many ties: in the gallery with and without the reference, and in the group."""
    frozen = random_split(seed, gallery)
    similarity, targets, references = (
        similarities(frozen),
        frozen.target_rows,
        frozen.reference_rows,
    )
    found = rank(frozen, compose, [ORIGINAL_KEPT, ORIGINAL_REMOVED], block=2)
    assert found[ORIGINAL_KEPT].ranks.tolist() == ranks_by_sorting(similarity, targets)
    assert found[ORIGINAL_REMOVED].ranks.tolist() == ranks_by_sorting(
        similarity, targets, references
    )
    in_group = found[ORIGINAL_KEPT].group_ranks
    assert torch.equal(
        in_group, rank(frozen, compose, [ORIGINAL_REMOVED])[ORIGINAL_REMOVED].group_ranks
    )
    for row, triplet in enumerate(frozen.split.triplets):
        others = sorted(frozen.split.row_of[n] for n in triplet.group if n != triplet.reference)
        order = sorted(others, key=lambda column: -similarity[row, column])
        assert int(in_group[row]) == order.index(int(targets[row]))


@SOME
@given(st.integers(0, 300), st.integers(6, 60))
def test_top_k_agrees_with_the_ranks(seed, gallery):
    frozen = random_split(seed, gallery)
    found = rank(frozen, compose, [ORIGINAL_REMOVED], k=50, block=3)[ORIGINAL_REMOVED]
    ranks, group_ranks, names = found.ranks, found.group_ranks, frozen.split.names
    nearest = [[n for n, _ in row] for row in found.results(names)]
    nearest_in_group = [[n for n, _ in row] for row in found.answers_in_group(names)]
    for row, triplet in enumerate(frozen.split.triplets):
        assert triplet.reference not in nearest[row]
        assert len(set(nearest[row])) == len(nearest[row]) == min(50, gallery - 1)
        assert (triplet.target in nearest[row]) == (ranks[row] < 50)
        if ranks[row] < 50:
            assert nearest[row].index(triplet.target) == ranks[row]
        assert nearest_in_group[row].index(triplet.target) == group_ranks[row]
        assert set(nearest_in_group[row]) == set(triplet.group) - {triplet.reference}


def test_one_query():
    frozen = random_split(1, 8)
    single = FrozenSplit(
        split=Split(
            name="val", triplets=frozen.split.triplets[:1], image_paths=frozen.split.image_paths
        ),
        images=frozen.images,
        captions=frozen.captions[:1],
    )
    metrics = evaluate(CIRR(None), [single], compose)
    assert {value for name, value in metrics.items() if "recall" in name} <= {0.0, 100.0}
    assert rank(single, compose, [ORIGINAL_REMOVED])[ORIGINAL_REMOVED].ranks.shape == (1,)


def test_fashioniq_summary_by_hand():
    benchmark = FashionIQ(None)
    scores = {
        "dress": {"recall_at10": 10.0, "recall_at50": 30.0},
        "shirt": {"recall_at10": 20.0, "recall_at50": 50.0},
    }
    assert benchmark.summary(scores) == {
        "dress_recall_at10": 10.0,
        "dress_recall_at50": 30.0,
        "shirt_recall_at10": 20.0,
        "shirt_recall_at50": 50.0,
        "average_recall_at10": 15.0,
        "average_recall_at50": 40.0,
        "average_recall": 27.5,
    }


def test_cirr_summary_by_hand():
    ranks = Ranks(np.array([0, 4, 7, 60]), in_group=np.array([0, 0, 1, 3]))
    benchmark = CIRR(None)
    metrics = benchmark.summary({"val": benchmark.score(ranks)})
    recalls = {"group_recall_at1": 50, "group_recall_at2": 75, "group_recall_at3": 75}
    recalls |= {"recall_at1": 25, "recall_at5": 50, "recall_at10": 75, "recall_at50": 75}
    assert {name: metrics[name] for name in recalls} == recalls
    assert metrics["mean(R@5+R_s@1)"] == 50
    assert metrics["arithmetic_mean"] == pytest.approx(425 / 7)


class WiderCIRR(CIRR):
    """CIRR with one more recall in its report."""

    def hits(self, ranks):
        return {**super().hits(ranks), "recall_at100": ranks.named < 100}


def test_a_recall_that_is_added_changes_no_selection():
    """Guards against what is reported deciding which checkpoint is the best."""
    ranks = Ranks(np.array([0, 4, 7, 60]), in_group=np.array([0, 0, 1, 3]))
    before, after = [
        kind(None).summary({"val": kind(None).score(ranks)}) for kind in (CIRR, WiderCIRR)
    ]
    assert after.pop("recall_at100") == 100
    assert after == before
    assert set(CIRR.selection) <= set(before)


def median(ranks: np.ndarray) -> float:
    return float(np.median(ranks))


class MedianFashionIQ(FashionIQ):
    """FashionIQ with the median rank (1 is the first) of dresses, which chooses a checkpoint too."""

    reported = {
        **FashionIQ.reported,
        "dress_median_rank": Metric(
            "dress MedR", unit="rank", lower_is_better=True, checkpoint="median"
        ),
    }
    statistics = {"median_rank": median}

    def hits(self, ranks):
        return {**super().hits(ranks), "median_rank": ranks.named + 1}


@pytest.fixture
def with_medians(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "FashionIQ", MedianFashionIQ)


def test_a_metric_that_is_no_percentage_is_measured_and_compared(
    with_medians, golden, run, tmp_path, capsys
):
    """The benchmark's own file is all that it takes. Ranks over 100 are none of a percentage."""
    clip = ["--dataset", "FashionIQ", "--clip-model-name", golden / "clip_vit.pt"]
    files = [tmp_path / "result.json", tmp_path / "rankings.json"]
    flags = [*clip, "--combining-function", "sum", "--metrics-json", files[0]]
    run("validate", golden, *flags, "--rankings", files[1], "--rankings-k", 4)
    result = read_result(files[0])
    measured = result["protocols"]["original-kept"]
    median_rank = measured["metrics"]["dress_median_rank"]
    assert median_rank == np.median(measured["ranks"]["dress"]) + 1
    assert measured["certain"]["dress"] == []
    far = [rank + 1000 for rank in measured["ranks"]["dress"]]
    assert MedianFashionIQ(golden).score(Ranks(np.array(far)))["median_rank"] == median_rank + 1000
    capsys.readouterr()
    compare.main([str(files[0]), str(files[0]), "--resamples", "20"])
    (row,) = re.findall(r"dress MedR .*", capsys.readouterr().out.partition("original-removed")[0])
    assert row.split()[2:4] == [f"{median_rank:.2f}"] * 2
    where = ["--data-root", str(golden)]
    check_submission.main([str(files[1]), "--split", "val", *where])
    assert f"dress_median_rank = {median_rank}" in capsys.readouterr().out
    machine = ["--device", "cpu", "--num-workers", 0, "--resamples", 20]
    audited = tmp_path / "audit.json"
    audit.main(list(map(str, [*clip, *where, *machine, "--metrics-json", audited])))
    assert "dress_median_rank" in json.dumps(json.loads(audited.read_text()))


def test_the_checkpoint_of_a_rank_is_that_of_the_lowest(with_medians, stage_2):
    folder = stage_2("FashionIQ", "--save-best", "--num-epochs", 6, "--combiner-lr", 0.01)
    ranks = read_csv(folder / "validation_metrics.csv")["dress_median_rank"]
    best = json.loads((folder / "best_metrics.json").read_text())["dress_median_rank"]
    assert len(set(ranks)) > 1
    assert best["epoch"] == ranks.index(min(ranks))
    weights = torch.load(folder / "saved_models/combiner_median.pt", weights_only=True)
    assert weights["epoch"] == best["epoch"]
    assert is_complete(folder)


def test_intervals_of_a_median_are_those_of_medians():
    """Over the same resamples as the percentages beside it, against resamples drawn by hand."""
    ranks = torch.tensor([3.0, 1.0, 40.0, 7.0, 7.0, 900.0])
    hits = torch.stack([ranks, (ranks < 10).float()], 1)
    medians, recalls = bootstrap(
        hits,
        torch.arange(6),
        600,
        generator=torch.Generator().manual_seed(0),
        statistics=[median, None],
    ).unbind(1)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(6, (rows, 6), generator=generator) for rows in (500, 100)]
    resampled = ranks[torch.cat(drawn)]
    assert medians.tolist() == [median(row) for row in resampled.numpy()]
    assert torch.allclose(recalls, 100 * (resampled < 10).float().mean(1))
