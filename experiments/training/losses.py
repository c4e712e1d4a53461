"""The terms of the training loss, as functions: cross-entropy, the budget of MACs, and distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from experiments.data.data_config import DataConfig
from models import Selection, tokens_per_block
from sparse_trainer.flops import model_macs
from sparse_trainer.units import find_blocks


def create_loss(data: DataConfig) -> nn.Module:
    """Cross-entropy, mean over the batch: logits ``[B, K]`` and targets to a scalar.

    Mixed images come with soft targets ``[B, K]`` that hold the label smoothing already; others with class
    numbers ``[B]``, which are smoothed here.
    """
    if data.mixes:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=data.label_smoothing)


def macs_loss(
    selection: Selection,
    model: nn.Module,
    target: float,
    dense_macs: float,
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``|mean MACs of the batch - target * dense MACs|`` in GMACs, a scalar (AS-ViT, arXiv 2209.13802).

    The batch is that of all processes; batches that are accumulated to one step have a distance each.

    What counts is what is computed: live heads and neurons and kept tokens. Zeros among the weights save nothing
    here, as they save no time.

    Args:
        selection: of a training forward; its masks carry the gradient to the thresholds.
        model: as it is, dense or compact.
        target: share of ``dense_macs``.
        dense_macs: MACs of one image in the dense network: all heads and neurons, all tokens, no selector. So a
            target means the same whatever else is made smaller.
        over_processes: turns this process's mean into that of all
            (:meth:`experiments.processes.processes.Processes.mean`).
    """
    tokens = tokens_per_block(selection, len(find_blocks(model)))
    # In GMACs from the start: 1e9 and its square would leave float32 few digits.
    mean = (model_macs(model, tokens) / 1e9).mean()
    if over_processes is not None:
        mean = over_processes(mean)
    return (mean - target * dense_macs / 1e9).abs()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(student || teacher)``, mean over the batch, in at least float32: a scalar.

    ``T^2 * sum_k p_k (log p_k - log q_k)`` with ``p = softmax(student / T)`` and ``q = softmax(teacher / T)``. It is
    the student's own distribution that weighs the classes. ``T^2`` keeps the gradient's size where T is not 1.

    Args:
        student: logits ``[B, K]``.
        teacher: logits ``[B, K]``, without gradient.
        temperature: T.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    own, other = (functional.log_softmax(logits.to(dtype) / temperature, dim=-1) for logits in (student, teacher))
    return (own.exp() * (own - other)).sum(dim=-1).mean() * temperature**2
