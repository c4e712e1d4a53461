"""What the user asks of the scheduler: one frozen record that says everything that is wrong at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sparse_trainer.budget import DISTRIBUTIONS
from sparse_trainer.given_values import plain, whole
from sparse_trainer.patterns import read_pattern
from sparse_trainer.update_schedule import UpdateSchedule

GROWTH = ("gradient", "random")
SWAPS = ("auto", "always", "if_better", "explore")
STARTS = ("random", "score")
UNIT_DISTRIBUTIONS = ("uniform", "by_score", "global")
CANDIDATES = ("last", "first")
UNIT_COUNTS = ("carry", "round_up")
FIRST_WEIGHTS = ("drawn", "rescaled")
WEIGHT_MOMENTS = ("zero", "mean", "gradient")
UNIT_MOMENTS = ("mean", "zero")


def _patterns(value: object) -> object:
    """Name patterns as a tuple, one alone too; anything else as it is, for the checks to refuse."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)) else value


@dataclass(frozen=True)
class SparsityConfig:
    """Weight masks, heads and neurons under one budget.

    Raises:
        ValueError: naming every field that is wrong, its value, and what would work.
    """

    density: float | None = 0.5
    """Live over all prunable weights of the dense network; null for no weight masks."""
    live_parameters: int | None = None
    """The budget as a whole number of live prunable weights, in place of density."""
    initial_density: float | None = None
    """Live at the start, in place of density, which the budget then falls to; 1.0 starts dense. Pruned by magnitude
    along a cubic, with growth at every update (GraNet)."""
    reach_at: float = 0.5
    """Share of the run after which a budget that falls has reached its last value."""
    pattern: str = "1x1"
    """Which weights live and die together: 1x1 for each by itself; RxC, such as 16x1, for R neighbouring outputs by C
    neighbouring inputs, which kernels compute fast; n:m, such as 2:4, for n of every m neighbouring inputs. Layers that
    it does not divide have single weights."""
    distribution: str = "erk"
    """How the budget is spread over the layers: erk, uniform or global."""
    head_density: float = 1.0
    """Share of the attention heads of a block that are live, rounded to whole heads."""
    neuron_density: float = 1.0
    """Share of the MLP neurons of a block that are live, rounded to whole neurons; from 512 on down to a multiple of 8,
    which is what the kernels of a GPU are fast with."""
    unit_falls: int = 0
    """At how many updates heads and neurons go, from the dense network at the start to what is asked, up to reach_at of
    the run, along the same cubic as weights: each time the network becomes physically smaller. 0: they are gone from
    the start."""
    update_every: int | None = None
    """Optimizer steps between updates; by default a hundredth of the run and at least 100."""
    updates: int | None = None
    """Number of updates over the run, in place of update_every; 0 keeps the first masks."""
    drop_fraction: float = 0.3
    """Share of the live elements that the first update replaces."""
    drop_fraction_end: float = 0.005
    """Share at the last update; in between it falls by a cosine."""
    stop_at: float = 0.8
    """Share of the run after which the masks stay."""
    grow: str = "gradient"
    """What ranks dead weights: the magnitude of their mean gradient (RigL) or chance (SET)."""
    growth_batches: int = 8
    """Micro-batches (backward passes) over which the growth gradient is averaged, in whole optimizer steps. RigL
    takes 1, of which much is noise."""
    regrow: bool = True
    """Whether a weight that an update prunes may grow again in the same update."""
    floor: float = 0.1
    """Share of its first live weights that a layer always keeps with the global distribution, and of its neurons that a
    block keeps with unit_distribution: by_score."""
    swap: str = "auto"
    """Units: always replace the share that is due; only if_better, where the estimated gain is greater; or explore: try
    each unit once, and after that take one back only if it is better; one that is writes again what it wrote. auto:
    explore for heads, of which if_better exchanges hardly any, and if_better for neurons."""
    probation: int = 2
    """Updates for which a unit that came stays, to learn before it is judged, and one that left stays out; 0 judges all
    at every update (S2ViTE)."""
    candidates: str = "last"
    """What a dormant unit comes back with: the last values that it had, or its first, from before the training."""
    unit_counts: str = "carry"
    """Units are few: carry the fraction that is due over to the next update, or round_up at each (S2ViTE)."""
    start: str = "random"
    """What is live first: random by the seed, or score (of a trained dense model the weights of greatest magnitude and
    the units of greatest effect)."""
    score_batches: int = 4
    """With start: score, over how many calls of the closure the scores of units are averaged."""
    unit_distribution: str = "uniform"
    """How live heads and neurons are spread over the blocks: uniform, the same share of each; by_score (with start:
    score, or unit_falls), as many in all, and where they matter most: none below one head and the floor of its neurons;
    global: at every update the weakest of the network leave and the most promising come, in whichever block."""
    first_weights: str = "drawn"
    """Where training starts from random weights: as they were drawn, for a dense layer; or rescaled, multiplied by
    1 / sqrt(density of the layer), so that a layer passes on as much variance as a dense one."""
    weight_moments: str = "zero"
    """Where the second moments of a grown weight start: at zero, so that it moves fast before it is judged by its
    magnitude; at the mean of the live ones of its tensor; or at the square of the gradient that grew it."""
    unit_moments: str = "zero"
    """The same of a unit: at zero, so that it moves fast, which won in short runs; or at the mean of the live ones,
    which learned images less by heart in a long one."""
    include: tuple[str, ...] = ()
    """Name patterns (as in a shell) of the weights to prune; empty for every weight of a layer that
    multiplies: Linear, Bilinear, convolutions, and the projections of attention."""
    exclude: tuple[str, ...] = ()
    """Name patterns of weights that stay dense."""
    seed: int = 0
    """Seed of the first masks and of random growth."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(getattr(self, name)))
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def structured(self) -> bool:
        """Whether heads or neurons are pruned."""
        return self.head_density < 1.0 or self.neuron_density < 1.0

    @property
    def masks_weights(self) -> bool:
        """Whether single weights are masked."""
        return self.density is not None or self.live_parameters is not None

    @property
    def pattern_rows(self) -> int:
        """Neurons that come and go together, so that the pattern goes on dividing what they are rows and columns of."""
        if not self.masks_weights:
            return 1
        pattern = read_pattern(self.pattern)
        return math.lcm(pattern.rows, pattern.columns)

    def swap_of(self, kind: str) -> str:
        """The rule by which units of a kind, ``head`` or ``neuron``, are exchanged."""
        if self.swap == "auto":
            return "explore" if kind == "head" else "if_better"
        return self.swap

    @property
    def falls(self) -> bool:
        """Whether the budget of weights falls."""
        return self.initial_density is not None

    def schedule(self, total_steps: int) -> UpdateSchedule:
        """When masks change in a run of so many optimizer steps.

        Raises:
            ValueError: if more updates are asked for than there are steps.
        """
        return UpdateSchedule(
            total_steps=total_steps,
            update_every=self.update_every,
            updates=self.updates,
            drop_fraction=self.drop_fraction,
            drop_fraction_end=self.drop_fraction_end,
            stop_at=self.stop_at,
        )

    def _problems(self) -> list[str]:
        problems = []

        def check(name: str, works: str, accept: bool) -> None:
            if not accept:
                problems.append(f"{name}: {getattr(self, name)!r} is not {works}")

        def choice(name: str, known: Sequence[str]) -> None:
            value = getattr(self, name)
            check(name, f"one of {', '.join(known)}", isinstance(value, str) and value in known)

        def share(value: Any, *, zero: bool = False) -> bool:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return number and (0 <= value <= 1 if zero else 0 < value <= 1)

        check("density", "a share in (0, 1] or null", self.density is None or share(self.density))
        check(
            "live_parameters",
            "a positive whole number or null",
            self.live_parameters is None or whole(self.live_parameters, 1),
        )
        check(
            "initial_density", "a share in (0, 1] or null", self.initial_density is None or share(self.initial_density)
        )
        if self.initial_density is not None and share(self.initial_density):
            if not self.masks_weights:
                problems.append("initial_density: needs density, which it falls to")
            elif self.live_parameters is None and share(self.density) and self.initial_density < (self.density or 0):
                problems.append(f"initial_density: {self.initial_density} is below density ({self.density})")
            if ":" in str(self.pattern):
                problems.append(f"initial_density: pattern {self.pattern} has one density; give 1x1 or RxC, or null")
        check("reach_at", "a share in (0, 1]", share(self.reach_at))
        check("head_density", "a share in (0, 1]", share(self.head_density))
        check("neuron_density", "a share in (0, 1]", share(self.neuron_density))
        choice("distribution", DISTRIBUTIONS)
        choice("grow", GROWTH)
        choice("swap", SWAPS)
        check("probation", "a whole number (0 or more)", whole(self.probation, 0))
        check("score_batches", "a positive whole number", whole(self.score_batches, 1))
        choice("unit_distribution", UNIT_DISTRIBUTIONS)
        if self.unit_distribution == "by_score" and self.start != "score" and not self.unit_falls:
            problems.append(
                'unit_distribution: "by_score" needs start: "score", which compares the units, or unit_falls'
            )
        check("unit_falls", "a whole number (0 or more)", whole(self.unit_falls, 0))
        if whole(self.unit_falls, 1) and ":" in str(self.pattern):
            problems.append(f"unit_falls: pattern {self.pattern} has one density; give 1x1 or RxC, or unit_falls 0")
        if whole(self.unit_falls, 1) and not (
            (share(self.head_density) and self.head_density < 1)
            or (share(self.neuron_density) and self.neuron_density < 1)
        ):
            problems.append("unit_falls: needs head_density or neuron_density below 1")
        choice("start", STARTS)
        choice("candidates", CANDIDATES)
        choice("unit_counts", UNIT_COUNTS)
        steps_work = self.update_every is None or whole(self.update_every, 1)
        check("update_every", "a positive whole number of steps or null", steps_work)
        check("updates", "a whole number (0 or more) or null", self.updates is None or whole(self.updates, 0))
        if self.updates is not None and self.update_every is not None:
            problems.append("updates and update_every: give one of them, not both")
        check("drop_fraction", "a share in [0, 1]", share(self.drop_fraction, zero=True))
        check("drop_fraction_end", "a share in [0, 1]", share(self.drop_fraction_end, zero=True))
        ordered = share(self.drop_fraction, zero=True) and share(self.drop_fraction_end, zero=True)
        if ordered and self.drop_fraction_end > self.drop_fraction:
            problems.append(
                f"drop_fraction_end: {self.drop_fraction_end} is above drop_fraction ({self.drop_fraction})"
            )
        check("stop_at", "a share in [0, 1]", share(self.stop_at, zero=True))
        check("growth_batches", "a positive whole number of micro-batches", whole(self.growth_batches, 1))
        check("regrow", "true or false", isinstance(self.regrow, bool))
        choice("first_weights", FIRST_WEIGHTS)
        check("pattern", "a text such as 1x1, 16x1 or 2:4", isinstance(self.pattern, str))
        try:
            read_pattern(self.pattern if isinstance(self.pattern, str) else "1x1")
        except ValueError as error:
            problems.append(f"pattern: {error}")
        choice("weight_moments", WEIGHT_MOMENTS)
        choice("unit_moments", UNIT_MOMENTS)
        check("seed", "a whole number from 0 to 2^63 - 1", whole(self.seed, 0) and self.seed < 2**63)
        check("floor", "a share in [0, 1]", share(self.floor, zero=True))
        for name in ("include", "exclude"):
            value = getattr(self, name)
            patterns = isinstance(value, tuple) and all(isinstance(pattern, str) for pattern in value)
            check(name, 'name patterns, such as ("blocks.*",); () for none', patterns)
        return problems
