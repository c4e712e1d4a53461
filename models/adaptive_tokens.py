"""The forward pass with a threshold selector: at each stage, image by image, dropped patches leave the computation.

Up to the first stage all images have all their tokens. From there on those of all images lie on one sheet ``[S, C]``
that shrinks from stage to stage, and there is one synchronisation with the host at each of them. Evaluation computes
the kept tokens; training in addition the *borderline* ones (see :mod:`models.masked_attention`) from the stage that
drops them to the next one, where what they could still tell the mask is multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import attend_scored, draw_depth, finish, kernel_of, of_tokens, project, run_block
from models.fusing import fuse_on_sheet
from models.masked_attention import (
    MaskedAttention,
    Sheets,
    attend_from_borderline,
    class_attention_masked,
    cut,
)
from models.packing import Layout, attend, class_attention_packed, from_grid, lay_out, on_grid, rows_in, uniform_layout
from models.scores import head_weighted_scores
from models.selection import Selection
from models.threshold_selector import ThresholdSelector

#: Calls a function, or, where activations are computed again in the backward pass, sees to that.
Call = Callable[..., Any]


class Model(Protocol):
    """What is asked of the network here."""

    blocks: nn.Sequential
    num_prefix_tokens: int
    sheet_rows: tuple[Tensor, int] | None


ONE_NUMBER_FOR_ALL = (
    "thresholds keep another number of patches of each image, so torch.export cannot trace the model; sparse-trainer "
    "export --format onnx --tokens 140,98,70 fixes the numbers"
)


@dataclass(frozen=True)
class Tokens:
    """What goes from block to block."""

    sheet: Tensor  #: the kept tokens ``[S, C]``
    layout: Layout
    mask: Tensor | None = None  #: ``[S]``, all 1, where its gradient is asked for
    borderline: Tensor | None = None  #: ``[R, C]``, in training, where there are any
    borderline_mask: Tensor | None = None  #: ``[R]``, all 0
    sheets: Sheets | None = None  #: where both lie, in training


def run_with_thresholds(model: Model, selector: ThresholdSelector, x: Tensor, call: Call) -> tuple[Tensor, Selection]:
    """Run the blocks.

    Args:
        x: embedded tokens ``[B, P + N, C]``.
        call: runs a block.

    Returns:
        the prefix tokens ``[B, P, C]``, and what was kept.
    """
    if not len(x):  # a sheet holds at least one image
        masks = tuple(x.new_zeros(0, x.shape[1] - model.num_prefix_tokens) for _ in selector.stages)
        for block in model.blocks:
            x = call(block, x)
        return x[:, : model.num_prefix_tokens], Selection(selector.stages, masks, model.num_prefix_tokens)
    x, scores = _run_to_first_stage(model, selector, x, call)
    if torch.compiler.is_exporting():
        raise ValueError(ONE_NUMBER_FOR_ALL)
    return _run_on_sheets(model, selector, x, scores, call)


def _run_to_first_stage(model: Model, selector: ThresholdSelector, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """All blocks before the first stage: tokens ``[B, P + N, C]`` and the scores ``[B, N]`` of the last block."""
    first = selector.stages[0]
    for block in model.blocks[: first - 1]:
        x = call(block, x)
    x, scores = call(_run_scored, model.blocks[first - 1], x, model.num_prefix_tokens)
    return x, scores


def _run_scored(block: Block, x: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
    attn = cast(Attention, block.attn)
    return run_block(block, x, lambda q, k, v: attend_scored(attn, q, k, v, prefix=prefix))


# The lengths of a sheet are other ones at every step, and compiled code would be compiled for each.
@torch.compiler.disable(reason="thresholds keep another number of patches of each image; compile without fullgraph")
def _run_on_sheets(
    model: Model, selector: ThresholdSelector, x: Tensor, scores: Tensor, call: Call
) -> tuple[Tensor, Selection]:
    """From the first stage on."""
    prefix, (images, everything, _) = model.num_prefix_tokens, x.shape
    fuses = selector.config.dropped == "fused"
    places = everything + len(selector.stages) if fuses else everything
    tokens = Tokens(x.flatten(0, 1), uniform_layout(images, everything, x.device, places))
    masks: list[Tensor] = []
    last = len(model.blocks) - 1
    for number in range(selector.stages[0], len(model.blocks)):
        if number in selector.stages:
            masks.append(_mask(selector, scores, masks[-1] if masks else None, len(masks)))
            tokens = _drop(selector, tokens, scores, masks, cast(Block, model.blocks[number]), prefix)
        scored = number + 1 in selector.stages
        sheet, borderline, scores = call(
            _run_block, model, model.blocks[number], tokens, everything if scored else None, scored or number == last
        )
        if scored:
            scores = on_grid(scores, tokens.layout, -torch.inf)[:, prefix:everything]
        tokens = Tokens(sheet, tokens.layout, tokens.mask, borderline, tokens.borderline_mask, tokens.sheets)
    heads = tokens.layout.starts[:-1].long()[:, None] + torch.arange(prefix, device=x.device)
    rows = heads[tokens.layout.order.argsort()].flatten()
    return tokens.sheet.index_select(0, rows).unflatten(0, (images, prefix)), Selection(
        selector.stages, tuple(masks), prefix, fuses=fuses
    )


def _mask(selector: ThresholdSelector, scores: Tensor, previous: Tensor | None, stage: int) -> Tensor:
    """What a stage keeps, ``[B, N]``; in training with its straight-through gradient."""
    mask: Tensor = selector(scores, previous, stage)
    return mask if selector.training else mask.detach()


def _drop(
    selector: ThresholdSelector, tokens: Tokens, scores: Tensor, masks: list[Tensor], block: Block, prefix: int
) -> Tokens:
    """Make the sheets smaller at stage number ``len(masks) - 1``."""
    stage, old, sheet, added = len(masks) - 1, tokens.layout, tokens.sheet, None
    mask, kept = masks[-1], [mask.detach() > 0.5 for mask in masks]
    live = [torch.ones_like(kept[0]), *kept[:-1]]
    last = prefix + mask.shape[1]

    def on_places(patches: Tensor, others: float) -> Tensor:
        """Values of the patches ``[B, N]`` with ``others`` for prefix and fused tokens: ``[B, places]``."""
        return F.pad(patches, (prefix, old.tokens - last), value=others)

    places = on_places(mask, 1.0)
    keep = on_places(kept[-1], True)
    if selector.config.dropped == "fused":
        added = last + stage
        # A stage that dropped nothing of an image has no token to fuse, and a later stage has not yet.
        for number in range(old.tokens - last):
            keep[:, last + number] = (live[number] & ~kept[number]).any(dim=1) if number <= stage else False
        weights = from_grid(on_places(scores, 0.0), old), from_grid(places, old)
        sheet = torch.cat([sheet, fuse_on_sheet(sheet, *weights, old.image_in_batch, old.images)])
    if not selector.training:
        (layout,) = lay_out(keep)
        return Tokens(sheet.index_select(0, rows_in(old, layout, added)), layout)
    close = live[-1] & ~kept[-1] & selector.still_learns(scores, stage)
    layout, others = lay_out(keep, on_places(close, False))
    sheets = cut(layout, others, cast(Attention, block.attn).num_heads)
    borderline, borderline_mask = None, None
    if sheets.any_borderline:
        borderline = tokens.sheet.detach().index_select(0, rows_in(old, others))
        borderline_mask = from_grid(places, others)
    sheet = sheet.index_select(0, rows_in(old, layout, added))
    return Tokens(sheet, layout, from_grid(places, layout), borderline, borderline_mask, sheets)


def _run_block(
    model: Model, block: Block, tokens: Tokens, scored: int | None, last: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One block on the sheets.

    Args:
        scored: tokens of an image before any was dropped, where scores ``[S]`` are asked for (meant for patches only).
        last: whether borderline tokens end here, so that what becomes of them is not asked.

    Returns:
        kept tokens ``[S, C]``, borderline tokens ``[R, C]`` or None, scores or None.
    """
    layout, sheets = tokens.layout, tokens.sheets
    depth = draw_depth(block, layout.images, tokens.sheet)
    with _named_rows(model, layout):
        normed, query, key, value = project(block, tokens.sheet)
        query, key = query.to(value.dtype), key.to(value.dtype)  # a norm of q and k under autocast gives float32
        if sheets is None:
            context = attend(query, key, value, layout, kernel_of(cast(Attention, block.attn)))
            class_row = class_attention_packed(query, key, layout) if scored is not None else None
            sheet = finish(block, tokens.sheet, normed, context, of_tokens(depth, layout))
            return sheet, None, _scores(class_row, context, scored)
        other, own_key, own_value = None, None, None
        if tokens.borderline is not None:
            with torch.no_grad():
                other = project(block, tokens.borderline)
                own_key, own_value = other[2].to(value.dtype), other[3]
        assert tokens.mask is not None
        context = MaskedAttention.apply(
            query, key, value, tokens.mask, own_key, own_value, tokens.borderline_mask, sheets
        )
        class_row = None
        if scored is not None:
            class_row = class_attention_masked(query, key, tokens.mask, own_key, tokens.borderline_mask, sheets)
        sheet = finish(block, tokens.sheet, normed, context, of_tokens(depth, layout))
    borderline = None
    if other is not None and not last:
        assert tokens.borderline is not None
        assert own_key is not None
        assert own_value is not None
        # Only now: of a weight that autocast has cast without a gradient, it would give the kept tokens that copy.
        with torch.no_grad(), _named_rows(model, sheets.borderline):
            mixed = attend_from_borderline(other[1], key, value, own_key, own_value, sheets)
            borderline = finish(block, tokens.borderline, other[0], mixed, of_tokens(depth, sheets.borderline))
    return sheet, borderline, _scores(class_row, context, scored)


def _scores(class_row: Tensor | None, context: Tensor, tokens: int | None) -> Tensor | None:
    return None if class_row is None or tokens is None else head_weighted_scores(class_row, context, tokens)


@contextmanager
def _named_rows(model: Model, layout: Layout) -> Iterator[None]:
    """While it lasts, ``model.sheet_rows`` says whose tokens the rows of a sheet are, to whoever counts by image."""
    model.sheet_rows = layout.image_in_batch, layout.images
    try:
        yield
    finally:
        model.sheet_rows = None
