"""Two processes and one run folder: the second is told who has it, and a kill leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.errors import ConfigError
from experiments.run_folder.lock import NAME, RunLock
from tests.test_stopping import SMALL

HOLD = """
import os, sys, time
from pathlib import Path
from experiments.run_folder.lock import RunLock
lock = RunLock()
assert lock.take(Path(sys.argv[1])) == ""
child = os.fork() if "fork" in sys.argv else None
if child == 0:
    time.sleep(60)
print(child or 0, flush=True)
sys.stdin.read()
if "release" in sys.argv:
    lock.release()
    print("released", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has the lock, and the child that it may have forked."""
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def is_free(folder: Path) -> bool:
    with RunLock() as lock:
        try:
            lock.take(folder)
        except ConfigError:
            return False
        return True


def test_the_second_is_told_who_has_it(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _), RunLock() as lock:
        with pytest.raises(ConfigError) as error:
            lock.take(tmp_path)
        said = (
            rf"{tmp_path} is in use: process {process.pid} on {re.escape(socket.gethostname())}, since 20\d\d-.* writes"
        )
        assert re.match(said, str(error.value))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("fork",)], ids=["alone", "with a worker that outlives it"])
def test_a_kill_frees_it_at_once(number: signal.Signals, options: tuple[str, ...], tmp_path: Path) -> None:
    with holder(tmp_path, *options) as (process, child):
        assert not is_free(tmp_path)
        process.send_signal(number)
        process.wait()
        assert is_free(tmp_path)
        if child:
            os.kill(child, 0)  # it is there still


def test_it_is_given_back_by_a_process_that_goes_on(tmp_path: Path) -> None:
    with holder(tmp_path, "release") as (process, _):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        assert process.stdout.readline() == "released\n"
        assert is_free(tmp_path)
        assert (tmp_path / NAME).read_bytes() == b""


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"host": "x"}', b'{"host": "\\u001b[2J", "pid": 1, "since": 0}']
)
def test_what_the_file_says_is_for_the_message_alone(content: bytes, tmp_path: Path) -> None:
    with holder(tmp_path), RunLock() as lock:
        with (tmp_path / NAME).open("wb") as file:
            file.write(content)
        with pytest.raises(ConfigError, match="is in use: another process writes to it"):
            lock.take(tmp_path)
    assert is_free(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunLock() as lock:
        assert f"{tmp_path}: nothing keeps a second process from" in lock.take(tmp_path)


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path: Path) -> None:
    with RunLock() as lock:
        assert lock.take(tmp_path / "nowhere") == ""


def test_two_runs_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second ends with 2 and changes nothing; where the first is killed, it goes on from there."""
    arguments = ["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run", "--resume=auto"]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments, "--training.epochs=2000"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        for command in (
            [*arguments, "--training.epochs=2000"],
            ["train", f"--resume={tmp_path / 'run'}"],
            ["train", f"--resume={tmp_path / 'run'}", "--training.device=cpu"],
        ):
            assert main(command) == 2
            assert f"run is in use: process {process.pid} on " in capsys.readouterr().err
        process.kill()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert len(steps) == len(set(steps)) > 0
    with subprocess.Popen(
        [sys.executable, "-m", "experiments", "train", f"--resume={tmp_path / 'run'}"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"resuming {tmp_path / 'run'} at step ")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
