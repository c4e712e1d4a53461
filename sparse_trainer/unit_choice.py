"""Which units leave and which come, from their scores: how many is decided before, what is done with them after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_trainer.budget import largest_remainder
from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.unit_scores import Scores


def spread_by_score(
    scores: Sequence[Tensor], counts: Sequence[int], least: Sequence[int], together: int = 1
) -> list[list[int]]:
    """The best units over all blocks: as many as ``counts`` says in all, and at least ``least`` of each block.

    Args:
        scores: of the units of each block ``[units]``.
        together: divides the units of each block. If it divides the sum of ``counts`` too, and no block has fewer, each
            gets the nearest multiple of it.

    Returns:
        by block, the units that live, ascending.
    """
    first = [score.argsort(stable=True, descending=True).tolist() for score in scores]
    chosen = [order[:few] for order, few in zip(first, least, strict=True)]
    rest = [(-float(scores[b][u]), b, u) for b, order in enumerate(first) for u in order[least[b] :]]
    for _, block, unit in sorted(rest)[: sum(counts) - sum(least)]:
        chosen[block].append(unit)
    total, odd = divmod(sum(counts), together)
    if together > 1 and not odd and all(len(units) >= together for units in chosen):
        shares = {block: len(units) / together for block, units in enumerate(chosen)}
        found = largest_remainder(shares, total, {block: len(order) // together for block, order in enumerate(first)})
        chosen = [order[: found[block] * together] for block, order in enumerate(first)]
    return [sorted(units) for units in chosen]


def choose(
    units: LiveUnits,
    scores: Scores,
    count: int,
    parameters: Mapping[str, nn.Parameter],
    swap: str,
    probation: int = 0,
) -> Swap:
    """The weakest live units and the strongest candidates, paired worst with best; ties go to the lower place.

    Args:
        swap: ``always`` takes as many as are due, by the size of what they change; ``if_better`` only those that change
            more than the one whose slot they take. A candidate changes the loss whether it is any good or not, so
            ``explore`` asks how much it makes it *fall*, and takes those for which that is more. What is due and
            was not taken so goes to candidates that were never tried: of these only training can tell.
        probation: updates for which a unit that came is not judged: it has had no time to learn. As long one that left
            stays out, since it would be judged beside units that had less time than it.
    """
    live = len(units.live)
    cost, change, gain = scores.size[:live], scores.size[live:], scores.gain[live:]
    ranking = cost
    if units.group.kind == "neuron" and swap == "always":
        # Neurons are many and a batch says little about each; their magnitude is the steadier order (S2ViTE).
        ranking = torch.stack(
            [
                part.units(parameters[part.name].detach()).flatten(1).abs().sum(dim=1)
                for part in units.group.slices
                if parameters[part.name].ndim > 1
            ]
        ).sum(dim=0)
    kept, out = set[int](), set[int]()
    if probation:
        kept, out = (set(places) for places in units.on_probation(probation))
    slots = [slot for slot in ranking.argsort(stable=True).tolist() if slot not in kept][:count]
    if swap == "explore":
        pairs = _explore(units, slots, out, cost, change, gain)
    else:
        order = change.argsort(stable=True, descending=True).tolist()
        places = [place for place in order if place not in out]
        pairs = [(s, p) for s, p in zip(slots, places, strict=False) if swap == "always" or change[p] > cost[s]]
    return Swap(
        tuple(slot for slot, _ in pairs),
        tuple(units.live[slot] for slot, _ in pairs),
        tuple(units.dormant[place] for _, place in pairs),
        tuple(slot for slot, place in pairs if swap == "explore" and gain[place] > cost[slot]),
    )


def _explore(
    units: LiveUnits, slots: Sequence[int], out: set[int], cost: Tensor, change: Tensor, gain: Tensor
) -> list[tuple[int, int]]:
    """Slots with the places of the candidates that take them: first the better ones, then those never tried."""
    order = gain.argsort(stable=True, descending=True).tolist()
    better = [(s, p) for s, p in zip(slots, [p for p in order if p not in out], strict=False) if gain[p] > cost[s]]
    taken = {place for _, place in better}
    untried = [
        place
        for place in change.argsort(stable=True, descending=True).tolist()
        if place not in taken and units.dormant[place] not in units.tried
    ]
    # The gains fall and the costs rise, so those that were taken so are the first ones.
    return better + list(zip(slots[len(better) :], untried, strict=False))
