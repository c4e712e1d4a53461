"""What fails on one process fails on all: nobody waits for one that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from experiments.processes.processes import Processes


class FailedElsewhere(Exception):
    """Another process met an error and tells the user; this one ends too."""


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """All processes leave the block, or none: an error on one of them ends it on all.

    Inside the block no process waits for another.

    Raises:
        Exception: the first process that met an error raises it again.
        FailedElsewhere: on the others.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    try:
        if not processes.any(error is not None):
            return
        failed = (rank for rank in range(processes.size) if processes.any(error is not None and rank == processes.rank))
        first = next(failed)
    except RuntimeError:  # another process is gone already, and what happened here matters more
        if error is not None:
            raise error from None
        raise
    if first == processes.rank and error is not None:
        raise error
    raise FailedElsewhere from error


def speaks(processes: Processes) -> bool:
    """Whether it is this process that tells the user of an error that ends it.

    For errors outside of :func:`together`: most are met by all processes, and then the first one speaks. Others may be
    waiting for this one elsewhere; its end is theirs.
    """
    if processes.size == 1:
        return True
    try:
        return processes.lowest(processes.rank) == processes.rank
    except RuntimeError:  # they do not come, or are gone
        return True
