"""Which units leave and which come, from their scores: how many is decided before, what is done with them after."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_trainer.live_units import LiveUnits, Swap


def choose(
    units: LiveUnits,
    score: Tensor,
    count: int,
    parameters: Mapping[str, nn.Parameter],
    if_better: bool,
) -> Swap:
    """The weakest live units and the strongest candidates, paired worst with best; ties go to the lower place."""
    live = len(units.live)
    loss, gain = score[:live], score[live:]
    ranking = loss
    if units.group.kind == "neuron" and not if_better:
        # Neurons are many and a batch says little about each; their magnitude is the steadier order (S2ViTE).
        ranking = torch.stack(
            [
                part.units(parameters[part.name].detach()).flatten(1).abs().sum(dim=1)
                for part in units.group.slices
                if parameters[part.name].ndim > 1
            ]
        ).sum(dim=0)
    slots = ranking.argsort(stable=True)[:count]
    places = gain.argsort(stable=True, descending=True)[:count]
    if if_better:
        better = gain[places] > loss[slots]
        slots, places = slots[better], places[better]
    return Swap(
        tuple(slots.tolist()),
        tuple(units.live[slot] for slot in slots.tolist()),
        tuple(units.dormant[place] for place in places.tolist()),
    )
