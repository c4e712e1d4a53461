"""What ranks the weights that grow: the mean dense gradient over the steps before an update (RigL, Evci et al. 2020).

The dense gradient exists only on the steps that collect it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.agreement import process_count, sum_over_processes


class GrowthGradient:
    """The mean dense gradient over the steps just before an update.

    Gradients are taken as they arrive in a backward pass, before the dead ones are zeroed, and are brought to the
    units in which the optimizer sees the live ones: loss scaling, gradient accumulation and clipping are undone
    or applied by the one factor that maps the collected live gradient onto the optimizer's.
    """

    def __init__(self) -> None:
        self.collecting = False
        self._step: dict[str, Tensor] = {}  # summed over the backward passes of this optimizer step
        self._mean: dict[str, Tensor] = {}  # summed over the optimizer steps collected so far
        self._steps = 0

    def add(self, name: str, gradient: Tensor, accumulated: Tensor | None) -> None:
        """Add the gradient of one backward pass.

        Args:
            accumulated: the parameter's ``.grad`` before this pass. Where it is empty an optimizer step begins
                anew: whatever was collected belongs to one that was skipped.
        """
        if name in self._step and accumulated is not None and bool(accumulated.any()):
            self._step[name].add_(gradient.detach())
        else:
            self._step[name] = gradient.detach().clone(memory_format=torch.contiguous_format)

    def finish_step(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Take over what this optimizer step collected; called when the optimizer has stepped.

        Only then are the gradients what it saw: a fused optimizer undoes the loss scale by itself, and one that is
        given a closure runs the backward pass within its step. A step whose gradients are not finite is left out.

        All processes that train together come here in the same step. One that no gradient reached adds zeros, so
        the others need not wait for it, and all end with the same mean.
        """
        step, self._step = self._step, {}
        device = next(iter(parameters.values())).device
        if process_count() > 1:
            contributors = int(sum_over_processes(torch.tensor(int(bool(step)), device=device)))
            if not contributors:
                return
            # The signed mean, so that every process ranks the gradient of the global batch.
            for name, parameter in parameters.items():
                gradient = step.setdefault(name, torch.zeros_like(parameter, memory_format=torch.contiguous_format))
                sum_over_processes(gradient).div_(contributors)
        if not step:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        seen, collected = sums.unbind()
        for name, gradient in step.items():
            optimizer_gradient = parameters[name].grad
            if optimizer_gradient is None:
                continue
            live = gradient * masks[name]
            seen += torch.sum(optimizer_gradient.float() * live, dtype=torch.float64)
            # In float64, since a loss scale may be so great that a float32 square is infinite.
            collected += torch.linalg.vector_norm(live, dtype=torch.float64).square()
        sum_over_processes(sums)  # equal on all, but for one without gradients
        factor = float(seen / collected) if float(collected) > 0 else 1.0
        # Not finite in any element makes the live sums or this product so; then nothing may be ranked by it.
        if not math.isfinite(factor) or not all(bool(g.sum().isfinite()) for g in step.values()):
            return
        if factor <= 0:  # the optimizer saw no gradient, or one that has nothing to do with the backward passes
            factor = 1.0
        for name, gradient in step.items():
            gradient.mul_(factor)
            if name in self._mean:
                self._mean[name].add_(gradient)
            else:
                self._mean[name] = gradient
        self._steps += 1

    def collect(self, now: bool) -> None:
        """Start or stop collecting; what was collected for nothing is freed."""
        if not now:
            self._step, self._mean, self._steps = {}, {}, 0
        self.collecting = now

    def holds(self, name: str) -> bool:
        """Whether this optimizer step brought a gradient of ``name``."""
        return name in self._step

    @property
    def holds_gradient(self) -> bool:
        """Whether a finite gradient was collected."""
        return bool(self._mean)

    def take(self) -> dict[str, Tensor]:
        """The mean gradient by name, empty if nothing finite was collected; the accumulators are freed."""
        mean, steps = self._mean, self._steps
        self._step, self._mean, self._steps = {}, {}, 0
        for gradient in mean.values():
            gradient.div_(steps)
        return mean

    def reshape(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """The parameter of a name has another shape: change what was collected of it."""
        for collected in (self._step, self._mean):
            if name in collected:
                collected[name] = change(collected[name])

    def state_dict(self) -> dict[str, Any]:
        return {"mean": {name: value.clone() for name, value in self._mean.items()}, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        self._mean = {name: value.to(parameters[name].device).clone() for name, value in state["mean"].items()}
        self._steps = int(state["steps"])
        self._step = {}
