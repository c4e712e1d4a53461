"""The precision in which a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Autocast = Callable[[], AbstractContextManager[object]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _AttentionTrainsInFloat32(TorchFunctionMode):
    """Fused attention, where a backward pass follows, in float32.

    On a CPU torch's backward pass of it is up to six times slower in 16 bits than in float32, and would take most of
    a training step; the forward pass alone is as fast.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) >= 3 and args[0].requires_grad:
            query, key, value, *rest = args
            with torch.autocast(query.device.type, enabled=False):
                mixed = func(query.float(), key.float(), value.float(), *rest, **kwargs)
            return mixed.to(value.dtype)
        return func(*args, **kwargs)


def precision_context(device: torch.device, amp: str) -> Autocast:
    """Makes the context in which a model runs: autocast to ``amp``, or nothing for float32."""
    dtype = DTYPES[amp]

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            if dtype != torch.float32:
                stack.enter_context(torch.autocast(device.type, dtype=dtype))
                if device.type == "cpu":
                    stack.enter_context(_AttentionTrainsInFloat32())
            yield

    return context


def narrow(model: nn.Module, amp: str) -> None:
    """Keep weights as autocast to ``amp`` would cast them at every use, in place: the same bits, of less memory.

    For a network that does not train. A selector scores in float32 whatever the precision, and keeps its weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("selector."):
            module.to(DTYPES[amp])
