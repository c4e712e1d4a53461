"""The first picture of a run in TensorBoard: what its masks have done so far, beside the curves it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from sparse_trainer.mask_history import MaskHistory, Moment
from sparse_trainer.mask_pictures import draw_key, short
from sparse_trainer.palette import (
    DORMANT,
    LINE,
    PALE,
    TEXT,
    Numbers,
    age_of,
    blank,
    by_age,
    by_heat,
    curve,
    finished,
    width_of,
    write,
)

WIDTH, MARGIN, GAP = 1200, 14, 22
CURVE_HEIGHT = 130

Series = Mapping[str, Sequence[tuple[int, float]]]
"""By name, (step, value)."""


def overview(
    history: MaskHistory, curves: Mapping[str, Series], facts: str, all_heads: Mapping[str, int]
) -> Image.Image:
    """1200 pixels wide, with a palette.

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
    image = blank(WIDTH, sum(heights) + LINE + MARGIN)
    write(image, MARGIN, 6, facts, size=TEXT + 2)
    top = heights[0]
    if shown:
        wide = (WIDTH - MARGIN * 2 - GAP * (len(shown) - 1)) // len(shown)
        for index, (title, lines) in enumerate(shown.items()):
            _draw_curves(image, MARGIN + index * (wide + GAP), top, wide, title, lines)
        top += heights[1]
    if maps:
        names = list(history.born)
        label = 6 + max(width_of(short(name)) for name in names)
        wide = (WIDTH - MARGIN * 2 - label - GAP * (len(maps) - 1)) // len(maps)
        for number, name in enumerate(names):
            if number % max(1, LINE // row) == 0:
                write(image, MARGIN, top + LINE + 4 + number * row + (row - TEXT) // 2, short(name))
        for index, (title, value) in enumerate(maps.items()):
            table = np.array([[value(moment).get(name, 0.0) for moment in moments] for name in names])
            most = 1.0 if index != 1 else max(float(table.max()), 1e-9)
            left = MARGIN + label + index * (wide + GAP)
            write(image, left, top, f"{title} (dark: {most:.0%})")
            _paste(image, by_heat(table / most), left, top + LINE + 4, wide, layers * row)
            _draw_steps(image, left, top + LINE + 6 + layers * row, wide, moments)
        top += layers * row + 2 * LINE + GAP
    if lanes:
        write(image, MARGIN, top, "live heads, a lane each, by age")
        y = top + LINE + 4
        for block, count in all_heads.items():
            write(image, MARGIN, y + (count * lane - TEXT) // 2, short(block))
            _paste(image, _lanes(moments, block, count), MARGIN + 60, y, WIDTH - 2 * MARGIN - 60, count * lane)
            y += count * lane + 3
        _draw_steps(image, MARGIN + 60, y + 1, WIDTH - 2 * MARGIN - 60, moments)
    draw_key(image, MARGIN, image.height - LINE - 4)
    return finished(image)


def _lanes(moments: Sequence[Moment], block: str, count: int) -> Numbers:
    """Colours ``[heads, updates]``: dark where a head was dormant, else by its age then."""
    numbers = np.full((count, len(moments)), DORMANT, dtype=np.uint8)
    for column, moment in enumerate(moments):
        live = moment.heads.get(block, {})
        numbers[list(live), column] = by_age(age_of(np.array(list(live.values())), column))
    return numbers


def _paste(image: Image.Image, numbers: Numbers, x: int, y: int, wide: int, high: int) -> None:
    image.paste(Image.fromarray(numbers).resize((wide, high), Image.Resampling.NEAREST), (x, y))


def _draw_steps(image: Image.Image, x: int, y: int, wide: int, moments: Sequence[Moment]) -> None:
    """First and last step below a picture whose columns are the updates."""
    last = f"{moments[-1].step:,}, update {len(moments) - 1}"
    write(image, x, y, f"step {moments[0].step:,}", ink=PALE)
    write(image, x + wide - width_of(last), y, last, ink=PALE)


def _draw_curves(image: Image.Image, x: int, y: int, wide: int, title: str, lines: Series) -> None:
    """Lines on one scale, from the least value to the greatest, with their last values."""
    pen = ImageDraw.Draw(image)
    place = write(image, x, y, title) + 14
    values = [value for line in lines.values() for _, value in line]
    last = max(max(step for step, _ in line) for line in lines.values())
    low, high = min(values), max(values)
    top, bottom = y + LINE + 4, y + LINE + CURVE_HEIGHT
    pen.line((x, bottom + 1, x + wide, bottom + 1), PALE)
    scale = f"step {last:,}; {low:,.4g} to {high:,.4g}"
    write(image, x + wide - width_of(scale), bottom + 3, scale, ink=PALE)
    for number, (name, line) in enumerate(lines.items()):
        ink, paper = curve(number)
        points = [
            (x + wide * step / max(last, 1), bottom - (bottom - top) * (value - low) / ((high - low) or 1.0))
            for step, value in line
        ]
        if len(points) > 1:
            pen.line(points, ink, 2)
        else:
            px, py = points[0]
            pen.ellipse((px - 3, py - 3, px + 3, py + 3), ink)
        place = write(image, place, y, f"{name} {line[-1][1]:,.3g}", ink=ink, paper=paper) + 12
