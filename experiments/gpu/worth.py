"""Which runs of the grid ``cifar10`` are trained, in an order of worth, and whether one still fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from experiments.grids.grid import Grid

ENTRIES = ("dense", "svite_50", "svite_90", "static_90", "s2vite_40", "as_vit_65", "svite_plus_5")
"""Those that are trained, the one first that is worth most; then again with the next seed."""
DRY_ENTRIES = ("dense", "svite_90", "as_vit_65")
COST = {"as_vit_65": 2.5, "s2vite_40": 0.8}
"""Of a step, over one of dense; a teacher and the whole attention matrix on the one side, fewer units on the other."""
START = 15.0
"""Seconds in which a run begins and ends."""
MARGIN = 1.1
"""A run is begun if there is so much more time than it is expected to take."""

Task = tuple[str, int]
"""Entry and seed."""


@dataclass(frozen=True)
class Progress:
    """Of a run that is going on."""

    steps: int  #: done
    total: int
    seconds: float  #: that these steps took
    recent: float | None = None  #: seconds of a step of late; None: as of all

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps if self.recent is None else self.recent

    @property
    def left(self) -> float:
        """Seconds to its end, at its pace of late."""
        return (self.total - self.steps) * self.step_seconds


class Pace:
    """How fast a run is of late: its first steps are slow, and it is faster when others have ended."""

    WINDOW = 20.0
    """Seconds over which the pace is taken."""

    def __init__(self) -> None:
        self._heard: list[tuple[float, int]] = []

    def hear(self, steps: int, total: int, seconds: float) -> Progress:
        """``steps`` of ``total`` were done after so many ``seconds``."""
        self._heard.append((seconds, steps))
        while len(self._heard) > 2 and self._heard[1][0] <= seconds - self.WINDOW:
            del self._heard[0]
        since, done = self._heard[0]
        recent = (seconds - since) / (steps - done) if steps > done else None
        return Progress(steps, total, seconds, recent)


def shorten(grid: Grid, recipe_epochs: int, epochs: int) -> Grid:
    """The grid whose runs are ``epochs`` / ``recipe_epochs`` as long, each by as much."""

    def shorter(entry: Mapping[str, Any]) -> dict[str, Any]:
        training = dict(entry.get("training") or {})
        training["epochs"] = max(1, round(training.get("epochs", recipe_epochs) * epochs / recipe_epochs))
        return {**entry, "training": training}

    return replace(grid, entries={name: shorter(entry) for name, entry in grid.entries.items()})


def tasks(entries: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """All runs, in the order of their worth."""
    return [(entry, seed) for seed in seeds for entry in entries]


def next_task(waiting: Sequence[Task], grid: Grid, trained: AbstractSet[Task], begun: AbstractSet[Task]) -> Task | None:
    """The first that need wait for no other; None if there is none.

    Args:
        trained: runs whose networks are there.
        begun: runs that are going on.
    """
    for entry, seed in waiting:
        if all((needed, seed) in trained for needed in grid.needs(entry)):
            return entry, seed
        if not all((needed, seed) in trained | begun | set(waiting) for needed in grid.needs(entry)):
            continue  # what it needs never comes; the next one may be luckier
    return None


def expected_seconds(entry: str, epochs: float, epoch_seconds: float) -> float:
    """Of a run.

    Args:
        epoch_seconds: of dense, with as many runs side by side.
    """
    return START + MARGIN * epochs * epoch_seconds * COST.get(entry, 1.0)


def to_give_up(running: Mapping[Task, Progress], order: Sequence[Task], left: float) -> Task | None:
    """The run of least worth, if one of them will not end in time and there are others to gain by its end.

    Args:
        running: those whose pace is known.
        order: of worth.
        left: seconds.
    """
    late = [task for task, progress in running.items() if progress.left > left]
    return max(running, key=order.index) if late and len(running) > 1 else None
