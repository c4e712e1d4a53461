"""A budget that falls while the network trains: how many are live after each update, pure in the step number.

From its first value to its last along a cubic (Zhu and Gupta 2017, "To prune, or not to prune", equation 1): fast while
much can be spared, slowly at the end. With regrowth at every update this is GraNet (Liu et al. 2021). An example, from
1,000 to 100 over the updates at steps 10, 20, 30 and 40, the last of which reaches it::

    step 10   100 + 900 * (1 - 1/4)^3 = 480
    step 20   100 + 900 * (1 - 2/4)^3 = 212
    step 30   100 + 900 * (1 - 3/4)^3 = 114
    step 40   100
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FallingBudget:
    """From ``first`` to ``last`` over ``steps``, the updates of the fall; it changes at no other step."""

    first: int
    last: int
    steps: tuple[int, ...]
    multiple: int = 1  #: what comes off is whole multiples of it

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a budget falls at updates, and there are none")

    def at(self, step: int) -> int:
        """Live after optimizer step ``step``."""
        done = bisect.bisect_right(self.steps, step)
        if not done:
            return self.first
        left = 1 - self.steps[done - 1] / self.steps[-1]
        return self.last + round((self.first - self.last) * left**3 / self.multiple) * self.multiple

    @property
    def values(self) -> tuple[int, ...]:
        """All that it is, in the order of time, the first included."""
        return (self.first, *map(self.at, self.steps))


def steps_of_fall(
    update_steps: Sequence[int], total_steps: int, reach_at: float, most: int | None = None
) -> tuple[int, ...]:
    """The updates of a fall: those up to the share ``reach_at`` of the run, and at least the first of all.

    Args:
        most: no more than so many of them, evenly spread, the last one among them.

    Raises:
        ValueError: there is no update.
    """
    if not update_steps:
        raise ValueError("initial_density or unit_falls: a budget falls at updates, and this run has none; set updates")
    due = [step for step in update_steps if step <= reach_at * total_steps] or [update_steps[0]]
    if most is not None and most < len(due):
        due = [due[math.ceil((number + 1) * len(due) / most) - 1] for number in range(most)]
    return tuple(due)
