"""How old each live weight, head and neuron is, and what is left of the first masks; the pictures of a run show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_trainer.report import MaskUpdate

DEAD = -1
_LATEST = torch.iinfo(torch.int16).max

Units = Mapping[str, Sequence[int]]
"""By block, the numbers of the live units in the dense block."""


@dataclass(frozen=True)
class Moment:
    """The masks after one update, layer by layer."""

    step: int
    survival: Mapping[str, float]  #: share of the layer's first live weights that have been live ever since
    churn: Mapping[str, float]  #: weights that changed sides over live ones; 0 before any update
    density: Mapping[str, float]
    heads: Mapping[str, Mapping[int, int]]  #: by block, the update at which each live head came


@dataclass
class MaskHistory:
    """What the masks have been so far. It depends on the masks that were shown alone, so a timeline gives it again.

    ``born[name]`` (int16, of the shape of the mask, on the CPU) is the number of the update at which a weight came,
    0 for the first masks, and -1 where it is dead.
    """

    updates: int = -1  #: number of the last update; 0 is the state before any
    born: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)  #: live weights of the first masks
    heads: dict[str, dict[int, int]] = field(default_factory=dict)
    neurons: dict[str, dict[int, int]] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    budget: tuple[int, int] | None = None  #: live and total parameters at the last update

    def observe(
        self, step: int, masks: Mapping[str, Tensor], heads: Units, neurons: Units, update: MaskUpdate | None
    ) -> None:
        """See the state before any update (``update`` is None), or after one.

        Args:
            masks: bool, by parameter name.
        """
        self.updates = min(self.updates + 1, _LATEST)
        density = {}
        for name, mask in masks.items():
            live = mask.cpu()
            density[name] = int(live.count_nonzero()) / max(live.numel(), 1)
            born = self.born.get(name)
            if born is None or born.shape != live.shape:
                self.born[name] = torch.where(live, self.updates, DEAD).to(torch.int16)
                self.first[name] = int(live.count_nonzero())
            else:
                came = (born == DEAD).logical_and_(live)
                born.masked_fill_(came, self.updates).masked_fill_(live.logical_not(), DEAD)
        _follow(self.heads, heads, self.updates)
        _follow(self.neurons, neurons, self.updates)
        layers = update.layers if update is not None else {}
        self.moments.append(
            Moment(
                step=step,
                survival={name: self.survival([name]) for name in masks},
                churn={name: layers[name].churn if name in layers else 0.0 for name in masks},
                density=density,
                heads={block: dict(units) for block, units in self.heads.items()},
            )
        )
        if update is not None:
            self.budget = (update.budget.live, update.budget.total)

    def survival(self, names: Sequence[str] | None = None) -> float:
        """Share of the first live weights (of some layers) that have been live ever since."""
        names = list(self.born) if names is None else names
        first = sum(self.first[name] for name in names)
        return sum(int((self.born[name] == 0).count_nonzero()) for name in names) / first if first else 1.0

    @property
    def density_varies(self) -> bool:
        """Whether any layer's density has changed since the beginning."""
        return any(moment.density != self.moments[0].density for moment in self.moments[1:])


def _follow(born: dict[str, dict[int, int]], live: Units, now: int) -> None:
    for block, units in live.items():
        known = born.get(block, {})
        born[block] = {unit: known.get(unit, now) for unit in units}
