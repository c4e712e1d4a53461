"""A density becomes whole numbers per layer: uniform, Erdős-Rényi-kernel, or global.

The total is exact: ``live = round(density * prunable)``, and the layers' counts sum to it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
DISTRIBUTIONS = ("erk", "uniform", "global")


@dataclass(frozen=True)
class Budget:
    """Live and total parameters of the prunable weights, as whole numbers."""

    live: int
    total: int  #: of the dense network

    @property
    def density(self) -> float:
        return self.live / self.total

    def __str__(self) -> str:
        return f"{self.live:,} of {self.total:,} ({self.density:.2%})"


def allocate(
    shapes: Mapping[str, Sequence[int]], live: int, distribution: str, *, at_least_one: bool = False
) -> dict[str, int]:
    """How many elements of each layer are live; the counts sum to ``live`` exactly.

    Args:
        shapes: shape of each prunable weight by name.
        live: live elements over all layers.
        distribution: ``uniform`` gives every layer the same density, ``erk`` follows
            :func:`erk_densities`; ``global`` starts from ``erk`` and lets updates move elements between layers.
        at_least_one: a layer whose share rounds to nothing gets one element of the greatest layer.

    Raises:
        ValueError: if ``live`` does not fit, or a layer would be left without a live element.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: {distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    if not 0 < live <= total:
        raise ValueError(f"a budget of {live:,} live parameters does not fit {total:,} prunable ones")
    if distribution == "uniform":
        ideal = {name: size * live / total for name, size in sizes.items()}
    else:
        densities = erk_densities(shapes, live / total)
        ideal = {name: sizes[name] * density for name, density in densities.items()}
    counts = largest_remainder(ideal, live, sizes)
    empty = [name for name, count in counts.items() if count == 0]
    if at_least_one and live >= len(counts):
        for name in empty:
            counts[max(counts, key=lambda other: counts[other])] -= 1
            counts[name] = 1
    elif empty:
        raise ValueError(
            f"a budget of {live:,} of {total:,} parameters rounds to no live element in {', '.join(empty[:3])}"
            f"{' and others' if len(empty) > 3 else ''}; raise density or exclude small layers"
        )
    return counts


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdős-Rényi-kernel densities (Mocanu et al. 2018; Evci et al. 2020, section 3).

    The density of a layer is ``epsilon * sum(shape) / prod(shape)``, so that small and narrow layers keep more.
    ``epsilon`` makes the total meet ``density``; a layer that would exceed 1 is made dense and ``epsilon`` is
    solved again for the rest.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    sums = {name: sum(shape) for name, shape in shapes.items()}
    live = density * sum(sizes.values())
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        if not free:
            return dict.fromkeys(shapes, 1.0)
        epsilon = (live - sum(sizes[name] for name in dense)) / sum(sums[name] for name in free)
        densities = {name: 1.0 if name in dense else epsilon * sums[name] / sizes[name] for name in shapes}
        over = {name for name in free if densities[name] > 1.0}
        if not over:
            return densities
        dense |= over


def largest_remainder(ideal: Mapping[Name, float], total: int, capacity: Mapping[Name, int]) -> dict[Name, int]:
    """Whole numbers nearest to ``ideal`` that sum to ``total``, none above its ``capacity``.

    Everyone gets the whole part; what is left goes one by one to the greatest fractions (Hamilton's method),
    of equal ones to the earlier.
    """
    counts = {name: min(math.floor(value + 1e-9), capacity[name]) for name, value in ideal.items()}
    by_fraction = sorted(ideal, key=lambda name: counts[name] - ideal[name])
    missing = total - sum(counts.values())
    while missing > 0:
        room = [name for name in by_fraction if counts[name] < capacity[name]][:missing]
        assert room, "the total exceeds the capacities"
        for name in room:
            counts[name] += 1
        missing -= len(room)
    assert sum(counts.values()) == total
    return counts


def count_units(density: float, units: int, what: str) -> int:
    """Live heads or neurons of a block: ``density * units`` to the nearest whole number, halves up.

    Raises:
        ValueError: if none would be left.
    """
    live = math.floor(density * units + 0.5)
    if live < 1:
        raise ValueError(
            f"{what}_density: {density} of {units} {what}s leaves none; the least that works is {1 / units:.3g}"
        )
    return live


TOGETHER = 8
"""Neurons that come and go together in wide MLPs: in 16 bits the tensor cores of a GPU read rows of 16 bytes. On an
H200 a DeiT-B with 1,843 of 3,072 neurons classified at .56 of the speed of the dense one."""
WIDE = 512
"""Neurons of an MLP where so few more or fewer are under 1 %."""


def neurons_together(neurons: int, pattern: int = 1) -> int:
    """How many neurons of an MLP come and go together.

    Args:
        neurons: of the dense MLP.
        pattern: rows or columns of the blocks of its weights, which go on dividing it.
    """
    if neurons >= WIDE and neurons % math.lcm(TOGETHER, pattern) == 0:
        return math.lcm(TOGETHER, pattern)
    return pattern if neurons % pattern == 0 else 1


def count_neurons(density: float, neurons: int, pattern: int = 1) -> int:
    """Live neurons of a block: ``density * neurons`` in whole numbers of those that come and go together.

    Down to the eight of a wide MLP, so that no limit is passed; to the nearest blocks of a pattern, which may be few.

    Raises:
        ValueError: if none would be left.
    """
    together, live = neurons_together(neurons, pattern), count_units(density, neurons, "neuron")
    return min(max(1, math.floor(live / together + (0.5 if pattern > 1 else 0.0))) * together, neurons)
