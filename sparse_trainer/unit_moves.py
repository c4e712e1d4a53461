"""Units that move between blocks: the weakest of the whole network leave, and the most promising ones come, wherever.

The total stays, so the budget does; blocks come to differ in size. A block keeps at least one head, and a share of its
neurons. Where as many come as leave, slots are exchanged (:mod:`~sparse_trainer.unit_exchange`); else the block changes
its shape (:mod:`~sparse_trainer.unit_reshaping`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.optimizer_state import Optimizers
from sparse_trainer.unit_exchange import exchange
from sparse_trainer.unit_reshaping import Reshape, grow, shrink
from sparse_trainer.unit_scores import Scores


@dataclass(frozen=True)
class Move:
    """What happens to one block: slots that are given up, and places of the candidates that come."""

    slots: tuple[int, ...]  #: the weakest first
    places: tuple[int, ...]  #: the most promising first
    writing: tuple[int, ...]  #: places of those that write at once as they did


def choose_moves(
    groups: Sequence[LiveUnits],
    scores: Sequence[Scores],
    count: int,
    floors: Sequence[int],
    swap: str,
    probation: int,
    together: int = 1,
) -> list[Move]:
    """Who leaves and who comes, over all groups of a kind: as many of the one as of the other.

    The rules are those of :func:`sparse_trainer.unit_choice.choose`, over one pool.

    Args:
        count: how many are due, at most.
        floors: units that each group keeps at least.
        together: no group becomes larger or smaller by another number than a multiple of it; who cannot move then is
            exchanged within the group, if that is better.
    """
    live: list[tuple[float, int, int]] = []
    coming: list[tuple[float, float, int, int]] = []
    for index, (units, score) in enumerate(zip(groups, scores, strict=True)):
        number = len(units.live)
        kept, out = (set(found) for found in units.on_probation(probation)) if probation else (set(), set())
        cost, change, gain = score.size[:number].tolist(), score.size[number:].tolist(), score.gain[number:].tolist()
        live += [(value, index, slot) for slot, value in enumerate(cost) if slot not in kept]
        for place, unit in enumerate(units.dormant):
            # What was thrown out a moment ago stays out, and so does a unit that was tried, unless it is better.
            if place not in out:
                promise = gain[place] if swap == "explore" else change[place]
                coming.append((promise, change[place] * (unit not in units.tried), index, place))
    live.sort()
    leaving = _weakest(live, [len(units.live) for units in groups], floors, count)
    best = sorted(coming, key=lambda item: (-item[0], item[2], item[3]))
    pairs: list[tuple[tuple[float, int, int], tuple[int, int]]] = []
    for slot, candidate in zip(leaving, best, strict=False):
        if swap != "always" and not candidate[0] > slot[0]:
            break
        pairs.append((slot, candidate[2:]))
    better = len(pairs)
    if swap == "explore":
        taken = {where for _, where in pairs}
        untried = [c for c in sorted(coming, key=lambda item: (-item[1], item[2], item[3])) if c[1] > 0]
        rest = [c[2:] for c in untried if c[2:] not in taken]
        pairs += list(zip(leaving[better:], rest, strict=False))
    # Any of those that leave is weaker than any that is better, so they need not stay in pairs.
    leave = [(group, slot) for (_, group, slot), _ in pairs]
    come = [(group, place, number < better) for number, (_, (group, place)) in enumerate(pairs)]
    arriving, departing = Counter(group for group, _, _ in come), Counter(group for group, _ in leave)
    net = in_whole([arriving[group] - departing[group] for group in range(len(groups))], together)
    moves = []
    for index, more in enumerate(net):
        slots = [slot for group, slot in leave if group == index]
        places = [(place, is_better) for group, place, is_better in come if group == index]
        due = len(slots)
        places, slots = places[: len(slots) + max(more, 0)], slots[: len(places) + max(-more, 0)]
        if len(slots) < due:  # some may still give way to others of their own block
            gone, here = set(slots), {place for place, _ in places}
            weak = [(value, slot) for value, group, slot in live if group == index and slot not in gone]
            strong = [(c[0], c[3]) for c in best if c[2] == index and c[3] not in here]
            for (value, weakest), (promise, strongest) in zip(weak[: due - len(slots)], strong, strict=False):
                if swap != "always" and not promise > value:
                    break
                slots.append(weakest)
                places.append((strongest, True))
        writing = tuple(place for place, is_better in places if is_better and swap == "explore")
        moves.append(Move(tuple(slots), tuple(place for place, _ in places), writing))
    return moves


def in_whole(changes: Sequence[int], together: int) -> list[int]:
    """Changes of groups, whose sum is 0, as multiples of ``together``, none greater and none with the other sign; their
    sum is 0 again.

    Example: 11, -5 and -6 by fours are 8, -4 and -4.
    """
    whole = [(abs(change) // together) * together * (1 if change > 0 else -1) for change in changes]
    while sum(whole):
        # The side that is too long gives up what it can, first where the least is lost.
        sign = 1 if sum(whole) > 0 else -1
        index = min((abs(value), index) for index, value in enumerate(whole) if value * sign > 0)[1]
        whole[index] -= sign * together
    return whole


def _weakest(
    ordered: Sequence[tuple[float, int, int]], live: Sequence[int], floors: Sequence[int], count: int
) -> list[tuple[float, int, int]]:
    """The first of ``ordered`` that leave every group its floor."""
    left, found = list(live), list[tuple[float, int, int]]()
    for item in ordered:
        if len(found) < count and left[item[1]] > floors[item[1]]:
            left[item[1]] -= 1
            found.append(item)
    return found


def move(
    units: LiveUnits,
    what: Move,
    parameters: Mapping[str, nn.Parameter],
    *,
    optimizer: Optimizers,
    ema: nn.Module | None,
    masks: Mapping[str, Tensor],
    others: Reshape,
    seed_moments: bool,
) -> Swap:
    """Carry out what was chosen for one block.

    Args:
        masks: weight masks by parameter name; a slot that is exchanged keeps its mask.
        others: reshapes masks and what else there is.

    Returns:
        who left, who came, and the slots of those.
    """
    both = min(len(what.slots), len(what.places))
    gone = [units.live[slot] for slot in what.slots]
    come = [units.dormant[place] for place in what.places]
    write = {units.dormant[place] for place in what.writing}
    if both:
        pairs = list(zip(what.slots[:both], gone[:both], come[:both], strict=True))
        swap = Swap(
            tuple(slot for slot, _, _ in pairs),
            tuple(unit for _, unit, _ in pairs),
            tuple(unit for _, _, unit in pairs),
            tuple(slot for slot, _, unit in pairs if unit in write),
        )
        averages = {n: p.data for n, p in ema.named_parameters(remove_duplicate=False)} if ema is not None else {}
        exchange(units, swap, parameters, optimizer=optimizer, ema=averages, masks=masks, seed_moments=seed_moments)
    if len(gone) > both:
        leaving = set(gone[both:])
        slots = [slot for slot, unit in enumerate(units.live) if unit not in leaving]
        shrink(units, slots, parameters, optimizer=optimizer, ema=ema, others=others)
    if len(come) > both:
        places = units.places_of(come[both:])
        writing = [place for place in places if units.dormant[place] in write]
        grow(units, places, parameters, writing=writing, optimizer=optimizer, ema=ema, others=others)
    slot_of = {unit: slot for slot, unit in enumerate(units.live)}
    units.last = Swap(tuple(slot_of[unit] for unit in come), tuple(gone), tuple(come))
    return units.last
