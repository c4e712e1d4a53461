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

    Args:
        scores: ``[B, N]``, 0 or greater.
        mask: ``[B, N]``, 1 kept and 0 dropped; gets a gradient.
    """
    weights = _weights(scores, mask)
    total = weights.sum(dim=1, keepdim=True)
    return ((weights / _nonzero(total)).unsqueeze(1) @ tokens.to(weights.dtype)).to(tokens.dtype)


def fuse_on_sheet(tokens: Tensor, scores: Tensor, mask: Tensor, image: Tensor, images: int) -> Tensor:
    """The same on a sheet: tokens ``[S, C]`` of ``images`` images to ``[B, C]``.

    Args:
        scores, mask: ``[S]``; the mask of what is no patch is 1.
        image: ``[S]``, each token's image.
    """
    weights = _weights(scores, mask)
    total = weights.new_zeros(images).index_add(0, image, weights)
    shares = weights / _nonzero(total).index_select(0, image)
    fused = shares.new_zeros(images, tokens.shape[1])
    return fused.index_add(0, image, shares[:, None] * tokens.to(shares.dtype)).to(tokens.dtype)


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores + _TINY) * (1 - mask.to(scores.dtype))


def _nonzero(total: Tensor) -> Tensor:
    """1 in place of 0: nothing is divided by it but zeros."""
    return torch.where(total == 0, 1.0, total)
