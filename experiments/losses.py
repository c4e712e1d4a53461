"""The loss of a training run."""

from __future__ import annotations

from timm.loss import SoftTargetCrossEntropy
from torch import nn

from experiments.data_config import DataConfig


def create_loss(data: DataConfig) -> nn.Module:
    """Cross-entropy, mean over the batch: logits ``[B, K]`` and targets to a scalar.

    Mixed images come with soft targets ``[B, K]`` that hold the label smoothing already; others with class
    numbers ``[B]``, which are smoothed here.
    """
    if data.mixes:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=data.label_smoothing)
