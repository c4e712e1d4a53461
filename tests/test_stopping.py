"""Signals: whenever one comes, the run ends in order, says how to go on, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.__main__ import main
from experiments.commands import train
from experiments.evaluation import measuring as metrics
from experiments.processes.signals import SIGNALS, StoppedAtOnce, StopRequest, exit_code, stop_on_signals
from experiments.run_folder.folder import RunFolder
from experiments.terminal import Display
from experiments.training import loop
from experiments.trials.compare import differences, fingerprint

SMALL = [
    "--selector=null", "--losses.macs_target=null",
    "--model.kwargs={embed_dim: 24, depth: 2, patch_size: 7}", "--data.train_subset=60", "--data.eval_subset=20",
    "--data.eval_batch_size=5", "--data.batch_size=10", "--training.epochs=2", "--schedule.warmup_epochs=1",
    "--sparsity.update_every=3", "--sparsity.updates=null", "--training.device=cpu", "--training.log_every=3",
    "--training.eval_every=0.7",
]  # fmt: skip
"""Twelve steps; evaluations of four batches and checkpoints after 4, 8 and 12."""
NAMES = [signal.Signals(number).name for number in SIGNALS]


def command(runs: Path) -> list[str]:
    return ["train", *SMALL, f"--output.runs={runs}", "--output.name=run"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The fingerprint of the run that nobody stops."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("whole")
    assert main(command(runs)) == 0
    return fingerprint(runs / "run")


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *numbers: int, after: bool = False) -> None:
    """Send the signals to this process when a function is called for that time, or just after it."""
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*arguments, **options) if after else None
        if calls == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return result if after else function(*arguments, **options)

    patch.setattr(owner, name, called)


def test_exit_codes() -> None:
    assert [exit_code(getattr(signal, name)) for name in ("SIGINT", "SIGTERM")] == [130, 143]
    assert NAMES == ["SIGINT", "SIGTERM", "SIGUSR1"]


def test_a_request_waits_only_where_something_is_to_be_saved() -> None:
    request = StopRequest()
    with pytest.raises(StoppedAtOnce, match="stopped at once by SIGTERM"):
        request.receive(signal.SIGTERM)
    request.waits = True
    for _ in range(3):
        request.receive(signal.SIGTERM)
    assert (request.made, request.number) == (True, signal.SIGTERM)
    request.receive(signal.SIGUSR1)
    assert request.number == signal.SIGTERM, "the first one counts"
    with pytest.raises(StoppedAtOnce, match="stopped at once by SIGINT"):
        request.receive(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_on_signals():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    failures: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            with stop_on_signals() as request:
                assert not request.made
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize("name", NAMES)
def test_during_a_step(
    name: str,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    number = signal.Signals[name]
    with monkeypatch.context() as patch:
        at_call(patch, Display, "advance", 6, number)
        assert main(command(tmp_path)) == 128 + number
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith(
        f"stopped by {name} after step 6 of 12; everything is saved. Go on with:\n"
        f"  sparse-trainer train --resume {tmp_path}/run\n"
    )
    assert RunFolder(tmp_path / "run").bundles()[0].name == "step_00000006.resume"
    assert main(["train", "--resume", f"{tmp_path}/run"]) == 0
    assert not differences(expected, fingerprint(tmp_path / "run"))


def test_during_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in SIGNALS:
        with monkeypatch.context() as patch:
            at_call(patch, train, "create_data", 1, number)
            assert main(command(tmp_path)) == 128 + number
        assert capsys.readouterr() == ("", f"sparse-trainer train: stopped at once by {signal.Signals(number).name}\n")
    assert list(tmp_path.iterdir()) == []


def test_during_an_evaluation(expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left, what is trained is saved, and the evaluation made on resuming."""
    with monkeypatch.context() as patch:
        at_call(patch, metrics, "count_correct", 2 + 4, signal.SIGTERM)  # of the second evaluation
        evaluate = loop.Loop._evaluate
        made: list[bool] = []
        patch.setattr(loop.Loop, "_evaluate", lambda *arguments: made.append(evaluate(*arguments)) or made[-1])
        assert main(command(tmp_path)) == 143
    assert made == [True, False]
    assert RunFolder(tmp_path / "run").bundles()[0].name == "step_00000008.resume"
    assert main([*command(tmp_path), "--resume=auto"]) == 0
    assert not differences(expected, fingerprint(tmp_path / "run"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_during_a_save(after: bool, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is finished, and no other step is begun."""
    with monkeypatch.context() as patch:
        at_call(patch, loop, "save_resume", 2, signal.SIGUSR1, after=after)
        assert main(command(tmp_path)) == 138
    assert [path.name for path in RunFolder(tmp_path / "run").bundles()] == [
        "step_00000004.resume", "step_00000000.resume",
    ]  # fmt: skip
    assert main([*command(tmp_path), "--resume=auto"]) == 0
    assert not differences(expected, fingerprint(tmp_path / "run"))


def test_in_the_last_moments_the_run_is_finished(
    expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, loop, "save_resume", 4, signal.SIGTERM)
        assert main(command(tmp_path)) == 0
    assert not differences(expected, fingerprint(tmp_path / "run"))


@pytest.mark.parametrize(("owner", "name"), [(Display, "advance"), (loop, "save_resume")], ids=["step", "save"])
def test_a_second_interrupt_ends_at_once(
    owner: Any,
    name: str,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, 6 if owner is Display else 2, signal.SIGINT, signal.SIGINT)
        assert main(command(tmp_path)) == 130
    saved = RunFolder(tmp_path / "run").bundles()[0].stem
    step = int(saved.removeprefix("step_"))
    assert step == (4 if owner is Display else 0)
    assert capsys.readouterr().err == (
        f"sparse-trainer train: stopped at once by SIGINT; go on from step {step} with "
        f"sparse-trainer train --resume {tmp_path}/run\n"
    )
    assert main([*command(tmp_path), "--resume=auto"]) == 0
    assert not differences(expected, fingerprint(tmp_path / "run"))


def test_worker_processes_leave_it_to_their_parent(tmp_path: Path) -> None:
    """A signal to the whole group, as Ctrl-C and torchrun send it: the step still gets its images."""
    arguments = [*command(tmp_path), "--data.in_memory=never", "--data.workers=2", "--training.epochs=2000"]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch"):
                os.killpg(process.pid, signal.SIGTERM)
                break
        out, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 143
    assert "stopped by SIGTERM" in out
