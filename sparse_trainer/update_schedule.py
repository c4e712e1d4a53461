"""When masks change, and what fraction of them. Pure in the step number."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

from sparse_trainer.given_values import plain, whole


@dataclass(frozen=True)
class UpdateSchedule:
    """Update steps and drop fractions of a run of ``total_steps`` optimizer steps.

    Steps are counted from 1: the update of step ``t`` runs after the t-th optimizer step. No update runs at or
    after ``stop_at * total_steps``, so that the last topology has time to converge (RigL, Evci et al. 2020).

    Args:
        total_steps: optimizer steps of the run.
        update_every: optimizer steps between updates. By default a hundredth of the run, at least 100 steps: a
            short run cannot pay for many updates.
        updates: number of updates over the run, evenly spaced, in place of an interval. One who halves the
            epochs then keeps the exploration.
        drop_fraction: share of the live elements that the first update replaces.
        drop_fraction_end: the share at the stop; in between it falls by a cosine.
        stop_at: share of the steps after which the masks stay.

    Raises:
        ValueError: if more updates are asked for than there are steps, or both ``updates`` and ``update_every``.
    """

    total_steps: int
    update_every: int | None = None
    updates: int | None = None
    drop_fraction: float = 0.3
    drop_fraction_end: float = 0.005
    stop_at: float = 0.8
    update_steps: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_steps", plain(self.total_steps))
        if not whole(self.total_steps, 1) or self.total_steps >= 2**63:
            raise ValueError(f"total_steps: {self.total_steps!r} is not a positive whole number of optimizer steps")
        if self.updates is not None and self.update_every is not None:
            raise ValueError("give updates or update_every, not both")
        last = max(0, math.ceil(self.stop_at * self.total_steps) - 1)
        if self.updates is not None:
            if self.updates > last:
                raise ValueError(
                    f"updates: {self.updates} do not fit the {last} steps before the stop; at most {last} do"
                )
            steps = [round(i * (last + 1) / (self.updates + 1)) for i in range(1, self.updates + 1)]
        else:
            every = self.update_every or max(100, round(self.total_steps / 100))
            steps = list(range(every, last + 1, every))
        object.__setattr__(self, "update_steps", tuple(steps))

    def is_update(self, step: int) -> bool:
        """Whether an update runs after the ``step``-th optimizer step."""
        return self.next_update(step) == step

    def next_update(self, step: int) -> int | None:
        """The first update step that is not before ``step``; None if there is none."""
        index = bisect.bisect_left(self.update_steps, step)
        return self.update_steps[index] if index < len(self.update_steps) else None

    def fraction(self, step: int) -> float:
        """The drop fraction at ``step``: a cosine from ``drop_fraction`` at 0 to ``drop_fraction_end`` at the stop."""
        stop = self.stop_at * self.total_steps
        progress = min(step / stop, 1.0) if stop > 0 else 1.0
        return self.drop_fraction_end + (self.drop_fraction - self.drop_fraction_end) * 0.5 * (
            1 + math.cos(math.pi * progress)
        )
