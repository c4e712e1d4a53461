"""Which units of a group are live, and what the dormant ones are: weights and nothing else.

A block holds only its live units, in *slots*. A dormant unit is a *candidate*: no gradient, no optimizer state, no
activation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.units import UnitGroup, UnitSlice


@dataclass(frozen=True)
class Swap:
    """One group's replacement: unit ``removed[i]`` left slot ``slots[i]``, ``added[i]`` came."""

    slots: tuple[int, ...]
    removed: tuple[int, ...]
    added: tuple[int, ...]
    writing: tuple[int, ...] = ()  #: slots of those that write at once as they did; the others begin with 0


class LiveUnits:
    """The live units and the candidates of one group (the heads, or the neurons, of one block).

    Args:
        live: unit in each slot.
        remember_first: whether a unit that comes back is to be as it is now.
        total: units of the dense network, where the model is compact already; its candidates are then drawn.
        generator: draws them.
    """

    def __init__(
        self,
        model: nn.Module,
        group: UnitGroup,
        live: Sequence[int],
        *,
        remember_first: bool = False,
        total: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.group = group
        self.total = group.count() if total is None else total
        self.live = list(live)  #: unit in each slot
        self.dormant = [unit for unit in range(self.total) if unit not in set(live)]  #: unit of each candidate
        if total is None:
            self.candidates = {p.name: p.take(parameters[p.name].detach(), self.dormant) for p in group.slices}
        else:  # of a compact model, which has the live units alone
            assert generator is not None
            self.candidates = {
                p.name: fresh_units(p, parameters[p.name].detach(), len(self.dormant), generator) for p in group.slices
            }
        #: All units of the group as they are now, where they are to come back like that; else empty.
        self.first = {part.name: parameters[part.name].detach().clone() for part in group.slices if remember_first}
        self.credit = 0.0  #: share of a unit that is due to be replaced and was not yet
        self.explored = set(live)
        self.tried = set(live)  #: units that were judged once: those that lived, and all that the start compared
        self.last = Swap((), (), ())
        self.updates = 0  #: how many there were, the one that is going on included
        self.came: dict[int, int] = {}  #: number of the update that brought a live unit; those of the start have none
        self.left: dict[int, int] = {}  #: number of the update that removed a dormant one

    def remember_first(self, parameters: Mapping[str, Tensor]) -> None:
        """Let units come back as they are now: the live ones from the model, the others from the candidates."""
        for part in self.group.slices:
            both = part.join(parameters[part.name].detach(), self.candidates[part.name])
            order = torch.tensor([*self.live, *self.dormant]).argsort()
            self.first[part.name] = part.take(both, order)

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Bring the candidates to the device and type of the model."""
        for tensors in (self.candidates, self.first):
            tensors.update({name: value.to(parameters[name]) for name, value in tensors.items()})

    def masked_candidates(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The candidates as they would be if they came: under the mask of a slot, one slot after the other.

        A dense candidate beside sparse live units would look better than it can be.
        """
        masked = dict(self.candidates)
        for part in self.group.slices:
            if part.name in masks:
                mask = part.units(masks[part.name])
                slots = torch.arange(len(self.dormant), device=mask.device) % mask.shape[0]
                masked[part.name] = masked[part.name].clone()
                part.units(masked[part.name]).mul_(mask[slots])
        return masked

    def places_of(self, units: Sequence[int]) -> list[int]:
        """Where these candidates stand in :attr:`dormant`."""
        places = {unit: place for place, unit in enumerate(self.dormant)}
        return [places[unit] for unit in units]

    def due(self, drop_fraction: float, *, round_up: bool = False) -> tuple[int, float]:
        """How many units this update replaces, and the fraction that is carried over to the next.

        Units are few: to ``round_up`` at every update replaces a third of three heads each time. Never the last unit,
        and never more than there are candidates.
        """
        credit = self.credit + drop_fraction * len(self.live)
        whole = math.ceil(credit) if round_up else int(credit)
        return max(0, min(whole, len(self.dormant), len(self.live) - 1)), max(0.0, credit - whole)

    def on_probation(self, updates: int) -> tuple[list[int], list[int]]:
        """Slots of units that came, and places of candidates that left, in the so many updates before this one."""
        slots = [slot for slot, unit in enumerate(self.live) if self._recent(self.came.get(unit), updates)]
        return slots, [place for place, unit in enumerate(self.dormant) if self._recent(self.left.get(unit), updates)]

    def _recent(self, number: int | None, updates: int) -> bool:
        return number is not None and self.updates - number <= updates

    def exchanged(self, swap: Swap) -> None:
        """Note who lives where after a swap; candidates take the places of the units that came."""
        places = self.places_of(swap.added)
        for place, slot, removed, added in zip(places, swap.slots, swap.removed, swap.added, strict=True):
            self.dormant[place] = removed
            self.live[slot] = added
            self.came.pop(removed, None)
            self.left.pop(added, None)
            self.came[added] = self.left[removed] = self.updates
        self.explored.update(swap.added)
        self.tried.update(swap.added)
        self.last = swap

    def added(self, places: Sequence[int]) -> tuple[int, ...]:
        """Note that candidates came, each into a slot of its own after all others."""
        units, gone = tuple(self.dormant[place] for place in places), set(places)
        self.live += units
        self.dormant = [unit for place, unit in enumerate(self.dormant) if place not in gone]
        for unit in units:
            self.left.pop(unit, None)
            self.came[unit] = self.updates
        self.explored.update(units)
        self.tried.update(units)
        return units

    def removed(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Note that units left and their slots with them; they are the last of the candidates now."""
        units, gone = tuple(self.live[slot] for slot in slots), set(slots)
        self.live = [unit for slot, unit in enumerate(self.live) if slot not in gone]
        self.dormant += units
        for unit in units:
            self.came.pop(unit, None)
            self.left[unit] = self.updates
        return units

    def state_dict(self) -> dict[str, Any]:
        return {
            "live": list(self.live),
            "dormant": list(self.dormant),
            "candidates": {name: value.clone() for name, value in self.candidates.items()},
            "first": {name: value.clone() for name, value in self.first.items()},
            "credit": self.credit,
            "explored": sorted(self.explored),
            "tried": sorted(self.tried),
            "updates": self.updates,
            "came": [[unit, number] for unit, number in self.came.items()],
            "left": [[unit, number] for unit, number in self.left.items()],
            "last": [list(self.last.slots), list(self.last.removed), list(self.last.added)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore.

        Raises:
            ValueError: if the state has another number of live units.
        """
        if len(state["live"]) != len(self.live) or len(state["dormant"]) != len(self.dormant):
            raise ValueError(
                f"{self.group.block}: the saved state has {len(state['live'])} live {self.group.kind}s, "
                f"this model {len(self.live)}"
            )
        if sorted([*state["live"], *state["dormant"]]) != list(range(len(self.live) + len(self.dormant))):
            raise ValueError(f"{self.group.block}: the saved live and dormant {self.group.kind}s are not all of them")
        self.live, self.dormant = list(state["live"]), list(state["dormant"])
        for what, tensors in (("candidates", self.candidates), ("first", self.first)):
            for name, tensor in tensors.items():
                tensor.copy_(state[what][name])
        self.credit = float(state["credit"])
        self.explored = set(state["explored"])
        self.tried = set(state.get("tried", state["explored"]))
        self.updates = int(state.get("updates", 0))
        self.came, self.left = ({int(u): int(n) for u, n in state.get(what, ())} for what in ("came", "left"))
        slots, removed, added = state["last"]
        self.last = Swap(tuple(slots), tuple(removed), tuple(added))


def fresh_units(part: UnitSlice, live: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """New values for ``count`` units in the layout of ``live``: weights with the spread of the live ones, biases 0."""
    shape = list(live.shape)
    shape[part.dim] = part.groups * count * part.size
    if live.ndim == 1:
        return live.new_zeros(shape)
    drawn = torch.randn(shape, generator=generator) * float(live.float().std())
    return drawn.to(live)
