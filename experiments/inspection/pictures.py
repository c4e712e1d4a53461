"""Pictures for ``sparse-trainer inspect --output``: images with the patches dimmed that a checkpoint drops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from experiments.data.augmentation import normalize
from experiments.data.data_config import DataConfig
from experiments.data.folders import pictures_below
from experiments.data.picture import UnreadableImage, read_picture
from experiments.data.transforms import eval_transform
from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of, open_eval_data
from experiments.evaluation.precision import precision_context
from experiments.evaluation.token_overlay import draw, examples
from models import Selection, create_model
from sparse_trainer.files.checkpoint import SparseInfo, load_sparse, read_info

MOST_IMAGES = 10
"""Rows of a picture."""


def image_files(paths: Sequence[str]) -> list[str]:
    """The files, and the images in the folders, sorted.

    Raises:
        ConfigError: a folder holds no image.
    """
    files: list[str] = []
    for name in paths:
        inside = pictures_below(Path(name)) if Path(name).is_dir() else [name]
        if not inside:
            raise ConfigError(f"--images: {name} holds no images")
        files += inside
    return files


def read_images(paths: Sequence[str], config: DataConfig, info: SparseInfo) -> tuple[list[str], Tensor]:
    """Names, and images ``[B, C, S, S]`` normalised as the model wants them: resized, and cut to the centre.

    Raises:
        ConfigError: a file is missing or no image, or a folder holds none.
    """
    files = image_files(paths)[:MOST_IMAGES]
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    transform = eval_transform(config, (height, width))
    images = []
    for file in files:
        if not Path(file).exists():
            raise ConfigError(f"--images: there is no {file}")
        try:
            picture = read_picture(file, file, "L" if info.in_chans == 1 else "RGB", config.white_level)
        except UnreadableImage as error:
            raise ConfigError(f"--images: {file} cannot be read as an image: {error.reason}") from error
        images.append(torch.as_tensor(transform(picture)).view(info.in_chans, height, width))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    return files, normalize(torch.stack(images), mean, std)


def evaluation_images(path: Path, info: SparseInfo) -> tuple[list[str], Tensor]:
    """A few of the images that the checkpoint was evaluated on: class names, and the images as above."""
    data = open_eval_data(data_of(path, info), info, "cpu")
    images, targets = next(iter(data.eval.batches()))
    places = examples(torch.arange(len(targets)), targets, MOST_IMAGES)
    return [data.class_names[int(targets[place])] for place in places], images[places]


def check_output(option: str, output: Path, checkpoint: Path, info: SparseInfo) -> None:
    """Refuse to draw what there is not, or into a file of another kind; before anything is computed.

    Raises:
        ConfigError: the checkpoint drops no patches, or the name is none of a picture.
    """
    if info.selector is None:
        raise ConfigError(f"{option}: {checkpoint} has no token selector, so it drops nothing that could be drawn")
    if output.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{option}: {output} is no name of a picture; end it in .png")


def save_picture(option: str, picture: Tensor, output: Path) -> None:
    """Write ``[3, H, W]`` in 0..1.

    Raises:
        ConfigError: it cannot be written.
    """
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    try:
        Image.fromarray(pixels).save(output)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option}: cannot write {output}: {reason}") from error


def draw_images(path: Path, paths: Sequence[str] | None, output: Path) -> tuple[list[str], Selection]:
    """Write the picture; returns the names of the images and what was kept of them.

    Raises:
        ConfigError: the checkpoint drops no patches, or a file cannot be read or written.
    """
    info = read_info(path)
    check_output("--output", output, path, info)
    names, images = read_images(paths, data_of(path, info), info) if paths else evaluation_images(path, info)
    model = load_sparse(path, create_model=create_model)
    try:
        picture, selection = draw(model, images, info.mean, info.std, precision_context(torch.device("cpu"), "float32"))
    except ValueError as error:
        raise ConfigError(f"--output: {error}") from error
    save_picture("--output", picture, output)
    return names, selection
