"""One process at a time writes into a run folder: a lock that the kernel takes back however its holder ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from experiments.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
"""What a system answers where another process has the lock."""
MOST_BYTES = 4096


class RunLock:
    """The right to write into a run folder, which is given back at the end of the block or with the process.

    The lock is one of POSIX (``fcntl``), which the kernel keeps by process: a kill frees it at once, worker processes
    that outlive their parent do not hold it, and NFS asks its server for it. Such a lock is lost when its own process
    opens the file once more and closes it, so nothing here does. The file says who has it, for the message alone; it
    stays behind, since a file that is deleted could be locked by one process and made anew by another.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, folder: Path) -> str:
        """Have the folder, or have it still.

        Returns:
            What the user must know where there are no locks, else nothing.

        Raises:
            ConfigError: another process has it; it says which.
        """
        if self._file is not None:
            return ""
        without = f"{folder}: nothing keeps a second process from writing there too"
        if fcntl is None:
            return f"{without}: this system has no locks"
        try:
            file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # then nothing else can be written either, and what must be says so itself
            return ""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _read(file) if error.errno in HELD else ""
            os.close(file)
            if error.errno not in HELD:
                return f"{without}: its file system has no locks ({error.strerror or error})"
            raise ConfigError(
                f"{folder} is in use: {who} writes to it; wait for its end, stop it, or choose another output.name"
            ) from error
        self._file = file
        here = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # of a full disk; the lock holds without it
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(here).encode() + b"\n", 0)
        return ""

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def _read(file: int) -> str:
    """Who has the lock, as the file says."""
    try:
        found = json.loads(os.pread(file, MOST_BYTES, 0))
        host, pid, since = (str(found[key]) for key in ("host", "pid", "since"))
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    text = f"process {pid} on {host}, since {since},"
    return text if text.isprintable() and len(text) < 300 else "another process"
