from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_trainer.masks import (
    _packed_on_device,
    _smallest_on_device,
    _smallest_on_host,
    count_bits,
    largest_per_segment,
    pack_bits,
    prune_and_grow,
    random_mask,
    replaceable,
    select_largest,
    select_smallest,
    unpack_bits,
)


def bools(text: str) -> torch.Tensor:
    return torch.tensor([character == "1" for character in text])


def test_one_update_by_hand() -> None:
    weight = torch.tensor([0.5, -0.1, 0.9, 0.0, 0.0, 0.0])
    gradient = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.7, 0.3])
    change = prune_and_grow(weight, bools("111000"), gradient, 1)
    assert change.live.tolist() == bools("101010").tolist()
    assert change.removed.tolist() == bools("010000").tolist()
    assert change.added.tolist() == bools("000010").tolist()
    assert change.threshold == pytest.approx(0.1)


def test_a_pruned_element_may_grow_back_and_has_then_not_changed() -> None:
    weight = torch.tensor([0.5, -0.1, 0.9, 0.0])
    gradient = torch.tensor([0.0, 5.0, 0.0, 0.2])
    change = prune_and_grow(weight, bools("1110"), gradient, 1)
    assert change.live.tolist() == bools("1110").tolist()
    assert not change.removed.any()
    assert not change.added.any()
    without = prune_and_grow(weight, bools("1110"), gradient, 1, regrow=False)
    assert without.live.tolist() == bools("1011").tolist()


def test_ties_go_to_the_lower_index() -> None:
    weight = torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0, 0.0])
    change = prune_and_grow(weight, bools("111000"), torch.zeros(6), 2, regrow=False)
    assert change.live.tolist() == bools("001110").tolist()


def test_only_eligible_elements_move() -> None:
    weight = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0])
    eligible = bools("01101")
    change = prune_and_grow(weight, bools("11100"), torch.ones(5), 1, eligible=eligible, regrow=False)
    assert change.live.tolist() == bools("10101").tolist()
    assert replaceable(bools("11100"), 1.0, eligible) == 1


def test_replaceable_is_bounded_by_the_dead() -> None:
    assert replaceable(bools("1111000000"), 0.5) == 2
    assert replaceable(bools("1111111110"), 0.5) == 1
    assert replaceable(bools("1111"), 0.5) == 0


def brute_force(weight: list[float], live: list[bool], score: list[float], count: int, regrow: bool) -> list[bool]:
    """Sort in Python by (value, index) and take."""
    pruned = sorted((i for i, on in enumerate(live) if on), key=lambda i: (abs(weight[i]), i))[:count]
    candidates = [i for i, on in enumerate(live) if not on] + (pruned if regrow else [])
    grown = sorted(candidates, key=lambda i: (-score[i], i))[:count]
    return [(on and i not in pruned) or i in grown for i, on in enumerate(live)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equals_brute_force_ties_included(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 24))
    # few distinct values, so that ties are the rule
    values = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    live = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    weight = [
        v if on else 0.0 for v, on in zip(data.draw(st.lists(values, min_size=size, max_size=size)), live, strict=True)
    ]
    score = [abs(v) for v in data.draw(st.lists(values, min_size=size, max_size=size))]
    regrow = data.draw(st.booleans())
    count = replaceable(torch.tensor(live), data.draw(st.floats(0, 1)))
    change = prune_and_grow(torch.tensor(weight), torch.tensor(live), torch.tensor(score), count, regrow=regrow)
    assert change.live.tolist() == brute_force(weight, live, score, count, regrow)
    assert int(change.live.sum()) == sum(live)
    assert int(change.removed.sum()) == int(change.added.sum())


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_random_mask_is_exact_and_seeded(live: int, extra: int, seed: int) -> None:
    def draw() -> torch.Tensor:
        return random_mask((live + extra,), live, torch.Generator().manual_seed(seed))

    assert int(draw().sum()) == live
    assert torch.equal(draw(), draw())


def test_random_mask_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="6 elements cannot have 7"):
        random_mask((2, 3), 7, torch.Generator())


def test_select_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot select 3 of 2"):
        select_smallest(torch.ones(4), bools("1100"), 3)


def test_select_works_on_half_precision_and_any_shape() -> None:
    score = torch.tensor([[3.0, 1.0], [2.0, 0.5]], dtype=torch.bfloat16).float()
    selected, threshold = select_largest(score, torch.ones(2, 2, dtype=torch.bool), 2)
    assert selected.tolist() == [[True, False], [True, False]]
    assert threshold == 2.0


def test_largest_per_segment() -> None:
    score = torch.tensor([1.0, 3.0, 2.0, 9.0, 8.0])
    chosen = largest_per_segment(score, torch.ones(5, dtype=torch.bool), [3, 2], [1, 1])
    assert chosen.tolist() == bools("01010").tolist()


def test_bits_by_hand() -> None:
    packed = pack_bits(bools("1010000011"))  # elements 0 and 2 in byte 0, 8 and 9 in byte 1
    assert packed.tolist() == [0b101, 0b11]
    assert count_bits(packed) == 4


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_round_trip(values: list[bool]) -> None:
    mask = torch.tensor(values)
    assert torch.equal(unpack_bits(pack_bits(mask), len(values)), mask)


def test_bits_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="takes 2 bytes"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="after the last"):
        unpack_bits(torch.tensor([0b1000], dtype=torch.uint8), 3)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans()), min_size=1), st.data())
def test_a_device_selects_and_packs_as_the_host_does(items: list[tuple[float, bool]], data: st.DataObject) -> None:
    """Its code runs on any device, here on the CPU, with many scores that tie."""
    score = torch.tensor([value for value, _ in items])
    among = torch.tensor([inside for _, inside in items])
    if among.any():
        count = data.draw(st.integers(1, int(among.sum())))
        host, device = (select(score, among, count) for select in (_smallest_on_host, _smallest_on_device))
        assert torch.equal(host[0], device[0])
        assert host[1] == device[1]
    assert torch.equal(_packed_on_device(among), pack_bits(among))
