"""Attention in training over tokens of three kinds, with a gradient for the mask that told them apart.

A *kept* token looks at the kept ones of its image. A *borderline* token, dropped but close to the threshold, looks at
the kept ones and at itself, and nobody looks at it: nothing depends on its value, so nothing flows back into it. It is
there for the gradient of the mask alone, which asks what the loss would gain if the others looked at it. All other
tokens are gone.

With ``G_j`` the mask of token ``j``, 1 kept and 0 dropped, row ``i`` of the attention is (AS-ViT, arXiv 2209.13802)

    P_ij = exp(a_ij) G_ij / sum_k exp(a_ik) G_ik,    G_ij = G_j for i != j, and G_ii = 1,

and ``dL/dG_j = sum over i != j and heads of exp(a_ij) / Z_i * (dO_i . (v_j - o_i))``, with ``Z_i`` over the kept ones:
for a kept token the sum over a column of the gradient of ``a``, which the backward pass has in its hands anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.packing import Layout, attend, pad, unpad
from models.scores import at_least_float32

#: What a dropped token would weigh is bounded by ``1 / EPSILON``, and with it the gradient that its mask receives.
EPSILON = 1e-6
_HIGHEST = -math.log(EPSILON)


class Limits(NamedTuple):
    """Scores of attention, over images and heads, in a piece that is computed at a time."""

    most: int
    padding: int  #: for fewer a piece takes one more image: to start its kernels takes as long as these scores


#: A few images, whose scores stay in the cache.
ON_A_CPU = Limits(2**18, 2**14)
#: Enough to keep an accelerator busy, in 64 MiB of float32. With the padding of a CPU training took two to three times
#: as long on an H200.
ELSEWHERE = Limits(2**24, 2**22)


class _Part:
    """The tokens of some neighbouring images of a sheet, as one row per image padded to the longest."""

    def __init__(self, layout: Layout, firsts: Sequence[int], images: slice) -> None:
        lengths = layout.lengths[images]
        self.images, self.longest = len(lengths), max(lengths)
        self.rows = slice(firsts[images.start], firsts[images.stop])
        #: bool ``[images, longest]``; None: all have the same length, so nothing is copied
        self.real: Tensor | None = None
        if min(lengths) < self.longest:
            starts = layout.starts[images.start : images.stop + 1].long()
            places = torch.arange(self.longest, device=starts.device)
            self.real = places < starts.diff()[:, None]
            self._take = (starts[:-1, None] + places).clamp(max=self.rows.stop - 1).flatten()
            position, image = layout.position[self.rows], layout.image[self.rows] - images.start
            self._put = image * self.longest + position

    def take(self, values: Tensor) -> Tensor:
        """``[S, ...]`` to ``[images, longest, ...]``; beyond an image's end stands what belongs to others."""
        values = values[self.rows] if self.real is None else values.index_select(0, self._take)
        return values.unflatten(0, (self.images, self.longest))

    def heads(self, values: Tensor) -> Tensor:
        """``[S, H, dh]`` to ``[images, H, longest, dh]``, in at least float32."""
        return at_least_float32(self.take(values)).transpose(1, 2)

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Inverse of :meth:`take`, into this part's tokens of ``[S, ...]``."""
        rows = rows.flatten(0, 1)
        into[self.rows] = rows if self.real is None else rows.index_select(0, self._put)


@dataclass(frozen=True)
class Sheets:
    """Where the kept and the borderline tokens lie: two sheets with the images in the same order."""

    kept: Layout
    borderline: Layout
    pieces: tuple[tuple[_Part, _Part | None], ...]  #: kept, and borderline if these images have any

    @property
    def any_borderline(self) -> bool:
        return bool(self.borderline.lengths) and max(self.borderline.lengths) > 0


def cut(kept: Layout, borderline: Layout, heads: int, limits: Limits | None = None) -> Sheets:
    """Cut two sheets into pieces that attention takes one at a time.

    Args:
        limits: of a piece; None for those of the device.
    """
    if limits is None:
        limits = ON_A_CPU if kept.order.device.type == "cpu" else ELSEWHERE
    most = limits.most // heads
    pieces: list[slice] = []
    rows, columns = 0, 0  # of the scores of one image, as padded in the piece that is being filled
    for image, (length, others) in enumerate(zip(kept.lengths, borderline.lengths, strict=True)):
        first = pieces[-1].start if pieces else image
        own = length * (length + others)
        grown = max(rows, length), max(columns, length + others)
        area, images = grown[0] * grown[1], image - first
        padding = images * (area - rows * columns) + area - own
        if images and ((images + 1) * area <= most and heads * padding <= limits.padding):
            pieces[-1] = slice(first, image + 1)
            rows, columns = grown
        else:
            pieces.append(slice(image, image + 1))
            rows, columns = length, length + others
    firsts = [list(accumulate(sheet.lengths, initial=0)) for sheet in (kept, borderline)]
    parts = [
        (
            _Part(kept, firsts[0], images),
            _Part(borderline, firsts[1], images) if any(borderline.lengths[images]) else None,
        )
        for images in pieces
    ]
    return Sheets(kept, borderline, tuple(parts))


class MaskedAttention(torch.autograd.Function):
    """Attention among the kept tokens, fused; and the gradient of the mask of kept and of borderline tokens.

    No matrix is kept for the backward pass, which computes the scores again, a few images at a time.

    Args:
        query, key, value: of the kept tokens ``[S, H, dh]``.
        mask: of the kept tokens ``[S]``, all 1; asked for its gradient.
        other_key, other_value: of the borderline tokens ``[R, H, dh]``, or None without any; get no gradient.
        other_mask: of the borderline tokens ``[R]``, all 0; asked for its gradient.
        sheets: where they lie.

    Returns:
        ``[S, H, dh]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        other_key: Tensor | None,
        other_value: Tensor | None,
        other_mask: Tensor | None,
        sheets: Sheets,
    ) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            output = attend(query, key, value, sheets.kept)
        ctx.save_for_backward(query, key, value, output, other_key, other_value)
        ctx.sheets, ctx.mask_dtype = sheets, mask.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, other_key, other_value = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        # Laid out as autograd wants them where the three come from one tensor.
        gradients = query.new_empty(query.shape[0], 3, *query.shape[1:]).unbind(1)
        of_mask = torch.zeros(query.shape[0], dtype=ctx.mask_dtype, device=query.device)
        of_other = None if other_key is None else of_mask.new_zeros(other_key.shape[0])
        asks = ctx.needs_input_grad[3] or ctx.needs_input_grad[6]
        with torch.autocast(query.device.type, enabled=False):
            for kept, other in ctx.sheets.pieces:
                q, k, v, o, d = (kept.heads(x) for x in (query, key, value, output, gradient))
                if kept.real is not None:
                    d = d * kept.real[:, None, :, None]
                q = q * scale
                weights, greatest, total = _softmax(q @ k.transpose(-2, -1), kept.real)
                delta = (d * o).sum(dim=-1, keepdim=True)
                of_value = weights.transpose(-2, -1) @ d
                of_scores = (d @ v.transpose(-2, -1)).sub_(delta).mul_(weights)
                of_query, of_key = of_scores @ k * scale, of_scores.transpose(-2, -1) @ q
                for one, into in zip((of_query, of_key, of_value), gradients, strict=True):
                    kept.put(one.transpose(1, 2), into)
                if not asks:
                    continue
                column = of_scores.sum(dim=-2) - of_scores.diagonal(dim1=-2, dim2=-1)
                kept.put(column.sum(dim=1), of_mask)
                if other is not None:
                    assert of_other is not None
                    ok, ov = other.heads(other_key), other.heads(other_value)
                    would = (q @ ok.transpose(-2, -1)).sub_(greatest).clamp_(max=_HIGHEST).exp_().div_(total)
                    would = would.transpose(-2, -1)
                    gain = ((would @ d) * ov).sum(dim=-1) - (would @ delta).squeeze(-1)
                    other.put(gain.sum(dim=1), of_other)
        return *gradients, of_mask, None, None, of_other, None


def _softmax(scores: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax in place over the keys that are ``real``; with the greatest score of a row, and the sum it divided by."""
    if real is not None:
        scores.masked_fill_(~real[:, None, None, :], -torch.inf)
    greatest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(greatest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total), greatest, total


@torch.no_grad()
def attend_from_borderline(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, sheets: Sheets
) -> Tensor:
    """Attention of the borderline tokens to the kept ones of their image and to themselves, without gradients.

    Args:
        query, own_key, own_value: of the borderline tokens ``[R, H, dh]``.
        key, value: of the kept tokens ``[S, H, dh]``.

    Returns:
        ``[R, H, dh]``.
    """
    output = torch.empty_like(own_value)
    with torch.autocast(query.device.type, enabled=False):
        for kept, other in sheets.pieces:
            if other is None:
                continue
            q, own_k, own_v = (other.heads(x) for x in (query, own_key, own_value))
            k, v = kept.heads(key), kept.heads(value)
            q = q * query.shape[-1] ** -0.5
            scores = q @ k.transpose(-2, -1)
            if kept.real is not None:
                scores.masked_fill_(~kept.real[:, None, None, :], -torch.inf)
            own = (q * own_k).sum(dim=-1, keepdim=True)
            greatest = torch.maximum(scores.amax(dim=-1, keepdim=True), own)
            weights, own = scores.sub_(greatest).exp_(), (own - greatest).exp()
            mixed = (weights @ v + own * own_v) / (weights.sum(dim=-1, keepdim=True) + own)
            other.put(mixed.transpose(1, 2).to(output.dtype), output)
    return output


def class_attention_masked(
    query: Tensor, key: Tensor, mask: Tensor, other_key: Tensor | None, other_mask: Tensor | None, sheets: Sheets
) -> Tensor:
    """What the class token of each image pays to its kept tokens, differentiable in the mask of all.

    Args:
        query, key, mask: of the kept tokens ``[S, H, dh]`` and ``[S]``, as :class:`MaskedAttention` takes them.
        other_key, other_mask: of the borderline tokens.

    Returns:
        ``[S, H]``, in at least float32.
    """
    layout = sheets.kept
    with torch.autocast(key.device.type, enabled=False):
        classes = at_least_float32(query[layout.starts[:-1].long()]) * query.shape[-1] ** -0.5
        logits = (at_least_float32(key) * classes.index_select(0, layout.image)).sum(dim=-1)
        rows = pad(logits + mask.log()[:, None].to(logits.dtype), layout, -torch.inf)
        weights = unpad(rows.softmax(dim=1), layout)
        if other_key is None or other_mask is None:
            return weights
        # A token that nobody looks at adds G_j exp(a_j) to the sum: the value of 1 / (1 + G_j p_j) and its gradient
        # are those of 1 - G_j p_j.
        image = sheets.borderline.image
        greatest = rows.detach().amax(dim=1)
        total = (rows.detach() - greatest[:, None]).exp().sum(dim=1)
        others = (at_least_float32(other_key) * classes.detach().index_select(0, image)).sum(dim=-1)
        would = (others - greatest[image]).clamp(max=_HIGHEST).exp() / total[image]
        lost = torch.zeros_like(total).index_add(0, image, would * other_mask[:, None].to(would.dtype))
        return weights * (1 - lost).index_select(0, layout.image)
