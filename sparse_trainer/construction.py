"""What a scheduler is going to do to a model, worked out and checked before anything is done to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from sparse_trainer.budget import count_units
from sparse_trainer.falling import FallingBudget, steps_of_fall
from sparse_trainer.masks import count_live
from sparse_trainer.patterns import read_pattern, whole_blocks
from sparse_trainer.prunable import describe_left_dense, left_dense, prunable_places
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.units import BlockUnits, find_blocks
from sparse_trainer.update_schedule import UpdateSchedule
from sparse_trainer.weight_masks import allocate_blocks, allocation_of, fitting_patterns


@dataclass(frozen=True)
class LiveNetwork:
    """What is live in a network, for a scheduler that goes on from it."""

    masks: Mapping[str, Tensor]  #: bool, by parameter name, of the compact shapes; empty without weight masks
    live_heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  #: by block, in slot order
    live_neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dense_heads: Mapping[str, int] = field(default_factory=dict)  #: by block, of the dense network
    dense_neurons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What construction does."""

    total: int  #: prunable weights of the dense network
    live: int | None  #: weights that are live at the start; None without weight masks
    fall: FallingBudget | None  #: how many are live later on; None where as many stay
    heads: Mapping[str, int]  #: live heads by block; empty if none is taken out
    neurons: Mapping[str, int]
    notes: tuple[str, ...]  #: what was rounded, and what stays dense


def plan(model: nn.Module, config: SparsityConfig, schedule: UpdateSchedule, given: LiveNetwork | None = None) -> Plan:
    """Check everything that can be wrong with a model and a configuration; nothing is changed.

    Args:
        schedule: when there are updates.
        given: what is live already, in a compact model.

    Raises:
        ValueError: the configuration does not fit the model, a prunable weight is frozen or spread over processes, or
            the budget cannot be met.
    """
    places = prunable_places(model, config.include, config.exclude)
    _check_whole(model)
    check_trainable({name: place.parameter for name, place in places.items()})
    prunable = sum(place.parameter.numel() for place in places.values())
    everything = places if not (config.include or config.exclude) else prunable_places(model)
    left = describe_left_dense(left_dense(model, everything, config.exclude), prunable)
    notes = [left] if left is not None else []
    shapes = {name: tuple(place.parameter.shape) for name, place in places.items()}
    if given is not None:
        total = prunable + _dormant_weights(model, shapes, given)
        here = sum(map(count_live, given.masks.values())) if given.masks else None
        fall = None
        if here is not None and config.falls:  # from what there is
            last = _live_target(config, prunable, total, len(shapes))
            fall = _fall(here, last, config, schedule, shapes) if last < here else None
        return Plan(total, here, fall, {}, {}, tuple(notes))
    heads, neurons = dict[str, int](), dict[str, int]()
    if config.structured:
        blocks = find_blocks(model)
        heads = {n: count_units(config.head_density, b.heads.count(), "head") for n, b in blocks.items()}
        neurons = {n: _neurons_of(config, b.neurons.count()) for n, b in blocks.items()}
        notes += _roundings(config, blocks, heads, neurons)
        shapes = compact_shapes(shapes, blocks, heads, neurons)
    live, fall = None, None
    if config.masks_weights:
        available = sum(map(_numel, shapes.values()))
        live = _live_target(config, available, prunable, len(shapes))
        if config.initial_density is not None:
            last, live = live, min(available, round(config.initial_density * prunable))
            if live < last:
                raise ValueError(
                    f"initial_density: {config.initial_density} of {prunable:,} prunable weights is {live:,}, below "
                    f"the budget that it falls to, {last:,}"
                )
            fall = _fall(live, last, config, schedule, shapes)
        counts = allocation_of(shapes, live, config.distribution)  # raises where a layer would be left without a weight
        pattern = read_pattern(config.pattern)
        patterns = fitting_patterns(shapes, config)
        odd = [name for name, own in patterns.items() if own != pattern]
        if len(odd) == len(patterns):
            raise ValueError(f"pattern: {config.pattern} divides no layer of this model")
        if odd:
            notes.append(f"pattern: {config.pattern} does not divide {', '.join(odd[:3])}; single weights there")
        notes += whole_blocks(counts, {name: _numel(shape) for name, shape in shapes.items()}, patterns)[1]
    return Plan(prunable, live, fall, heads, neurons, tuple(notes))


def _fall(
    first: int, last: int, config: SparsityConfig, schedule: UpdateSchedule, shapes: Mapping[str, tuple[int, ...]]
) -> FallingBudget:
    """The budgets of a run, each of which can be met.

    Raises:
        ValueError: one of them cannot, or there is no update at which it could fall.
    """
    fall = FallingBudget(first, last, steps_of_fall(schedule.update_steps, schedule.total_steps, config.reach_at))
    patterns = fitting_patterns(shapes, config)
    for live in sorted(set(fall.values)):
        allocate_blocks(shapes, live, config, patterns)
    return fall


def _neurons_of(config: SparsityConfig, dense: int) -> int:
    """Live neurons of a block: in whole blocks of the pattern, where that divides the dense layers."""
    count = count_units(config.neuron_density, dense, "neuron")
    if not config.masks_weights:
        return count
    pattern = read_pattern(config.pattern)
    whole = math.lcm(pattern.rows, pattern.columns)
    return count if dense % whole else min(max(1, round(count / whole)) * whole, dense)


def compact_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Mapping[str, BlockUnits],
    heads: Mapping[str, int],
    neurons: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors have when each block holds so many heads and neurons."""
    result = dict(shapes)
    for name, block in blocks.items():
        for group, units in ((block.heads, heads[name]), (block.neurons, neurons[name])):
            for part in group.slices:
                if part.name in result:
                    shape = list(result[part.name])
                    shape[part.dim] = part.groups * units * part.size
                    result[part.name] = tuple(shape)
    return result


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _dormant_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], given: LiveNetwork) -> int:
    """Prunable weights of the dense network that a compact one does not have."""
    if not (given.dense_heads or given.dense_neurons):
        return 0
    blocks = find_blocks(model)
    unknown = sorted((set(given.dense_heads) | set(given.dense_neurons)) - set(blocks))
    if unknown:
        raise ValueError(f"resume_from: the model has no block {unknown[0]!r}; it has {', '.join(blocks)}")
    heads = {name: given.dense_heads.get(name, block.heads.count()) for name, block in blocks.items()}
    neurons = {name: given.dense_neurons.get(name, block.neurons.count()) for name, block in blocks.items()}
    dense = compact_shapes(shapes, blocks, heads, neurons)
    return sum(map(_numel, dense.values())) - sum(map(_numel, shapes.values()))


def _check_whole(model: nn.Module) -> None:
    """Masks need whole tensors on every process."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{name} is spread over processes ({type(parameter).__name__}, as by fully_shard of FSDP2), and masks "
                "need whole tensors; train with DistributedDataParallel, which works"
            )


def check_trainable(prunable: Mapping[str, nn.Parameter]) -> None:
    """Refuse prunable weights that are frozen.

    Raises:
        ValueError: naming one of them, and what to exclude.
    """
    frozen = [name for name, parameter in prunable.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} prunable weights are frozen, {frozen[0]} among them; exclude them, such as "
            f"exclude=({frozen[0].removesuffix('.weight')!r},), or let them train"
        )


def _roundings(
    config: SparsityConfig, blocks: Mapping[str, BlockUnits], heads: Mapping[str, int], neurons: Mapping[str, int]
) -> list[str]:
    """What is said of densities that are not whole units."""
    found: set[str] = set()
    for block in blocks.values():
        for group, density, live in (
            (block.heads, config.head_density, heads[block.name]),
            (block.neurons, config.neuron_density, neurons[block.name]),
        ):
            share = live / group.count()
            # Heads are few, so any rounding is worth a word; of neurons only one that can be felt.
            if abs(share - density) > (1e-6 if group.kind == "head" else 0.01):
                kind, units = group.kind, group.count()
                found.add(f"{kind}_density: {density} of {units} {kind}s is rounded to {live} ({share:.3f})")
    return sorted(found)


def _live_target(config: SparsityConfig, available: int, total: int, layers: int) -> int:
    """The budget in whole numbers; density counts against the *dense* network, units included."""
    if config.live_parameters is not None:
        live, key = config.live_parameters, f"live_parameters: {config.live_parameters:,}"
        least = f"at least {layers} are needed"
    else:
        live, key = round((config.density or 0) * total), f"density: {config.density}"
        least = f"the least that can work is {layers / total:.2g}"
    if live < layers:
        raise ValueError(
            f"{key} of {total:,} prunable weights leaves {live:,} live, fewer than one in each of the "
            f"{layers} layers; {least}"
        )
    if live > available == total:
        raise ValueError(f"{key} is more than the {total:,} prunable weights that the model has")
    if live > available:
        raise ValueError(
            f"{key} asks for {live:,} live weights, but head_density {config.head_density} and "
            f"neuron_density {config.neuron_density} leave {available:,} of {total:,} "
            f"({available / total:.4f}); lower density to that or less, or set it to null"
        )
    return live
