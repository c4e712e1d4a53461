"""What a model achieves on images it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from experiments.data_batches import EvalBatches

Autocast = Callable[[], AbstractContextManager[object]]


def precision_context(device: torch.device, amp: str) -> Autocast:
    """Makes the context in which a model runs: autocast to ``amp``, or nothing for float32."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Images, summed loss, right at the first guess, right within five: float64 ``[4]`` on the logits' device.

    Args:
        logits: ``[B, K]``; with fewer than five classes all of them are guesses.
        targets: class numbers ``[B]``.
    """
    logits = logits.float()
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    guesses = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
    counts = (torch.full_like(loss, len(targets)), loss, guesses[:, 0].sum(), guesses.sum())
    return torch.stack([count.double() for count in counts])


@torch.inference_mode()
def measure(model: nn.Module, batches: EvalBatches, autocast: Autocast) -> dict[str, float]:
    """Accuracy in percent and mean loss over all images, each counted once over all processes.

    Returns:
        ``top1``, ``top5``, ``loss`` and ``images``.

    Raises:
        ValueError: there was no image.
    """
    was_training = model.training
    model.eval()
    total: Tensor | None = None
    for images, targets in batches.batches():
        with autocast():
            logits = model(images)
        counts = count_correct(logits, targets)
        total = counts if total is None else total + counts
    model.train(was_training)
    if total is None:
        total = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    images_seen, loss, top1, top5 = total.tolist()
    if images_seen == 0:
        raise ValueError("data.eval_split: there is no image to evaluate on")
    return {
        "top1": 100 * top1 / images_seen,
        "top5": 100 * top5 / images_seen,
        "loss": loss / images_seen,
        "images": int(images_seen),
    }
