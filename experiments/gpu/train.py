"""The grid ``cifar10``: several runs side by side on one GPU, as many as fit, the most worthy ones first."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.timing import describe_machine
from experiments.config.reading import find_config, load_config
from experiments.gpu import slot, worth
from experiments.gpu.record import Deadline, Record
from experiments.gpu.results import KEPT, Results, network_beside
from experiments.gpu.settings import Settings
from experiments.gpu.worth import Pace, Progress, Task
from experiments.grids.grid import Grid, Runs, read_grid
from experiments.grids.report import read_outcome

SETTLED = 10.0
"""Seconds after which the pace of a run is believed."""
PAUSE = Pace.WINDOW + 5.0
"""Seconds between two looks at whether all runs end in time: each that is given up makes the others faster, which must
show in their pace."""
DRY_CHANGES = (
    *("--model.kwargs", '{"patch_size": 7, "embed_dim": 24, "num_heads": 3}', "--data.dataset", "fashion-mnist-10k"),
    *("--data.root", "null", "--data.image_size", "28", "--data.batch_size", "8", "--data.train_subset", "40"),
    *("--data.eval_subset", "20", "--schedule.warmup_epochs", "0.5", "--training.device", "cpu"),
    *("--training.amp", "float32"),
)


@dataclass
class Slot:
    """A process that trains, and what it trains."""

    process: BaseProcess
    pipe: Connection
    task: Task | None = None
    total: int = 0
    epochs: float = 0.0
    progress: Progress | None = None
    pace: Pace = field(default_factory=Pace)
    since: float = field(default_factory=time.monotonic)
    stopping: bool = False

    def knows_pace(self) -> bool:
        return self.progress is not None and self.progress.seconds >= SETTLED


def run(settings: Settings) -> int:
    """Train until the time is over; returns the exit code, 1 if a run failed."""
    with tempfile.TemporaryDirectory(prefix="sparse-trainer-gpu-") as scratch:
        return Training(settings, Path(scratch)).run()


def prepare(settings: Settings) -> Grid:
    """The grid, as long as asked for."""
    grid = read_grid(find_config("cifar10_deit_tiny").parent / "grids" / "cifar10.yaml")
    return worth.shorten(grid, load_config(find_config(grid.recipe)).training.epochs, settings.epochs)


class Training:
    """The runs of one call.

    Args:
        scratch: folder of the run folders, of which none comes home.
    """

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings = settings
        self.deadline = Deadline(settings.seconds)
        self.grid = prepare(settings)
        device = torch.device("cpu" if settings.dry else "cuda")
        self.machine = describe_machine(device)
        self.record = Record(settings.output / "train.json", machine=self.machine, dry=settings.dry)
        self.results = Results(settings, self.grid)
        changes = ["--training.checkpoint_every", "100000"]
        changes += (
            DRY_CHANGES if settings.dry else ("--data.root", str(settings.data.absolute()), "--data.workers", "4")
        )
        changes += ["--training.compile", "true"] if settings.compile else []
        self.threads = max(1, (os.cpu_count() or 1) // settings.jobs)
        self.runs = Runs(self.grid, scratch / self.grid.name, self.threads, changes)
        self.runs.folder.mkdir()
        entries, seeds = (worth.DRY_ENTRIES, (0,)) if settings.dry else (worth.ENTRIES, self.grid.seeds)
        self.order = worth.tasks(entries, seeds)
        self.waiting = [task for task in self.order if task not in self.results.done]
        self.context = multiprocessing.get_context("spawn")
        self.slots: list[Slot] = []
        self.epoch_seconds: list[float] = []  # of dense, as each run that is going on or done has it
        self.good = True
        self.looked = time.monotonic()

    def run(self) -> int:
        """Train what fits; returns the exit code."""
        for path in self.settings.have:
            network_beside(path, self.runs.path("dense", 0))
        self.slots = [self._open() for _ in range(min(self.settings.jobs, len(self.waiting)))]
        try:
            while True:
                for each in self.slots:
                    if each.task is None and self.waiting:
                        self._begin(each)
                if all(each.task is None for each in self.slots) or self.deadline.left <= 0:
                    break
                for pipe in wait([each.pipe for each in self.slots if each.task is not None], timeout=1.0):
                    self._hear(next(each for each in self.slots if each.pipe is pipe))
                self._give_up()
        finally:
            for each in self.slots:
                each.process.kill()
        for each in self.slots:
            if each.task is not None:
                self._note(each.task, skipped="the time was over before its end")
        for task in self.waiting:
            self._note(task, skipped=f"{self.deadline.left:.0f} s left")
        return 0 if self.good else 1

    def _open(self) -> Slot:
        """A new process."""
        own, other = self.context.Pipe()
        process = self.context.Process(target=slot.work, args=(other, self.threads), daemon=True)
        process.start()
        other.close()
        return Slot(process, own)

    def _begin(self, each: Slot) -> None:
        """Give it the next run, if one fits."""
        trained = {task for task in self.order if read_outcome_of(self.runs.path(*task))}
        running = {other.task for other in self.slots if other.task is not None}
        task = worth.next_task(self.waiting, self.grid, trained, running)
        if task is None:
            return
        entry, seed = task
        if self.epoch_seconds:
            epochs = self.grid.entries[entry]["training"]["epochs"]
            expected = worth.expected_seconds(entry, epochs, self.epoch_seconds[-1])
            if expected > self.deadline.left and not self.settings.dry:
                self.waiting.remove(task)
                self._note(task, skipped=f"{expected:.0f} s are needed, {self.deadline.left:.0f} s left")
                return
        self.waiting.remove(task)
        keep = self.settings.output / KEPT if task == ("dense", 0) else None
        each.task, each.progress, each.pace, each.stopping = task, None, Pace(), False
        each.since = time.monotonic()
        # No run folder is there yet, so there is nothing to resume.
        arguments = [word for word in self.runs.command(entry, seed)[1:] if word not in ("--resume", "auto")]
        each.pipe.send(slot.Order(tuple(arguments), keep))
        self._note(task, begun=True)

    def _hear(self, each: Slot) -> None:
        """Take in what a process says."""
        assert each.task is not None
        task = each.task
        try:
            word, *values = each.pipe.recv()
        except (EOFError, OSError):
            each.process.join(5)
            self.good = False
            self._note(task, failed=f"its process ended with code {each.process.exitcode}")
            self.slots[self.slots.index(each)] = self._open()
            return
        if word == "begun":
            each.total, each.epochs = values
        elif word == "step":
            each.progress = each.pace.hear(values[0], each.total, values[1])
            if each.knows_pace():
                self.epoch_seconds.append(self._epoch_seconds(each))
        else:
            each.task = None
            if word == "done":
                self._bring_home(task, time.monotonic() - each.since)
            elif word == "stopped":
                self._note(task, skipped="given up, so that others end in time")
            else:
                self.good = False
                self._note(task, failed=values[0])

    def _epoch_seconds(self, each: Slot) -> float:
        """Of dense, by the pace of a run."""
        assert each.task is not None
        assert each.progress is not None
        return each.progress.step_seconds * each.total / each.epochs / worth.COST.get(each.task[0], 1.0)

    def _give_up(self) -> None:
        """End the least worthy run where not all end in time."""
        if time.monotonic() - self.looked < PAUSE or self.settings.dry:
            return
        self.looked = time.monotonic()
        paces = {each.task: each.progress for each in self.slots if each.task and each.progress and each.knows_pace()}
        busy = [each for each in self.slots if each.task is not None]
        if len(paces) < len(busy) or any(each.stopping for each in busy):
            return
        given_up = worth.to_give_up(paces, self.order, self.deadline.left)
        for each in busy:
            if given_up is not None and each.task == given_up:
                each.stopping = True
                each.pipe.send("stop")

    def _bring_home(self, task: Task, seconds: float) -> None:
        """Write what a run came to."""
        outcome = read_outcome(self.runs.path(*task))
        assert outcome is not None
        self._note(task, top1=outcome.accuracy, loss=outcome.loss, took=round(seconds, 1))
        self.results.add(task, outcome, machine=self.machine, seconds=seconds)

    def _note(self, task: Task, **found: Any) -> None:
        entry, seed = task
        self.record.add(name=f"{entry}-seed{seed}", at=round(self.settings.seconds - self.deadline.left, 1), **found)
        print(f"{entry}-seed{seed}: {found}", flush=True)


def read_outcome_of(folder: Path) -> bool:
    """Whether the network of a run is there."""
    return (folder / "sparse.safetensors").is_file()
