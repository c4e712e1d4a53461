"""Which patches a model looks at, as a picture: a row per image, a column per stage, dropped patches dimmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.evaluation.precision import Autocast
from models import Selection

DIMMED = (0.42, 0.47, 0.60)
"""Slate: what a dropped patch fades to, so that it shows on black and on white images."""
FADE = 0.8
"""How far it fades."""
SIDE = 112
"""Pixels that an image has at least in the picture."""
GAP = 4


@torch.inference_mode()
def select(model: nn.Module, images: Tensor, autocast: Autocast) -> Selection:
    """What a model with a selector keeps of normalised images ``[B, C, H, W]`` in evaluation."""
    was_training = model.training
    model.eval()
    with autocast():
        _, selection = model(images, return_selection=True)
    model.train(was_training)
    return cast(Selection, selection)


def overlay(images: Tensor, selection: Selection, grid: tuple[int, int]) -> Tensor:
    """The original in the first column, then what each stage left.

    Images are enlarged by a whole number, pixel by pixel, to at least :data:`SIDE`; white gaps lie between them.

    Args:
        images: ``[B, C, H, W]`` in 0..1, C 1 or 3.
        selection: of these images.
        grid: rows and columns of patches.

    Returns:
        ``[3, H', W']`` in 0..1, on the CPU.

    Raises:
        ValueError: the grid does not divide the images, or the selection is of other ones.
    """
    images = images.detach().float().cpu().clamp(0, 1)
    count, channels, height, width = images.shape
    rows, columns = grid
    if height % rows or width % columns or channels not in (1, 3):
        raise ValueError(
            f"{channels} channels of {height} x {width} pixels cannot be drawn in {rows} x {columns} patches"
        )
    if any(tuple(mask.shape) != (count, rows * columns) for mask in selection.masks):
        raise ValueError(f"the selection is not of {count} images of {rows} x {columns} patches")
    images = images.expand(-1, 3, -1, -1)
    dimmed = images + FADE * (torch.tensor(DIMMED).view(3, 1, 1) - images)
    cells = [images]
    for mask in selection.masks:
        kept = (mask.detach().cpu() > 0.5).view(count, 1, rows, columns)
        kept = kept.repeat_interleave(height // rows, dim=2).repeat_interleave(width // columns, dim=3)
        cells.append(torch.where(kept, images, dimmed))
    factor = max(1, math.ceil(SIDE / min(height, width)))
    sheet = torch.stack(cells, dim=1)  # [B, 1 + stages, 3, H, W]
    sheet = sheet.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    sheet = torch.nn.functional.pad(sheet, (0, GAP, 0, GAP), value=1.0)
    picture = sheet.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return torch.nn.functional.pad(picture, (GAP, 0, GAP, 0), value=1.0)


def draw(
    model: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float], autocast: Autocast
) -> tuple[Tensor, Selection]:
    """The picture of normalised images ``[B, C, H, W]``, and what it shows."""
    selection = select(model, images, autocast)
    centre, spread = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    grid = cast(Any, model).patch_embed.grid_size
    return overlay(images * spread + centre, selection, (int(grid[0]), int(grid[1]))), selection


def examples(images: Tensor, targets: Tensor, count: int) -> Tensor:
    """Up to ``count`` of the images ``[B, ...]``: the first of each class in turn, then the second, and so on."""
    seen: dict[int, int] = {}
    order = []
    for place, label in enumerate(targets.tolist()):
        seen[label] = seen.get(label, 0) + 1
        order.append((seen[label], label, place))
    return images[[place for *_, place in sorted(order)[:count]]]
