"""The tokens of many images as one sheet ``[S, C]``, every image with its own number of tokens.

Layers that treat each token alone (Linear, LayerNorm, MLP) run on the sheet as it is. Attention needs to know
where an image begins and ends: that is the :class:`Layout`. Nothing is padded on the CPU, and on a GPU only
where it has no kernel for sequences of unequal length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

#: Attention by a kernel of the caller: query, key and value ``[S, H, dh]`` of one type, and the tokens of each image.
Kernel = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of B images lie in a sheet of S tokens.

    Images lie in ascending order of length, so that those of equal length are neighbours and share one call
    of attention without a copy.
    """

    lengths: tuple[int, ...]  #: tokens per image, in the order of the sheet, on the host
    order: Tensor  #: ``[B]``: number in the batch of each image of the sheet
    image: Tensor  #: ``[S]``: the token's image, as counted in the sheet
    position: Tensor  #: ``[S]``: the token's place within its image's tokens
    source: Tensor  #: ``[S]``: the token's place within the grid of its image
    starts: Tensor  #: ``[B + 1]``, int32: first token of each image, and S
    tokens: int  #: places in the grid of an image: for all its tokens, and for what may come in place of dropped ones

    @property
    def images(self) -> int:
        return len(self.lengths)

    @cached_property
    def image_in_batch(self) -> Tensor:
        """``[S]``: number in the batch of each token's image."""
        return self.order[self.image]

    @cached_property
    def grid(self) -> Tensor:
        """``[S]``: the token's place in ``[B, tokens]``, all tokens of the batch, flattened."""
        return self.image_in_batch * self.tokens + self.source

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Runs of images of equal length: (first token, images, tokens per image)."""
        runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        firsts = accumulate((length * images for length, images in runs), initial=0)
        return [(first, images, length) for first, (length, images) in zip(firsts, runs, strict=False)]


def uniform_layout(images: int, tokens: int, device: torch.device, places: int | None = None) -> Layout:
    """The layout of ``x.flatten(0, 1)`` for ``x`` of shape ``[images, tokens, C]``.

    Args:
        places: in the grid of an image, if more than its tokens.
    """
    every = torch.arange(images * tokens, device=device)
    return Layout(
        lengths=(tokens,) * images,
        order=torch.arange(images, device=device),
        image=every // tokens,
        position=every % tokens,
        source=every % tokens,
        starts=torch.arange(0, images * tokens + 1, tokens, device=device, dtype=torch.int32),
        tokens=tokens if places is None else places,
    )


def lay_out(*keeps: Tensor) -> list[Layout]:
    """A sheet for each choice of tokens, all with the images in one order: that of the first sheet's lengths.

    The lengths of all come to the host at once: the one synchronisation of a stage.

    Args:
        keeps: bool ``[B, tokens]``.
    """
    counts = torch.stack([keep.sum(dim=1) for keep in keeps])
    order = counts[0].argsort(stable=True)
    counts = counts[:, order]
    return [
        _lay_out(keep[order], order, count, tuple(lengths))
        for keep, count, lengths in zip(keeps, counts, counts.tolist(), strict=True)
    ]


def _lay_out(keep: Tensor, order: Tensor, counts: Tensor, lengths: tuple[int, ...]) -> Layout:
    """``keep`` and ``counts`` are in the order of the sheet already."""
    total, tokens = sum(lengths), keep.shape[1]
    starts = F.pad(counts.cumsum(0), (1, 0))
    # Dropped tokens all land on one more place behind the sheet, which is cut off.
    place = torch.where(keep, keep.cumsum(dim=1) - 1 + starts[:-1, None], total).flatten()
    every = torch.arange(place.shape[0], device=place.device)
    cell = every.new_empty(total + 1).scatter(0, place, every)[:total]
    image = cell // tokens
    return Layout(
        lengths=lengths,
        order=order,
        image=image,
        position=every[:total] - starts[image],
        source=cell % tokens,
        starts=starts.to(torch.int32),
        tokens=tokens,
    )


def rows_in(old: Layout, new: Layout, added: int | None = None) -> Tensor:
    """Numbers ``[S']`` of the tokens of the old sheet that are the new one.

    Args:
        added: place in the grid of one more token of each image; they are counted on behind the old sheet, in the order
            of the batch.
    """
    rows = old.grid.shape[0]
    every = torch.arange(rows + old.images, device=old.grid.device)
    table = every.new_zeros(old.images * old.tokens).scatter(0, old.grid, every[:rows])
    if added is not None:
        table.view(old.images, old.tokens)[:, added] = every[rows:]
    return table.index_select(0, new.grid)


def on_grid(values: Tensor, layout: Layout, fill: float) -> Tensor:
    """Values of the tokens ``[S]`` in the order of the batch, ``[B, tokens]``, those that are gone ``fill``."""
    grid = values.new_full((layout.images * layout.tokens,), fill)
    return grid.index_put((layout.grid,), values).view(layout.images, layout.tokens)


def from_grid(grid: Tensor, layout: Layout) -> Tensor:
    """Inverse of :func:`on_grid`: ``[B, tokens]`` to ``[S]``."""
    return grid.flatten().index_select(0, layout.grid)


def pad(values: Tensor, layout: Layout, fill: float) -> Tensor:
    """Values of the tokens ``[S, ...]`` as one row per image ``[B, longest, ...]``, the rest ``fill``."""
    shape = (layout.images, layout.longest, *values.shape[1:])
    return values.new_full(shape, fill).index_put((layout.image, layout.position), values)


def unpad(rows: Tensor, layout: Layout) -> Tensor:
    """Inverse of :func:`pad`: ``[B, longest, ...]`` to ``[S, ...]``."""
    # Rows by one number are copied as they are; an index of two is taken apart element by element.
    return rows.flatten(0, 1).index_select(0, layout.image * rows.shape[1] + layout.position)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, kernel: Kernel | None = None) -> Tensor:
    """Attention within each image of a sheet.

    Args:
        query, key, value: ``[S, H, dh]``.
        kernel: that computes it, in the place of those of torch.

    Returns:
        ``[S, H, dh]``.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # a norm of q and k under autocast gives float32
    if kernel is not None:
        return kernel(query, key, value, layout.lengths)
    if not value.is_cuda or len(set(layout.lengths)) == 1:
        return attend_by_length(query, key, value, layout)
    if has_varlen_kernel(value):
        return attend_varlen(query, key, value, layout)
    return attend_padded(query, key, value, layout)


def attend_by_length(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """One call for each length that occurs; no padding and no copy of the inputs."""
    heads, width = value.shape[1:]
    outputs = []
    for first, images, length in layout.groups:
        q, k, v = (
            x[first : first + images * length].view(images, length, heads, width).transpose(1, 2)
            for x in (query, key, value)
        )
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, heads, width))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def has_varlen_kernel(value: Tensor) -> bool:
    """Whether attention over sequences of unequal length runs in one kernel for this ``[S, H, dh]``."""
    return (
        varlen_attn is not None
        and value.is_cuda
        and value.dtype in (torch.float16, torch.bfloat16)
        and value.shape[-1] % 8 == 0
        and value.shape[-1] <= 256
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
    )


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """One kernel over all images (FlashAttention's interface for unequal lengths)."""
    output = varlen_attn(query, key, value, layout.starts, layout.starts, layout.longest, layout.longest)
    assert isinstance(output, Tensor)
    return output


def attend_padded(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """All images padded to the longest, the padding masked as keys."""
    q, k, v = (pad(x, layout, 0.0).transpose(1, 2) for x in (query, key, value))
    lengths = layout.starts.diff()
    real = torch.arange(layout.longest, device=value.device) < lengths[:, None]
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    return unpad(output.transpose(1, 2), layout)


def class_attention_packed(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """What the first token of each image, the class token, pays to each token of its image.

    Args:
        query, key: ``[S, H, dh]``.

    Returns:
        attention after softmax ``[S, H]``, in at least float32.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    classes = query[layout.starts[:-1].long()].to(dtype) * query.shape[-1] ** -0.5
    logits = (key.to(dtype) * classes.index_select(0, layout.image)).sum(dim=-1)
    return unpad(pad(logits, layout, -torch.inf).softmax(dim=1), layout)
