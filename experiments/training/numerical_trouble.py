"""Where numbers that are not finite come from: a step is run once more, and watched.

This is done when a run gives up, and costs nothing before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.processes.processes import ALONE, Processes
from experiments.run_folder.random_states import random_states, restore_random_states
from experiments.training.objective import Objective

NAMED = 3
"""Tensors that a message lists."""


@dataclass
class Recording:
    """One optimizer step, to be run again: the batches as the network saw them, and the random states before."""

    model: nn.Module
    device: torch.device
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Images and targets."""

    def __post_init__(self) -> None:
        self._random = random_states(self.device)
        self._extra = {module: module.get_extra_state() for module in _with_extra_state(self.model)}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside the block whatever is drawn is drawn as it was; afterwards as if nothing had been."""
        random, extra = random_states(self.device), {m: m.get_extra_state() for m in self._extra}
        restore_random_states(self._random, self.device)
        for module, state in self._extra.items():
            module.set_extra_state(state)
        try:
            yield
        finally:
            restore_random_states(random, self.device)
            for module, state in extra.items():
                module.set_extra_state(state)


def _with_extra_state(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]


def explain(recording: Recording, objective: Objective, processes: Processes, scale: Callable[[Tensor], Tensor]) -> str:
    """What was not finite first in a step, and on which process; called by all of them.

    Args:
        recording: of the step, whose gradients are still the model's.
        objective: what was minimised.
        scale: what the loss was scaled by before the backward pass.
    """
    own = copy.copy(objective)
    own.processes = ALONE  # each looks at its own batches alone
    gradients = bad_names((name, parameter.grad) for name, parameter in recording.model.named_parameters())

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        terms, _ = own.terms(recording.model, images, targets)
        return scale(own.weigh(terms) / len(recording.batches))

    try:
        found = first_not_finite(recording, loss)
    except RuntimeError as error:  # out of memory above all: to watch takes some
        found = f"what could not be found out ({str(error).splitlines()[0]})"
    everyone = processes.gather(found)
    if not any(everyone):
        seen = f"the gradients of {listed(gradients)}" if gradients else "the loss"
        return f"first not finite: {seen}, but nothing when the step was run again"
    if processes.size == 1:
        return f"first not finite: {found}"
    by_process = (f"{reason} (process {rank})" for rank, reason in enumerate(everyone) if reason)
    return f"first not finite: {', '.join(by_process)}"


def first_not_finite(recording: Recording, loss: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """What was not finite first, in the order in which a step computes: weights, images, what modules take and give,
    the loss, and back from it the gradients. None, if all is finite now.

    Args:
        recording: of the step, whose weights are still the model's.
        loss: of images and targets, as the backward pass began with it.
    """
    model = recording.model
    bad = bad_names(model.state_dict(keep_vars=True).items())
    if bad:
        return f"the weights {listed(bad)}"
    with recording.again():
        for images, targets in recording.batches:
            if not _finite((images, targets)):
                return "the images or targets of the batch"
            found = _watch(model, lambda images=images, targets=targets: loss(images, targets))  # type: ignore[misc]
            if found is not None:
                return found
    return None


def bad_names(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """The names of those that are not finite."""
    return [name for name, tensor in tensors if not _finite(tensor)]


def listed(names: list[str]) -> str:
    """The first few, and how many more."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _watch(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """The first thing that is not finite in a forward and backward pass, which leaves the parameters' gradients be."""
    forward: list[str] = []
    backward: list[str] = []
    outputs: list[Tensor] = []

    def watch(name: str, module: nn.Module) -> Iterator[Any]:
        def before(_: nn.Module, arguments: Any) -> None:
            if not _finite(arguments):
                forward.append(f"the input of {name}")

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if not _finite(output):
                forward.append(f"the output of {name}")
            if isinstance(output, Tensor) and output.requires_grad:
                outputs.append(output)
                output.register_hook(
                    lambda gradient: None if _finite(gradient) else backward.append(f"the gradient at {name}'s output")
                )

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)

    handles = [handle for name, module in model.named_modules() if name for handle in watch(name, module)]
    try:
        with torch.enable_grad():
            value = loss()
    finally:
        for handle in handles:
            handle.remove()
    if forward:
        return forward[0]
    if not _finite(value):
        return "the loss, of outputs that are finite"
    if outputs:
        torch.autograd.grad(value, outputs[0], allow_unused=True)  # which leads back through all the others
    return backward[0] if backward else None


def _finite(value: Any) -> bool:
    """Whether all floating-point numbers in a tensor, or in a tuple or list of them, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, tuple | list):
        return all(_finite(item) for item in value)
    return True
