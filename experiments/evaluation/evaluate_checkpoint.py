"""What a sparse checkpoint achieves: its data, found and opened, and its accuracy on them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.config.reading import load_config, recipes
from experiments.config.records import naming
from experiments.data.create_data import EvalData, create_eval_data
from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from experiments.evaluation.measuring import Measured, count_used, measure
from experiments.evaluation.precision import precision_context
from models import create_model
from models.threshold_selector import ThresholdSelector
from models.top_k_selector import TopKSelector
from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo, load_sparse, load_sparse_masks, read_info
from sparse_trainer.kernels.accelerate import accelerate, describe_choices


def data_of(checkpoint: Path, info: SparseInfo) -> DataConfig:
    """The data that a checkpoint was trained on: of its run folder, else of its recipe, else the embedded set.

    How pictures are brought to their size the checkpoint itself says, where it does.
    """
    return dataclasses.replace(_known_data(checkpoint, info), **info.preparation)


def _known_data(checkpoint: Path, info: SparseInfo) -> DataConfig:
    for folder in checkpoint.resolve().parents[:2]:
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml").data
    known = recipes()
    return load_config(known[info.recipe]).data if info.recipe in known else DataConfig()


def open_eval_data(config: DataConfig, info: SparseInfo, device: str) -> EvalData:
    """The evaluation images as the checkpoint's model wants them.

    Raises:
        ConfigError: they are missing, or of other classes than the model's.
    """
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    if height != width:
        raise ConfigError(f"data.image_size: the model takes {height} x {width} pixels; only square images can be read")
    if config.image_size not in (None, height):
        raise ConfigError(
            f"data.image_size: {config.image_size} does not match the checkpoint's image size {height}; leave it out"
        )
    classes = info.class_names
    config = dataclasses.replace(config, image_size=height, in_chans=info.in_chans, mean=info.mean, std=info.std)
    with naming("data"):
        try:
            data = create_eval_data(
                config, class_names=classes, image_size=height, in_chans=info.in_chans, device=device
            )
        except OSError as error:
            raise ValueError(f"cannot be read: {error}") from error
        except ValueError as error:
            if "different classes" not in str(error):
                raise
            raise ValueError(f"{error}; choose the data that the checkpoint was trained on") from error
    if classes is not None and data.class_names != classes:
        raise ConfigError(
            f"data.dataset: {config.dataset!r} has {data.num_classes} classes ({_some(data.class_names)}), the "
            f"checkpoint knows {len(classes)} ({_some(classes)}); choose the data that it was trained on"
        )
    return data


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint achieved on a set of images."""

    info: SparseInfo
    measured: Measured
    macs: float  #: mean of one image, with the patches that these images kept
    seconds: float  #: reading the images included
    #: By the block before which patches are dropped: how many images kept so many, ``{"4": {"98": 12, ...}}``.
    histogram: dict[str, dict[str, int]]
    summary: tuple[str, str]  #: what images were read, :attr:`EvalData.summary`
    kernels: str = "dense"
    """What the layers were computed with."""


def evaluate(
    path: Path,
    data_config: DataConfig,
    *,
    device: torch.device,
    amp: str,
    at_random: bool = False,
    kernels: str = "dense",
) -> Evaluation:
    """Measure a sparse checkpoint.

    Args:
        data_config: as :func:`data_of` finds it.
        amp: float32, bfloat16 or float16.
        at_random: draw as many patches as the selector keeps, in place of those it keeps.
        kernels: dense, auto or sparse (:func:`sparse_trainer.accelerate`).

    Raises:
        CheckpointError: the file is damaged, or none, or its network cannot run.
        ConfigError: the images are missing, or of other classes than the model's.
    """
    info = read_info(path)
    model = load_sparse(path, create_model=create_model, device=device)
    if at_random:
        selector = getattr(model, "selector", None)
        if not isinstance(selector, TopKSelector | ThresholdSelector):
            raise ConfigError(f"--selection: random needs a checkpoint with a token selector; {path} has none")
        selector.chance = torch.Generator().manual_seed(0)
    data = open_eval_data(data_config, info, str(device))
    classes = getattr(model, "num_classes", data.num_classes)
    if classes != data.num_classes:
        raise ConfigError(
            f"data.dataset: {data_config.dataset!r} has {data.num_classes} classes, the checkpoint knows {classes}; "
            "choose the data that it was trained on"
        )
    fast, chosen = model, "dense"
    if kernels != "dense":
        masks = load_sparse_masks(path)
        fast = accelerate(model, masks, kernels=kernels, dtype=getattr(torch, amp))
        chosen = describe_choices(fast)
    started = time.perf_counter()
    with naming("data"):
        try:
            measured = measure(fast, data.eval, precision_context(device, amp))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # its parts agree, but they are not those of a network
            raise CheckpointError(f"{path}: its network cannot run: {str(error).splitlines()[0][:300]}") from error
    seconds = time.perf_counter() - started
    macs = float(info.macs)
    histogram: dict[str, dict[str, int]] = {}
    if measured.tokens is not None:  # they depend on the images
        size = (data.in_chans, data.image_size, data.image_size)
        macs = count_used(model, load_sparse_masks(path), measured.tokens, size).live_macs
        if measured.kept is not None and (info.selector or {}).get("kind") == "threshold":
            for stage, counts in zip(measured.tokens.stages, measured.kept.unbind(dim=1), strict=True):
                kept, images = counts.unique(return_counts=True)
                histogram[str(stage)] = dict(zip(map(str, kept.tolist()), images.tolist(), strict=True))
    return Evaluation(info, measured, macs, seconds, histogram, data.summary, chosen)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
