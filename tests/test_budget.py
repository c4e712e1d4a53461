from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_trainer.budget import allocate, count_neurons, count_units, erk_densities, largest_remainder


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = timm.create_model(name)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


@pytest.mark.parametrize(
    ("name", "prunable"),
    [("tiny", 5_647_872), ("small", 21_912_576), ("base", 86_292_480)],
)
def test_deit_has_the_known_number_of_prunable_weights(name: str, prunable: int) -> None:
    assert sum(map(math.prod, shapes_of(f"deit_{name}_patch16_224").values())) == prunable


@pytest.mark.parametrize(
    ("name", "density", "patch", "qkv", "proj", "fc", "head"),
    [
        ("tiny", 0.5, 0.1136, 0.5123, 0.7684, 0.4802, 0.4580),
        ("small", 0.5, 0.2061, 0.5037, 0.7555, 0.4722, 0.5228),
        ("small", 0.7, 0.2907, 0.7105, 1.0, 0.6661, 0.7375),
        ("base", 0.5, 0.3915, 0.4993, 0.7489, 0.4681, 0.6621),
    ],
)
def test_erk_of_deit(name: str, density: float, patch: float, qkv: float, proj: float, fc: float, head: float) -> None:
    shapes = shapes_of(f"deit_{name}_patch16_224")
    found = erk_densities(shapes, density)
    block = "blocks.5"
    got = [
        found[layer]
        for layer in (
            "patch_embed.proj",
            f"{block}.attn.qkv",
            f"{block}.attn.proj",
            f"{block}.mlp.fc1",
            "head",
        )
    ]
    assert [round(value, 4) for value in got] == [patch, qkv, proj, fc, head]
    assert round(found[f"{block}.mlp.fc2"], 4) == fc
    live = round(density * sum(map(math.prod, shapes.values())))
    assert sum(allocate(shapes, live, "erk").values()) == live


def test_erk_by_hand() -> None:
    # sizes 4 and 100, sums 4 and 20; at density 0.5: 52 live, epsilon = 52/24, 4 * 52/24 = 8.7 > 4, so the first
    # is dense, and the second takes the other 48
    assert erk_densities({"a": (2, 2), "b": (10, 10)}, 0.5) == {"a": 1.0, "b": pytest.approx(0.48)}


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8),
    st.floats(0.01, 1.0),
    st.sampled_from(["erk", "uniform", "global"]),
)
def test_counts_are_exact_or_refused(shapes: list[tuple[int, int]], density: float, distribution: str) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    live = round(density * sum(map(math.prod, shapes)))
    try:
        counts = allocate(named, live, distribution)
    except ValueError as error:
        assert "rounds to no live element" in str(error) or "does not fit" in str(error)  # noqa: PT017
        return
    assert sum(counts.values()) == live
    assert all(0 < counts[name] <= math.prod(shape) for name, shape in named.items())


def test_largest_remainder_by_hand() -> None:
    ideal = {"a": 1.5, "b": 2.2, "c": 1.3}
    assert largest_remainder(ideal, 5, dict.fromkeys(ideal, 9)) == {"a": 2, "b": 2, "c": 1}


def test_what_does_not_fit_raises() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        allocate({"a": (2, 2)}, 5, "erk")
    with pytest.raises(ValueError, match="is not one of erk, uniform, global"):
        allocate({"a": (2, 2)}, 2, "even")
    with pytest.raises(ValueError, match="no live element in a"):
        allocate({"a": (1, 1), "b": (30, 30)}, 3, "uniform")


def test_unit_counts() -> None:
    assert count_units(0.7, 6, "head") == 4
    assert count_units(0.5, 3, "head") == 2  # halves up
    assert count_units(0.6, 1536, "neuron") == 922
    with pytest.raises(ValueError, match=r"head_density: 0.1 of 3 heads leaves none; the least that works is 0.333"):
        count_units(0.1, 3, "head")


def test_neurons_of_wide_layers_come_in_eights() -> None:
    assert count_neurons(0.6, 1536) == 920  # not 922: of 16 bytes and less a tensor core makes slow work
    assert count_neurons(0.6, 3072) == 1840
    assert count_neurons(0.5, 3072) == 1536
    assert count_neurons(1.0, 1536) == 1536
    assert count_neurons(0.001, 1536) == 8
    assert count_neurons(0.6, 96) == 58  # where eight are many, to the nearest
    assert count_neurons(0.6, 516) == 310  # where eight do not divide all of them
    assert count_neurons(0.6, 96, 16) == 64
    assert count_neurons(0.6, 1536, 32) == 928
    assert count_neurons(0.6, 100, 16) == 60
