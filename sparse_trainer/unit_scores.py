"""What a unit is worth: one batch with gates, and the gradients at them.

At an update one probe batch runs with the candidates behind gates that are 0 (:mod:`~sparse_trainer.unit_gates`). The
gradients at the gates tell what each live unit is worth and what each candidate could be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_trainer.agreement import process_count, sum_over_processes
from sparse_trainer.unit_gates import Gate

LossClosure = Callable[[], Tensor]


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
    for gate, several in zip(gates, values, strict=True):
        # The loss is a mean over the samples, so the sum of their gradients' sizes is the mean of each one's own.
        both = _sizes_and_gains([next(gradients) for _ in several])
        if gate.dormant:
            # A forward pass that has no part in the loss brings a candidate no gradient.
            dormant = _sizes_and_gains(gate.found) if gate.found else both.new_zeros(2, gate.dormant)
            both = torch.cat([both, dormant], dim=1)
        size, gain = (sum_over_processes(both) / process_count()).cpu()
        scores.append(Scores(size, gain))
    return scores


def _sizes_and_gains(by_sample: Sequence[Tensor]) -> Tensor:
    """``[2, units]`` of gradients ``[B, units]``, one for each forward pass."""
    return torch.stack([torch.stack([g.abs().sum(dim=0), -g.sum(dim=0)]) for g in by_sample]).sum(dim=0)
