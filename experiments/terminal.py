"""What a run shows while it goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.errors import ConfigError
from sparse_trainer.files.checkpoint import CheckpointError

FAILED, WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes: it could not go on; what was asked for cannot be done; ended by Ctrl-C."""
PLAIN_WIDTH = 110
PLAIN_INTERVAL = 15.0
"""Seconds between progress lines where there is no terminal."""


def create_console() -> Console:
    """The terminal, or a plain text of fixed width in a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


class Display:
    """Progress of a run, and lines above it.

    Args:
        total: optimizer steps of the run.
        done: steps that an earlier process did.
    """

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self.console, self.total = console, total
        self._spoke = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total, completed=done, status="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def status(self, step: int, epoch: float, loss: float, images_per_second: float) -> None:
        """New numbers: beside the bar, or now and then as a line."""
        text = f"loss {loss:.3f}  {images_per_second:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, status=text)
        elif time.monotonic() - self._spoke >= PLAIN_INTERVAL:
            self.line(f"step {step:,} of {self.total:,}  epoch {epoch:.2f}  {text}")

    def line(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, soft_wrap=True, markup=False)
        self._spoke = time.monotonic()


def _as_note(usual: Callable[..., None]) -> Callable[..., None]:
    """Shows what is said to users as one line, without the place in the code; all else as usual."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if category is UserWarning:
            print(f"note: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            usual(message, category, *place, **options)

    return show


def run_command(name: str, command: Callable[[], int]) -> int:
    """The exit code of a sub-command; what a user did wrong becomes one line and code 2, Ctrl-C code 130."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _as_note(warnings.showwarning)
            return command()
    except (ConfigError, CheckpointError) as error:
        print(f"sparse-trainer {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED


def print_table(
    console: Console, title: str, rows: Iterable[tuple[str, ...]], headings: tuple[str, ...] = ("", "")
) -> None:
    """Names and values; several values where there are headings for them."""
    table = Table(title=title, title_justify="left", show_header=any(headings))
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
