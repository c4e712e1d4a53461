"""Ages of weights and units by hand, and the pictures that show them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_trainer.budget import Budget
from sparse_trainer.mask_history import MaskHistory
from sparse_trainer.mask_pictures import DORMANT, STOPS, age_of, colours, short, units_picture, weights_picture
from sparse_trainer.overview import WIDTH, overview
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


def test_colours_of_ages() -> None:
    ages = age_of(torch.tensor([0, 1, 2]), 2)
    assert ages.tolist() == [1.0, 0.5, 0.0]
    assert colours(ages).round().int().tolist() == [list(STOPS[2]), list(STOPS[1]), list(STOPS[0])]
    assert age_of(torch.tensor([0]), 0).tolist() == [1.0], "the first masks have been there since the start"


def has(picture: Tensor, colour: tuple[int, int, int], least: int = 1) -> bool:
    same = picture.int() == torch.tensor(colour)[:, None, None]
    return int(same.all(dim=0).sum()) >= least


def test_a_picture_of_weights() -> None:
    found = history()
    picture = weights_picture("w", found.born["w"], now=2, step=20, side=64)
    pixels = picture.int()
    top, left = 23, 8  # below the title
    line = [tuple(pixels[:, top + 5, left + 16 * column + 8].tolist()) for column in range(4)]
    assert line == [STOPS[2], STOPS[0], DORMANT, DORMANT]


def test_a_large_layer_is_shown_by_means_over_squares() -> None:
    born = torch.full((4, 4), -1, dtype=torch.int16)
    born[:2, :2] = torch.tensor([[0, 4], [-1, -1]])  # half of a square is live, its mean age is a half
    pixels = weights_picture("w", born, now=4, step=1, side=2).int()
    middle = [(dark + bright) / 2 for dark, bright in zip(DORMANT, STOPS[1], strict=True)]
    assert pixels[:, 23, 8].tolist() == pytest.approx(middle, abs=1)
    assert pixels[:, 24, 9].tolist() == list(DORMANT)


@pytest.mark.parametrize("shape", [(1000, 3), (3, 1000), (257, 257), (4, 3, 16, 16), (5,), (1, 1)])
def test_pictures_stay_small(shape: tuple[int, ...]) -> None:
    picture = weights_picture("a.layer", torch.zeros(shape, dtype=torch.int16), now=3, step=1, side=64)
    assert picture.ndim == 3
    assert picture.shape[1] <= 64 + 80
    assert picture.shape[2] <= 500
    assert has(picture, STOPS[2]), "what is live since the start stays so at the borders"


def test_a_picture_of_heads() -> None:
    born, now = {"blocks.0": {0: 0, 2: 4}, "blocks.1": {1: 2}}, 4
    picture = units_picture("heads", born, {"blocks.0": 4, "blocks.1": 3}, now=now, step=40)
    assert all(has(picture, colour, least=200) for colour in (*STOPS, DORMANT))


def test_the_overview_has_what_there_is() -> None:
    found = history()
    curves = {"top-1, %": {"weights": [(0, 10.0), (20, 60.0)], "average": []}, "MACs": {"live": []}}
    whole = overview(found, curves, "a run", {"b": 3})
    assert whole.shape[0] == 3
    assert whole.shape[2] == WIDTH
    assert whole.dtype == torch.uint8
    less = overview(found, {"MACs": {"live": []}}, "a run", {})
    assert less.shape[1] < whole.shape[1] - 200, "no empty panels"
    assert overview(MaskHistory(moments=found.moments), {}, "units alone", {"b": 3}).shape[2] == WIDTH


def test_short_names() -> None:
    assert short("blocks.3.attn.qkv.weight") == "3 attn.qkv"
    assert short("blocks.11") == "11"
    assert short("patch_embed.proj.weight") == "patch_embed.proj"
