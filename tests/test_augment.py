"""Whole-batch augmentation against the same done to one image after another."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as reference

from experiments.data.augmentation import (
    Augmentation,
    Draw,
    augment,
    draw,
    draw_noise,
    erase,
    jitter_colors,
    normalize,
    resized_crop,
    shift_and_flip,
)

EVERYTHING = Augmentation(crop_padding=3, horizontal_flip=0.5, color_jitter=0.4, random_erasing=0.6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator())


def test_shift_and_flip_by_hand() -> None:
    image = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]], dtype=torch.uint8).repeat(3, 1, 1, 1)
    moved = shift_and_flip(
        image, down=torch.tensor([0.0, 1.0, 0.0]), right=torch.tensor([0.0, 0.0, -1.0]), flip=torch.tensor([1.0, 0, 0])
    )
    assert moved[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    assert moved[1, 0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert moved[2, 0].tolist() == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert moved.dtype == torch.uint8


def test_shift_and_flip_is_pad_crop_flip_of_each_image() -> None:
    images = random_images(40)
    drawn = draw(Augmentation(crop_padding=3, horizontal_flip=0.5), 40, 8, generator())
    moved = shift_and_flip(images, drawn.down, drawn.right, drawn.flip)
    for index, image in enumerate(images):
        top, left = int(drawn.down[index]) + 3, int(drawn.right[index]) + 3
        expected = reference.crop(reference.pad(image, [3]), top, left, 8, 8)
        assert torch.equal(moved[index], reference.hflip(expected) if drawn.flip[index] else expected)


def test_shifts_are_uniform_over_the_whole_range() -> None:
    drawn = draw(Augmentation(crop_padding=2, horizontal_flip=0.5), 20_000, 28, generator())
    for shift in (drawn.down, drawn.right):
        values, counts = shift.unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert (counts / 20_000 - 0.2).abs().max() < 0.02
    assert abs(drawn.flip.mean().item() - 0.5) < 0.02


def test_resized_crop_of_the_whole_image_is_the_image() -> None:
    images = random_images(2).float()
    zero, one = torch.zeros(2), torch.ones(2)
    flip = torch.tensor([0.0, 1.0])
    same = resized_crop(images, zero, zero, one, one, flip)
    assert torch.allclose(same[0], images[0], atol=1e-3)
    assert torch.allclose(same[1], images[1].flip(-1), atol=1e-3)


def test_resized_crop_of_a_ramp_by_hand() -> None:
    # Pixel x of the ramp has the value x, so its centre at x + 0.5 has; the box from 2 to 6 scaled to 8 pixels has its
    # centres at 2.25, 2.75 ... 5.75, where the ramp is 1.75, 2.25 ... 5.25.
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    quarter, half, none = torch.tensor([0.25]), torch.tensor([0.5]), torch.tensor([0.0])
    scaled = resized_crop(ramp, quarter, quarter, half, half, none)
    assert torch.allclose(scaled[0, 0, 3], torch.arange(1.75, 5.5, 0.5))
    mirrored = resized_crop(ramp, quarter, quarter, half, half, torch.tensor([1.0]))
    assert torch.allclose(mirrored[0, 0, 3], torch.arange(1.75, 5.5, 0.5).flip(0))


def test_resized_crops_keep_the_area_and_stay_inside() -> None:
    drawn = draw(Augmentation(crop_scale=0.3), 5_000, 32, generator())
    assert (drawn.crop_top >= 0).all()
    assert (drawn.crop_top + drawn.crop_height <= 1 + 1e-6).all()
    assert (drawn.crop_left + drawn.crop_width <= 1 + 1e-6).all()
    area = drawn.crop_height * drawn.crop_width
    inner = (drawn.crop_height < 1) & (drawn.crop_width < 1)
    assert (area[inner] >= 0.3 - 1e-5).all()
    aspect = drawn.crop_width / drawn.crop_height
    assert (aspect >= 3 / 4 - 1e-5).all()
    assert (aspect <= 4 / 3 + 1e-5).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_of_each_image(channels: int) -> None:
    images = random_images(12, channels).float() / 255
    drawn = draw(Augmentation(color_jitter=0.8), 12, 8, generator())
    jittered = jitter_colors(images, drawn.brightness, drawn.contrast, drawn.saturation)
    for index, image in enumerate(images):
        expected = reference.adjust_brightness(image, drawn.brightness[index].item())
        expected = reference.adjust_contrast(expected, drawn.contrast[index].item())
        expected = reference.adjust_saturation(expected, drawn.saturation[index].item())
        assert torch.allclose(jittered[index], expected, atol=1e-3)


def test_normalize_is_torchvisions() -> None:
    images = random_images(3)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    expected = reference.normalize(images.float() / 255, mean.tolist(), std.tolist())
    assert torch.allclose(normalize(images, mean.view(3, 1, 1), std.view(3, 1, 1)), expected)


def test_erase_takes_exactly_its_rectangle() -> None:
    images = torch.ones(64, 2, 16, 16)
    drawn = draw(Augmentation(random_erasing=0.5), 64, 16, generator())
    erased = erase(images, drawn, None)
    for index in range(64):
        expected = images[index].clone()
        top, left = int(drawn.erase_top[index]), int(drawn.erase_left[index])
        bottom, right = top + int(drawn.erase_height[index]), left + int(drawn.erase_width[index])
        assert bottom <= 16
        assert right <= 16
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(erased[index], expected)


def test_erased_rectangles_have_the_published_areas_and_rate() -> None:
    drawn = draw(Augmentation(random_erasing=0.25), 8_000, 32, generator())
    erased = drawn.erase_height > 0
    assert abs(erased.float().mean().item() - 0.25) < 0.02
    share = (drawn.erase_height * drawn.erase_width)[erased] / 32**2
    # Sides are rounded to whole pixels, so the area may leave 2 % .. 33 % by as much.
    assert share.min() > 0.01
    assert share.max() < 0.36
    assert (drawn.erase_height < 32).all()
    assert (drawn.erase_width < 32).all()


def test_erase_fills_with_noise_only_inside() -> None:
    images = torch.full((16, 3, 12, 12), 7.0)
    drawn = draw(Augmentation(random_erasing=1.0), 16, 12, generator())
    filled = erase(images, drawn, draw_noise(3, 12, generator()))
    zeroed = erase(images, drawn, None)
    assert torch.equal(filled == 7.0, zeroed == 7.0)
    inside = filled[filled != 7.0]
    assert abs(inside.mean().item()) < 0.1
    assert abs(inside.std().item() - 1) < 0.1


def test_one_kind_does_not_change_the_draw_of_another() -> None:
    alone = draw(Augmentation(crop_padding=3), 10, 8, generator(5))
    together = draw(EVERYTHING, 10, 8, generator(5))
    assert torch.equal(alone.down, together.down)
    assert torch.equal(alone.right, together.right)


def test_nothing_asked_is_normalisation_alone() -> None:
    images, one = random_images(4), torch.ones(3, 1, 1)
    drawn = draw(Augmentation(), 4, 8, generator())
    assert torch.equal(augment(images, drawn, None, Augmentation(), 0 * one, one), images.float() / 255)


def test_a_slice_of_the_batch_is_augmented_as_in_the_whole_batch() -> None:
    images, mean = random_images(10), torch.zeros(3, 1, 1)
    drawn, noise = draw(EVERYTHING, 10, 8, generator()), draw_noise(3, 8, generator())
    whole = augment(images, drawn, noise, EVERYTHING, mean, mean + 1)
    part = augment(images[4:7], Draw(*(field[4:7] for field in drawn)), noise, EVERYTHING, mean, mean + 1)
    assert torch.equal(part, whole[4:7])
