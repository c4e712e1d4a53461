"""Images for a run: opened by name, held in memory or streamed, augmented, in batches on the device.

A training loop needs two lines of it::

    data = create_data(DataConfig(batch_size=64), device="cpu", seed=0)
    for images, targets in data.train.batches(epoch=0):
        ...

Names are opened in ``data_sources.py``, batches are made in ``data_batches.py``, pictures in ``augment.py``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor, distributed
from torchvision import transforms

from experiments.data.batches import (
    Batch,
    EvalBatches,
    Finish,
    LoaderEval,
    LoaderTrain,
    MemoryEval,
    MemoryTrain,
    Place,
    Report,
    StreamEval,
    StreamTrain,
    TrainBatches,
)
from experiments.data.data_config import EMBEDDED, DataConfig
from experiments.data.sources import ImageSource, StreamSource, UnreadableImage, open_sources

__all__ = ["EMBEDDED", "Batch", "Data", "DataConfig", "create_data"]

_logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True)
class Data:
    """What a training loop needs of its images."""

    train: TrainBatches
    eval: EvalBatches
    class_names: tuple[str, ...]
    image_size: int  #: pixels
    in_chans: int
    mean: tuple[float, ...]  #: per channel, of values in 0 .. 1
    std: tuple[float, ...]
    train_size: int  #: images
    eval_size: int
    path: str  #: "in memory on cpu", "timm loader, 2 workers"
    corrupt_files: dict[str, str]  #: reason by name of each image that this process could not read; grows

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the incomplete last one is dropped."""
        return self.train.steps_per_epoch


def _peek(source: ImageSource, count: int = 16) -> tuple[int | None, tuple[int, int], int]:
    """The side that some images share (None if they differ or are not square), the first size, and the channels."""
    images = []
    for index in torch.linspace(0, len(source) - 1, min(count, len(source))).long().tolist():
        try:
            images.append(source.load(index))
        except UnreadableImage:
            continue
    if not images:
        raise ValueError(f"none of {count} images could be read, the first is {source.name(0)}")
    sizes = {image.size for image in images}
    first = images[0].size
    greyscale = all(image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;") for image in images)
    return first[0] if sizes == {(first[0], first[0])} else None, first, 1 if greyscale else 3


def _eval_transform(config: DataConfig, size: int) -> transforms.Compose:
    """PIL image to uint8 [C, size, size]: resized to size / crop_pct, centre."""
    return create_transform(size, interpolation=config.interpolation, crop_pct=config.crop_pct, use_prefetcher=True)


def _train_transform(config: DataConfig, size: int, mean: tuple[float, ...]) -> Callable[[Any], Any]:
    """PIL image to uint8 [C, size, size]: what must be done to single images of full resolution.

    That is the resized crop and the policy. All the rest happens to whole batches, as it does in memory.
    """
    try:
        crop, policy, last = create_transform(
            size,
            is_training=True,
            separate=True,
            scale=(config.crop_scale, 1.0),
            hflip=0.0,
            color_jitter=None,  # type: ignore[arg-type]  # timm's own check is "is not None"
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=mean,
            use_prefetcher=True,
        )
    # timm asserts on the text of a policy, and fails in many ways on its parts.
    except Exception as error:
        raise ValueError(
            f"data.auto_augment is {config.auto_augment!r} ({error or type(error).__name__}); "
            "it must be one of timm's policies, as 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3' or 'original'"
        ) from error
    resize = crop if config.crop_scale < 1 else transforms.Compose(_eval_transform(config, size).transforms[:2])
    return transforms.Compose([*resize.transforms, *policy.transforms, *last.transforms])


def _decode(
    config: DataConfig, source: ImageSource, shape: tuple[int, int, int], report: Report
) -> tuple[Tensor, Tensor]:
    """All readable images as uint8 [N, C, S, S], and their classes, int64 [N]; ``shape`` is (C, S, S).

    What one process cannot read, all leave out: they share out one order of the same images.
    """
    if config.crop_pct == 1 and (plain := source.pixels(shape)) is not None:
        return plain, source.targets
    transform = _eval_transform(config, shape[-1])
    images = torch.empty((len(source), *shape), dtype=torch.uint8)

    def one(index: int) -> UnreadableImage | None:
        try:
            images[index] = transform(source.load(index))
            return None
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(max(1, min(config.workers, os.cpu_count() or 1))) as pool:
        failures = list(pool.map(one, range(len(source))))
    good = torch.tensor([failure is None for failure in failures], dtype=torch.uint8)
    told = torch.zeros_like(good)  # by the first process, of what it cannot read itself
    if distributed.is_available() and distributed.is_initialized():
        first = good.clone()
        distributed.broadcast(first, src=0)
        told = 1 - first if distributed.get_rank() > 0 else told
        distributed.all_reduce(good, op=distributed.ReduceOp.MIN)
    unreadable = [failure for failure, known in zip(failures, told, strict=True) if failure is not None and not known]
    report([(failure.name, failure.reason) for failure in unreadable])
    if good.all():
        return images, source.targets
    if not good.any():
        raise ValueError(f"none of {len(source)} images can be read, the first is {failures[0] or source.name(0)}")
    return images[good.bool()], source.targets[good.bool()]


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, of values in 0 .. 1, exact: from a count of each of the 256 values.

    Args:
        images: uint8 [N, C, S, S].
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        count = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().double()
        mean = (count @ values / count.sum()).item()
        means.append(mean)
        stds.append(max((count @ (values - mean) ** 2 / count.sum()).sqrt().item(), 1e-6))
    return tuple(means), tuple(stds)


def _statistics(config: DataConfig, channels: int, images: Tensor | None) -> tuple[tuple[float, ...], ...]:
    """Mean and std: as configured, else measured on images in memory, else ImageNet's."""
    if config.mean is not None and config.std is not None:
        if len(config.mean) != channels or len(config.std) != channels:
            raise ValueError(
                f"data.mean has {len(config.mean)} and data.std {len(config.std)} numbers, the images have "
                f"{channels} channels; give one number per channel, or null"
            )
        return tuple(config.mean), tuple(config.std)
    if images is not None:
        return mean_and_std(images)
    if channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)


def _check_batches(config: DataConfig, train_size: int, world_size: int) -> None:
    problems = []
    if config.batch_size % world_size:
        problems.append(
            f"data.batch_size is {config.batch_size} over all processes together, and there are {world_size}; "
            f"it must be a multiple of {world_size}, as {-(-config.batch_size // world_size) * world_size}, or start "
            f"{max(n for n in range(1, world_size) if config.batch_size % n == 0)} of them"
        )
    elif config.mixes and config.batch_size // world_size % 2:
        problems.append(
            f"data.batch_size is {config.batch_size}, {config.batch_size // world_size} on each process, and mixup "
            f"and cutmix mix pairs; it must be a multiple of {2 * world_size}"
        )
    if train_size < config.batch_size:
        problems.append(
            f"data.batch_size is {config.batch_size}, but there are only {train_size} training images; "
            f"it must be at most {train_size}"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _fits(config: DataConfig, size: int, native: int | None, channels: int, images: int) -> bool:
    if config.in_memory != "auto":
        return config.in_memory == "always"
    loses = bool(config.auto_augment) or (config.crop_scale < 1 and native != size)
    return not loses and images * channels * size * size <= config.memory_limit * GIB


def create_data(
    config: DataConfig, *, device: torch.device | str, seed: int, rank: int = 0, world_size: int = 1
) -> Data:
    """Opens the data and chooses its path: in memory on the device where it fits, else timm's readers in workers.

    Args:
        config: what to open and how to augment it. ``batch_size`` is over all processes together.
        device: where batches lie.
        seed: of order and augmentation; together with epoch and batch it decides every training picture.
        rank, world_size: this process and their number.

    Raises:
        ValueError: what is wrong in terms of ``data.*``, and what would work.
    """
    place = Place(torch.device(device), rank, world_size)
    together = config.download and world_size > 1 and distributed.is_initialized()
    if together and rank > 0:
        distributed.barrier()  # until the first process has downloaded
    train, evaluation = open_sources(config)
    if together and rank == 0:
        distributed.barrier()
    if isinstance(train, StreamSource) or isinstance(evaluation, StreamSource):
        return _create_streamed(config, train, evaluation, place, seed)

    native, first, own_channels = _peek(train)
    size = config.image_size or native
    if size is None:
        raise ValueError(
            f"data.image_size is null, but the images in data.root {config.root!r} are not of one square size (the "
            f"first is {first[0]} x {first[1]}); set data.image_size, as 224"
        )
    channels = config.in_chans or own_channels
    mode = "L" if channels == 1 else "RGB"
    train, evaluation = replace(train, mode=mode), replace(evaluation, mode=mode)
    _check_batches(config, len(train), world_size)

    corrupt_files: dict[str, str] = {}
    report = Report(corrupt_files)
    train_batches: TrainBatches
    eval_batches: EvalBatches
    train_size, eval_size = len(train), len(evaluation)
    if _fits(config, size, native, channels, train_size + eval_size):
        shape = (channels, size, size)
        images, targets = _decode(config, train, shape, report)
        eval_images, eval_targets = _decode(config, evaluation, shape, report)
        train_size, eval_size = len(images), len(eval_images)
        _check_batches(config, train_size, world_size)
        mean, std = _statistics(config, channels, images)
        finish = Finish(config.augmentation, torch.tensor(mean), torch.tensor(std), config.batch_size, place, seed)
        images, targets = images.to(place.device), targets.to(place.device)
        train_batches = MemoryTrain(images, targets, finish, config.repeated_augmentation)
        eval_images, eval_targets = eval_images.to(place.device), eval_targets.to(place.device)
        eval_batches = MemoryEval(eval_images, eval_targets, finish, config.eval_batch_size)
        path = f"in memory on {place.device}"
    else:
        mean, std = _statistics(config, channels, None)
        finish = _finish_of_loader(config, mean, std, place, seed)
        train_batches = LoaderTrain(
            train,
            _train_transform(config, size, mean),
            finish,
            config.repeated_augmentation,
            config.workers,
            report,
        )
        eval_batches = LoaderEval(
            evaluation, _eval_transform(config, size), finish, config.eval_batch_size, config.workers, report
        )
        path = f"timm loader, {config.workers} workers"
    return Data(
        train=train_batches,
        eval=eval_batches,
        class_names=train.class_names,
        image_size=size,
        in_chans=channels,
        mean=mean,
        std=std,
        train_size=train_size,
        eval_size=eval_size,
        path=path,
        corrupt_files=corrupt_files,
    )


def _finish_of_loader(
    config: DataConfig, mean: tuple[float, ...], std: tuple[float, ...], place: Place, seed: int
) -> Finish:
    """All but the resized crop, which the workers make from the full resolution."""
    augmentation = replace(config.augmentation, crop_scale=1.0)
    return Finish(augmentation, torch.tensor(mean), torch.tensor(std), config.batch_size, place, seed)


def _create_streamed(
    config: DataConfig,
    train: ImageSource | StreamSource,
    evaluation: ImageSource | StreamSource,
    place: Place,
    seed: int,
) -> Data:
    assert isinstance(train, StreamSource)
    assert isinstance(evaluation, StreamSource)
    problems = []
    if config.image_size is None:
        problems.append("data.image_size is null; a streamed data set needs it, as 224")
    if config.in_memory == "always":
        problems.append("data.in_memory is 'always'; a streamed data set cannot be held, set it to auto")
    if config.repeated_augmentation > 1:
        problems.append(
            f"data.repeated_augmentation is {config.repeated_augmentation}; a streamed data set comes in its own "
            "order, set it to 1"
        )
    readers = place.world_size * max(1, config.workers)
    if train.shards is not None and train.shards < readers:
        problems.append(
            f"data.train_split has {train.shards} shards for {readers} readers ({place.world_size} processes, "
            f"data.workers {config.workers}), and some would have nothing to read; at least {readers} are needed"
        )
    if problems:
        raise ValueError("\n".join(problems))
    if train.shards is not None and train.shards % readers and place.rank == 0:
        _logger.warning(
            "data.train_split: %d shards do not divide evenly over %d readers (%d processes, data.workers %d): in an "
            "epoch some images come twice and others not at all",
            train.shards,
            readers,
            place.world_size,
            config.workers,
        )
    _check_batches(config, train.size, place.world_size)
    assert config.image_size is not None
    channels = config.in_chans or 3
    mean, std = _statistics(config, channels, None)
    finish = _finish_of_loader(config, mean, std, place, seed)
    train_transform = _train_transform(config, config.image_size, mean)
    eval_transform = _eval_transform(config, config.image_size)
    return Data(
        train=StreamTrain(train, train_transform, finish, config.workers),
        eval=StreamEval(evaluation, eval_transform, finish, config.eval_batch_size, config.workers),
        class_names=train.class_names,
        image_size=config.image_size,
        in_chans=channels,
        mean=mean,
        std=std,
        train_size=train.size,
        eval_size=evaluation.size,
        path=f"timm loader, streamed, {config.workers} workers",
        corrupt_files={},
    )
