"""Heads and neurons that come and go: candidates, the probe that scores them, and the swap.

The live network is compact: a block holds only its live units, in *slots* whose number never changes. A dormant
unit is a *candidate*: its weights and nothing else. At an update one probe batch runs with the candidates attached
behind gates that are 0; the gradients at the gates tell what each live unit is worth and what each candidate
could be. A candidate enters with its input side as it is and its output side 0, so growth does not change the
function, and the unit can learn from its first step.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_trainer.agreement import process_count, sum_over_processes
from sparse_trainer.budget import count_units
from sparse_trainer.optimizer_state import Optimizers, is_second_moment, moments
from sparse_trainer.report import BlockUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.units import UnitGroup, UnitSlice, constant_output, find_blocks, keep

LossClosure = Callable[[], Tensor]


@dataclass(frozen=True)
class Swap:
    """One group's replacement: unit ``removed[i]`` left slot ``slots[i]``, ``added[i]`` came."""

    slots: tuple[int, ...]
    removed: tuple[int, ...]
    added: tuple[int, ...]


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
                p.name: _fresh(p, parameters[p.name].detach(), len(self.dormant), generator) for p in group.slices
            }
        #: All units of the group as they are now, where they are to come back like that; else empty.
        self.first = {part.name: parameters[part.name].detach().clone() for part in group.slices if remember_first}
        self.credit = 0.0  #: share of a unit that is due to be replaced and was not yet
        self.explored = set(live)
        self.last = Swap((), (), ())

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

    def due(self, drop_fraction: float, *, round_up: bool = False) -> tuple[int, float]:
        """How many units this update replaces, and the fraction that is carried over to the next.

        Units are few: to ``round_up`` at every update replaces a third of three heads each time. Never the last unit,
        and never more than there are candidates.
        """
        credit = self.credit + drop_fraction * len(self.live)
        whole = math.ceil(credit) if round_up else int(credit)
        return max(0, min(whole, len(self.dormant), len(self.live) - 1)), max(0.0, credit - whole)

    def state_dict(self) -> dict[str, Any]:
        return {
            "live": list(self.live),
            "dormant": list(self.dormant),
            "candidates": {name: value.clone() for name, value in self.candidates.items()},
            "first": {name: value.clone() for name, value in self.first.items()},
            "credit": self.credit,
            "explored": sorted(self.explored),
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
        slots, removed, added = state["last"]
        self.last = Swap(tuple(slots), tuple(removed), tuple(added))


class UnitSwaps:
    """All groups of a model that have dormant units.

    Construction makes the model compact in place.

    Args:
        model: a timm ``VisionTransformer``, dense.
        heads, neurons: live units per block (see :func:`sparse_trainer.budget.count_units`).
        generator: draws the first live units.
        config: how units start, come back and are counted. With ``start: score`` the first are the best by the gate
            gradient of ``closure`` on the dense model, and what is removed then is folded into the output biases.
        closure: the loss of one batch; needed by ``score``.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, int],
        neurons: Mapping[str, int],
        config: SparsityConfig,
        *,
        generator: torch.Generator,
        closure: LossClosure | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.blocks = find_blocks(model)
        wanted = [
            (group, count[name])
            for name, block in self.blocks.items()
            for group, count in ((block.heads, heads), (block.neurons, neurons))
            if count[name] < group.count()
        ]
        scores: dict[int, Tensor] = {}
        by_score = config.start == "score"
        if by_score:
            if closure is None:
                raise ValueError(
                    'start: "score" needs the loss of a batch: SparsityScheduler(..., closure=lambda: loss)'
                )
            groups = [group for group, _ in wanted]
            with _probing(model, [(group, {}) for group in groups]) as gates:
                scores = dict(enumerate(_gate_scores(closure, gates)))
        self.groups: list[LiveUnits] = []
        for index, (group, count) in enumerate(wanted):
            if by_score:
                chosen = scores[index].topk(count).indices
            else:
                chosen = torch.randperm(group.count(), generator=generator)[:count]
            live = sorted(chosen.tolist())
            self.groups.append(LiveUnits(model, group, live, remember_first=config.candidates == "first"))
            keep(model, group, live, fold_biases=by_score)

    @classmethod
    def of_compact(
        cls, model: nn.Module, given: Any, config: SparsityConfig, *, generator: torch.Generator
    ) -> UnitSwaps:
        """Go on with the live units of a compact model; candidates are drawn anew, with the spread of the live ones.

        Args:
            given: ``live_heads``, ``live_neurons``, ``dense_heads``, ``dense_neurons`` by block.

        Raises:
            ValueError: the numbers do not fit the model, or the configuration asks for other shares.
        """
        made = cls.__new__(cls)
        made.model, made.config, made.blocks = model, config, find_blocks(model)
        made.groups = []
        for name, block in made.blocks.items():
            for group, live, totals, density in (
                (block.heads, given.live_heads, given.dense_heads, config.head_density),
                (block.neurons, given.live_neurons, given.dense_neurons, config.neuron_density),
            ):
                here, total = tuple(live.get(name, range(group.count()))), totals.get(name, group.count())
                if len(here) != group.count() or not set(here) <= set(range(total)):
                    raise ValueError(
                        f"resume_from: {name} has {group.count()} {group.kind}s, and {len(here)} of {total} are live"
                    )
                if count_units(density, total, group.kind) != len(here):
                    raise ValueError(
                        f"resume_from: {len(here)} of {total} {group.kind}s of {name} are live, and the configuration "
                        f"asks for {density} of them; give {group.kind}_density={len(here) / total:.4g}"
                    )
                if len(here) < total:
                    remember = config.candidates == "first"
                    units = LiveUnits(model, group, here, remember_first=False, total=total, generator=generator)
                    if remember:
                        units.remember_first(dict(model.named_parameters()))
                    made.groups.append(units)
        return made

    def report(self, swaps: Mapping[int, Swap]) -> dict[str, BlockUpdate]:
        """What an update did, by block.

        Args:
            swaps: of :meth:`update`.
        """
        nothing = Swap((), (), ())
        found: dict[tuple[str, str], tuple[Swap, int]] = {}
        for index, units in enumerate(self.groups):
            found[units.group.block, units.group.kind] = (swaps.get(index, nothing), len(units.explored))
        heads, neurons = self.totals("head"), self.totals("neuron")
        live_heads, live_neurons = self.live("head"), self.live("neuron")
        report = {}
        for name in self.blocks:
            head_swap, explored_heads = found.get((name, "head"), (nothing, heads[name]))
            neuron_swap, explored_neurons = found.get((name, "neuron"), (nothing, neurons[name]))
            report[name] = BlockUpdate(
                heads_removed=head_swap.removed,
                heads_added=head_swap.added,
                neurons_removed=neuron_swap.removed,
                neurons_added=neuron_swap.added,
                live_heads=tuple(sorted(live_heads[name])),
                heads=heads[name],
                live_neurons=len(live_neurons[name]),
                neurons=neurons[name],
                explored_heads=explored_heads,
                explored_neurons=explored_neurons,
            )
        return report

    def live(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Live units by block, in slot order, of ``head`` or ``neuron``; all of them where none is dormant."""
        dense = {
            name: tuple(range((block.heads if kind == "head" else block.neurons).count()))
            for name, block in self.blocks.items()
        }
        return dense | {g.group.block: tuple(g.live) for g in self.groups if g.group.kind == kind}

    def totals(self, kind: str) -> dict[str, int]:
        """Units of each block in the dense network."""
        counts = {name: len(units) for name, units in self.live(kind).items()}
        return counts | {g.group.block: g.total for g in self.groups if g.group.kind == kind}

    def update(
        self,
        closure: LossClosure,
        drop_fraction: float,
        *,
        optimizer: Optimizers,
        ema: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> tuple[dict[int, Swap], list[str]]:
        """Probe, choose, swap. Weights, gradients, moments, EMA and biases change together.

        Args:
            closure: the loss of one batch, a forward pass without backward.
            masks: weight masks on the compact tensors; a slot keeps its mask, so the budget does not move.

        Returns:
            the swaps by index into :attr:`groups`, and warnings.
        """
        round_up = self.config.unit_counts == "round_up"
        before = dict(self.model.named_parameters())
        frozen = [not all(before[part.name].requires_grad for part in units.group.slices) for units in self.groups]
        due = [
            (0, units.credit) if still else units.due(drop_fraction, round_up=round_up)
            for units, still in zip(self.groups, frozen, strict=True)
        ]
        probed = [index for index, (count, _) in enumerate(due) if count]
        scores = []
        if probed:
            candidates = [(self.groups[i].group, self.groups[i].masked_candidates(masks)) for i in probed]
            with _probing(self.model, candidates) as gates:
                scores = _gate_scores(closure, gates)
        for units, (_, credit) in zip(self.groups, due, strict=True):  # only now: the closure may have failed
            units.credit = credit
        if not all(bool(score.isfinite().all()) for score in scores):
            return {}, ["a probe batch gave scores that are not finite: no unit was swapped"]
        parameters = dict(self.model.named_parameters())
        swaps, undone = {}, []
        for index, score in zip(probed, scores, strict=True):
            units = self.groups[index]
            swap = _choose(units, score, due[index][0], parameters, self.config.swap == "if_better")
            if not swap.slots:
                continue
            if set(swap.added) == set(units.last.removed) and set(swap.removed) == set(units.last.added):
                undone.append(f"{units.group.block} ({units.group.kind}s)")
            self._exchange(units, swap, parameters, optimizer, ema, masks)
            units.last = swap
            swaps[index] = swap
        warnings = []
        if undone:
            warnings.append(
                f"what came back in {', '.join(undone)} is what the update before removed; growth changes nothing there"
            )
        return swaps, warnings

    @torch.no_grad()
    def _exchange(
        self,
        units: LiveUnits,
        swap: Swap,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizers,
        ema: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        group = units.group
        slots = torch.tensor(swap.slots)
        places = torch.tensor([units.dormant.index(unit) for unit in swap.added])
        for tensors in (parameters, ema):
            if tensors and group.output_bias is not None:
                constant = constant_output(group, tensors, slots)
                if constant is not None:
                    tensors[group.output_bias].data.add_(constant)
        for part in group.slices:
            parameter, store = parameters[part.name], units.candidates[part.name]
            if part.name in units.first:
                leaving = part.units(units.first[part.name])[torch.tensor(swap.removed)]
            else:
                leaving = part.units(parameter.data)[slots].clone()
            coming = part.units(store)[places].clone()
            part.units(store)[places] = leaving.to(store.dtype)
            if part in group.outputs:
                coming.zero_()
            if part.name in masks:
                coming.mul_(part.units(masks[part.name])[slots])
            part.units(parameter.data)[slots] = coming
            if part.name in ema:
                part.units(ema[part.name])[slots] = coming.to(ema[part.name].dtype)
            if parameter.grad is not None:
                part.units(parameter.grad)[slots] = 0
            for key, value in moments(optimizer, parameter):
                _restart_moments(part, key, value, slots, masks.get(part.name), self.config.unit_moments == "mean")
        for slot, place, removed, added in zip(swap.slots, places.tolist(), swap.removed, swap.added, strict=True):
            units.live[slot] = added
            units.dormant[place] = removed
        units.explored.update(swap.added)

    def fresh(self, swaps: Mapping[int, Swap], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bool masks over the elements of units that have just come, by parameter name."""
        fresh: dict[str, Tensor] = {}
        for index, swap in swaps.items():
            for part in self.groups[index].group.slices:
                if part.name in masks:
                    mask = torch.zeros_like(masks[part.name])
                    part.units(mask)[torch.tensor(swap.slots)] = True
                    fresh[part.name] = mask
        return fresh

    def state_dict(self) -> dict[str, Any]:
        return {f"{g.group.block}.{g.group.kind}": g.state_dict() for g in self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; the model's tensors are restored by the model's own state dict."""
        expected = {f"{g.group.block}.{g.group.kind}": g for g in self.groups}
        if set(state) != set(expected):
            odd = sorted(set(state) ^ set(expected))
            raise ValueError(f"the saved units are of other blocks than the model's: {', '.join(odd[:4])}")
        for name, group in expected.items():
            group.load_state_dict(state[name])


def _fresh(part: UnitSlice, live: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """New values for ``count`` units in the layout of ``live``: weights with the spread of the live ones, biases 0."""
    shape = list(live.shape)
    shape[part.dim] = part.groups * count * part.size
    if live.ndim == 1:
        return live.new_zeros(shape)
    drawn = torch.randn(shape, generator=generator) * float(live.float().std())
    return drawn.to(live)


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


def _choose(
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


class _Gate:
    """Multiplies the activations of each unit, per sample, at the input of the Linear that writes them.

    A model may run layers on a sheet ``[S, C]`` of the tokens of all samples. It then says in ``sheet_rows`` whose each
    row is, and how many samples there are.
    """

    def __init__(self, model: nn.Module, group: UnitGroup, live: int, candidates: int) -> None:
        self.model, self.group = model, group
        self.live, self.candidates = live, candidates
        self.values: list[Tensor] = []  # one per forward pass, [B, units]

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activation, *rest = arguments  # [B, N, units * size], or [S, units * size]
        rows = getattr(self.model, "sheet_rows", None)
        samples = activation.shape[0] if rows is None else rows[1]
        # float32 gates, so that their gradients are summed in float32 under autocast too
        value = torch.cat(
            [
                activation.new_ones(samples, self.live, dtype=torch.float32),
                activation.new_zeros(samples, self.candidates, dtype=torch.float32),
            ],
            dim=1,
        ).requires_grad_()
        if torch.is_grad_enabled():  # what runs without has no part in the loss
            self.values.append(value)
        gate = value if rows is None else value.index_select(0, rows[0])
        gate = gate.repeat_interleave(self.group.size, dim=1).to(activation.dtype)
        samples = gate.shape[0]
        return (activation * gate.view(samples, *[1] * (activation.ndim - 2), -1), *rest)


@contextlib.contextmanager
def _probing(model: nn.Module, groups: Sequence[tuple[UnitGroup, Mapping[str, Tensor]]]) -> Iterator[list[_Gate]]:
    """Attach candidates behind gates that are 0 for as long as the context lasts.

    Nothing remains of it: parameters keep their identity (only their data is exchanged for a while), random
    states, buffers and generators are put back, and compiled code is bypassed, so that it is not compiled again.
    """
    parameters = dict(model.named_parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(_leaving_no_trace(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Autocast keeps weights that it has cast; those are of other shapes now, and again afterwards.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        gates = []
        for group, candidates in groups:
            live = group.count()
            dormant = 0
            if candidates:
                first = group.outputs[0]
                dormant = first.units(candidates[first.name]).shape[0]
                stack.callback(group.set_count, live)  # runs last, when the tensors are back
                for part in group.slices:
                    stack.enter_context(
                        _exchanged(
                            parameters[part.name],
                            part.join(parameters[part.name].data, candidates[part.name]),
                        )
                    )
                group.set_count(live + dormant)
            gate = _Gate(model, group, live, dormant)
            stack.enter_context(contextlib.closing(_Handle(group.writer.register_forward_pre_hook(gate))))
            gates.append(gate)
        yield gates


class _Handle:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


@contextlib.contextmanager
def _exchanged(parameter: nn.Parameter, data: Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = data
    try:
        yield
    finally:
        parameter.data = before


@contextlib.contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Put back random states, buffers and extra state (a selector's generator) on leaving."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    extra = {
        module: module.get_extra_state()
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for module, state in extra.items():
            module.set_extra_state(state)


def _gate_scores(closure: LossClosure, gates: Sequence[_Gate]) -> list[Tensor]:
    """Mean over samples of the size of the gradient at each gate: ``[units]``, live ones first, then candidates.

    At a live unit this is ``|sum(A * dL/dA)|``, the first-order change of the loss when the unit goes (Michel et
    al. 2019); at a candidate the change when it comes. Both estimate the same thing, so they can be compared.
    """
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
        raise ValueError("scheduler.step(closure): the closure must return the loss, a tensor with a graph")
    if not all(gate.values for gate in gates):
        raise ValueError("scheduler.step(closure): the closure did not run the model that is being trained")
    # Taken before the backward pass: gradient checkpointing runs the forward, and with it the gates, again in it.
    values = [list(gate.values) for gate in gates]
    every = [value for several in values for value in several]
    gradients = iter(torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True))
    scores = []
    for several in values:
        # The loss is a mean over the samples, so the sum of their gradients' sizes is the mean of each one's own.
        score = torch.stack([next(gradients).abs().sum(dim=0) for _ in several]).sum(dim=0)
        scores.append((sum_over_processes(score) / process_count()).cpu())
    return scores
