"""The batches of a run, one after the other, from wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.config.run_config import RunConfig
from experiments.data.create_data import Data
from experiments.data.mixing import create_mixup
from experiments.processes.processes import Processes
from experiments.training.outcome import TrainingError
from experiments.training.plan import Plan

Numbered = tuple[int, int, Tensor, Tensor]
"""Epoch, batch of the epoch, images, targets."""


class Feed:
    """Images and targets as the network sees them: this process's share of each batch, mixed.

    Args:
        config: of the run.
        data: what to train on; its batches are pure in seed, epoch and batch.
        plan: where epochs begin.
        device: where batches lie.
    """

    def __init__(self, config: RunConfig, data: Data, plan: Plan, device: torch.device, processes: Processes) -> None:
        self.data, self.plan, self.device, self.processes = data, plan, device, processes
        self.share = config.data.batch_size // processes.size  #: images of a batch that are this process's
        self.mixing = create_mixup(config.data, data.num_classes, seed=config.training.seed)
        self.error: TrainingError | None = None
        """Why this process cannot read on, where there are others."""
        self.batches: Iterator[Numbered] = self._read(0)

    def go_to(self, tried: int) -> None:
        """Go on after so many optimizer steps."""
        self.batches = self._read(tried)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch.

        Where one process of several cannot read on, it goes through the step with black images: the others are on
        their way to where they meet, and would wait for it there. The step comes to nothing.

        Raises:
            TrainingError: this process is alone and cannot read on.
        """
        try:
            epoch, batch, images, targets = next(self.batches)
        except TrainingError as error:
            if self.processes.size == 1:
                raise
            self.error = error
            self.batches = self._black()
            epoch, batch, images, targets = next(self.batches)
        return self._mixed(epoch, batch, images, targets)

    def early(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch of the first epoch, as it will be trained on; the run does not move."""
        batch %= self.plan.steps_per_epoch * self.plan.accumulate
        images, targets = next(iter(self.data.train.batches(0, batch)))
        return self._mixed(0, batch, images, targets)

    def _mixed(self, epoch: int, batch: int, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixing is None:
            return images, targets
        return self.mixing(images, targets, epoch=epoch, batch=batch)

    def _read(self, tried: int) -> Iterator[Numbered]:
        """Batches without end, from the one after so many optimizer steps."""
        epoch, start = self.plan.locate(tried)
        stop = self.plan.steps_per_epoch * self.plan.accumulate
        try:
            while True:
                batches = self.data.train.batches(epoch, start)
                for batch, (images, targets) in zip(range(start, stop), batches, strict=False):
                    yield epoch, batch, images, targets
                epoch, start = epoch + 1, 0
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            # Of a worker process it brings the whole trace, the message last.
            raise TrainingError(f"data: {str(error).strip().splitlines()[-1]}") from error

    def _black(self) -> Iterator[Numbered]:
        """What :meth:`_read` gives, without any picture."""
        size = self.data.image_size
        while True:
            images = torch.zeros(self.share, self.data.in_chans, size, size, device=self.device)
            yield 0, 0, images, torch.zeros(self.share, dtype=torch.int64, device=self.device)
