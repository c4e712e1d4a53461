"""A disk that is full, read-only or gone ends a run in one line, and what was saved before stays good."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from experiments.run_folder.folder import RunFolder
from experiments.run_folder.metrics_writer import WholeRecords
from experiments.training.loop import Loop
from experiments.training.trainer import TrainingError
from experiments.trials.compare import differences, fingerprint
from sparse_trainer.files.checkpoint import load_resume
from tests.test_training import Display, make_trainer, read_metrics, run, start

SHORT = {
    "sparsity": {"update_every": 2, "updates": None, "stop_at": 1.0},
    "training": {"steps": 6, "log_every": 1, "eval_every": 0.3, "checkpoint_every": 0.2},
}
"""Six steps: updates after 2 and 4, evaluations after 3 and 6, checkpoints after 0, 2, 3, 4 and 6."""


class FullDisk:
    """Every call that writes fails from a certain one on. Deleting works, as it does on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, code: int = errno.ENOSPC) -> None:
        self.folder, self.code = str(folder), code
        self.calls, self.fails_from = 0, -1
        really_open = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            writes = set(mode) & set("wax+") and str(file).startswith(self.folder)
            if not writes:
                return really_open(file, mode, *arguments, **options)
            self.count()
            return FailingFile(really_open(file, mode, *arguments, **options), self)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        for name in ("fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def count(self) -> None:
        self.calls += 1
        if 0 <= self.fails_from < self.calls:
            raise OSError(self.code, os.strerror(self.code))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count()
            return function(*arguments, **options)

        return call

    @contextmanager
    def failing(self, after: int) -> Iterator[None]:
        """Inside the block only so many more calls succeed."""
        self.calls, self.fails_from = 0, after
        try:
            yield
        finally:
            self.fails_from = -1


class FailingFile:
    """A file that counts what is written to it."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        self.disk.count()
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()


def check_what_is_left(folder: RunFolder) -> None:
    """Nothing half-written, and every checkpoint good."""
    assert not list(folder.path.rglob(".*"))
    for bundle in folder.bundles():
        load_resume(bundle)
    if folder.metrics.is_file():
        text = folder.metrics.read_text()
        assert text == "" or text.endswith("\n")
        read_metrics(folder)


def go_on(folder: RunFolder) -> Loop:
    loop = Loop(make_trainer(SHORT), folder)
    if folder.bundles():
        loop.resume()
    else:
        assert folder.begins
    run(loop)
    return loop


@pytest.mark.parametrize(("code", "times"), [(errno.ENOSPC, 10), (errno.EROFS, 4)], ids=["full", "read-only"])
def test_whichever_write_fails(code: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch, tmp_path, code)
    run(start(tmp_path / "whole", SHORT))
    calls, expected = disk.calls, fingerprint(tmp_path / "whole")
    generator = random.Random(code)
    for after in sorted(generator.sample(range(1, calls), times)):
        loop = start(tmp_path / f"after-{after}", SHORT)
        with disk.failing(after), pytest.raises(TrainingError, match=r"^cannot write the run: ") as caught:
            run(loop)
        message = str(caught.value)
        assert os.strerror(code) in message
        assert "\n" not in message
        check_what_is_left(loop.folder)
        assert loop.saved is None or loop.folder.bundles()[0] == loop.folder.bundle(loop.saved)
    go_on(loop.folder)
    assert not differences(expected, fingerprint(loop.folder.path))


class Meanwhile(Display):
    """Does something to the disk after a step."""

    def __init__(self, *arguments: Any, at: int, then: Callable[[], object]) -> None:
        super().__init__(*arguments)
        self.at, self.then = at, then

    def advance(self, step: int) -> None:
        if step == self.at:
            self.then()


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    """As when a mount is lost: what is open can still be written, nothing new can."""
    loop = start(tmp_path / "run", SHORT)
    with pytest.raises(TrainingError, match=r"^cannot write the run: .*step_00000003.* No such file or directory$"):
        run(loop, Meanwhile, at=3, then=lambda: (tmp_path / "run").rename(tmp_path / "gone"))
    assert not (tmp_path / "run").exists()
    check_what_is_left(RunFolder(tmp_path / "gone"))
    expected = start(tmp_path / "whole", SHORT)
    run(expected)
    (tmp_path / "gone").rename(tmp_path / "run")
    assert go_on(loop.folder).trainer.finished
    assert not differences(fingerprint(tmp_path / "whole"), fingerprint(tmp_path / "run"))


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    def replace() -> None:
        loop.folder.checkpoints.rename(tmp_path / "checkpoints")
        loop.folder.checkpoints.touch()

    loop = start(tmp_path / "run", SHORT)
    with pytest.raises(TrainingError, match=r"^cannot write the run: .*: Not a directory$"):
        run(loop, Meanwhile, at=3, then=replace)


def test_a_quota(tmp_path: Path) -> None:
    """The system itself refuses files that grow over a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    loop = start(tmp_path / "run", SHORT)
    try:
        with pytest.raises(TrainingError, match=r"^cannot write the run: .*File too large") as caught:
            run(loop, Meanwhile, at=3, then=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    check_what_is_left(loop.folder)
    assert loop.saved == 2
    assert go_on(loop.folder).trainer.finished


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = WholeRecords(tmp_path / "lines")
    file.append(b"0123456789\n")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
        with pytest.raises(OSError, match="File too large"):  # five of eleven bytes fit
            file.append(b"abcdefghij\n")
        assert file.path.read_bytes() == b"0123456789\n"
        file.append(b"abc\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        file.close()
    assert file.path.read_bytes() == b"0123456789\nabc\n"


def test_lines_are_cut_back_to_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthr")
    WholeRecords(path, 4).close()
    assert path.read_bytes() == b"one\n"
    path.write_bytes(b"one\ntwo\nthr")
    file = WholeRecords(path, 20)  # lines are lost: what is torn goes too, and it is told
    assert (file.missing, file.size) == (9, 8)
    file.append(b"four\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nfour\n"
