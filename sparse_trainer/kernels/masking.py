"""Dead gradients set to 0 by a compiled loop, where there is one: the one thing that masks cost in every step.

torch multiplies floats by a bool by way of a copy of the mask as floats, and NumPy does it in one thread. The compiled
loop passes once over the memory, in torch's threads, in whose caches a gradient still is. The bits are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_trainer.kernels.library import KernelError, Library, load_library
from sparse_trainer.masks import zero_dead

WORTH = 1 << 22
"""Weights of a network from which a few seconds of compilation, once on a machine, are worth it."""
IN_THREADS = 1 << 16
"""Elements from which several threads are worth starting."""


def masking_library(weights: int, device: torch.device) -> Library | None:
    """The compiled loop for a network of so many masked weights; None where it is not worth it or cannot be had."""
    if device.type != "cpu" or weights < WORTH:
        return None
    try:
        return load_library()
    except KernelError:
        return None


def mask_gradient(gradient: Tensor, live: Tensor, library: Library | None) -> None:
    """Set ``gradient`` to 0 where ``live`` is False, in place; what is not finite there becomes NaN."""
    plain = gradient.device.type == "cpu" and gradient.dtype == torch.float32 and gradient.is_contiguous()
    if library is None or not plain or not live.is_contiguous():
        zero_dead(gradient, live)
        return
    threads = torch.get_num_threads() if gradient.numel() >= IN_THREADS else 1
    library.functions.sparse_mask(
        gradient.data_ptr(), live.data_ptr(), gradient.numel(), library.parallel, min(threads, 64)
    )
