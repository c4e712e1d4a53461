"""Signals: what a user's Ctrl-C and a cluster's notice do to a run.

While a run starts there is nothing to lose, and a signal ends it at once. While it trains a signal only asks: the step
is finished and everything is saved before the process ends. A second Ctrl-C ends it at once all the same.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGUSR1
)
"""Ctrl-C; what clusters and service managers send before they kill; what Slurm sends with ``--signal=USR1@120``."""


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended, as shells have it: 130, 143, 138 (on Linux)."""
    return 128 + number


class StoppedAtOnce(KeyboardInterrupt):
    """A signal ended the process where it stood."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped at once by {signal.Signals(number).name}")
        self.number = number
        self.hint = ""
        """What the user can do now."""


@dataclass
class StopRequest:
    """Whether someone asked the run to end after the step it is in."""

    made: bool = False
    number: int = signal.SIGINT
    """The signal that asked first."""
    waits: bool = False
    """Whether a signal waits for the step to end. Before the training begins it does not."""

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of all signals.

        Raises:
            StoppedAtOnce: there is nothing to wait for, or it is Ctrl-C again.
        """
        if not self.waits or (self.made and number == signal.SIGINT):
            raise StoppedAtOnce(number)
        if not self.made:
            self.made, self.number = True, int(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle :data:`SIGNALS` inside the block; in a thread other than the main one, which alone gets them, nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def leave_signals_to_parent(worker: int = 0) -> None:
    """For a worker process of a data loader: a signal to the whole group is its parent's to answer, who still needs
    images to finish its step. Only the parent itself may end it."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS; there a SIGTERM to the whole group ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Wait for a SIGTERM of ``parent``: so it ends those workers that are left when it ends itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
