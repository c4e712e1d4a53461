"""The 256 colours of the pictures of a run.

A picture is drawn in the numbers of these colours, a byte for each pixel: that takes a third of the time of drawing in
true colours and looking for a palette afterwards, and nothing is rounded. Letters are drawn as a shade between their
colour and the paper, so the colours of words are rows of shades.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Numbers = NDArray[np.uint8]
"""Of colours, ``[H, W]`` or any other shape."""

PAPER_COLOUR, INK_COLOUR = (255, 255, 255), (40, 44, 52)
DORMANT_COLOUR = (23, 26, 36)  #: dead weights and dormant units: near black
AGE_COLOURS = ((255, 158, 28), (216, 92, 138), (92, 204, 230))
"""From just come (orange) over half of the run so far (rose) to live since the start (blue)."""
HEAT_COLOURS = ((244, 246, 250), (92, 150, 200), (16, 44, 84))  #: little, middle, much
CURVE_COLOURS = ((16, 44, 84), (190, 60, 70), (80, 150, 90), (224, 159, 62))
TEXT, LINE = 13, 17  #: pixels

_SHADES, _AGES, _SHARES, _HEATS, _CURVE_SHADES = 56, 17, 8, 24, 9
INK, PALE, PAPER = 0, 21, _SHADES - 1
DORMANT = _SHADES
_FIRST_AGE = DORMANT + 1
_FIRST_HEAT = _FIRST_AGE + _AGES * _SHARES
_FIRST_CURVE = _FIRST_HEAT + _HEATS


def curve(number: int) -> tuple[int, int]:
    """Ink and paper of the ``number``-th curve: words in its ink stand on its paper."""
    first = _FIRST_CURVE + number % len(CURVE_COLOURS) * _CURVE_SHADES
    return first, first + _CURVE_SHADES - 1


def by_age(age: NDArray[np.floating[Any]], share: NDArray[np.floating[Any]] | float = 1.0) -> Numbers:
    """Numbers of colours.

    Args:
        age: in [0, 1]: 0 came at this update, 1 has been live since the start.
        share: of what a pixel stands for, how much is live: the less, the darker; 0 is dead.
    """
    shade = np.ceil(np.clip(share, 0, 1) * _SHARES - 1e-3)
    number = _FIRST_AGE + np.rint(np.clip(age, 0, 1) * (_AGES - 1)) * _SHARES + shade - 1
    return np.where(shade > 0, number, DORMANT).astype(np.uint8)


def by_heat(values: NDArray[np.floating[Any]]) -> Numbers:
    """Numbers of colours of values in [0, 1]."""
    return (_FIRST_HEAT + np.rint(np.clip(values, 0, 1) * (_HEATS - 1))).astype(np.uint8)


def age_of(born: NDArray[np.number[Any]], now: int) -> NDArray[np.float64]:
    """Age in [0, 1] of what came at these updates: 0 came now, 1 has been there since the start."""
    return np.divide(now - born, now, dtype=np.float64) if now > 0 else np.ones(np.shape(born))


def blank(width: int, height: int) -> Image.Image:
    """An empty picture, drawn in numbers."""
    return Image.new("L", (width, height), PAPER)


def finished(image: Image.Image) -> Image.Image:
    """The same picture with its colours."""
    image.putpalette(_palette())
    return image


def write(image: Image.Image, x: int, y: int, *words: str, ink: int = INK, paper: int = PAPER, size: int = TEXT) -> int:
    """Put words beside each other, ``x``, ``y`` the upper left corner, and say where they end.

    What has been written before is kept, so that a number that changes is best a word of its own.
    """
    for text in words:
        drawn, letters = _words(text, ink, paper, size)
        image.paste(drawn, (x, y), letters)  # not the paper: lines of words may overlap
        x += drawn.width
    return x


def width_of(*words: str, size: int = TEXT) -> int:
    """Of words beside each other, in pixels."""
    return sum(_words(text, INK, PAPER, size)[0].width for text in words)


@lru_cache(maxsize=4096)
def _words(text: str, ink: int, paper: int, size: int) -> tuple[Image.Image, Image.Image]:
    """Words, and where their letters are."""
    font = _font(size)
    image = Image.new("L", (max(round(font.getlength(text)), 1), size + LINE - TEXT), paper)
    ImageDraw.Draw(image).text((0, 0), text, ink, font)
    return image, image.point([255 * (number != paper) for number in range(256)])


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


@cache
def _palette() -> bytes:
    words = _between((INK_COLOUR, PAPER_COLOUR), _SHADES)
    ages = _between(AGE_COLOURS, _AGES)
    dead = np.array(DORMANT_COLOUR, dtype=float)
    shares = np.arange(1, _SHARES + 1)[None, :, None] / _SHARES
    aged = dead + (ages[:, None] - dead) * shares
    curves = [_between((colour, PAPER_COLOUR), _CURVE_SHADES) for colour in CURVE_COLOURS]
    rows = [words, dead[None], aged.reshape(-1, 3), _between(HEAT_COLOURS, _HEATS), *curves]
    return np.rint(np.concatenate(rows)).astype(np.uint8).tobytes()


def _between(stops: tuple[tuple[int, int, int], ...], count: int) -> NDArray[np.float64]:
    """``count`` colours ``[count, 3]`` from the first to the last stop, through all of them."""
    place = np.linspace(0, len(stops) - 1, count)
    channels = np.array(stops, dtype=float).T
    return np.stack([np.interp(place, range(len(stops)), channel) for channel in channels], axis=-1)
