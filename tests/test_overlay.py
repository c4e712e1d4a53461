"""The picture of dropped patches: by hand on a grid of two by two."""

from __future__ import annotations

import pytest
import torch

from experiments.evaluation.token_overlay import DIMMED, FADE, GAP, SIDE, examples, overlay
from models import Selection


def pixel(picture: torch.Tensor, row: int, column: int) -> list[float]:
    return [round(value, 4) for value in picture[:, row, column].tolist()]


def test_two_stages_of_one_image_by_hand() -> None:
    """Two by two pixels are four patches; the first stage drops the last, the second the first too."""
    image = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]]])
    masks = (torch.tensor([[1.0, 1, 1, 0]]), torch.tensor([[0.0, 1, 1, 0]]))
    picture = overlay(image, Selection((0, 1), masks, 1), (2, 2))
    factor = SIDE // 2
    assert picture.shape == (3, GAP + SIDE + GAP, GAP + 3 * (SIDE + GAP))
    assert picture.min() >= 0
    assert picture.max() <= 1

    def at(column: int, y: int, x: int) -> list[float]:
        """The middle of a pixel of the image in a column."""
        return pixel(picture, GAP + y * factor + factor // 2, GAP + column * (SIDE + GAP) + x * factor + factor // 2)

    def dim(value: float) -> list[float]:
        return [round(value + FADE * (colour - value), 4) for colour in DIMMED]

    assert [at(0, y, x) for y in (0, 1) for x in (0, 1)] == [[0.0] * 3, [0.25] * 3, [0.5] * 3, [1.0] * 3]
    assert [at(1, y, x) for y in (0, 1) for x in (0, 1)] == [[0.0] * 3, [0.25] * 3, [0.5] * 3, dim(1.0)]
    assert [at(2, y, x) for y in (0, 1) for x in (0, 1)] == [dim(0.0), [0.25] * 3, [0.5] * 3, dim(1.0)]
    assert pixel(picture, 0, 0) == [1.0] * 3
    assert pixel(picture, GAP + 3, GAP + SIDE + GAP // 2) == [1.0] * 3


def test_a_row_per_image_in_colour() -> None:
    images = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    masks = (torch.ones(3, 6), torch.zeros(3, 6))
    picture = overlay(images, Selection((1, 2), masks, 1), (2, 3))
    factor = 14  # the least whole number that brings 8 pixels to SIDE
    assert picture.shape == (3, GAP + 3 * (8 * factor + GAP), GAP + 3 * (12 * factor + GAP))
    for row in range(3):
        top = GAP + row * (8 * factor + GAP)
        cell = picture[:, top : top + 8 * factor : factor, GAP : GAP + 12 * factor : factor]
        torch.testing.assert_close(cell, images[row])
        left = GAP + 12 * factor + GAP
        again = picture[:, top : top + 8 * factor : factor, left : left + 12 * factor : factor]
        torch.testing.assert_close(again, images[row])


def test_large_images_keep_their_size() -> None:
    picture = overlay(torch.zeros(1, 3, 224, 224), Selection((4,), (torch.ones(1, 196),), 1), (14, 14))
    assert picture.shape == (3, 224 + 2 * GAP, 2 * 224 + 3 * GAP)


def test_a_dropped_patch_shows_on_black_and_on_white() -> None:
    for value in (0.0, 1.0):
        picture = overlay(
            torch.full((1, 1, 2, 2), value), Selection((0,), (torch.tensor([[1.0, 0, 1, 0]]),), 1), (2, 2)
        )
        kept, dropped = picture[:, GAP + 9, 2 * GAP + SIDE + 9], picture[:, GAP + 9, 2 * GAP + 2 * SIDE - 9]
        assert (kept - dropped).abs().max() > 0.3


@pytest.mark.parametrize(
    ("images", "patches", "message"),
    [
        (torch.zeros(1, 1, 5, 4), 4, r"1 channels of 5 x 4 pixels cannot be drawn in 2 x 2 patches"),
        (torch.zeros(1, 2, 4, 4), 4, r"2 channels of 4 x 4 pixels"),
        (torch.zeros(1, 1, 4, 4), 9, r"the selection is not of 1 images of 2 x 2 patches"),
    ],
)
def test_what_cannot_be_drawn(images: torch.Tensor, patches: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        overlay(images, Selection((0,), (torch.ones(1, patches),), 1), (2, 2))


def test_examples_are_of_all_classes() -> None:
    """The first of each class, then the second of each."""
    targets = torch.tensor([2, 2, 2, 0, 1, 0])
    assert examples(torch.arange(6), targets, 5).tolist() == [3, 4, 0, 5, 1]
    assert examples(torch.arange(6), targets, 2).tolist() == [3, 4]
    assert len(examples(torch.arange(6), targets, 9)) == 6
