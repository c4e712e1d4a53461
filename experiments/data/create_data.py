"""Images for a run: opened by name, held in memory or streamed, augmented, in batches on the device.

A training loop needs two lines of it::

    data = create_data(DataConfig(batch_size=64), device="cpu", seed=0)
    for images, targets in data.train.batches(epoch=0):
        ...

Names are opened in ``sources.py``, files are read in ``picture.py``, batches are made in ``batches.py``.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, distributed

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
from experiments.data.picture import UnreadableImage
from experiments.data.sources import ImageSource, StreamSource, open_eval_source, open_sources
from experiments.data.survey import describe, refuse_class, survey
from experiments.data.transforms import eval_transform, train_transform

__all__ = ["EMBEDDED", "Batch", "Data", "DataConfig", "EvalData", "create_data", "create_eval_data"]

_logger = logging.getLogger(__name__)

GIB = 2**30


CONSTANT_LOOKED_AT = 128
"""Of the images that are not held in memory, so many are decoded at the start."""


@dataclass(frozen=True)
class EvalData:
    """What an evaluation needs of its images."""

    eval: EvalBatches
    class_names: tuple[str, ...]
    image_size: int  #: pixels
    in_chans: int
    mean: tuple[float, ...]  #: per channel, of values in 0 .. 1
    std: tuple[float, ...]
    eval_size: int  #: images
    path: str  #: "in memory on cpu", "timm loader, 2 workers"
    corrupt_files: dict[str, str]  #: reason by name of each image that this process could not read; grows
    summary: tuple[str, str]  #: what was read, in two lines: classes with their images, and what the files are like

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Data(EvalData):
    """What a training loop needs of its images."""

    train: TrainBatches
    train_size: int  #: images

    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the incomplete last one is dropped."""
        return self.train.steps_per_epoch


@dataclass(frozen=True)
class _Decoded:
    """Images that could be read."""

    images: Tensor  #: uint8 [N, C, S, S]
    targets: Tensor  #: int64 [N]
    constant: tuple[str, ...]  #: names of those of one colour


def _decode(config: DataConfig, source: ImageSource, shape: tuple[int, int, int], report: Report) -> _Decoded:
    """All readable images in the ``shape`` (C, S, S).

    What one process cannot read, all leave out: they share out one order of the same images.
    """
    if config.crop_pct == 1 and (plain := source.pixels(shape)) is not None:
        return _Decoded(plain, source.targets, _constant(plain, source))
    transform = eval_transform(config, shape[-1])
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
    if not good.any():
        raise ValueError(f"none of {len(source)} images can be read, the first is {failures[0] or source.name(0)}")
    if not good.all():
        images, source = images[good.bool()], source.select(good.nonzero().squeeze(1))
    return _Decoded(images, source.targets, _constant(images, source))


def _constant(images: Tensor, source: ImageSource) -> tuple[str, ...]:
    """Names of the images [N, C, S, S] in which all pixels are alike."""
    # In parts: compared at once, they would take as much memory again.
    alike = torch.cat([(part == part[:, :, :1, :1]).flatten(1).all(dim=1) for part in images.split(1024)])
    return tuple(source.name(index) for index in alike.nonzero().flatten().tolist())


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

    train, evaluation = _with_level(train, config), _with_level(evaluation, config)
    seen = survey(train, training=True, all_modes=config.in_chans is None)
    size = config.image_size or seen.side
    if size is None:
        width, height = seen.first_size
        raise ValueError(
            f"data.image_size is null, but the images in data.root {config.root!r} are not of one square size (the "
            f"first is {width} x {height}); set data.image_size, as 224"
        )
    channels = config.in_chans or seen.channels
    mode = "L" if channels == 1 else "RGB"
    train, evaluation = replace(train, mode=mode), replace(evaluation, mode=mode)
    _check_batches(config, len(train), world_size)

    corrupt_files: dict[str, str] = {}
    report = Report(corrupt_files)
    train_batches: TrainBatches
    train_size = len(train)
    holds = _fits(config, size, seen.side, channels, len(train) + len(evaluation))
    if holds:
        decoded = _decode(config, train, (channels, size, size), report)
        train_size = len(decoded.images)
        _check_classes(train, decoded.targets, corrupt_files)
        _check_batches(config, train_size, world_size)
        mean, std = _statistics(config, channels, decoded.images)
        finish = Finish(config.augmentation, torch.tensor(mean), torch.tensor(std), config.batch_size, place, seed)
        images, targets = decoded.images.to(place.device), decoded.targets.to(place.device)
        train_batches = MemoryTrain(images, targets, finish, config.repeated_augmentation)
    else:
        mean, std = _statistics(config, channels, None)
        finish = _finish_of_loader(config, mean, std, place, seed)
        decoded = _decode(config, _some_of(train), (channels, size, size), report)
        seen.constant_of = len(decoded.images)
        train_batches = LoaderTrain(
            train,
            train_transform(config, size, mean),
            finish,
            config.repeated_augmentation,
            config.workers,
            report,
        )
    eval_batches, eval_size = _eval_batches(config, evaluation, size, channels, finish, report, holds)
    seen.constant = decoded.constant
    seen.unreadable |= corrupt_files
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
        path=f"in memory on {place.device}" if holds else f"timm loader, {config.workers} workers",
        corrupt_files=corrupt_files,
        summary=describe(config, train, evaluation, seen, channels),
    )


def create_eval_data(
    config: DataConfig, *, class_names: tuple[str, ...] | None, image_size: int, in_chans: int, device: str
) -> EvalData:
    """The images to evaluate a trained network on; those that it was trained on need not be there.

    Args:
        config: ``mean`` and ``std`` are given.
        class_names: those that the network knows; there need not be images of all. None for those of the data.

    Raises:
        ValueError: as :func:`create_data`.
    """
    assert config.mean is not None
    assert config.std is not None
    evaluation = open_eval_source(config, class_names)
    if isinstance(evaluation, StreamSource):
        return _eval_streamed(config, evaluation, Place(torch.device(device)))
    evaluation = replace(_with_level(evaluation, config), mode="L" if in_chans == 1 else "RGB")
    mean, std = _statistics(config, in_chans, None)
    corrupt_files: dict[str, str] = {}
    report = Report(corrupt_files)
    finish = _finish_of_loader(config, mean, std, Place(torch.device(device)), 0)
    holds = _fits(config, image_size, None, in_chans, len(evaluation))
    batches, count = _eval_batches(config, evaluation, image_size, in_chans, finish, report, holds)
    seen = survey(evaluation)
    seen.unreadable |= corrupt_files
    return EvalData(
        eval=batches,
        class_names=evaluation.class_names,
        image_size=image_size,
        in_chans=in_chans,
        mean=mean,
        std=std,
        eval_size=count,
        path=f"in memory on {device}" if holds else f"timm loader, {config.workers} workers",
        corrupt_files=corrupt_files,
        summary=describe(config, None, evaluation, seen, in_chans),
    )


def _with_level(source: ImageSource, config: DataConfig) -> ImageSource:
    return replace(source, white_level=config.white_level)


def _some_of(source: ImageSource) -> ImageSource:
    """A few images from all over it."""
    chosen = torch.linspace(0, len(source) - 1, min(CONSTANT_LOOKED_AT, len(source))).long()
    return source.select(chosen)


def _check_classes(source: ImageSource, targets: Tensor, corrupt: dict[str, str]) -> None:
    """Refuse to train a class of which no image could be read."""
    count = targets.bincount(minlength=len(source.class_names))
    for label in source.targets.unique().tolist():
        if not count[label]:
            refuse_class(source, label, corrupt)


def _eval_batches(
    config: DataConfig,
    source: ImageSource,
    size: int,
    channels: int,
    finish: Finish,
    report: Report,
    holds: bool,
) -> tuple[EvalBatches, int]:
    """The batches, and how many images they hold."""
    if not holds:
        transform = eval_transform(config, size)
        return LoaderEval(source, transform, finish, config.eval_batch_size, config.workers, report), len(source)
    decoded = _decode(config, source, (channels, size, size), report)
    device = finish.place.device
    images, targets = decoded.images.to(device), decoded.targets.to(device)
    return MemoryEval(images, targets, finish, config.eval_batch_size), len(images)


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
    held_out = _eval_streamed(config, evaluation, place, seed)
    finish = _finish_of_loader(config, held_out.mean, held_out.std, place, seed)
    transform = train_transform(config, held_out.image_size, held_out.mean)
    return Data(**vars(held_out), train=StreamTrain(train, transform, finish, config.workers), train_size=train.size)


def _eval_streamed(config: DataConfig, evaluation: StreamSource, place: Place, seed: int = 0) -> EvalData:
    assert config.image_size is not None
    channels = config.in_chans or 3
    mean, std = _statistics(config, channels, None)
    finish = _finish_of_loader(config, mean, std, place, seed)
    transform = eval_transform(config, config.image_size)
    return EvalData(
        eval=StreamEval(evaluation, transform, finish, config.eval_batch_size, config.workers),
        class_names=evaluation.class_names,
        image_size=config.image_size,
        in_chans=channels,
        mean=mean,
        std=std,
        eval_size=evaluation.size,
        path=f"timm loader, streamed, {config.workers} workers",
        corrupt_files={},
        summary=(f"{len(evaluation.class_names):,} classes", "a stream, which is not looked through"),
    )
