"""Real images for a checkpoint: how many tokens it keeps depends on what it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of, open_eval_data
from experiments.inspection.pictures import MOST_IMAGES, image_files, read_images
from sparse_trainer.files.checkpoint import SparseInfo


def spread_out(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``count`` at equal distances; where there are too few, they begin again."""
    if count < wanted:
        return [index % count for index in range(wanted)]
    return [index * count // wanted for index in range(wanted)]


def read_sample(paths: Sequence[str], checkpoint: Path, info: SparseInfo, count: int) -> Tensor:
    """``count`` images ``[count, C, H, W]`` (or as many as there are) from all over the given files and folders.

    Raises:
        ConfigError: one cannot be read, or there is none.
    """
    files = image_files(paths)
    chosen = [files[index] for index in spread_out(len(files), min(count, len(files)))]
    config = data_of(checkpoint, info)
    read = [
        read_images(chosen[first : first + MOST_IMAGES], config, info)[1]
        for first in range(0, len(chosen), MOST_IMAGES)
    ]
    return torch.cat(read)


def evaluation_sample(checkpoint: Path, info: SparseInfo, count: int) -> Tensor:
    """``count`` of the images that the checkpoint was evaluated on, as many of each class where that can be had.

    Raises:
        ConfigError: the data is not here, or not what the checkpoint knows.
    """
    config = dataclasses.replace(data_of(checkpoint, info), eval_batch_size=count)
    try:
        try:
            data = open_eval_data(dataclasses.replace(config, eval_subset=count), info, "cpu")
        except ConfigError as error:
            if "eval_subset" not in str(error):
                raise
            data = open_eval_data(config, info, "cpu")  # a stream, or a class with few images
        images = next(iter(data.eval.batches()), (torch.empty(0), None))[0]
    except ValueError as error:
        raise ConfigError(f"{error}; or give other images with --images FOLDER") from error
    if not len(images):
        raise ConfigError(f"data.eval_split: {config.eval_split!r} holds no image; give some with --images FOLDER")
    return images


def sample(paths: Sequence[str] | None, checkpoint: Path, info: SparseInfo, count: int) -> tuple[Tensor, str]:
    """Images ``[count, C, H, W]`` for the checkpoint, as its model wants them, and where they come from."""
    if paths is not None:
        images, source = read_sample(paths, checkpoint, info, count), ", ".join(paths)
    else:
        config = data_of(checkpoint, info)
        images, source = evaluation_sample(checkpoint, info, count), f"{config.dataset} ({config.eval_split})"
    repeated = ", again and again" if len(images) < count else ""
    return images[spread_out(len(images), count)], f"{len(images):,} of {source}{repeated}"
