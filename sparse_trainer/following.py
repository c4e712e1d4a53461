"""How a training loop is followed: its optimizers' steps and its backward passes, by hooks alone."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.optimizer_state import Optimizers, check_supported


def unwrap(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers in what a user holds: one, several, or wrappers of Accelerate and Lightning around them.

    Raises:
        ValueError: it is no optimizer.
    """
    if isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        return [member for several in optimizer for member in unwrap(several)]
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"attach() takes an optimizer, or several in a list; got {type(optimizer).__name__}")
    return [optimizer]


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], prunable: dict[str, nn.Parameter]) -> None:
    """Check that optimizers can be followed and together hold every prunable weight.

    Raises:
        ValueError: naming what is missing or not supported.
    """
    if not optimizers:
        raise ValueError("attach() got no optimizer")
    for optimizer in optimizers:
        check_supported(optimizer)
    owned = Optimizers(optimizers).parameters()
    missing = [name for name, parameter in prunable.items() if id(parameter) not in owned]
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} prunable parameters, {missing[0]} among them; build it from "
            "the model's parameters after the scheduler, give all optimizers in one list, or exclude frozen layers"
        )


@contextlib.contextmanager
def hookable(parameter: nn.Parameter) -> Iterator[None]:
    """Lets a frozen parameter take hooks, which torch refuses; they stay until it trains again."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_()
    try:
        yield
    finally:
        if frozen:
            parameter.requires_grad_(False)


class LoadHook:
    """Tells a scheduler that a state was loaded into its model. In a copy of the model, or a file, it does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None

    def __call__(self, *arguments: Any) -> None:
        method = self._method() if self._method is not None else None
        if method is not None:
            method(*arguments)

    def __deepcopy__(self, memo: Any) -> LoadHook:
        return LoadHook()

    def __reduce__(self) -> Any:
        return (LoadHook, ())


class Following:
    """The hooks on optimizers and model, and what they count.

    Args:
        optimizers: to follow; each steps at most once between two calls of the scheduler.
        model: whose loaded states matter.
        first: a prunable weight; its gradient arrives once in every backward pass.
        before, after: called around the step of each optimizer that counts.
        loaded: called when a state was loaded into the model or an optimizer.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: nn.Module,
        first: nn.Parameter,
        *,
        before: Callable[[], None],
        after: Callable[[], None],
        loaded: Callable[..., None],
    ) -> None:
        self.optimizers = Optimizers(optimizers)
        self._first, self._before, self._after = first, before, after
        self._depth = 0  # of steps within steps: an optimizer's own may call that of its base class
        self._steps = [0] * len(optimizers)  # of each since the scheduler was called last
        self.passes = 0  # backward passes since the last optimizer step
        self.passes_per_step = 1
        self._skipped: Tensor | None = None  # counted on the device; read only when an update may be due
        with hookable(first):
            self._handles: list[Any] = [first.register_hook(self._count_pass)]
        self._handles.append(model.register_load_state_dict_post_hook(LoadHook(loaded)))
        for index, optimizer in enumerate(optimizers):
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step_of(index)),
                optimizer.register_load_state_dict_post_hook(LoadHook(loaded)),
            ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self, passes_per_step: int) -> None:
        """Forget what was counted, as after a state was loaded."""
        self._steps, self.passes, self._skipped = [0] * len(self._steps), 0, None
        self.passes_per_step = passes_per_step

    def take_steps(self) -> int:
        """Steps since the last call: the most that one of the optimizers took."""
        steps, self._steps, self._depth = max(self._steps), [0] * len(self._steps), 0
        return steps

    def take_skipped(self) -> int:
        """Steps that a fused optimizer skipped on the device since the last call; this reads the device."""
        if self._skipped is None:
            return 0
        skipped, self._skipped = int(self._skipped), None
        return skipped

    def forget_skipped(self) -> None:
        """Whether the last steps were skipped is known otherwise; the device need not be read."""
        self._skipped = None

    def _count_pass(self, _: Tensor) -> None:
        if self._first.grad is None:
            self.passes = 0  # an optimizer step begins: passes of one that was dropped do not count
        self.passes += 1

    def _before_step(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._before()

    def _after_step_of(self, index: int) -> Callable[..., None]:
        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._depth -= 1
            if self._depth > 0:
                return
            self._steps[index] += 1
            self._after()
            self.passes_per_step, self.passes = max(self.passes, self.passes_per_step if not self.passes else 1), 0
            # GradScaler lets a fused optimizer skip the step by itself and leaves its verdict here, on the device.
            found_inf = getattr(optimizer, "found_inf", None)
            if index == 0 and isinstance(found_inf, Tensor):
                skipped = found_inf.detach().reshape(()).clone()
                self._skipped = skipped if self._skipped is None else self._skipped + skipped

        return after
