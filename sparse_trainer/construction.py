"""What a scheduler is going to do to a model, worked out and checked before anything is done to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from sparse_trainer.budget import count_neurons, count_units, neurons_together
from sparse_trainer.falling import FallingBudget, steps_of_fall
from sparse_trainer.masks import count_live
from sparse_trainer.patterns import Pattern, PatternBudgetError, read_pattern, whole_blocks
from sparse_trainer.prunable import describe_left_dense, left_dense, prunable_places
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.units import BlockUnits, UnitGroup, find_blocks
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


UnitFalls = dict[tuple[str, str], FallingBudget]
"""By block and kind (head, neuron), how many of them there are."""


@dataclass(frozen=True)
class Plan:
    """What construction does."""

    total: int  #: prunable weights of the dense network
    live: int | None  #: weights that are live at the start; None without weight masks
    fall: FallingBudget | None  #: how many are live later on; None where as many stay
    heads: Mapping[str, int]  #: live heads by block; empty if none is taken out
    neurons: Mapping[str, int]
    unit_falls: UnitFalls  #: how they come to be so few; empty where they are from the start
    patterns: Mapping[str, Pattern] | None  #: of layers that change their shape; None where none does
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
        return _plan_from(model, config, schedule, given, shapes, tuple(notes))
    heads, neurons, blocks = dict[str, int](), dict[str, int](), dict[str, BlockUnits]()
    falls: UnitFalls = {}
    first_shapes = shapes
    if config.structured:
        blocks = find_blocks(model)
        heads = {n: count_units(config.head_density, b.heads.count(), "head") for n, b in blocks.items()}
        neurons = {n: _neurons_of(config, b.neurons.count()) for n, b in blocks.items()}
        notes += _roundings(config, blocks, heads, neurons)
        if config.unit_distribution != "uniform":
            _check_alike(blocks)
        if config.unit_distribution == "global":
            _check_counted_alike(blocks, shapes)
        falls = _unit_falls(blocks, heads, neurons, config, schedule)
        shapes = compact_shapes(shapes, blocks, heads, neurons)
        if not falls:
            first_shapes = shapes
    if not config.masks_weights:
        return Plan(prunable, None, None, heads, neurons, falls, None, tuple(notes))
    vary = bool(falls) or (config.structured and config.unit_distribution == "global")
    live, fall = _live_target(config, sum(map(_numel, shapes.values())), prunable, len(shapes)), None
    pattern = read_pattern(config.pattern)
    patterns = fitting_patterns(shapes, config, _steps_of_shapes(shapes, blocks, config) if vary else None)
    odd = [name for name, own in patterns.items() if own != pattern]
    if len(odd) == len(patterns):
        name, shape = max(shapes.items(), key=lambda item: _numel(item[1]))
        raise ValueError(
            f"pattern: {config.pattern} divides no layer of this model; {name}, for one, has "
            f"{shape[0]} outputs of {_numel(shape[1:])} weights"
        )
    # Of a layer that changes its size a pattern has to divide every one.
    undivided = [name for name in odd if vary or not pattern.divides(shapes[name])]
    if undivided:
        notes.append(f"pattern: {config.pattern} does not divide {', '.join(undivided[:3])}; single weights there")
    elif odd:
        notes.append(f"pattern: {odd[0]} has single weights, so that the budget is met exactly")
    # Raises where a layer would be left without a weight; patterns are then those that the first masks have.
    counts, sizes = allocation_of(shapes, live, config.distribution), {n: _numel(shape) for n, shape in shapes.items()}
    try:
        notes += whole_blocks(counts, sizes, patterns)[1]
    except PatternBudgetError as error:
        raise error.of(prunable, sum(sizes.values())) from error
    if config.initial_density is not None:
        last, live = live, min(sum(map(_numel, first_shapes.values())), round(config.initial_density * prunable))
        if live < last:
            raise ValueError(
                f"initial_density: {config.initial_density} of {prunable:,} prunable weights is {live:,}, below "
                f"the budget that it falls to, {last:,}"
            )
        fall = _fall(live, last, config, schedule)
    when = {step for f in (*falls.values(), *([fall] if fall is not None else [])) for step in f.steps}
    for step in sorted({0, *when}):  # each of the budgets of the run can be met
        there = first_shapes
        if falls:
            there = compact_shapes(
                first_shapes,
                blocks,
                {**heads, **{n: f.at(step) for (n, kind), f in falls.items() if kind == "head"}},
                {**neurons, **{n: f.at(step) for (n, kind), f in falls.items() if kind == "neuron"}},
            )
        budget = fall.at(step) if fall is not None else live
        allocate_blocks(there, min(budget, sum(map(_numel, there.values()))), config, dict(patterns))
    return Plan(prunable, live, fall, heads, neurons, falls, patterns if vary else None, tuple(notes))


def _plan_from(
    model: nn.Module,
    config: SparsityConfig,
    schedule: UpdateSchedule,
    given: LiveNetwork,
    shapes: Mapping[str, tuple[int, ...]],
    notes: tuple[str, ...],
) -> Plan:
    """What there is stays, and what falls goes on from there."""
    total = sum(map(_numel, shapes.values())) + _dormant_weights(model, shapes, given)
    live = sum(map(count_live, given.masks.values())) if given.masks else None
    fall: FallingBudget | None = None
    if live is not None and config.falls:
        last = _live_target(config, total, total, len(shapes))
        fall = _fall(live, last, config, schedule) if last < live else None
    varies = config.unit_falls or config.unit_distribution == "global"
    if not (varies and (given.dense_heads or given.dense_neurons)):
        return Plan(total, live, fall, {}, {}, {}, None, notes)
    blocks = find_blocks(model)
    if config.unit_distribution == "global":
        _check_counted_alike(blocks, shapes)
    heads = {name: count_units(config.head_density, dense, "head") for name, dense in given.dense_heads.items()}
    neurons = {name: _neurons_of(config, dense) for name, dense in given.dense_neurons.items()}
    falls = _unit_falls(blocks, heads, neurons, config, schedule)
    patterns = fitting_patterns(shapes, config, _steps_of_shapes(shapes, blocks, config))
    return Plan(total, live, fall, {}, {}, falls, patterns, notes)


def _check_alike(blocks: Mapping[str, BlockUnits]) -> None:
    """As many units of another block must be as large.

    Raises:
        ValueError: they are not.
    """
    sizes = {(group.kind, group.size, group.writer.weight.shape[0]) for b in blocks.values() for group in b.groups}
    if len(sizes) > len({kind for kind, _, _ in sizes}):
        raise ValueError(
            "unit_distribution: by_score and global need heads and neurons of one size, and this model has blocks of "
            'different widths; give "uniform"'
        )


def _check_counted_alike(blocks: Mapping[str, BlockUnits], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A unit that moves to another block must count as many weights there, or the budget would not stay.

    Raises:
        ValueError: ``include`` or ``exclude`` leaves out layers of some blocks only.
    """
    layers: dict[str, tuple[str, ...]] = {}
    for name, block in blocks.items():
        names = [part.name for group in block.groups for part in group.slices]
        layers[name] = tuple(sorted({part.removeprefix(name) for part in names if part in shapes}))
    usual = max(layers.values(), key=list(layers.values()).count)
    odd = [name for name, own in layers.items() if own != usual]
    if odd:
        raise ValueError(
            "unit_distribution: global moves heads and neurons between blocks, and include and exclude leave out other "
            f'layers of {odd[0]} than of the rest; leave out the same layers of every block, or give "uniform"'
        )


def check_chosen(
    model: nn.Module, config: SparsityConfig, planned: Plan, heads: Mapping[str, int], neurons: Mapping[str, int]
) -> None:
    """Check that the budget of weights can be met when blocks hold so many heads and neurons; nothing is changed.

    Raises:
        ValueError: it cannot.
    """
    if planned.live is None:
        return
    places = prunable_places(model, config.include, config.exclude)
    dense = {name: tuple(place.parameter.shape) for name, place in places.items()}
    shapes = compact_shapes(dense, find_blocks(model), heads, neurons)
    patterns = planned.patterns or fitting_patterns(shapes, config)
    try:
        allocate_blocks(shapes, planned.live, config, dict(patterns))
    except PatternBudgetError as error:
        raise error.of(planned.total, sum(map(_numel, shapes.values()))) from error


def _fall(first: int, last: int, config: SparsityConfig, schedule: UpdateSchedule) -> FallingBudget:
    """How the budget of weights falls.

    Raises:
        ValueError: there is no update at which it could.
    """
    return FallingBudget(first, last, steps_of_fall(schedule.update_steps, schedule.total_steps, config.reach_at))


def _unit_falls(
    blocks: Mapping[str, BlockUnits],
    heads: Mapping[str, int],
    neurons: Mapping[str, int],
    config: SparsityConfig,
    schedule: UpdateSchedule,
) -> UnitFalls:
    """How heads and neurons leave during training: from what the blocks hold to the given numbers."""
    if not config.unit_falls:
        return {}
    steps = steps_of_fall(schedule.update_steps, schedule.total_steps, config.reach_at, config.unit_falls)
    return {
        (name, group.kind): FallingBudget(group.count(), last, steps, _together(config, group))
        for name, block in blocks.items()
        for group, last in ((block.heads, heads[name]), (block.neurons, neurons[name]))
        if last < group.count()
    }


def _steps_of_shapes(
    shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, BlockUnits], config: SparsityConfig
) -> dict[str, tuple[int, ...]]:
    """What shapes change by when heads and neurons leave: a pattern that divides this divides them all."""
    uniform = config.unit_distribution == "uniform"
    return compact_shapes(
        shapes,
        blocks,
        dict.fromkeys(blocks, 1),
        {name: _together(config, block.neurons) if uniform else 1 for name, block in blocks.items()},
    )


def _together(config: SparsityConfig, group: UnitGroup) -> int:
    """Units of a block that leave together."""
    return neurons_together(group.count(), config.pattern_rows) if group.kind == "neuron" else 1


def _neurons_of(config: SparsityConfig, dense: int) -> int:
    """Live neurons of a block."""
    return count_neurons(config.neuron_density, dense, config.pattern_rows)


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
