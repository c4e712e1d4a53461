"""Results that are on the disk as soon as they are known: a call may be cut off at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_trainer.files.whole_file import write_atomically

LONGEST = 300
"""Characters of a failure that are kept."""


class Deadline:
    """A point in time.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; below 0 when it has passed."""
        return self._end - time.monotonic()


class Record:
    """A JSON file with a list of entries, whole after each of them.

    Args:
        path: of the file; it is begun anew.
        head: what stands before the entries.
    """

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "entries": []}
        self._write()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What was added so far."""
        entries: list[dict[str, Any]] = self.content["entries"]
        return entries

    def add(self, **entry: Any) -> None:
        """One more entry."""
        self.entries.append(entry)
        self._write()

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]], **entry: Any) -> bool:
        """Add what ``measure`` finds, or why it failed; whether it did not."""
        started = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # a step that fails is named, and the rest goes on
            self.add(name=name, **entry, failed=in_one_line(error))
            print(f"{name}: failed: {in_one_line(error)}", flush=True)
            return False
        self.add(name=name, **entry, **found, took=round(time.monotonic() - started, 1))
        return True

    def _write(self) -> None:
        write_atomically(self.path, [(json.dumps(self.content, indent=1) + "\n").encode()])


def read_record(path: Path) -> dict[str, Any]:
    """What a :class:`Record` wrote; without entries where there is no such file."""
    if not path.is_file():
        return {"entries": []}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def in_one_line(error: BaseException) -> str:
    """The kind of an error and what it says, cut to :data:`LONGEST` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:LONGEST]
