"""What others put around a model: the model itself is meant."""

from __future__ import annotations

from torch import nn

PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in what ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel`` made of it."""
    while True:
        inner = model.module if isinstance(model, PARALLEL) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
