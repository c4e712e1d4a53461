"""A file or a folder that appears under its name whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.errors import ConfigError
from sparse_trainer.files.checkpoint import CheckpointError


def check_target(target: Path, *, checkpoint: Path, overwrite: bool, files: frozenset[str] | None) -> None:
    """Refuse, before any work is done, a place that cannot or must not be written to.

    Args:
        checkpoint: what is exported; never overwritten.
        files: names of the files in a folder that is to be written; None for a single file.

    Raises:
        ConfigError: in the words of ``--output``.
    """
    if not target.name:
        raise ConfigError(f"--output: {target} is no name of a {'file' if files is None else 'folder'}")
    if not target.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {target.parent}; make it, or give another place")
    if not os.path.lexists(target):
        return
    if target.exists() and target.samefile(checkpoint):
        raise ConfigError(f"--output: {target} is the checkpoint itself; give another name")
    if not overwrite:
        raise ConfigError(f"--output: {target} exists; give another name, or --overwrite")
    if target.is_dir() and files is None:
        raise ConfigError(f"--output: {target} is a folder, and this format is one file; give another name")
    if files is None:
        return
    if not target.is_dir():
        raise ConfigError(f"--output: {target} is a file, and this format is a folder; give another name")
    others = sorted({path.name for path in target.iterdir()} - files)
    if others:
        raise ConfigError(f"--output: {target} holds other things ({others[0]}, ...) that are not overwritten")


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` where the block ends without an error.

    It lies in a hidden folder beside ``target`` that is gone afterwards. The contents are flushed to the disk
    before they get their name.

    Raises:
        CheckpointError: what was written does not fit, or may not be there; ``target`` is as it was.
    """
    staging = target.with_name(f".{target.name}.tmp")
    new = staging / target.name
    try:
        if staging.is_dir():  # of an export that was killed
            shutil.rmtree(staging)
        staging.mkdir()
        yield new
        for path in (*new.rglob("*"), new):
            _sync(path)
        if not overwrite and os.path.lexists(target):
            raise CheckpointError(f"{target}: came into being meanwhile; give another name, or --overwrite")
        _rename(new, target, staging / "before")
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(new), str(target))) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rename(new: Path, target: Path, before: Path) -> None:
    """Put ``new`` in the place of ``target``; a folder cannot be replaced in one step, so the old one steps aside."""
    if not new.is_dir() or not os.path.lexists(target):
        os.replace(new, target)
        return
    os.rename(target, before)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(before, target)
        raise


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)
