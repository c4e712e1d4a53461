"""A block with fewer or more units: every tensor that knows of them changes its shape together.

Parameters stay the same objects with other data, so optimizers, hooks and whoever else holds them go on. What is kept
by the shape of a parameter has to be made again by its owner: a ``DistributedDataParallel`` around the model above all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_trainer.live_units import LiveUnits
from sparse_trainer.optimizer_state import (
    FACTORS,
    WEIGHT_COPIES,
    Optimizers,
    change_factors,
    holds_one_per_element,
    is_factored,
    weight_copies,
)
from sparse_trainer.units import UnitGroup, UnitSlice, constant_output, find_blocks

Reshape = Callable[[str, Callable[[Tensor], Tensor]], None]
"""Applies a function to whatever else is kept in the shape of a parameter, by its name."""


def nothing_else(name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Nothing else is kept in the shape of a parameter."""


@torch.no_grad()
def shrink(
    units: LiveUnits,
    slots: Sequence[int],
    parameters: Mapping[str, nn.Parameter],
    *,
    optimizer: Optimizers,
    ema: nn.Module | None,
    others: Reshape,
) -> tuple[int, ...]:
    """Take all but some units out of a block. What they add whatever the input is goes into the output bias.

    Args:
        slots: those that stay, ascending.
        ema: average of the model, by the same names.
        others: masks and what else there is.

    Returns:
        the units that left.
    """
    group = units.group
    staying = set(slots)
    gone = [slot for slot in range(len(units.live)) if slot not in staying]
    averages = dict(ema.named_parameters(remove_duplicate=False)) if ema is not None else {}
    for tensors in (parameters, averages):
        if tensors and group.output_bias is not None:
            constant = constant_output(group, tensors, gone)
            if constant is not None:
                tensors[group.output_bias].data.add_(constant)
                if tensors is parameters:
                    for copy in weight_copies(optimizer, parameters[group.output_bias]):
                        copy.add_(constant)
    for part in group.slices:
        parameter = parameters[part.name]
        if part.name in units.first:
            leaving = part.take(units.first[part.name], [units.live[slot] for slot in gone])
        else:
            leaving = part.take(parameter.data, gone)
        units.candidates[part.name] = part.join(units.candidates[part.name], leaving)

        def kept(tensor: Tensor, part: UnitSlice = part) -> Tensor:
            return part.take(tensor, slots)

        _reshape_state(optimizer, parameter, kept, kept)
        others(part.name, kept)
        exchange_data(parameter, kept(parameter.data))
        if part.name in averages:
            exchange_data(averages[part.name], kept(averages[part.name].data))
    set_count(group, len(slots), ema)
    return units.removed(gone)


@torch.no_grad()
def grow(
    units: LiveUnits,
    places: Sequence[int],
    parameters: Mapping[str, nn.Parameter],
    *,
    writing: Sequence[int] = (),
    optimizer: Optimizers,
    ema: nn.Module | None,
    others: Reshape,
) -> tuple[int, ...]:
    """Take candidates into a block, each into a new slot. Their moments begin at 0, and so does what they write.

    What else is kept per weight (masks above all) is for a new unit as it is for a live one: for the candidate at place
    ``p`` that of slot ``p`` modulo the slots, under which it was scored.

    Args:
        writing: places of those that write at once as they did.

    Returns:
        the units that came.
    """
    group, live = units.group, len(units.live)
    averages = dict(ema.named_parameters(remove_duplicate=False)) if ema is not None else {}
    models = [place % live for place in places]
    chosen, at_once = set(places), set(writing)
    stay = [place for place in range(len(units.dormant)) if place not in chosen]
    for part in group.slices:
        parameter, store = parameters[part.name], units.candidates[part.name]
        coming = part.take(store, places)
        if part in group.outputs:
            part.units(coming)[torch.tensor([place not in at_once for place in places])] = 0
        units.candidates[part.name] = part.take(store, stay)

        def with_zeros(tensor: Tensor, part: UnitSlice = part) -> Tensor:
            return part.join(tensor, torch.zeros_like(part.take(tensor, models)))

        def with_coming(tensor: Tensor, part: UnitSlice = part, coming: Tensor = coming) -> Tensor:
            return part.join(tensor, coming.to(tensor))

        def with_copies(tensor: Tensor, part: UnitSlice = part) -> Tensor:
            return part.join(tensor, part.take(tensor, models))

        _reshape_state(optimizer, parameter, with_zeros, with_coming)
        others(part.name, with_copies)
        exchange_data(parameter, part.join(parameter.data, coming))
        if part.name in averages:
            average = averages[part.name]
            exchange_data(average, part.join(average.data, coming.to(average)))
    set_count(group, live + len(places), ema)
    return units.added(places)


def exchange_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; its gradient is gone.

    Autograd keeps, for as long as a graph of the parameter lives, a node that accumulates gradients of the old shape.
    A change of type drops it.
    """
    parameter.grad = None
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = data


def set_count(group: UnitGroup, units: int, ema: nn.Module | None) -> None:
    """Bring the numbers of the modules in line with the tensors, in the average too."""
    group.set_count(units)
    if ema is not None:
        block = find_blocks(ema)[group.block]
        (block.heads if group.kind == "head" else block.neurons).set_count(units)


def _reshape_state(
    optimizer: Optimizers,
    parameter: nn.Parameter,
    change: Callable[[Tensor], Tensor],
    change_weights: Callable[[Tensor], Tensor],
) -> None:
    """Moments follow, and copies of the weights as the weights do; state of any other shape begins anew."""
    for member in optimizer.members:
        state = member.state.get(parameter)
        if not state:
            continue
        factors = FACTORS if is_factored(state) else ()
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in factors}
        per_element = {key for key, value in tensors.items() if holds_one_per_element(key, value, parameter)}
        if any(value.numel() > 1 for key, value in tensors.items() if key not in per_element):
            member.state.pop(parameter)
            continue
        for key in per_element:
            state[key] = (change_weights if key in WEIGHT_COPIES else change)(state[key])
        if factors:
            change_factors(state, change)
