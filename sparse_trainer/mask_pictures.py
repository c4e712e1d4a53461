"""Pictures of masks for TensorBoard, with words and a legend in them: weights and units coloured by age."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from sparse_trainer.mask_history import DEAD

PAPER, INK, PALE = (255, 255, 255), (40, 44, 52), (120, 126, 138)
DORMANT = (23, 26, 36)  #: dead weights and dormant units: near black
STOPS = ((255, 158, 28), (216, 92, 138), (92, 204, 230))
"""From just come (orange) over half of the run so far (rose) to live since the start (blue)."""
TEXT, LINE = 13, 17  #: pixels


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; reading it takes as long as drawing a picture."""
    return ImageFont.load_default(size)


def age_of(born: Tensor, now: int) -> Tensor:
    """Age in [0, 1]: 0 came at this update, 1 has been live since the start."""
    return (now - born.float()) / now if now > 0 else torch.ones_like(born, dtype=torch.float32)


def colours(age: Tensor) -> Tensor:
    """float ``[..., 3]`` in 0..255 for ages in [0, 1]."""
    stops = torch.tensor(STOPS, dtype=torch.float32)
    place = age.clamp(0, 1) * (len(STOPS) - 1)
    low = place.floor().clamp(max=len(STOPS) - 2).long()
    return torch.lerp(stops[low], stops[low + 1], (place - low)[..., None])


def weights_picture(name: str, born: Tensor, now: int, step: int, side: int = 256) -> Tensor:
    """One layer, uint8 ``[3, H, W]``: outputs from top to bottom, inputs from left to right, coloured by age.

    A large layer is reduced to means over square areas, so that neither side exceeds ``side``: the darker, the fewer of
    the weights under a pixel are live; the colour is their mean age. A small one is enlarged.

    Args:
        born: as :attr:`MaskHistory.born`; of more than two dimensions it is shown as ``[shape[0], rest]``.
    """
    rows = born.reshape(born.shape[0] if born.ndim > 1 else 1, -1)
    area = math.ceil(max(rows.shape) / side)
    share = F.avg_pool2d((rows != DEAD)[None, None].float(), area, ceil_mode=True)[0, 0]
    # The mean over a square counts -1 for each dead weight; what is left is the sum over the live ones.
    born_live = F.avg_pool2d(rows[None, None].float(), area, ceil_mode=True)[0, 0] - DEAD * (1 - share)
    ages = age_of(born_live / share.clamp(min=1e-9), now)
    dead = torch.tensor(DORMANT, dtype=torch.float32)
    pixels = torch.lerp(dead, colours(ages), share[..., None])
    scale = max(1, side // max(share.shape))
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    outputs, inputs = rows.shape
    under = f"{inputs:,} inputs across, {outputs:,} outputs down" + (
        f"; a pixel is {area} x {area}" if area > 1 else ""
    )
    return to_tensor(framed(pixels, f"{name}, step {step:,}", [under]))


def units_picture(
    kind: str, born: Mapping[str, Mapping[int, int]], all_units: Mapping[str, int], now: int, step: int
) -> Tensor:
    """Heads or neurons, uint8 ``[3, H, W]``: a row per block, a column per unit of the dense block.

    Live ones are coloured by age.
    """
    most = max(all_units.values())
    cell = max(1, min(22, 512 // most))
    height = max(cell, 12)
    pixels = torch.full((len(all_units) * height, most * cell, 3), float(PAPER[0]))
    for row, (block, count) in enumerate(all_units.items()):
        line = torch.tensor(DORMANT, dtype=torch.float32).expand(count, 3).clone()
        live = born.get(block, {})
        if live:
            numbers = torch.tensor(list(live))
            line[numbers] = colours(age_of(torch.tensor(list(live.values())), now))
        band = pixels[row * height : (row + 1) * height, : count * cell]
        band[:] = line.repeat_interleave(cell, 0)
        band[-1] = float(PAPER[0])
        if cell >= 6:
            band[:, cell - 1 :: cell] = float(PAPER[0])
    labels = [short(block) for block in all_units]
    return to_tensor(framed(pixels, f"{kind}, step {step:,}", [f"{kind[:-1]} of the block across"], labels, height))


def short(name: str) -> str:
    """``3 attn.qkv`` for ``blocks.3.attn.qkv.weight``."""
    return re.sub(r"^(?:\w+\.)*?\w+\.(\d+)(?:\.|$)", r"\1 ", name.removesuffix(".weight")).strip()


def framed(
    pixels: Tensor, title: str, under: Sequence[str], labels: Sequence[str] = (), height: int = 0
) -> Image.Image:
    """A picture of pixels ``[H, W, 3]`` with its title, the names of its rows, words below it, and the colours' key."""
    font = font_of(TEXT)
    left = 8 + max((int(font.getlength(label)) + 6 for label in labels), default=0)
    tall, wide = pixels.shape[:2]
    words = max(int(font.getlength(text)) for text in (title, *under)) + 16
    key = 320
    image = Image.new("RGB", (max(left + wide + 8, words, key), LINE + 6 + tall + LINE * (len(under) + 1) + 10), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((8, 3), title, INK, font)
    image.paste(Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy()), (left, LINE + 6))
    for row, label in enumerate(labels):
        pen.text((6, LINE + 6 + row * height + height // 2), label, INK, font, anchor="lm")
    for row, text in enumerate(under):
        pen.text((8, LINE + tall + 10 + LINE * row), text, PALE, font)
    draw_key(image, 8, LINE + tall + 11 + LINE * len(under))
    return image


def draw_key(image: Image.Image, x: int, y: int) -> None:
    """The key of the colours: dead, just come, ... live since the start."""
    image.paste(_key(), (x, y - 1))


@cache
def _key() -> Image.Image:
    """Drawn once: it stands in every picture."""
    font, words = font_of(TEXT), ("dead    just come", "since the start")
    start = 24 + int(font.getlength(words[0]))
    image = Image.new("RGB", (start + 58 + int(font.getlength(words[1])), LINE), PAPER)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 2, 11, 13), DORMANT)
    pen.text((16, 0), words[0], INK, font)
    ramp = colours(torch.linspace(0, 1, 48)).round().to(torch.uint8)[None].repeat(12, 1, 1)
    image.paste(Image.fromarray(ramp.numpy()), (start, 2))
    pen.text((start + 54, 0), words[1], INK, font)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 ``[3, H, W]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
