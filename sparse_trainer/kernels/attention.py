"""Attention over a sheet of tokens for inference on a CPU: images of unequal lengths in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn

from sparse_trainer.kernels.layers import InferenceOnly, is_just, is_looked_at
from sparse_trainer.kernels.library import Library
from sparse_trainer.kernels.packed import DTYPES, check_on_cpu


@torch.compiler.disable
def attention(library: Library, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention within each image, ``softmax(q k^T / sqrt(dh)) v``; sums are in float32.

    Args:
        query, key, value: ``[S, H, dh]`` on the CPU, of one type; others than float32 and bfloat16 are computed in
            float32.
        lengths: tokens of each image, in the order of the sheet; together ``S``.

    Returns:
        ``[S, H, dh]``. That of an image does not depend on the others.

    Raises:
        RuntimeError: they are on another device, or somebody would wait for a gradient.
    """
    for x in (query, key, value):
        InferenceOnly.check_no_gradient(x)
        check_on_cpu(x)
    assert query.shape == key.shape == value.shape
    assert query.dtype == key.dtype == value.dtype
    assert sum(lengths) == len(value)
    if value.dtype not in DTYPES:
        return attention(library, query.float(), key.float(), value.float(), lengths).to(value.dtype)
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    tokens, heads, width = value.shape
    output = torch.empty(tokens, heads, width, dtype=value.dtype, device=value.device)
    if output.numel() == 0:
        return output
    starts = torch.tensor([0, *lengths], device=value.device).cumsum(0)
    strides = torch.tensor([x.stride(dim) for x in (query, key, value) for dim in (0, 1)], device=value.device)
    library.functions.sparse_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        strides.data_ptr(),
        output.data_ptr(),
        starts.data_ptr(),
        len(lengths),
        heads,
        width,
        max(lengths),
        width**-0.5,
        int(value.dtype == torch.bfloat16),
        library.parallel,
        torch.get_num_threads(),
    )
    return output


def with_kernel(attn: Attention, library: Library) -> None:
    """Let a block's attention, timm's own class, be computed by our kernel from now on.

    ``attn.kernel`` is there for models that mix the tokens of a sheet themselves.
    """
    module: Any = attn
    module.kernel = partial(attention, library)
    module.forward = MethodType(_forward, attn)


def _forward(attn: Any, x: Tensor, *masks: Any, **named: Any) -> Tensor:
    """timm's ``Attention.forward`` for ``[B, N, C]`` by the kernel; with a mask, as timm does it."""
    if any(value is not None and value is not False for value in (*masks, *named.values())):
        return cast(Tensor, type(attn).forward(attn, x, *masks, **named))
    images, tokens = x.shape[:2]
    sheets = attn.qkv(x).flatten(0, 1).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    query, key, value = sheets.unbind(1)
    query, key = attn.q_norm(query).to(value.dtype), attn.k_norm(key).to(value.dtype)
    mixed = attn.norm(attn.kernel(query, key, value, (tokens,) * images).flatten(1)).unflatten(0, (images, tokens))
    gate = getattr(attn, "gate", None)  # of later timm releases
    if gate is not None:
        mixed = mixed * gate(x).sigmoid()
    return cast(Tensor, attn.proj_drop(attn.proj(mixed)))


def without_kernel(model: nn.Module) -> None:
    """Undo :func:`with_kernel`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _forward:
            del module.kernel, module.forward


def find_attention(model: nn.Module) -> dict[str, Attention]:
    """By name, the attentions of a model that :func:`with_kernel` may change: those that compute as timm's class does,
    with nobody who looks at what lies within."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is Attention and "forward" not in vars(module) and _is_as_known(module)
    }


def _is_as_known(attn: Attention) -> bool:
    """Whether nothing within differs from what the kernel computes, or would see other shapes than timm gives it."""
    scaled = attn.fused_attn or attn.scale == attn.head_dim**-0.5  # the fused product knows no other scale
    within = attn.q_norm, attn.k_norm, attn.norm
    return scaled and is_just(attn.attn_drop, nn.Dropout, nn.Identity) and not any(map(is_looked_at, within))
