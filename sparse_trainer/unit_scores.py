"""What a unit is worth: one batch with gates, and the gradients at them.

At an update one probe batch runs with the candidates attached behind gates that are 0; the gradients at the gates tell
what each live unit is worth and what each candidate could be. Nothing remains of a probe.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_trainer.agreement import process_count, sum_over_processes
from sparse_trainer.units import UnitGroup

LossClosure = Callable[[], Tensor]


class Gate:
    """Multiplies the activations of each unit, per sample, at the input of the Linear that writes them.

    A model, or a part of it, may run layers on a sheet ``[S, C]`` of the tokens of all samples. It then says in
    ``sheet_rows`` whose each row is, and how many samples there are.
    """

    def __init__(self, model: nn.Module, group: UnitGroup, live: int, candidates: int) -> None:
        self.group = group
        self.packing: list[Any] = [module for module in model.modules() if hasattr(module, "sheet_rows")]
        self.live, self.candidates = live, candidates
        self.values: list[Tensor] = []  # one per forward pass, [B, units]

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activation, *rest = arguments  # [B, N, units * size], or [S, units * size]
        rows: tuple[Tensor, int] | None = next((m.sheet_rows for m in self.packing if m.sheet_rows is not None), None)
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
def probing(model: nn.Module, groups: Sequence[tuple[UnitGroup, Mapping[str, Tensor]]]) -> Iterator[list[Gate]]:
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
            gate = Gate(model, group, live, dormant)
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


@dataclass(frozen=True)
class Scores:
    """What the units of one group are worth: ``[units]``, live ones first, then candidates."""

    size: Tensor
    """Mean over samples of the size of the gradient at the gate. At a live unit this is ``|sum(A * dL/dA)|``, the
    first-order change of the loss when the unit goes (Michel et al. 2019); at a candidate the change when it comes, up
    or down."""
    gain: Tensor
    """The same with its sign: how much the loss falls, on the mean, when the gate opens. A candidate that writes
    something at random changes the loss of every sample, but makes it fall as often as rise."""

    def isfinite(self) -> bool:
        """Whether they can be compared."""
        return bool(self.size.isfinite().all()) and bool(self.gain.isfinite().all())


def gate_scores(closure: LossClosure, gates: Sequence[Gate]) -> list[Scores]:
    """What each unit behind a gate is worth to the loss of one batch."""
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
        by_sample = [next(gradients) for _ in several]
        both = torch.stack([torch.stack([g.abs().sum(dim=0), -g.sum(dim=0)]) for g in by_sample]).sum(dim=0)
        size, gain = (sum_over_processes(both) / process_count()).cpu()
        scores.append(Scores(size, gain))
    return scores
