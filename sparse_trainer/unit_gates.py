"""A probe: live units and candidates run behind gates that nothing has to multiply.

A gate is 1 at a live unit and 0 at a candidate. A factor of 1 changes nothing, and what a factor of 0 keeps out need
not be written. So live units run as they are, and candidates run without a graph. The gradient at a gate is the sum of
activation times gradient over the tokens of a sample. What reaches a candidate's activations is the gradient of the
writer's output times the candidate's own columns.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_trainer.units import UnitGroup

Rows = tuple[Tensor, int]
"""Of a sheet ``[S, C]``: the sample of each row, and how many samples there are."""


class Gate:
    """The gates of one group.

    A model may run layers on a sheet ``[S, C]`` of the tokens of all samples. It then says in ``sheet_rows`` whose each
    row is, and how many samples there are.

    Args:
        candidates: their weights by parameter name; empty without candidates.
    """

    def __init__(self, model: nn.Module, group: UnitGroup, candidates: Mapping[str, Tensor]) -> None:
        self.model, self.group, self.candidates = model, group, candidates
        self.live = group.count()
        columns = candidates.get(group.outputs[0].name)
        self.dormant = 0 if columns is None else columns.shape[1] // group.size
        self.columns = columns if self.dormant else None  # [C, candidates * size]
        self.values: list[Tensor] = []  #: gates of the live units, one for each forward pass, ``[B, live]``
        self.found: list[Tensor] = []  #: gradients at those of the candidates, one for each too, ``[B, candidates]``
        self._beside: dict[str, Tensor] = {}  # parameters of the owner with which the candidates run
        self._running = False  # the candidates run
        self._activation: Tensor | None = None  # theirs, until the live ones are written

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Let the group run with its candidates until the stack unwinds."""
        group = self.group
        hooks = [
            group.writer.register_forward_pre_hook(self._before_writing),
            group.writer.register_forward_hook(self._after_writing),
        ]
        if self.joined:
            parameters = dict(self.model.named_parameters())
            stack.callback(group.set_count, self.live)  # runs last, when the tensors are back
            for part in group.inputs:
                joined = part.join(parameters[part.name].data, self.candidates[part.name])
                stack.enter_context(_exchanged(parameters[part.name], joined))
            group.set_count(self.live + self.dormant)
        elif self.columns is not None:
            names = {module: name for name, module in self.model.named_modules()}
            prefix = f"{names[group.owner]}."
            self._beside = {name.removeprefix(prefix): value for name, value in self.candidates.items()}
            # What they write is not needed: a writer without outputs.
            writer = names[group.writer].removeprefix(prefix)
            self._beside[f"{writer}.weight"] = self.columns[:0]
            if group.writer.bias is not None:
                self._beside[f"{writer}.bias"] = group.writer.bias.detach()[:0]
            hooks.append(group.owner.register_forward_pre_hook(self._run_candidates, with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)

    @property
    def joined(self) -> bool:
        """Whether live units and candidates run as one: where the model computes the attention itself, on sheets."""
        return self.columns is not None and self.group.kind == "head" and hasattr(self.model, "sheet_rows")

    def _run_candidates(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """The candidates alone, without a graph; the live ones run next."""
        if self._running or not torch.is_grad_enabled():
            return
        self._running = True
        self.group.set_count(self.dormant)
        try:
            with torch.no_grad():
                torch.func.functional_call(module, self._beside, arguments, named)
        finally:
            self._running = False
            self.group.set_count(self.live)

    def _before_writing(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        activation, *rest = arguments  # [B, N, units * size], or [S, units * size]
        if self._running:
            self._activation = activation
            return None
        if self.joined:
            activation, others = activation.tensor_split([self.live * self.group.size], dim=-1)
            self._activation = others.detach()
        if torch.is_grad_enabled():  # what runs without has no part in the loss
            rows = getattr(self.model, "sheet_rows", None)
            # float32 gates, so that their gradients are summed in float32 under autocast too
            samples = activation.shape[0] if rows is None else rows[1]
            gate = activation.new_ones(samples, self.live, dtype=torch.float32).requires_grad_()
            self.values.append(gate)
            activation = _Gated.apply(activation, gate, rows)
        return (activation, *rest)

    def _after_writing(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if self._running or self.columns is None or not output.requires_grad:
            return
        if self._activation is None:
            owner, units = type(self.group.owner).__name__, f"{self.group.kind}s"
            raise ValueError(
                f"{self.group.block}: the model runs the layers of {owner} and not {owner} itself, so {units} that are "
                "not live cannot be compared"
            )
        activation, columns, rows = self._activation, self.columns, getattr(self.model, "sheet_rows", None)
        self._activation = None

        def look(gradient: Tensor) -> None:
            by_row = gradient @ columns.to(gradient.dtype)
            self.found.append(_by_sample(activation * by_row, self.dormant, rows))

        output.register_hook(look)


class _Gated(torch.autograd.Function):
    """Activations as they are, and the gradient at a gate of 1 before each of their units."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gate: Tensor, rows: Rows | None) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.units, ctx.rows = gate.shape[1], rows
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (activation,) = ctx.saved_tensors
        return gradient, _by_sample(activation * gradient, ctx.units, ctx.rows), None


def _by_sample(product: Tensor, units: int, rows: Rows | None) -> Tensor:
    """Sums over tokens and the entries of a unit: float32 ``[B, units]``.

    Args:
        product: ``[B, ..., units * size]``, or ``[S, units * size]`` of a sheet.
    """
    if rows is None:
        by_unit = product.reshape(product.shape[0], -1, units, product.shape[-1] // units)
        return by_unit.sum(dim=(1, 3), dtype=torch.float32)
    sample, samples = rows
    by_row = product.reshape(product.shape[0], units, -1).sum(dim=2, dtype=torch.float32)
    return by_row.new_zeros(samples, units).index_add_(0, sample, by_row)


@contextlib.contextmanager
def probing(model: nn.Module, groups: Sequence[tuple[UnitGroup, Mapping[str, Tensor]]]) -> Iterator[list[Gate]]:
    """Attach candidates behind gates that are 0 for as long as the context lasts.

    Nothing remains of it: parameters keep their identity (only their data is exchanged for a while), random
    states, buffers and generators are put back, and compiled code is bypassed, so that it is not compiled again.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_leaving_no_trace(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Autocast keeps weights that it has cast; those are of other shapes now, and again afterwards.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        gates = [Gate(model, group, candidates) for group, candidates in groups]
        for gate in gates:
            gate.attach(stack)
        yield gates


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
