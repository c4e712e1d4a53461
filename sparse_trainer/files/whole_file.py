"""Files that are whole or absent: a reader finds the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


class CheckpointError(ValueError):
    """A file that cannot be written or trusted; the message names it, what was expected and found."""


def write_atomically(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``chunks`` to ``path`` so that a reader finds the old file or the new one, never a part.

    The bytes go to ``.<name>.tmp`` in the same folder, are flushed to the disk, and the file is renamed; a
    crash leaves at most that one temporary file, which the next write to ``path`` replaces.

    Raises:
        CheckpointError: if the folder is missing or read-only, the disk is full, or the like.
    """
    with replacing(path) as file:
        for chunk in chunks:
            file.write(chunk)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends, if it ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "; the file that was there is unchanged" if path.is_file() else ""
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}{kept}") from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make durable what was renamed or made in a folder, where the system can: on Windows none can be opened."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be flushed to the disk: {error.strerror}") from error
