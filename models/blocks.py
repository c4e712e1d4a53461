"""timm's transformer block in two halves, so that what lies between them, attention, can be another.

Both halves treat each token alone: they take tokens ``[B, N, C]`` as well as a sheet ``[S, C]``. The number of heads is
read from the block whenever it runs, so blocks may be compact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from models.packing import Kernel, Layout
from models.scores import class_attention, head_weighted_scores

#: Query, key and value ``[..., H, dh]`` to the mixed values ``[..., H, dh]`` and scores (None: not asked).
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
#: What stochastic depth multiplies attention and MLP of each token with ``[S, 1]``; None: nothing.
Depth = tuple[Tensor | None, Tensor | None]


def project(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first half: normalised tokens ``[..., C]``; query, key and value ``[..., H, dh]``."""
    attn = cast(Attention, block.attn)
    normed = block.norm1(x)
    query, key, value = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return normed, attn.q_norm(query), attn.k_norm(key), value


def finish(block: Block, x: Tensor, normed: Tensor, context: Tensor, depth: Depth | None = None) -> Tensor:
    """The second half.

    Args:
        x, normed: tokens as the block got them, and as :func:`project` normalised them, ``[..., C]``.
        context: mixed values ``[..., H, dh]``.
        depth: stochastic depth as drawn before; by default timm's layers draw it, for ``[B, N, C]``.
    """
    attn = cast(Attention, block.attn)
    context = attn.norm(context.flatten(-2))
    gate = getattr(attn, "gate", None)  # of later timm releases
    if gate is not None:
        context = context * gate(normed).sigmoid()
    mixed = block.ls1(attn.proj_drop(attn.proj(context)))
    x = x + (block.drop_path1(mixed) if depth is None else _times(mixed, depth[0]))
    mixed = block.ls2(block.mlp(block.norm2(x)))
    return x + (block.drop_path2(mixed) if depth is None else _times(mixed, depth[1]))


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor.to(x.dtype)


def draw_depth(block: Block, images: int, like: Tensor) -> Depth:
    """What stochastic depth multiplies each image with in attention and MLP, ``[B]``: drawn as timm draws it."""

    def draw(layer: nn.Module) -> Tensor | None:
        if not layer.training or not getattr(layer, "drop_prob", None):
            return None
        factor: Tensor = layer(like.new_ones(images, 1, 1))
        return factor.flatten()

    return draw(block.drop_path1), draw(block.drop_path2)


def of_tokens(depth: Depth, layout: Layout) -> Depth:
    """The same for each token of a sheet, ``[S, 1]``."""
    attention, mlp = (None if x is None else x.index_select(0, layout.image_in_batch)[:, None] for x in depth)
    return attention, mlp


def run_block(block: Block, x: Tensor, attend_to: Attend) -> tuple[Tensor, Tensor | None]:
    """timm's ``Block.forward`` with another attention."""
    normed, query, key, value = project(block, x)
    context, scores = attend_to(query, key, value)
    return finish(block, x, normed, context), scores


def kernel_of(attn: Attention) -> Kernel | None:
    """The kernel that computes a block's attention for inference, where somebody gave it one (``attn.kernel``)."""
    return getattr(attn, "kernel", None)


def attend_fused(attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """timm's attention over ``[B, N, H, dh]``, with a bias on the scores if given."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # a norm of q and k under autocast gives float32
    kernel = kernel_of(attn)
    if kernel is not None and bias is None:
        images, tokens = value.shape[:2]
        sheets = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        return kernel(*sheets, (tokens,) * images).unflatten(0, (images, tokens))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    dropout = attn.attn_drop.p if attn.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).transpose(1, 2)


def attend_scored(attn: Attention, query: Tensor, key: Tensor, value: Tensor, *, prefix: int) -> tuple[Tensor, Tensor]:
    """Fused attention over ``[B, N, H, dh]``, and the scores ``[B, N - prefix]`` of the patches beside it."""
    context = attend_fused(attn, query, key, value)
    class_row = class_attention(query[:, 0], key.transpose(1, 2), query.shape[-1] ** -0.5).transpose(1, 2)
    return context, head_weighted_scores(class_row[:, prefix:], context[:, prefix:], query.shape[1])


def attend_gated(attn: Attention, query: Tensor, key: Tensor, value: Tensor, *, factor: Tensor) -> Tensor:
    """Fused attention over ``[B, N, H, dh]``, where looking at a token counts ``factor`` ``[B, N]`` times.

    For a factor of 1 it is plain attention, and the factor's gradient says what the loss would gain if the others
    looked at the token more.
    """
    return attend_fused(attn, query, key, value, factor.log()[:, None, None, :])
