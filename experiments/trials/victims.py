"""Processes that train and may be killed at any moment: forked, so that nothing has to be imported again.

A victim tells through a pipe when it enters and leaves a phase, and notes in shared memory in which one it is: that can
be read when it is dead. The code that trains is the same as ever; a few of its functions are wrapped to tell.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.commands import train
from experiments.training import loop
from experiments.training.trainer import Trainer
from sparse_trainer.mask_log import MaskLog
from sparse_trainer.scheduler import SparsityScheduler

PHASES = (
    "start",
    "cutting back",
    "step",
    "update of the masks",
    "record of the masks",
    "evaluation",
    "resume bundle",
    "sparse checkpoint",
)
"""What a victim can be in; the inner one where one lies within another."""
START, CUTTING, STEP, UPDATE, RECORD, EVALUATION, BUNDLE, SPARSE = range(len(PHASES))
LEFT = 128
"""Added to a phase in the pipe when it is left."""
WRAPPED = (
    (loop.Loop, "_begin", CUTTING),
    (Trainer, "train_step", STEP),
    (SparsityScheduler, "_update", UPDATE),
    (MaskLog, "log_update", RECORD),
    (loop.Loop, "_evaluate", EVALUATION),
    (loop, "save_resume", BUNDLE),
    (loop, "save_sparse", SPARSE),
)


@dataclass
class Victim:
    """One process. After its end :attr:`ended` says how, as ``waitpid`` does: an exit code, or minus a signal."""

    pid: int
    pipe: int  #: read end
    board: mmap.mmap
    ended: int | None = None
    entered: dict[int, int] = field(default_factory=dict)
    """How often each phase was entered."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """How long each phase took each time, roughly."""
    _since: dict[int, float] = field(default_factory=dict)

    @property
    def phase(self) -> int:
        """Where it is, or was when it died."""
        return self.board[0]

    def listen(self, timeout: float) -> bool:
        """Take in what it tells, for so many seconds at most; False when it is dead."""
        if self.ended is not None:
            return False
        ready, _, _ = select.select([self.pipe], [], [], timeout)
        if ready:
            told = os.read(self.pipe, 1)  # one at a time, so that whoever waits for a phase hears of it at once
            if not told:
                self.bury()
                return False
            phase, now = told[0] % LEFT, time.monotonic()
            if told[0] >= LEFT:
                self.seconds.setdefault(phase, []).append(now - self._since.get(phase, now))
            else:
                self._since[phase] = now
                self.entered[phase] = self.entered.get(phase, 0) + 1
        return True

    def wait_for(self, phase: int, times: int, timeout: float) -> bool:
        """Until it enters ``phase`` for that time; False if it ends before."""
        left = timeout
        while self.entered.get(phase, 0) < times:
            if left <= 0:
                raise TimeoutError(f"process {self.pid} did not come to {PHASES[phase]!r} in {timeout:.0f} s")
            since = time.monotonic()
            if not self.listen(1.0):
                return False
            left -= min(time.monotonic() - since, 1.0)  # while all processes are suspended no time passes
        return True

    def send(self, number: int) -> None:
        if self.ended is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> bool:
        """Until it ends; False if it does not in that time."""
        left = timeout
        while self.ended is None and left > 0:
            since = time.monotonic()
            self.listen(0.2)
            left -= min(time.monotonic() - since, 0.2)
        return self.ended is not None

    def bury(self) -> None:
        """Learn how it ended; it has."""
        if self.ended is None:
            _, status = os.waitpid(self.pid, 0)
            self.ended = os.waitstatus_to_exitcode(status)
            os.close(self.pipe)


def start_victim(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Victim:
    """Fork a process that runs ``sparse-trainer train`` with ``arguments``.

    Args:
        log: what it prints is added to this file.
        environment: variables that it has beside those of this process.
    """
    board = mmap.mmap(-1, 1)
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Victim(pid, read, board)
    code = 99
    try:
        os.close(read)
        text = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(text, 1)
        os.dup2(text, 2)
        os.environ.update(environment)
        for owner, name, phase in WRAPPED:
            setattr(owner, name, _telling(getattr(owner, name), phase, board, write))
        code = train.main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _telling(function: Callable[..., Any], phase: int, board: mmap.mmap, pipe: int) -> Callable[..., Any]:
    def tell(*arguments: Any, **options: Any) -> Any:
        before, board[0] = board[0], phase
        os.write(pipe, bytes([phase]))
        try:
            return function(*arguments, **options)
        finally:
            board[0] = before
            os.write(pipe, bytes([phase + LEFT]))

    return tell


def start_victims(count: int, arguments: Sequence[str], log: Path) -> list[Victim]:
    """Fork ``count`` processes that train together, as ``torchrun`` would start them."""
    torch.set_num_threads(1)
    if count == 1:
        return [start_victim(arguments, log, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start_victim(
            arguments,
            log.with_name(f"{log.name}.{rank}"),
            {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
        )
        for rank in range(count)
    ]


def end_victims(victims: Sequence[Victim], grace: float) -> None:
    """End those that are left, as ``torchrun`` does when one of them is gone."""
    for victim in victims:
        victim.send(signal.SIGTERM)
    for victim in victims:
        if not victim.wait(grace):
            victim.send(signal.SIGKILL)
            victim.wait(grace)
