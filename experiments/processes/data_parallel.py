"""The network on many processes: torch's DistributedDataParallel around its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def in_parallel(network: nn.Module, model: nn.Module, image: tuple[int, int, int]) -> DistributedDataParallel:
    """``network``, whose backward pass averages the gradients over all processes.

    Dead gradients are zeroed before they are averaged, and the mean of zeros is 0: what the optimizer sees is live.

    Args:
        network: the model, or what was compiled from it.
        model: the bare model; masks, averages, evaluation and checkpoints go on with it.
        image: ``(C, H, W)`` of an input.
    """
    device = next(model.parameters()).device
    saved = model.state_dict()
    parallel = DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        # To look for them costs a walk over the graph at every step.
        find_unused_parameters=bool(unused_parameters(model, image)),
        gradient_as_bucket_view=True,
    )
    # Buffers that no checkpoint holds, such as a temperature, are set alike on each process and need not be sent. The
    # argument for it has another name in later releases of torch.
    parallel.broadcast_buffers = any(name in saved for name, _ in model.named_buffers())
    return parallel


def averaging(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """A context for one forward and backward pass: gradients are averaged over the processes, or not yet."""
    if now or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def unused_parameters(model: nn.Module, image: tuple[int, int, int]) -> list[str]:
    """Parameters that get no gradient when the model learns from an image ``(C, H, W)``."""
    first = next(model.parameters())
    with _undrawn(model, first.device), torch.enable_grad():
        output: Tensor = model(torch.zeros(1, *image, device=first.device, dtype=first.dtype))
    reached: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))  # of the nodes that write a gradient
        waiting.extend(following for following, _ in node.next_functions)
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


@contextmanager
def _undrawn(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back whatever random numbers are drawn in the block."""
    selector = cast(Any, getattr(model, "selector", None))
    generator = getattr(selector, "generator", None)
    before = generator.get_state() if generator is not None else None
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        yield
    if generator is not None and before is not None:
        generator.set_state(before)
