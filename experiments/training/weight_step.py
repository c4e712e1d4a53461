"""The optimizer's step along the gradient of a batch, or none where something was not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.threshold_selector import ThresholdSelector

LEAVES_STEPS_OUT = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose fused kernels take the verdict on a step from the device. (Those of SGD do too, but not on the first
step, when there is no momentum yet.)"""


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class WeightStep:
    """Clips and steps; a gradient that is not finite moves no weight and no moment, only the loss scale of float16.

    Args:
        model: whose parameters the optimizer moves.
        clip_grad: greatest norm of the gradient; None for no clipping.
        scaler: of the loss; not enabled but for float16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip_grad: float | None,
    ) -> None:
        self.optimizer, self.scaler, self.clip_grad = optimizer, scaler, clip_grad
        # The slope at a threshold is in the thousands: its gradient would be all of the norm, and clipping by it would
        # scale the network's own gradient by chance.
        selector = getattr(model, "selector", None)
        own = list(selector.parameters()) if isinstance(selector, ThresholdSelector) else []
        self._unclipped: list[nn.Parameter] = own
        self._clipped = [p for p in model.parameters() if not any(p is other for other in own)]
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.may_wait = type(optimizer) in LEAVES_STEPS_OUT and fused and not scaler.is_enabled()
        """Whether :meth:`move_unless` is to be had."""

    def norms(self) -> tuple[Tensor, Tensor]:
        """Of the gradient that is clipped, and one that is not finite if any gradient is not: scalars."""
        norm = gradient_norm(self._clipped)
        return norm, norm + gradient_norm(self._unclipped) if self._unclipped else norm

    def move(self, norm: Tensor, bad: bool, *, overflowed: Tensor) -> None:
        """Step along a gradient whose ``norm`` is known; not at all where something is ``bad``.

        Args:
            overflowed: not finite if any gradient is not.
        """
        if bad and self.scaler.is_enabled() and bool(overflowed.isfinite()):
            self.scaler.update(self.scaler.get_scale())  # no gradient overflowed: the scale may stay
            return
        if not bad:
            self._clip(norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def move_unless(self, drop: Tensor, norm: Tensor) -> None:
        """The same where the host does not know yet whether something is bad.

        Args:
            drop: float32 scalar on the device, 1 to move nothing, else 0.
        """
        assert self.may_wait
        self._clip(norm)
        # What a GradScaler does to a fused optimizer, without a scale.
        self.optimizer.found_inf = drop  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def _clip(self, norm: Tensor) -> None:
        if self.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self._clipped, self.clip_grad, norm)
