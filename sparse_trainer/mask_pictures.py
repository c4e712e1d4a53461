"""Pictures of masks for TensorBoard, with words and a legend in them: weights and units coloured by age."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from sparse_trainer.mask_history import DEAD
from sparse_trainer.palette import (
    DORMANT,
    LINE,
    PALE,
    PAPER,
    TEXT,
    Numbers,
    age_of,
    blank,
    by_age,
    finished,
    width_of,
    write,
)


def weights_picture(name: str, born: Tensor, now: int, step: int, side: int = 256) -> Image.Image:
    """One layer, with a palette: outputs from top to bottom, inputs from left to right, coloured by age.

    A large layer is reduced to means over square areas, so that neither side exceeds ``side``: the darker, the fewer of
    the weights under a pixel are live; the colour is their mean age. A small one is enlarged.

    Args:
        born: as :attr:`MaskHistory.born`; of more than two dimensions it is shown as ``[shape[0], rest]``.
    """
    rows = born.reshape(born.shape[0] if born.ndim > 1 else 1, -1)
    area = math.ceil(max(rows.shape) / side)
    if area == 1:
        colours = np.concatenate([[np.uint8(DORMANT)], by_age(age_of(np.arange(now + 1), now))])
        numbers: Numbers = colours[rows.numpy() - DEAD]
    else:
        share = F.avg_pool2d((rows != DEAD)[None, None].float(), area, ceil_mode=True)[0, 0]
        # The mean over a square counts -1 for each dead weight; what is left is the sum over the live ones.
        born_live = F.avg_pool2d(rows[None, None].float(), area, ceil_mode=True)[0, 0] - DEAD * (1 - share)
        numbers = by_age(age_of((born_live / share.clamp(min=1e-9)).numpy(), now), share.numpy())
    scale = max(1, side // max(numbers.shape))
    pixels = Image.fromarray(numbers)
    pixels = pixels.resize((pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST)
    outputs, inputs = rows.shape
    under = f"{inputs:,} inputs across, {outputs:,} outputs down" + (
        f"; a pixel is {area} x {area}" if area > 1 else ""
    )
    return finished(framed(pixels, (f"{name}, ", f"step {step:,}"), under))


def units_picture(
    kind: str, born: Mapping[str, Mapping[int, int]], all_units: Mapping[str, int], now: int, step: int
) -> Image.Image:
    """Heads or neurons, with a palette: a row per block, a column per unit of the dense block.

    Live ones are coloured by age.
    """
    most = max(all_units.values())
    cell = max(1, min(22, 512 // most))
    height = max(cell, 12)
    pixels = np.full((len(all_units) * height, most * cell), PAPER, dtype=np.uint8)
    for row, (block, count) in enumerate(all_units.items()):
        line = np.full(count, DORMANT, dtype=np.uint8)
        live = born.get(block, {})
        line[list(live)] = by_age(age_of(np.array(list(live.values())), now))
        band = pixels[row * height : (row + 1) * height, : count * cell]
        band[:] = line.repeat(cell)
        band[-1] = PAPER
        if cell >= 6:
            band[:, cell - 1 :: cell] = PAPER
    labels = [short(block) for block in all_units]
    title, under = (f"{kind}, ", f"step {step:,}"), f"{kind[:-1]} of the block across"
    return finished(framed(Image.fromarray(pixels), title, under, labels, height))


def short(name: str) -> str:
    """``3 attn.qkv`` for ``blocks.3.attn.qkv.weight``."""
    return re.sub(r"^(?:\w+\.)*?\w+\.(\d+)(?:\.|$)", r"\1 ", name.removesuffix(".weight")).strip()


def framed(
    pixels: Image.Image, title: Sequence[str], under: str, labels: Sequence[str] = (), height: int = 0
) -> Image.Image:
    """A picture in numbers with its title, the names of its rows, words below it, and the colours' key."""
    left = 8 + max((width_of(label) + 6 for label in labels), default=0)
    wide, tall = pixels.size
    key = 320
    words = max(width_of(*title), width_of(under)) + 16
    image = blank(max(left + wide + 8, words, key), 3 * LINE + tall + 16)
    write(image, 8, 3, *title)
    image.paste(pixels, (left, LINE + 6))
    for row, label in enumerate(labels):
        write(image, 6, LINE + 6 + row * height + (height - TEXT) // 2, label)
    write(image, 8, LINE + tall + 10, under, ink=PALE)
    draw_key(image, 8, 2 * LINE + tall + 11)
    return image


def draw_key(image: Image.Image, x: int, y: int) -> None:
    """The key of the colours: dead, just come, ... live since the start."""
    image.paste(_key(), (x, y - 1))


@cache
def _key() -> Image.Image:
    """Drawn once: it stands in every picture."""
    first, last = "dead    just come", "since the start"
    start = 24 + width_of(first)
    image = blank(start + 58 + width_of(last), LINE)
    ImageDraw.Draw(image).rectangle((0, 2, 11, 13), DORMANT)
    write(image, 16, 0, first)
    image.paste(Image.fromarray(by_age(np.linspace(0, 1, 51))[None].repeat(12, 0)), (start, 2))
    write(image, start + 54, 0, last)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 ``[3, H, W]``, for a writer that takes pixels."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
