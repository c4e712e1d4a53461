"""From scores to the patches that stay: pure functions over tensors ``[B, N]``.

Every image keeps at least one patch. Prefix tokens (class, distillation, registers) have no score and always stay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def top_k_indices(scores: Tensor, count: int) -> Tensor:
    """Positions ``[B, count]``, ascending, of the ``count`` greatest of ``scores`` ``[B, N]``.

    Of equal scores the first positions win: a choice that an image's neighbours in the batch cannot change.
    (A stable sort would say so in one line, but cannot be exported to ONNX.)
    """
    # After a step that diverged the loss should be nan, not this an index error.
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    least = scores.topk(count, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    missing = count - above.sum(dim=1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=1) <= missing))
    patches = scores.shape[1]
    places = torch.arange(patches, device=scores.device)
    return torch.where(keep, places, patches).sort(dim=1).values[:, :count]


def kept_count(keep_ratio: float, patches: int) -> int:
    """``round(keep_ratio * patches)``, at least 1."""
    return max(1, round(keep_ratio * patches))


def as_many_at_random(keep: Tensor, live: Tensor, generator: torch.Generator) -> Tensor:
    """For every image as many of its live patches as ``keep`` has, drawn at random.

    Args:
        keep: bool ``[B, N]``, within ``live``.
        live: bool ``[B, N]``.
        generator: on the CPU, so that a seed draws the same everywhere.

    Returns:
        bool ``[B, N]``.
    """
    noise = torch.rand(keep.shape, generator=generator).to(keep.device).masked_fill(~live, 2.0)
    return noise.argsort(dim=1).argsort(dim=1) < keep.sum(dim=1, keepdim=True)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """``tokens`` ``[B, N, C]`` at ``indices`` ``[B, K]``: ``[B, K, C]``."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def above_threshold(scores: Tensor, threshold: Tensor, live: Tensor) -> Tensor:
    """Live patches whose score exceeds the threshold; the best live patch where none does.

    Args:
        scores: ``[B, N]``.
        threshold: scalar.
        live: ``[B, N]`` bool, at least one per image.

    Returns:
        ``[B, N]`` bool.
    """
    keep = live & (scores > threshold)
    best = scores.masked_fill(~live, -torch.inf).argmax(dim=1, keepdim=True)
    guard = torch.zeros_like(keep).scatter(1, best, ~keep.any(dim=1, keepdim=True))
    return keep | guard


def on_ramp(end: float, ramp: float, progress: float, start: float = 1.0) -> float:
    """A value that falls evenly from ``start`` to ``end`` over the share ``ramp`` of a run, and stays there.

    Args:
        progress: share of the run that is done.
    """
    return end if progress >= ramp else start + (end - start) * progress / ramp
