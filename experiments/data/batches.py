"""Batches for training and evaluation, from memory or through worker processes.

Everything random is a pure function of (seed, epoch, batch, position): the order of an epoch, and what happens to
each image. So an epoch may be entered at any batch, and any number of processes or workers makes the same pictures.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from experiments.data.augmentation import Augmentation, Draw, augment, draw, draw_noise, normalize
from experiments.data.picture import UnreadableImage, to_mode
from experiments.data.sources import ImageSource, StreamSource
from experiments.processes.signals import leave_signals_to_parent

_logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  #: images float32 [B, C, S, S], targets int64 [B]
ORDER, PICTURES, LOADER, MIX = range(4)  #: what a seed is derived for
ATTEMPTS = 10  #: unreadable images in a row before a run gives up


class TrainBatches(Protocol):
    """The training set, one epoch at a time."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def order(self) -> tuple[int, int]:
        """What beside seed and epoch decides the order of the images: processes and workers, or zeros."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of the batches ``start``, ``start`` + 1, ... of an epoch."""
        ...


class EvalBatches(Protocol):
    """The evaluation set. Each image comes once over all processes; the last batch may be smaller."""

    def batches(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Place:
    """Which share of each batch this process takes: the ``rank``-th of ``world_size`` equal pieces in a row."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def slice(self, batch_size: int) -> slice:
        share = batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)


def derive_seeds(count: int, *parts: int) -> list[int]:
    """Well-mixed 32-bit seeds from several numbers."""
    return [int(seed) for seed in np.random.SeedSequence(parts).generate_state(count)]


def derive_seed(*parts: int) -> int:
    return derive_seeds(1, *parts)[0]


def epoch_order(count: int, batch_size: int, repeats: int, seed: int, epoch: int) -> Tensor:
    """The images of an epoch's whole batches, over all processes.

    With ``repeats`` > 1 each drawn image comes that often, and the epoch stays as long as the data set (repeated
    augmentation; Hoffer et al. 2020, as in timm's ``RepeatAugSampler``). Within a batch the copies of an image lie
    far apart: on different processes where there are several, and never mixed with each other.

    Returns:
        int64 [steps, batch_size].
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, ORDER, epoch))
    order = torch.randperm(count, generator=generator).repeat_interleave(repeats)
    batches = order[: count // batch_size * batch_size].view(-1, batch_size)
    apart = torch.cat([torch.arange(first, batch_size, repeats) for first in range(min(repeats, batch_size))])
    return batches[:, apart]


def share_of(count: int, place: Place) -> range:
    """The numbers of ``count`` images that this process evaluates: each one on exactly one process.

    The first process has one if any has.
    """
    rank, world_size = place.rank, place.world_size
    return range(-(-count * rank // world_size), -(-count * (rank + 1) // world_size))


class Finish:
    """The last steps to a training batch, on the device: augmentation of whole batches, and normalisation."""

    def __init__(
        self, augmentation: Augmentation, mean: Tensor, std: Tensor, batch_size: int, place: Place, seed: int
    ) -> None:
        self.augmentation, self.batch_size, self.place, self.seed = augmentation, batch_size, place, seed
        self.mean, self.std = (value.view(-1, 1, 1).to(place.device) for value in (mean, std))

    def __call__(self, images: Tensor, epoch: int, batch: int) -> Tensor:
        """This process's share of a batch, uint8 [B, C, S, S], to float32."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, PICTURES, epoch, batch))
        channels, size = images.shape[1], images.shape[-1]
        whole = draw(self.augmentation, self.batch_size, size, generator)
        share = torch.stack(whole)[:, self.place.slice(self.batch_size)]
        drawn = Draw(*share.to(self.place.device, non_blocking=True))
        noise = None
        if self.augmentation.random_erasing and self.augmentation.erasing_mode == "pixel":
            noise = draw_noise(channels, size, generator).to(self.place.device, non_blocking=True)
        return augment(images, drawn, noise, self.augmentation, self.mean, self.std)


class MemoryTrain:
    """Training images held as bytes on the device: uint8 [N, C, S, S]."""

    order = (0, 0)

    def __init__(self, images: Tensor, targets: Tensor, finish: Finish, repeats: int) -> None:
        self.images, self.targets, self.finish, self.repeats = images, targets, finish, repeats
        self.steps_per_epoch = len(images) // finish.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        finish = self.finish
        order = epoch_order(len(self.images), finish.batch_size, self.repeats, finish.seed, epoch)
        order = order[:, finish.place.slice(finish.batch_size)].to(self.images.device)
        for batch in range(start, self.steps_per_epoch):
            yield finish(self.images[order[batch]], epoch, batch), self.targets[order[batch]]


class MemoryEval:
    """Evaluation images held as bytes on the device: uint8 [N, C, S, S]."""

    def __init__(self, images: Tensor, targets: Tensor, finish: Finish, batch_size: int) -> None:
        share = share_of(len(images), finish.place)
        self.images, self.targets = images[share.start : share.stop], targets[share.start : share.stop]
        self.finish, self.batch_size = finish, batch_size

    def batches(self) -> Iterator[Batch]:
        for first in range(0, len(self.images), self.batch_size):
            batch = slice(first, first + self.batch_size)
            yield normalize(self.images[batch], self.finish.mean, self.finish.std), self.targets[batch]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch (CPU) inside the block and puts their states back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Sample:
    """One image on its way from a worker: uint8 [C, S, S], its class, and (file, reason) of each that failed."""

    image: Tensor | None
    target: int
    unreadable: tuple[tuple[str, str], ...] = ()


def collate(samples: list[Sample]) -> tuple[Tensor | None, Tensor, list[tuple[str, str]]]:
    """Images uint8 [B, C, S, S] (None if none could be read), targets int64 [B], and what could not be read."""
    good = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in good if sample.image is not None]) if good else None
    return images, torch.tensor([s.target for s in good]), [u for s in samples for u in s.unreadable]


Key = tuple[int, int, bool]  #: (index, seed, replace)


class Pictures(Dataset[Sample]):
    """Decoded and transformed images.

    An image that cannot be read is reported. With ``replace`` the next readable one takes its place, so that
    training batches stay whole; without, or when too many in a row fail, it is left out.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Any], Any]) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, key: Key) -> Sample:
        index, seed, replace = key
        unreadable: list[tuple[str, str]] = []
        for attempt in range(min(ATTEMPTS, len(self.source)) if replace else 1):
            number = (index + attempt) % len(self.source)
            try:
                image = self.source.load(number)
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
                continue
            with seeded(seed):
                pixels = torch.as_tensor(self.transform(image))
            return Sample(pixels, int(self.source.targets[number]), tuple(unreadable))
        return Sample(None, -1, tuple(unreadable))


class Stream(IterableDataset[Sample]):
    """Transformed images of a stream, with a seed for each: pure in (seed, worker, position)."""

    def __init__(self, stream: Any, source: StreamSource, transform: Callable[[Any], Any], seed: int) -> None:
        self.stream, self.source, self.transform, self.seed = stream, source, transform, seed

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        for position, (picture, target) in enumerate(self.stream):
            image = to_mode(picture, self.source.mode, self.source.config.white_level)
            with seeded(derive_seed(self.seed, worker.id if worker else 0, position)):
                sample = Sample(torch.as_tensor(self.transform(image)), int(target))
            yield sample


class EpochKeys(Sampler[list[Key]]):
    """The keys of this process's share of each batch, from batch ``start`` of ``epoch`` on.

    Both are set before a pass. The object stays, and with it the worker processes.
    """

    def __init__(self, count: int, repeats: int, finish: Finish) -> None:
        self.count, self.repeats, self.finish = count, repeats, finish
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[Key]]:
        finish = self.finish
        share = finish.place.slice(finish.batch_size)
        order = epoch_order(self.count, finish.batch_size, self.repeats, finish.seed, self.epoch)
        for batch, row in enumerate(order[self.start :], self.start):
            # One seed per position in the global batch, whichever process has it.
            seeds = derive_seeds(finish.batch_size, finish.seed, LOADER, self.epoch, batch)
            yield [(index, seed, True) for index, seed in zip(row.tolist()[share], seeds[share], strict=True)]


def _loader(dataset: Any, workers: int, device: torch.device, seed: int, **options: Any) -> DataLoader[Any]:
    # A generator of its own: without one, each pass would take a number from torch's global state.
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


class Report:
    """Names of files that could not be read, with the reason; each is logged once."""

    def __init__(self, files: MutableMapping[str, str]) -> None:
        self.files = files

    def __call__(self, unreadable: list[tuple[str, str]]) -> None:
        for name, reason in unreadable:
            if name not in self.files:
                _logger.warning("skipped an image that cannot be read: %s (%s)", name, reason)
                self.files[name] = reason


class LoaderTrain:
    """Training images decoded by worker processes, batch by batch."""

    order = (0, 0)

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Any],
        finish: Finish,
        repeats: int,
        workers: int,
        report: Report,
    ) -> None:
        self.finish, self.report = finish, report
        self.steps_per_epoch = len(source) // finish.batch_size
        self.keys = EpochKeys(len(source), repeats, finish)
        self.loader = _loader(
            Pictures(source, transform),
            workers,
            finish.place.device,
            derive_seed(finish.seed, LOADER),
            batch_sampler=self.keys,
            persistent_workers=workers > 0,
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        finish = self.finish
        self.keys.epoch, self.keys.start = epoch, start
        for batch, (images, targets, unreadable) in enumerate(self.loader, start):
            self.report(unreadable)
            if len(targets) < finish.batch_size // finish.place.world_size:
                raise ValueError(
                    f"{ATTEMPTS} images in a row cannot be read; is the folder still there? The last ones: "
                    + "; ".join(f"{name} ({reason})" for name, reason in unreadable[-3:])
                )
            images = images.to(finish.place.device, non_blocking=True)
            yield finish(images, epoch, batch), targets.to(finish.place.device, non_blocking=True)


class LoaderEval:
    """Evaluation images decoded by worker processes, batch by batch."""

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Any],
        finish: Finish,
        batch_size: int,
        workers: int,
        report: Report,
    ) -> None:
        self.finish, self.report = finish, report
        share = share_of(len(source), finish.place)
        keys = [
            [(index, 0, False) for index in share[first : first + batch_size]]
            for first in range(0, len(share), batch_size)
        ]
        self.loader = _loader(Pictures(source, transform), workers, finish.place.device, 0, batch_sampler=keys)

    def batches(self) -> Iterator[Batch]:
        device = self.finish.place.device
        for images, targets, unreadable in self.loader:
            self.report(unreadable)
            if images is not None:
                images = images.to(device, non_blocking=True)
                yield (
                    normalize(images, self.finish.mean, self.finish.std),
                    targets.to(device, non_blocking=True),
                )


def _checked_targets(targets: Tensor, num_classes: int) -> Tensor:
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"data.num_classes is {num_classes}, but a batch has labels {int(targets.min())} to "
            f"{int(targets.max())}; labels count from 0"
        )
    return targets


class StreamTrain:
    """Training images that come in a row. To enter an epoch at a later batch, the ones before are read and dropped."""

    def __init__(self, source: StreamSource, transform: Callable[[Any], Any], finish: Finish, workers: int) -> None:
        self.source, self.transform, self.finish, self.workers = source, transform, finish, workers
        self.steps_per_epoch = source.size // finish.batch_size
        self.order = (finish.place.world_size, workers)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        finish, place = self.finish, self.finish.place
        share = finish.batch_size // place.world_size
        seed = derive_seed(finish.seed, LOADER, epoch, place.rank)
        stream = self.source.open(share, finish.seed)
        stream.reader.dist_rank, stream.reader.dist_num_replicas = place.rank, place.world_size
        stream.set_loader_cfg(num_workers=self.workers)
        stream.set_epoch(epoch)
        loader = _loader(
            Stream(stream, self.source, self.transform, seed),
            self.workers,
            place.device,
            seed,
            batch_size=share,
            drop_last=True,
        )
        batch = -1
        for batch, (images, targets, _) in zip(range(self.steps_per_epoch), loader, strict=False):
            if batch >= start:
                targets = _checked_targets(targets, len(self.source.class_names))
                images = images.to(place.device, non_blocking=True)
                yield finish(images, epoch, batch), targets.to(place.device, non_blocking=True)
        if batch + 1 < self.steps_per_epoch:
            raise ValueError(
                f"data.dataset {self.source.config.dataset!r} ended after {batch + 1} of {self.steps_per_epoch} "
                f"batches; does it have the {self.source.size} images that it tells?"
            )


class StreamEval:
    """Evaluation images that come in a row. A stream cannot be shared out exactly: the first process reads it all."""

    def __init__(
        self,
        source: StreamSource,
        transform: Callable[[Any], Any],
        finish: Finish,
        batch_size: int,
        workers: int,
    ) -> None:
        self.source, self.transform, self.finish = source, transform, finish
        self.batch_size, self.workers = batch_size, workers

    def batches(self) -> Iterator[Batch]:
        place = self.finish.place
        if place.rank > 0:
            return
        stream = self.source.open(self.batch_size, self.finish.seed)
        stream.reader.dist_rank, stream.reader.dist_num_replicas = 0, 1
        stream.set_loader_cfg(num_workers=self.workers)
        samples = Stream(stream, self.source, self.transform, 0)
        for images, targets, _ in _loader(samples, self.workers, place.device, 0, batch_size=self.batch_size):
            targets = _checked_targets(targets, len(self.source.class_names))
            images = images.to(place.device, non_blocking=True)
            yield (
                normalize(images, self.finish.mean, self.finish.std),
                targets.to(place.device, non_blocking=True),
            )
