"""Ages of weights and units by hand, and the pictures that show them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparse_trainer.budget import Budget
from sparse_trainer.mask_history import MaskHistory
from sparse_trainer.mask_pictures import short, to_tensor, units_picture, weights_picture
from sparse_trainer.overview import WIDTH, overview
from sparse_trainer.palette import (
    AGE_COLOURS,
    CURVE_COLOURS,
    DORMANT_COLOUR,
    HEAT_COLOURS,
    INK_COLOUR,
    PAPER_COLOUR,
    age_of,
    blank,
    by_age,
    by_heat,
    curve,
    finished,
    write,
)
from sparse_trainer.report import LayerUpdate, MaskUpdate


def mask(text: str) -> Tensor:
    return torch.tensor([character == "x" for character in text])[None]


def update(step: int) -> MaskUpdate:
    layer = LayerUpdate(pruned=1, grown=1, live=2, total=4, explored=4, threshold=0.5)
    return MaskUpdate(step=step, drop_fraction=0.5, budget=Budget(2, 4), seconds=0.0, layers={"w": layer})


def history() -> MaskHistory:
    """Weight 1 dies and comes again; weight 0 stays; head 2 takes the place of head 0."""
    found = MaskHistory()
    found.observe(0, {"w": mask("xx..")}, {"b": (0, 1)}, {"b": (3,)}, None)
    found.observe(10, {"w": mask("x.x.")}, {"b": (1, 2)}, {"b": (3,)}, update(10))
    found.observe(20, {"w": mask("xx..")}, {"b": (1, 2)}, {"b": (3,)}, update(20))
    return found


def test_ages_by_hand() -> None:
    found = history()
    assert found.born["w"].tolist() == [[0, 2, -1, -1]]
    assert found.heads == {"b": {1: 0, 2: 1}}
    assert found.neurons == {"b": {3: 0}}
    assert [moment.step for moment in found.moments] == [0, 10, 20]
    assert [moment.survival["w"] for moment in found.moments] == [1.0, 0.5, 0.5], "one that comes again is a new one"
    assert [moment.churn["w"] for moment in found.moments] == [0.0, 1.0, 1.0]
    assert found.moments[0].heads == {"b": {0: 0, 1: 0}}, "the past stays as it was"
    assert found.budget == (2, 4)
    assert not found.density_varies
    found.observe(30, {"w": mask("xxx.")}, {}, {}, update(30))
    assert found.density_varies


def colours_of(numbers: np.ndarray) -> list[tuple[int, ...]]:
    """Of numbers in a row."""
    row = np.array(finished(Image.fromarray(np.atleast_2d(numbers))).convert("RGB"))[0]
    return [tuple(map(int, colour)) for colour in row]


def test_colours_of_ages() -> None:
    ages = age_of(np.array([0, 1, 2]), 2)
    assert ages.tolist() == [1.0, 0.5, 0.0]
    assert colours_of(by_age(ages)) == list(AGE_COLOURS[::-1])
    assert age_of(np.array([0]), 0).tolist() == [1.0], "the first masks have been there since the start"
    assert age_of(np.array([]), 0).tolist() == []


def test_what_is_live_is_never_shown_as_dead() -> None:
    numbers = by_age(np.full(3, 1.0), np.array([0.0, 0.01, 1.0]))
    dead, little, live = colours_of(numbers)
    assert (dead, live) == (DORMANT_COLOUR, AGE_COLOURS[2])
    assert dead != little != live


def test_colours_of_heat() -> None:
    assert colours_of(by_heat(np.array([0.0, 1.0, 2.0]))) == [HEAT_COLOURS[0], HEAT_COLOURS[2], HEAT_COLOURS[2]]
    table = [sum(colour) for colour in colours_of(by_heat(np.linspace(0, 1, 24)))]
    assert table == sorted(table, reverse=True), "the more, the darker"
    assert len(set(table)) == 24


@pytest.mark.parametrize("number", [*range(len(CURVE_COLOURS)), None])
def test_words_are_shades_between_their_ink_and_the_paper(number: int | None) -> None:
    image = blank(80, 20)
    if number is None:
        end, ink = write(image, 5, 2, "ink, ", "again"), INK_COLOUR
    else:
        shades = dict(zip(("ink", "paper"), curve(number), strict=True))
        end, ink = write(image, 5, 2, "ink, ", "again", **shades), CURVE_COLOURS[number]
    pixels = np.array(finished(image).convert("RGB")).astype(float)
    assert 40 < end <= 80
    assert (pixels[:, :5] == 255).all()
    assert (pixels[:, end:] == 255).all()
    paper = np.array(PAPER_COLOUR)
    along = (paper - pixels) @ (paper - ink) / ((paper - ink) @ (paper - ink))  # 0 paper, 1 ink
    assert along.max() == pytest.approx(1, abs=0.02)
    assert np.abs(pixels - (paper - along[..., None] * (paper - ink))).max() < 2, "no colour beside that line"


def has(picture: Image.Image, colour: tuple[int, int, int], least: int = 1) -> bool:
    same = to_tensor(picture).int() == torch.tensor(colour)[:, None, None]
    return int(same.all(dim=0).sum()) >= least


def test_a_picture_of_weights() -> None:
    found = history()
    pixels = to_tensor(weights_picture("w", found.born["w"], now=2, step=20, side=64))
    top, left = 23, 8  # below the title
    line = [tuple(pixels[:, top + 5, left + 16 * column + 8].tolist()) for column in range(4)]
    assert line == [AGE_COLOURS[2], AGE_COLOURS[0], DORMANT_COLOUR, DORMANT_COLOUR]


def test_a_large_layer_is_shown_by_means_over_squares() -> None:
    born = torch.full((4, 4), -1, dtype=torch.int16)
    born[:2, :2] = torch.tensor([[0, 4], [-1, -1]])  # half of a square is live, its mean age is a half
    pixels = to_tensor(weights_picture("w", born, now=4, step=1, side=2))
    middle = [(dark + bright) / 2 for dark, bright in zip(DORMANT_COLOUR, AGE_COLOURS[1], strict=True)]
    assert pixels[:, 23, 8].tolist() == pytest.approx(middle, abs=1)
    assert pixels[:, 24, 9].tolist() == list(DORMANT_COLOUR)


@pytest.mark.parametrize("shape", [(1000, 3), (3, 1000), (257, 257), (4, 3, 16, 16), (5,), (1, 1)])
def test_pictures_stay_small(shape: tuple[int, ...]) -> None:
    picture = weights_picture("a.layer", torch.zeros(shape, dtype=torch.int16), now=3, step=1, side=64)
    assert picture.mode == "P"
    assert picture.height <= 64 + 80
    assert picture.width <= 500
    assert has(picture, AGE_COLOURS[2]), "what is live since the start stays so at the borders"


def test_a_picture_of_heads() -> None:
    born, now = {"blocks.0": {0: 0, 2: 4}, "blocks.1": {1: 2}}, 4
    picture = units_picture("heads", born, {"blocks.0": 4, "blocks.1": 3}, now=now, step=40)
    assert all(has(picture, colour, least=200) for colour in (*AGE_COLOURS, DORMANT_COLOUR))


def test_the_overview_has_what_there_is() -> None:
    found = history()
    curves = {"top-1, %": {"weights": [(0, 10.0), (20, 60.0)], "average": []}, "MACs": {"live": []}}
    whole = overview(found, curves, "a run", {"b": 3})
    assert (whole.mode, whole.width) == ("P", WIDTH)
    shown = (*AGE_COLOURS, DORMANT_COLOUR, HEAT_COLOURS[0], HEAT_COLOURS[2], CURVE_COLOURS[0], INK_COLOUR)
    assert all(has(whole, colour) for colour in shown)
    less = overview(found, {"MACs": {"live": []}}, "a run", {})
    assert less.height < whole.height - 200, "no empty panels"
    assert overview(MaskHistory(moments=found.moments), {}, "units alone", {"b": 3}).width == WIDTH


def test_short_names() -> None:
    assert short("blocks.3.attn.qkv.weight") == "3 attn.qkv"
    assert short("blocks.11") == "11"
    assert short("patch_embed.proj.weight") == "patch_embed.proj"
