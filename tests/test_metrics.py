"""Ranks by counting against ranks by sorting; recalls and means by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.metrics import mean_and_deviation, means, percentage
from benchmarks.ranking import NotFiniteError, nearest, target_ranks
from evaluation.comparison import bootstrap
from test_protocols import SOME
from twins import ranks_by_sorting


@st.composite
def rankings(draw):
    """Similarities with many ties, and a target for each query."""
    queries, gallery = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    cells = st.lists(st.integers(-3, 3), min_size=queries * gallery, max_size=queries * gallery)
    similarity = torch.tensor(draw(cells), dtype=torch.float32).view(queries, gallery)
    targets = [draw(st.integers(0, gallery - 1)) for _ in range(queries)]
    return similarity, torch.tensor(targets)


@SOME
@given(rankings())
def test_ranks_equal_a_stable_sort(ranking):
    similarity, targets = ranking
    assert target_ranks(similarity, targets).tolist() == ranks_by_sorting(similarity, targets)


@SOME
@given(rankings(), st.integers(1, 12))
def test_the_nearest_equal_a_stable_sort(ranking, k):
    similarity = ranking[0]
    k = min(k, similarity.shape[1])
    assert (
        nearest(similarity, k).tolist()
        == similarity.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
    )


def test_ties_keep_the_order_of_the_gallery():
    similarity = torch.full((3, 4), 0.5)
    assert target_ranks(similarity, torch.tensor([0, 2, 3])).tolist() == [0, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_raises(value):
    """Guards against NaN similarities that compare as "nothing is nearer", which would read as recall 100."""
    for row in ([0.1, value, 0.3], [value, 0.1, 0.3]):
        with pytest.raises(NotFiniteError):
            target_ranks(torch.tensor([row]), torch.tensor([1]))
        with pytest.raises(NotFiniteError):
            nearest(torch.tensor([row]), 2)


def test_an_excluded_target_raises():
    with pytest.raises(ValueError, match="excluded"):
        target_ranks(torch.tensor([[float("-inf"), 1.0]]), torch.tensor([0]))


def test_recall_counts_the_ranks_below_k():
    ranks = np.array([0, 1, 4, 9])
    assert [percentage(ranks < k) for k in (1, 2, 5, 10)] == [25, 50, 75, 100]
    assert percentage(np.array([3]) < 3) == 0


def test_means():
    expected = {"arithmetic_mean": 62.5, "harmonic_mean": 40.0, "geometric_mean": 50.0}
    assert means([25.0, 100.0]) == pytest.approx(expected)


def test_a_recall_of_zero_makes_the_other_means_zero():
    """Guards against the original's crash in the geometric mean."""
    assert means([0.0, 50.0]) == {
        "arithmetic_mean": 25.0,
        "harmonic_mean": 0.0,
        "geometric_mean": 0.0,
    }


def test_the_bootstrap_has_the_spread_of_the_binomial():
    hits = torch.zeros(400, 2)
    hits[:100, 0] = 1
    hits[:300, 1] = 1
    each = torch.arange(400)
    drawn = bootstrap(hits, each, 4000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 2)
    assert drawn.mean(0).tolist() == pytest.approx([25, 75], abs=0.2)
    deviation = 100 * (0.25 * 0.75 / 400) ** 0.5
    assert drawn.std(0).tolist() == pytest.approx([deviation, deviation], rel=0.05)


def test_the_bootstrap_is_paired():
    """Two columns of the same hits never differ; unpaired ones would."""
    hits = (torch.arange(50) % 3 == 0).float()[:, None].repeat(1, 2)
    drawn = bootstrap(hits, torch.arange(50), 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert drawn[:, 0].std() > 1


def test_a_cluster_is_drawn_with_all_of_its_queries():
    """Clusters of several sizes, against scores of resamples that are put together query by query."""
    clusters = torch.tensor([2, 0, 1, 0, 2, 0])
    hits = torch.tensor([1.0, 0, 1, 1, math.nan, 0])
    drawn = bootstrap(
        torch.stack([hits, hits], 1),
        clusters,
        700,
        generator=torch.Generator().manual_seed(3),
        statistics=[None, lambda values: float(np.nanmedian(values))],
    )
    generator = torch.Generator().manual_seed(3)
    rounds = [torch.randint(3, (rows, 3), generator=generator) for rows in (500, 200)]
    for chosen, (mean, middle) in zip(torch.cat(rounds).tolist(), drawn.tolist(), strict=True):
        queries = np.concatenate([hits[clusters == cluster].numpy() for cluster in chosen])
        assert mean == pytest.approx(100 * np.nanmean(queries))
        assert middle == np.nanmedian(queries)


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_deviation([5.0]) == (5.0, None)
