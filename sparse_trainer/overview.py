"""The first picture of a run in TensorBoard: what its masks have done so far, beside the curves it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sparse_trainer.mask_history import MaskHistory, Moment
from sparse_trainer.mask_pictures import (
    DORMANT,
    INK,
    LINE,
    PALE,
    PAPER,
    TEXT,
    age_of,
    colours,
    draw_key,
    font_of,
    short,
    to_tensor,
)

WIDTH, MARGIN, GAP = 1200, 14, 22
HEAT = ((244, 246, 250), (92, 150, 200), (16, 44, 84))  #: little, middle, much
CURVES = ((16, 44, 84), (190, 60, 70), (80, 150, 90), (224, 159, 62))
CURVE_HEIGHT = 130

Series = Mapping[str, Sequence[tuple[int, float]]]
"""By name, (step, value)."""


def overview(history: MaskHistory, curves: Mapping[str, Series], facts: str, all_heads: Mapping[str, int]) -> Tensor:
    """uint8 ``[3, H, 1200]``.

    From the top: the facts; a panel per group of curves; survival, churn and, where it changes, density of each layer
    (down) at each update (to the right); a lane per head, coloured by age, where some are dormant.

    Args:
        curves: by title, the lines of one panel; what is empty is left out.
        all_heads: by block, heads of the dense block; empty without head sparsity.
    """
    moments = history.moments
    maps: dict[str, Callable[[Moment], Mapping[str, float]]] = {}
    if history.born:
        maps["survival: first weights still live"] = lambda moment: moment.survival
        maps["churn: weights that changed sides"] = lambda moment: moment.churn
        if history.density_varies:
            maps["density"] = lambda moment: moment.density
    shown = {title: {name: line for name, line in lines.items() if line} for title, lines in curves.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    layers = len(history.born)
    row = max(3, min(13, 360 // max(layers, 1)))
    lanes = sum(all_heads.values())
    lane = max(3, min(10, 320 // max(lanes, 1)))
    heights = [LINE + 10]
    if shown:
        heights.append(CURVE_HEIGHT + 2 * LINE + GAP)
    if maps:
        heights.append(layers * row + 2 * LINE + GAP)
    if lanes:
        heights.append(lanes * lane + len(all_heads) * 3 + 2 * LINE + GAP)
    image = Image.new("RGB", (WIDTH, sum(heights) + LINE + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(image), font_of(TEXT)
    pen.text((MARGIN, 6), facts, INK, font_of(TEXT + 2))
    top = heights[0]
    if shown:
        wide = (WIDTH - MARGIN * 2 - GAP * (len(shown) - 1)) // len(shown)
        for index, (title, lines) in enumerate(shown.items()):
            _draw_curves(image, MARGIN + index * (wide + GAP), top, wide, title, lines)
        top += heights[1]
    if maps:
        names = list(history.born)
        label = 6 + max(int(font.getlength(short(name))) for name in names)
        wide = (WIDTH - MARGIN * 2 - label - GAP * (len(maps) - 1)) // len(maps)
        for number, name in enumerate(names):
            if number % max(1, LINE // row) == 0:
                pen.text((MARGIN, top + LINE + 4 + number * row + row // 2), short(name), INK, font, anchor="lm")
        for index, (title, value) in enumerate(maps.items()):
            table = torch.tensor([[value(moment).get(name, 0.0) for moment in moments] for name in names])
            most = 1.0 if index != 1 else max(float(table.max()), 1e-9)
            left = MARGIN + label + index * (wide + GAP)
            pen.text((left, top), f"{title} (dark: {most:.0%})", INK, font)
            _paste(image, _heat(table / most), left, top + LINE + 4, wide, layers * row)
            _draw_steps(pen, left, top + LINE + 6 + layers * row, wide, moments)
        top += layers * row + 2 * LINE + GAP
    if lanes:
        pen.text((MARGIN, top), "live heads, a lane each, by age", INK, font)
        y = top + LINE + 4
        for block, count in all_heads.items():
            pen.text((MARGIN, y + count * lane // 2), short(block), INK, font, anchor="lm")
            _paste(image, _lanes(moments, block, count), MARGIN + 60, y, WIDTH - 2 * MARGIN - 60, count * lane)
            y += count * lane + 3
        _draw_steps(pen, MARGIN + 60, y + 1, WIDTH - 2 * MARGIN - 60, moments)
    draw_key(image, MARGIN, image.height - LINE - 4)
    return to_tensor(image)


def _heat(values: Tensor) -> Tensor:
    """Colours ``[H, W, 3]`` of values in [0, 1]."""
    stops = torch.tensor(HEAT, dtype=torch.float32)
    place = values.clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().clamp(max=len(HEAT) - 2).long()
    return torch.lerp(stops[low], stops[low + 1], (place - low)[..., None])


def _lanes(moments: Sequence[Moment], block: str, count: int) -> Tensor:
    """Colours ``[heads, updates, 3]``: dark where a head was dormant, else by its age then."""
    pixels = torch.tensor(DORMANT, dtype=torch.float32).repeat(count, len(moments), 1)
    for column, moment in enumerate(moments):
        for head, born in moment.heads.get(block, {}).items():
            pixels[head, column] = colours(age_of(torch.tensor(born), column))
    return pixels


def _paste(image: Image.Image, pixels: Tensor, x: int, y: int, wide: int, high: int) -> None:
    picture = Image.fromarray(pixels.round().to(torch.uint8).numpy())
    image.paste(picture.resize((wide, high), Image.Resampling.NEAREST), (x, y))


def _draw_steps(pen: ImageDraw.ImageDraw, x: int, y: int, wide: int, moments: Sequence[Moment]) -> None:
    """First and last step below a picture whose columns are the updates."""
    font = font_of(TEXT)
    pen.text((x, y), f"step {moments[0].step:,}", PALE, font)
    pen.text((x + wide, y), f"{moments[-1].step:,}, update {len(moments) - 1}", PALE, font, anchor="ra")


def _draw_curves(image: Image.Image, x: int, y: int, wide: int, title: str, lines: Series) -> None:
    """Lines on one scale, from the least value to the greatest, with their last values."""
    pen, font = ImageDraw.Draw(image), font_of(TEXT)
    pen.text((x, y), title, INK, font)
    values = [value for line in lines.values() for _, value in line]
    last = max(max(step for step, _ in line) for line in lines.values())
    low, high = min(values), max(values)
    top, bottom = y + LINE + 4, y + LINE + CURVE_HEIGHT
    pen.line((x, bottom + 1, x + wide, bottom + 1), PALE)
    pen.text((x + wide, bottom + 3), f"step {last:,}; {low:,.4g} to {high:,.4g}", PALE, font, anchor="ra")
    place = x + int(font.getlength(title)) + 14
    for colour, (name, line) in zip(CURVES, lines.items(), strict=False):
        points = [
            (x + wide * step / max(last, 1), bottom - (bottom - top) * (value - low) / ((high - low) or 1.0))
            for step, value in line
        ]
        if len(points) > 1:
            pen.line(points, colour, 2)
        else:
            px, py = points[0]
            pen.ellipse((px - 3, py - 3, px + 3, py + 3), colour)
        text = f"{name} {line[-1][1]:,.3g}"
        pen.text((place, y), text, colour, font)
        place += int(font.getlength(text)) + 12
