"""One process that trains runs, one after the other: the images are read once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.commands import export
from experiments.commands.train_request import read_command_line
from experiments.data.create_data import create_data
from experiments.gpu.record import in_one_line
from experiments.processes.signals import StopRequest
from experiments.run_folder.folder import create_run_folder
from experiments.terminal import Display
from experiments.training.loop import Loop, Stopped
from experiments.training.trainer import Trainer

EVERY = 1.0
"""Seconds between two words on how far a run is."""


@dataclass(frozen=True)
class Order:
    """A run to train."""

    arguments: tuple[str, ...]  #: of ``sparse-trainer train``
    keep: Path | None = None  #: where its network is also written, in 16 bits


def work(pipe: Connection, threads: int) -> None:
    """Train what comes through the pipe, until None does.

    What is said back: ``("begun", steps in all, epochs)``, ``("step", steps done, seconds)``, and last
    ``("done", "")``, ``("stopped", "")`` or ``("failed", why)``. Whatever comes while a run goes on ends it.
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    open_data = cache(create_data)
    while (order := pipe.recv()) is not None:
        try:
            pipe.send((_train(order, pipe, open_data), ""))
        except Exception as error:  # the next run may be luckier
            pipe.send(("failed", in_one_line(error)))


class _Telling(Display):
    """Says how far the run is, and listens whether it is to end."""

    def __init__(self, pipe: Connection, stop: StopRequest, total: int) -> None:
        super().__init__(Console(quiet=True), total)
        self.pipe, self.stop = pipe, stop
        self._begun = self._told = time.monotonic()
        self._first = 0

    def advance(self, step: int) -> None:
        now = time.monotonic()
        if self._first == 0:  # what is compiled in the first step is no measure of the others
            self._first, self._begun, self._told = step, now, now
        elif now - self._told >= EVERY:
            self._told = now
            self.pipe.send(("step", step - self._first, now - self._begun))
        if self.pipe.poll():
            self.pipe.recv()
            self.stop.made = True


def _train(order: Order, pipe: Connection, open_data: Any) -> str:
    config, _ = read_command_line(order.arguments)
    data = open_data(config.data, device=config.training.device, seed=config.training.seed)
    trainer = Trainer(config, data)
    pipe.send(("begun", trainer.plan.total_steps, trainer.plan.total_steps / trainer.plan.steps_per_epoch))
    loop = Loop(trainer, create_run_folder(config.output, config.recipe))
    stop = StopRequest()
    try:
        with _Telling(pipe, stop, trainer.plan.total_steps) as display:
            loop.run(display, stop)
    except Stopped:
        return "stopped"
    if order.keep is not None:
        convert(loop.folder.sparse, order.keep, "float16")
    return "done"


def convert(checkpoint: Path, target: Path, dtype: str) -> None:
    """Write a checkpoint again, in another precision."""
    arguments: Sequence[str] = [str(checkpoint), "--format", "sparse", "--dtype", dtype, "--output", str(target)]
    code = export.main([*arguments, "--overwrite", "--json"])
    if code != 0:
        raise RuntimeError(f"{checkpoint} could not be written in {dtype}")
