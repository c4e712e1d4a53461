"""How much the class token looks at each patch (AS-ViT, arXiv 2209.13802)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Scores of the threshold selector are expressed for this many tokens (DeiT at 224 pixels, patch 16), the
#: size for which the thresholds were published; see :func:`head_weighted_scores`.
REFERENCE_TOKENS = 197


def at_least_float32(x: Tensor) -> Tensor:
    """At least float32: scores near a threshold must not depend on the precision of autocast."""
    return x if x.dtype == torch.float64 else x.float()


def class_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """One row of the attention after softmax, in time and memory proportional to the tokens.

    Args:
        query: ``[B, H, dh]`` of the class token.
        keys: ``[B, H, N, dh]``.
        scale: of the scores, ``dh ** -0.5``.

    Returns:
        ``[B, H, N]``, in at least float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = (at_least_float32(keys) @ (at_least_float32(query) * scale).unsqueeze(-1)).squeeze(-1)
        return logits.softmax(dim=-1)


def head_weighted_scores(class_row: Tensor, context: Tensor, tokens: int) -> Tensor:
    """How much the class token looks at each patch, a head counting by its part in what the patch became.

    ``S_i = sum_h R_hi A_h(class, i)`` with ``R_hi = |C_hi| / (sum_h |C_hi| + 1e-8)`` (AS-ViT). A row of
    attention sums to 1, so scores shrink as the tokens grow in number. They are returned in units of 197
    tokens, ``S_i * tokens / 197``: one threshold (and one temperature) then fits every image and patch size,
    and to compare with ``theta`` is to compare ``S_i`` with ``theta * 197 / tokens``.

    Args:
        class_row: attention of the class token to the patches, ``[..., H]`` (heads last).
        context: attention output of the patches before the projection, ``[..., H, dh]``.
        tokens: tokens of an image before any were dropped, prefix tokens included.

    Returns:
        ``[...]``, in at least float32.
    """
    norms = torch.linalg.vector_norm(at_least_float32(context), dim=-1)
    share = norms / (norms.sum(dim=-1, keepdim=True) + 1e-8)
    return (share * at_least_float32(class_row)).sum(dim=-1) * (tokens / REFERENCE_TOKENS)
