"""From scores to patches: small worked examples, a stable sort, and exact guards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.choosing import (
    above_threshold,
    as_many_at_random,
    gather_tokens,
    kept_count,
    on_ramp,
    straight_through,
    top_k_indices,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    soft = torch.tensor([0.3, 0.9], requires_grad=True)
    mask = straight_through(torch.tensor([0.0, 1.0]), soft)
    assert mask.tolist() == [0.0, 1.0]
    (mask * torch.tensor([2.0, 5.0])).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [2.0, 5.0]


@pytest.mark.parametrize(("ratio", "patches", "count"), [(0.7, 196, 137), (0.5, 49, 24), (1, 9, 9), (0.01, 9, 1)])
def test_kept_count(ratio: float, patches: int, count: int) -> None:
    assert kept_count(ratio, patches) == count


def test_top_k_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.9], [5.0, 4.0, 3.0, 2.0]])
    assert top_k_indices(scores, 2).tolist() == [[1, 3], [0, 1]]
    tokens = torch.arange(8.0).view(2, 4, 1)
    assert gather_tokens(tokens, top_k_indices(scores, 2)).flatten(1).tolist() == [[1, 3], [4, 5]]


def test_equal_scores_are_taken_in_order() -> None:
    scores = torch.tensor([[0.0] * 6, [1, 3, 1, 1, 3, 1], [math.nan, 1, math.nan, 2, -math.inf, math.nan]])
    assert top_k_indices(scores, 3).tolist() == [[0, 1, 2], [0, 1, 4], [0, 1, 3]]
    assert top_k_indices(torch.full((1, 3), math.nan), 2).tolist() == [[0, 1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_top_k_is_a_stable_sort(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    assert top_k_indices(torch.tensor([scores], dtype=torch.float), count).tolist() == [sorted(best)]


def test_as_many_at_random() -> None:
    live = torch.rand(200, 12, generator=generator(1)) < 0.7
    live[:, 0] = True
    keep = live & (torch.rand(200, 12, generator=generator(2)) < 0.5)
    drawn = as_many_at_random(keep, live, generator())
    assert torch.equal(drawn.sum(dim=1), keep.sum(dim=1))
    assert not (drawn & ~live).any()
    assert not torch.equal(drawn, keep)
    # Each live place is drawn as often as another: of 4 live ones 2 are kept, so half of the time.
    live = torch.tensor([True, False, True, True, False, True]).expand(4000, -1)
    keep = torch.tensor([True, False, True, False, False, False]).expand(4000, -1)
    shares = as_many_at_random(keep, live, generator()).double().mean(dim=0)
    assert torch.allclose(shares[live[0]], torch.full((4,), 0.5, dtype=torch.float64), atol=0.03)


def test_above_threshold_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.3, 0.2], [0.9, 0.3, 0.4]])
    live = torch.tensor([[True, True, True], [True, True, True], [False, True, True]])
    keep = above_threshold(scores, torch.tensor(0.5), live)
    assert keep.tolist() == [
        [True, False, True],
        [False, True, False],  # none is above: the best stays
        [False, False, True],  # the best of those that are left
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 2))
def test_a_dropped_patch_stays_dropped_and_one_always_remains(seed: int, theta: float) -> None:
    scores = torch.rand(4, 7, generator=generator(seed))
    live = torch.rand(4, 7, generator=generator(seed + 1)) < 0.4
    live[:, seed % 7] = True
    keep = above_threshold(scores, torch.tensor(theta), live)
    assert bool(keep.any(dim=1).all())
    assert not bool((keep & ~live).any())


def test_a_ramp_by_hand() -> None:
    falls = [on_ramp(0.4, 0.5, progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert falls == pytest.approx([1.0, 0.7, 0.4, 0.4, 0.4])
    assert on_ramp(0.4, 0.0, 0.0) == 0.4
    assert on_ramp(0.4, 0.5, 0.25, start=0.6) == pytest.approx(0.5)
