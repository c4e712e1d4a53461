"""Augmentation of a whole batch at once, on the device that holds it.

The random numbers of a batch are drawn first, on the CPU, for all its images (:func:`draw`); the pure functions
after it apply them. So one generator decides every picture, whatever the device, and a process that holds a
slice of the batch makes the same pictures as one that holds all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ERASED_AREA = (0.02, 1 / 3)  #: share of the image (Zhong et al. 2017, arXiv 1708.04896; timm's values)
ERASED_ASPECT = (0.3, 1 / 0.3)
CROP_ASPECT = (3 / 4, 4 / 3)  #: as in torchvision's and timm's RandomResizedCrop
ERASING_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image. The defaults leave it as it is."""

    crop_padding: int = 0  #: pixels of black border around the image before a random crop of its own size
    crop_scale: float = 1.0  #: least share of the area that a random resized crop keeps; 1 = no such crop
    horizontal_flip: float = 0.0  #: probability
    color_jitter: float = 0.0  #: brightness, contrast and saturation are scaled by 1 - this .. 1 + this
    random_erasing: float = 0.0  #: probability that one rectangle is erased
    erasing_mode: Literal["const", "pixel"] = "pixel"  #: fill with the mean colour, or with normal noise


class Draw(NamedTuple):
    """The random decisions for a batch: one number an image in every field, float32 [B]."""

    down: Tensor  #: shift of the crop in pixels, -padding .. padding
    right: Tensor
    flip: Tensor  #: 0 or 1
    crop_top: Tensor  #: box of the resized crop as shares of the image, 0 .. 1
    crop_left: Tensor
    crop_height: Tensor
    crop_width: Tensor
    brightness: Tensor  #: factors
    contrast: Tensor
    saturation: Tensor
    erase_top: Tensor  #: rectangle in pixels; height 0 where nothing is erased
    erase_left: Tensor
    erase_height: Tensor
    erase_width: Tensor
    noise_down: Tensor  #: where in the noise of the batch this image's noise begins, in pixels
    noise_right: Tensor


def _whole(uniform: Tensor, count: int | Tensor) -> Tensor:
    """Whole numbers 0 .. count - 1 from uniform ones in [0, 1)."""
    limit = torch.as_tensor(count, dtype=uniform.dtype)
    return (uniform * limit).floor().minimum(limit - 1)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _rectangles(area: Tensor, aspect: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Height and width in pixels of the first candidate that is smaller than the image; 0 where none is.

    ``area`` and ``aspect`` are uniform numbers [B, candidates].
    """
    pixels = _between(area, *ERASED_AREA) * size * size
    ratio = _between(aspect, math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])).exp()
    height, width = (pixels * ratio).sqrt().round(), (pixels / ratio).sqrt().round()
    fits = (height < size) & (width < size)
    first = fits.int().argmax(dim=1, keepdim=True)
    fits_at_all = fits.any(dim=1)
    height, width = (side.gather(1, first).squeeze(1) * fits_at_all for side in (height, width))
    return height, width


def draw(augmentation: Augmentation, count: int, size: int, generator: torch.Generator) -> Draw:
    """The decisions for ``count`` images of ``size`` x ``size`` pixels, on the CPU.

    Every kind of augmentation has its own columns of random numbers, so to switch one on or off leaves the
    others as they are.
    """
    uniform = torch.rand(count, 15 + 2 * ERASING_ATTEMPTS, generator=generator)
    columns = uniform[:, :15].unbind(dim=1)
    padding, jitter = augmentation.crop_padding, augmentation.color_jitter

    area = _between(columns[3], augmentation.crop_scale, 1.0)
    log_aspect = (
        _between(columns[4], math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))
        if augmentation.crop_scale < 1
        else torch.zeros(count)
    )
    crop_height = (area / log_aspect.exp()).sqrt().clamp(max=1)
    crop_width = (area * log_aspect.exp()).sqrt().clamp(max=1)

    candidates = uniform[:, 15:].unflatten(1, (2, ERASING_ATTEMPTS))
    erase_height, erase_width = _rectangles(candidates[:, 0], candidates[:, 1], size)
    erase_height = erase_height * (columns[10] < augmentation.random_erasing)
    return Draw(
        down=_whole(columns[0], 2 * padding + 1) - padding,
        right=_whole(columns[1], 2 * padding + 1) - padding,
        flip=(columns[2] < augmentation.horizontal_flip).float(),
        crop_top=columns[5] * (1 - crop_height),
        crop_left=columns[6] * (1 - crop_width),
        crop_height=crop_height,
        crop_width=crop_width,
        brightness=_between(columns[7], max(0.0, 1 - jitter), 1 + jitter),
        contrast=_between(columns[8], max(0.0, 1 - jitter), 1 + jitter),
        saturation=_between(columns[9], max(0.0, 1 - jitter), 1 + jitter),
        erase_top=_whole(columns[11], size - erase_height + 1),
        erase_left=_whole(columns[12], size - erase_width + 1),
        erase_height=erase_height,
        erase_width=erase_width,
        noise_down=_whole(columns[13], size + 1),
        noise_right=_whole(columns[14], size + 1),
    )


def draw_noise(channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Normal noise [C, 2 * size, 2 * size] from which each image of a batch takes its own window."""
    return torch.randn(channels, 2 * size, 2 * size, generator=generator)


def shift_and_flip(images: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """A window of the image's own size, moved by (down, right) pixels, then mirrored where ``flip`` is 1.

    What lies outside the image is 0. Equal to padding with zeros, cropping, and flipping each image alone.

    Args:
        images: [B, C, S, S], any dtype.
        down, right, flip: [B].
    """
    count, channels, size, _ = images.shape
    steps = torch.arange(size, device=images.device)
    rows = steps + down.long()[:, None]
    columns = torch.where(flip.bool()[:, None], size - 1 - steps, steps) + right.long()[:, None]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    pixel = rows.clamp(0, size - 1)[:, :, None] * size + columns.clamp(0, size - 1)[:, None, :]
    window = images.flatten(2).gather(2, pixel.flatten(1)[:, None].expand(-1, channels, -1))
    return window.view(count, channels, size, size) * inside[:, None]


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor) -> Tensor:
    """The box of each image, scaled up to the image's size (bilinear), then mirrored where ``flip`` is 1.

    Args:
        images: float [B, C, S, S].
        top, left, height, width: [B], shares of the image's side. flip: [B].
    """
    size = images.shape[-1]
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    rows = top[:, None] + height[:, None] * centres
    columns = left[:, None] + width[:, None] * torch.where(flip.bool()[:, None], 1 - centres, centres)
    grid = torch.stack((columns[:, None, :].expand(-1, size, -1), rows[:, :, None].expand(-1, -1, size)), dim=-1)
    return functional.grid_sample(images, 2 * grid - 1, padding_mode="border", align_corners=False)


def grey(images: Tensor) -> Tensor:
    """Luminance [B, 1, S, S] of RGB images (ITU-R 601), or the image itself if it has one channel."""
    if images.shape[1] == 1:
        return images
    # Filled on the device: numbers that are sent there make the host wait.
    weights = torch.cat([images.new_full((1, 1, 1, 1), weight) for weight in (0.299, 0.587, 0.114)], dim=1)
    return (images * weights).sum(dim=1, keepdim=True)


def jitter_colors(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scales brightness, then contrast, then saturation, as torchvision's ``adjust_*`` do.

    Images are float [B, C, S, S] in 0 .. 1, the factors [B].
    """
    factor = brightness.view(-1, 1, 1, 1)
    images = (images * factor).clamp(0, 1)
    factor = contrast.view(-1, 1, 1, 1)
    images = (images * factor + grey(images).mean(dim=(2, 3), keepdim=True) * (1 - factor)).clamp(0, 1)
    if images.shape[1] == 1:
        return images
    factor = saturation.view(-1, 1, 1, 1)
    return (images * factor + grey(images) * (1 - factor)).clamp(0, 1)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 or float [B, C, S, S] in 0 .. 255 to float32 with the given mean and std [C, 1, 1] (of 0 .. 1)."""
    return (images.float() / 255 - mean) / std


def erase(images: Tensor, drawn: Draw, noise: Tensor | None) -> Tensor:
    """One rectangle of each image replaced by its window of ``noise`` [C, 2 S, 2 S], or by 0 without noise."""
    channels, size = images.shape[1], images.shape[-1]
    steps = torch.arange(size, device=images.device)
    rows = (steps >= drawn.erase_top[:, None]) & (steps < (drawn.erase_top + drawn.erase_height)[:, None])
    columns = (steps >= drawn.erase_left[:, None]) & (steps < (drawn.erase_left + drawn.erase_width)[:, None])
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    if noise is None:
        return images.masked_fill(inside, 0.0)
    row = steps + drawn.noise_down.long()[:, None]
    column = steps + drawn.noise_right.long()[:, None]
    window = (row[:, :, None] * noise.shape[-1] + column[:, None, :]).flatten(1)
    fill = noise.flatten(1)[:, window].transpose(0, 1).reshape(-1, channels, size, size)
    return torch.where(inside, fill, images)


def augment(
    images: Tensor, drawn: Draw, noise: Tensor | None, augmentation: Augmentation, mean: Tensor, std: Tensor
) -> Tensor:
    """Training images from stored ones.

    Args:
        images: uint8 [B, C, S, S].
        drawn: the decisions for these images, on their device.
        noise: [C, 2 S, 2 S] for ``erasing_mode`` "pixel".
        mean, std: [C, 1, 1], of values in 0 .. 1.

    Returns:
        float32 [B, C, S, S], normalised.
    """
    if augmentation.crop_scale < 1:
        boxes = (drawn.crop_top, drawn.crop_left, drawn.crop_height, drawn.crop_width)
        images = resized_crop(images.float(), *boxes, drawn.flip)
    elif augmentation.crop_padding or augmentation.horizontal_flip:
        images = shift_and_flip(images, drawn.down, drawn.right, drawn.flip)
    if augmentation.color_jitter:
        factors = (drawn.brightness, drawn.contrast, drawn.saturation)
        images = jitter_colors(images.float() / 255, *factors) * 255
    images = normalize(images, mean, std)
    return erase(images, drawn, noise) if augmentation.random_erasing else images
