"""How many images a second networks classify: in turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.evaluation.precision import Autocast

ROUNDS, WARMUP = 9, 1
SECONDS = 4.0
"""After which no further round begins, once each network has had one."""


@torch.inference_mode()
def images_per_second(models: Sequence[nn.Module], images: Tensor, autocast: Autocast) -> list[float]:
    """Medians over rounds in which each network classifies the same batch once.

    Args:
        models: on one device, in eval mode or not; each is in the mode that it had when this returns.
        images: ``[B, C, H, W]``, on their device.
        autocast: the precision.
    """
    modes = [model.training for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    try:
        for model in models:
            model.eval()
        begun = time.perf_counter()
        for number in range(WARMUP + ROUNDS):
            if number > WARMUP and time.perf_counter() - begun > SECONDS:
                break
            for model, taken in zip(models, seconds, strict=True):
                _wait(images)
                started = time.perf_counter()
                with autocast():
                    model(images)
                _wait(images)
                taken.append(time.perf_counter() - started)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    return [len(images) / statistics.median(taken[WARMUP:]) for taken in seconds]


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
