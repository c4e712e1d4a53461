"""Mixup and CutMix of a batch: images and targets blended, by a draw that is pure in seed, epoch and batch."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor

from experiments.data.batches import (
    MIX,
    Batch,
    derive_seed,
    seeded,
)
from experiments.data.data_config import DataConfig


class Mixing:
    """timm's mixup and cutmix with a draw that is pure in (seed, epoch, batch) and the same on every process.

    timm mixes image i of a batch with image B - 1 - i and draws from NumPy's global state. Here neighbours (2 i,
    2 i + 1) are mixed, so that a process that holds a share of the batch makes the same pictures; and NumPy's
    state is seeded for the call and put back after it.
    """

    def __init__(self, mixup: Mixup, seed: int) -> None:
        self.mixup, self.seed = mixup, seed

    def __call__(self, images: Tensor, targets: Tensor, *, epoch: int, batch: int) -> Batch:
        """Mixed images [B, C, S, S] and soft targets float32 [B, classes], in the order in which they came; B even."""
        count = len(images)
        neighbours = torch.cat((torch.arange(0, count, 2), torch.arange(count - 1, 0, -2)))
        back = neighbours.argsort().to(images.device, non_blocking=True)
        neighbours = neighbours.to(images.device, non_blocking=True)
        with seeded(derive_seed(self.seed, MIX, epoch, batch)):
            mixed, soft = self.mixup(images[neighbours], targets[neighbours])
        return mixed[back], soft[back]


def create_mixup(config: DataConfig, num_classes: int, *, seed: int) -> Mixing | None:
    """Mixup and cutmix as configured, with label smoothing in the targets; None where both are off."""
    if not config.mixes:
        return None
    mixup = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
    return Mixing(mixup, seed)
