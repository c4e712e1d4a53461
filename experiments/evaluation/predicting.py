"""What a sparse checkpoint sees in image files: the share of each class, and the patches that it looked at."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from experiments.data.augmentation import normalize
from experiments.data.data_config import DataConfig
from experiments.data.folders import pictures_below
from experiments.data.picture import UnreadableImage, read_picture
from experiments.data.transforms import eval_transform
from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of
from experiments.evaluation.precision import precision_context
from models import create_model
from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo, load_sparse, load_sparse_masks, read_info
from sparse_trainer.kernels.accelerate import accelerate


@dataclass(frozen=True)
class Prediction:
    """Of one image."""

    name: str  #: its file
    shares: Tensor  #: ``[K]``, of each class, 1 together
    kept: tuple[int, ...]  #: patches that are left before each stage of a selector; empty without one


@dataclass(frozen=True)
class Predictions:
    """Of all images that could be read."""

    info: SparseInfo
    images: list[Prediction]
    skipped: dict[str, str]  #: reason by name of each that could not
    seconds: float  #: reading included
    first: Tensor  #: the first of the images, normalised, ``[N, C, H, W]``

    @property
    def class_names(self) -> tuple[str, ...]:
        """Their numbers, where the checkpoint knows no names."""
        return self.info.class_names or tuple(map(str, range(len(self.images[0].shares))))


def find_images(paths: Sequence[str]) -> list[str]:
    """The files, and the pictures in the folders; each once.

    Raises:
        ConfigError: one is not there, or a folder holds no picture.
    """
    files: list[str] = []
    for name in paths:
        path = Path(name)
        if not os.path.lexists(path):
            raise ConfigError(f"there is no {name}; give image files, or folders of them")
        inside = pictures_below(path) if path.is_dir() else [name]
        if not inside:
            raise ConfigError(f"{name} holds no pictures that can be read here")
        files += inside
    return list(dict.fromkeys(files))


class Reader:
    """Image files as a checkpoint's model wants them, read by threads one batch ahead."""

    def __init__(self, config: DataConfig, info: SparseInfo) -> None:
        size = cast(tuple[int, int], info.image_size)
        self.transform = eval_transform(config, size)
        self.mode = "L" if info.in_chans == 1 else "RGB"
        self.white_level = config.white_level
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))

    def read(self, file: str) -> Tensor | UnreadableImage:
        """uint8 ``[C, H, W]``, or why not."""
        try:
            return torch.as_tensor(self.transform(read_picture(file, file, self.mode, self.white_level)))
        except UnreadableImage as error:
            return error

    def batches(
        self, files: Sequence[str], batch_size: int, skipped: dict[str, str]
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Names, and normalised images ``[B, C, H, W]``; what cannot be read goes to ``skipped``."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            chunks = [files[first : first + batch_size] for first in range(0, len(files), batch_size)]
            ahead = [pool.submit(self.read, file) for file in chunks[0]]
            for number, chunk in enumerate(chunks):
                waiting, ahead = ahead, []
                if number + 1 < len(chunks):
                    ahead = [pool.submit(self.read, file) for file in chunks[number + 1]]
                names, images = [], []
                for file, found in zip(chunk, (future.result() for future in waiting), strict=True):
                    if isinstance(found, UnreadableImage):
                        skipped[file] = found.reason
                    else:
                        names.append(file)
                        images.append(found)
                if names:
                    yield names, normalize(torch.stack(images), self.mean, self.std)


@torch.inference_mode()
def predict(
    checkpoint: Path,
    files: Sequence[str],
    *,
    device: torch.device,
    amp: str,
    batch_size: int,
    keep: int = 0,
    kernels: str = "dense",
) -> tuple[Predictions, Any]:
    """What the checkpoint sees in each file, and its model.

    Args:
        amp: float32, bfloat16 or float16.
        keep: so many images are returned, at most a batch.
        kernels: dense, auto or sparse (:func:`sparse_trainer.accelerate`).

    Raises:
        CheckpointError: the file is damaged, or none, or its network cannot run.
        ConfigError: no image can be read.
    """
    info = read_info(checkpoint)
    model: Any = load_sparse(checkpoint, create_model=create_model, device=device).eval()
    if kernels != "dense":
        model = accelerate(model, load_sparse_masks(checkpoint), kernels=kernels, dtype=getattr(torch, amp))
    reader, autocast = Reader(data_of(checkpoint, info), info), precision_context(device, amp)
    skipped: dict[str, str] = {}
    found: list[Prediction] = []
    first: Tensor | None = None
    started = time.perf_counter()
    for names, images in reader.batches(files, batch_size, skipped):
        first = images[:keep].clone() if first is None else first
        kept: list[tuple[int, ...]] = [()] * len(names)
        try:
            with autocast():
                if info.selector is not None:
                    logits, selection = model(images.to(device), return_selection=True)
                    kept = [tuple(counts) for counts in selection.counts.tolist()]
                else:
                    logits = model(images.to(device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # its parts agree, but they are not those of a network
            text = str(error).splitlines()[0][:300]
            raise CheckpointError(f"{checkpoint}: its network cannot run: {text}") from error
        shares = logits.float().softmax(dim=-1).cpu()
        found += [Prediction(*one) for one in zip(names, shares, kept, strict=True)]
    if not found:
        name, reason = next(iter(skipped.items()))
        raise ConfigError(f"none of {len(files)} images can be read; the first is {name}: {reason}")
    assert first is not None
    return Predictions(info, found, skipped, time.perf_counter() - started, first), model
