"""A swap done: one unit's slot becomes another's, in every tensor that knows of it.

A unit enters with its input side as it is and its output side 0, so growth does not change the function, and the unit
can learn from its first step. One that is taken back because its output lowers the loss enters with it: from 0 it would
have to learn again what it is known to be good for, and be judged before it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.optimizer_state import (
    WEIGHT_COPIES,
    Optimizers,
    change_factors,
    is_factored,
    is_second_moment,
    moments,
    state_of,
    weight_copies,
)
from sparse_trainer.units import UnitSlice, constant_output


@torch.no_grad()
def exchange(
    units: LiveUnits,
    swap: Swap,
    parameters: Mapping[str, nn.Parameter],
    *,
    optimizer: Optimizers,
    ema: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    seed_moments: bool,
) -> None:
    """Put units into the slots of others: weights, gradients, moments, EMA and output biases change together.

    Args:
        swap: who leaves which slot, and who comes; ``units`` says afterwards that it was done.
        masks: weight masks by parameter name; a slot keeps its mask.
        seed_moments: whether second moments start at the mean of those of the units that stay, else at 0.
    """
    group = units.group
    slots = torch.tensor(swap.slots)
    places = torch.tensor(units.places_of(swap.added))
    for tensors in (parameters, ema):
        if tensors and group.output_bias is not None:
            constant = constant_output(group, tensors, slots)
            if constant is not None:
                tensors[group.output_bias].data.add_(constant)
                if tensors is parameters:
                    for copy in weight_copies(optimizer, parameters[group.output_bias]):
                        copy.add_(constant)
    for part in group.slices:
        parameter, store = parameters[part.name], units.candidates[part.name]
        if part.name in units.first:
            leaving = part.units(units.first[part.name])[torch.tensor(swap.removed)]
        else:
            leaving = part.units(parameter.data)[slots].clone()
        coming = part.units(store)[places].clone()
        part.units(store)[places] = leaving.to(store.dtype)
        if part in group.outputs:
            coming[torch.tensor([slot not in swap.writing for slot in swap.slots])] = 0
        if part.name in masks:
            coming.mul_(part.units(masks[part.name])[slots])
        part.units(parameter.data)[slots] = coming
        if part.name in ema:
            part.units(ema[part.name])[slots] = coming.to(ema[part.name].dtype)
        if parameter.grad is not None:
            part.units(parameter.grad)[slots] = 0
        for key, value in moments(optimizer, parameter):
            if key in WEIGHT_COPIES:
                part.units(value)[slots] = coming.to(value.dtype)
            else:
                _restart_moments(part, key, value, slots, masks.get(part.name), seed_moments)
        state = state_of(optimizer, parameter)
        if is_factored(state):
            change_factors(state, partial(_restarted, part, slots, seed_moments))
    units.exchanged(swap)


def _restart_moments(part: UnitSlice, key: str, value: Tensor, slots: Tensor, mask: Tensor | None, seed: bool) -> None:
    """A unit that has just come has first moments 0, and second moments of 0 or, with ``seed``, like those around it.

    Its output enters as 0, so its gradients are small at first: the second moments of those around it would keep it
    slow. From 0 Adam takes its steps by its own gradients, the first ones several times the learning rate
    (the bias correction knows only the step number).
    """
    by_unit = part.units(value)
    start: Tensor | float = 0.0
    if seed and is_second_moment(key):
        stays = torch.ones(by_unit.shape[0], dtype=torch.bool, device=value.device)
        stays[slots] = False
        if bool(stays.any()):
            alive = part.units(mask)[stays] if mask is not None else torch.ones_like(by_unit[stays], dtype=torch.bool)
            start = by_unit[stays].sum() / alive.sum().clamp(min=1)
    by_unit[slots] = start
    if mask is not None:
        value.mul_(mask)


def _restarted(part: UnitSlice, slots: Tensor, seed: bool, estimate: Tensor) -> Tensor:
    """The same of a second moment that is kept by rows and columns.

    The mean unit is their multiple, so with ``seed`` too the units that stay keep what they had.
    """
    by_unit = part.units(estimate)
    stays = torch.ones(by_unit.shape[0], dtype=torch.bool, device=estimate.device)
    stays[slots] = False
    by_unit[slots] = by_unit[stays].mean(dim=0) if seed and bool(stays.any()) else 0.0
    return estimate
