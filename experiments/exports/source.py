"""The checkpoint that is exported, and whether what was written is the same network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of
from experiments.exports import onnx
from models import create_model
from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo, load_sparse, read_sparse

MOST_VALUES = 1 << 26
"""In an image that logits are compared on: a file may say any size."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that is exported."""

    path: Path
    info: SparseInfo
    masks: Mapping[str, Tensor]  #: bool, by parameter name
    model: nn.Module  #: compact, in float32
    dtype: torch.dtype  #: to store weights in
    images: Tensor  #: ``[B, C, H, W]`` to compare logits on

    def rounded(self, model: nn.Module) -> nn.Module:
        """``model``, in float32, with the values that :attr:`dtype` can hold.

        Raises:
            ConfigError: a weight is too large for it.
        """
        if self.dtype == torch.float32:
            return model
        result = copy.deepcopy(model).to(self.dtype).float()
        for name, tensor in result.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ConfigError(
                    f"--dtype: {name_of(self.dtype)} holds at most {torch.finfo(self.dtype).max:,.0f}, and {name} has "
                    "a greater value; choose float32 or bfloat16"
                )
        return result


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def open_source(path: Path, dtype: torch.dtype | None) -> Source:
    """Read a checkpoint.

    Args:
        dtype: to store weights in; None for that of the file.

    Raises:
        CheckpointError: it is damaged, or does not take the images that it says.
    """
    contents = read_sparse(path)
    info = contents.info
    stored = next((t.dtype for t in contents.tensors.values() if t.is_floating_point()), torch.float32)
    model = load_sparse(path, create_model=create_model)
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    if info.in_chans * height * width > MOST_VALUES:  # of a model that takes images of any size
        raise CheckpointError(f"{path}: images of {height} x {width} x {info.in_chans} are too large to try it with")
    images = onnx.random_images((info.in_chans, height, width))
    try:
        with torch.inference_mode():
            model(images[:1])
    except Exception as error:  # of any model
        raise CheckpointError(f"{path}: the model does not take images of {height} x {width}: {error}") from error
    return Source(path, info, contents.masks, model, dtype or stored, images)


def images_of(source: Source) -> tuple[str, float, list[str]]:
    """Interpolation and crop of the images that the checkpoint was made for; a note where they are a guess."""
    said = source.info.preparation
    if {"interpolation", "crop_pct"} <= set(said):
        return said["interpolation"], said["crop_pct"], []
    try:
        data, notes = data_of(source.path, source.info), []
    except ConfigError:
        data = DataConfig()
        notes = [f"the run's config.yaml cannot be read; {data.interpolation} resizing without a crop is assumed"]
    return data.interpolation, data.crop_pct, notes


@torch.inference_mode()
def compare(found: nn.Module, expected: nn.Module, images: Tensor) -> float:
    """The greatest difference of their logits."""
    return float((found(images) - expected(images)).abs().max())


def check(found: nn.Module, expected: nn.Module, images: Tensor) -> None:
    """Make sure that what was written is the network that was meant.

    Raises:
        CheckpointError: its logits are others.
    """
    with torch.inference_mode():
        limit = onnx.TOLERANCE * max(1.0, float(expected(images).abs().max()))
    difference = compare(found, expected, images)
    if not difference <= limit:
        raise CheckpointError(
            f"what was written gives logits that differ from the checkpoint's by {difference:.2g}, more than "
            f"{limit:.2g}; it was removed"
        )
