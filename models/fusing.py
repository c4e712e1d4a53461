"""What is dropped need not be lost: the patches that a stage drops become one token (EViT, Liang et al. 2022).

The token is their mean, weighted by their scores. It stands behind the patches, has no score, and stays from then on:
every stage that drops a patch of an image adds one. EViT adds the weighted sum; a mean has the size of a token whatever
the number of patches and the scale of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-8  # added to each score, for patches that all score 0


def fuse(tokens: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """The dropped ones of the patches ``[B, N, C]`` as one token ``[B, 1, C]``; for an image without any, zeros.

    The mask's gradient is the change that a patch would make if it alone changed sides. The slope at the mask would be
    that change times the sum of all scores over that of the dropped, which are the small ones: it could be thousands.

    Args:
        scores: ``[B, N]``, 0 or greater.
        mask: ``[B, N]``, 1 kept and 0 dropped; gets a gradient.
    """
    scores = scores + _TINY
    weights = scores * (mask <= 0.5)
    total = weights.sum(dim=1, keepdim=True)
    values = tokens.to(weights.dtype)
    fused = (weights / _nonzero(total)).unsqueeze(1) @ values
    if mask.requires_grad:
        fused = fused + _changing_sides(scores, mask, total).unsqueeze(1) @ (values - fused).detach()
    return fused.to(tokens.dtype)


def fuse_on_sheet(tokens: Tensor, scores: Tensor, mask: Tensor, image: Tensor, images: int) -> Tensor:
    """The same on a sheet: tokens ``[S, C]`` of ``images`` images to ``[B, C]``.

    Args:
        scores, mask: ``[S]``; the mask of what is no patch is 1.
        image: ``[S]``, each token's image.
    """
    scores = scores + _TINY
    weights = scores * (mask <= 0.5)
    total = weights.new_zeros(images).index_add(0, image, weights).index_select(0, image)
    shares, values = weights / _nonzero(total), tokens.to(weights.dtype)
    fused = shares.new_zeros(images, tokens.shape[1]).index_add(0, image, shares[:, None] * values)
    if mask.requires_grad:
        apart = (values - fused.index_select(0, image)).detach()
        fused = fused.index_add(0, image, _changing_sides(scores, mask, total)[:, None] * apart)
    return fused.to(tokens.dtype)


def _changing_sides(scores: Tensor, mask: Tensor, total: Tensor) -> Tensor:
    """0 for each patch, with the mask's gradient: the share of the fused token that a kept patch would become, or a
    dropped one is.

    Args:
        total: sum of the scores of the dropped.
    """
    kept = (mask > 0.5).to(scores.dtype)
    share = scores.detach() / (total.detach() + scores.detach() * kept)
    return (kept - mask.to(scores.dtype)) * share


def _nonzero(total: Tensor) -> Tensor:
    """1 in place of 0: nothing is divided by it but zeros."""
    return torch.where(total == 0, 1.0, total)
