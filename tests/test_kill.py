"""The trial that kills runs, in short; and that it would notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.run_folder.folder import RunFolder
from experiments.trials.compare import differences, fingerprint
from experiments.trials.kill import write_results
from sparse_trainer.files.checkpoint import load_resume, save_resume
from sparse_trainer.mask_log import record_path
from tests.test_training import run, start

TRIALS = """
import sys
from experiments.trials.kill import main
common = ["--results", sys.argv[1]]
sys.exit(
    main(["--kills", "3", "--variant", "joint", "--seed", "1", *common])
    or main(["--kills", "1", "--variant", "weights", "--signal", "SIGTERM", "--processes", "2", *common])
)
"""


def test_killed_and_resumed(tmp_path: Path) -> None:
    """In a process of its own, since the trial forks, which one that has trained must not."""
    done = subprocess.run(
        [sys.executable, "-c", TRIALS, str(tmp_path / "kill.md")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kill.json").read_text())
    assert [(row["variant"], row["signal"], row["processes"]) for row in rows] == [
        ("joint", "SIGKILL", 1), ("weights", "SIGTERM", 2),
    ]  # fmt: skip
    assert [(row["kills"], row["equal"], row["faults"]) for row in rows] == [(3, 3, []), (1, 1, [])]
    assert all(sum(row["phases"].values()) == row["kills"] for row in rows)
    text = (tmp_path / "kill.md").read_text()
    assert "| joint | SIGKILL | 1 | 3 | 3 of 3 |" in text
    assert str(tmp_path) not in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    run(start(path, {"training": {"epochs": 1}, "sparsity": {"updates": 2}}))
    return path


def change_one_weight(folder: RunFolder) -> None:
    """By its sign alone, where it is 0."""
    state = load_resume(folder.bundles()[0])
    weight = state["trainer"]["model"]["blocks.0.attn.qkv.weight"].view(-1)
    dead = int((weight == 0).nonzero()[0])
    weight[dead] = -0.0
    save_resume(folder.bundles()[0], state)


def double_a_line(folder: RunFolder) -> None:
    lines = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text("".join([*lines, lines[-1]]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (change_one_weight, ["state: model"]),
        (double_a_line, ["metrics"]),
        (lambda folder: (folder.checkpoints / ".best.safetensors.tmp").touch(), ["stray files"]),
        (lambda folder: (folder.path / "masks" / ".step_00000003.safetensors.tmp").touch(), ["stray files"]),
        (lambda folder: record_path(folder.path, 3).unlink(), ["masks of step 3"]),
        (lambda folder: folder.best.write_bytes(folder.best.read_bytes()[:-1]), ["best checkpoint"]),
        (lambda folder: folder.bundles()[0].rename(folder.bundle(99)), ["step"]),
        (lambda folder: shutil.rmtree(folder.tensorboard) or folder.tensorboard.mkdir(), ["tensorboard"]),
    ],
)  # fmt: skip
def test_what_is_compared(
    change: Callable[[RunFolder], object], found: list[str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert differences(fingerprint(finished), fingerprint(tmp_path / "run")) == []
    change(RunFolder(tmp_path / "run"))
    assert differences(fingerprint(finished), fingerprint(tmp_path / "run")) == found


def test_a_report_is_added_to(tmp_path: Path) -> None:
    row = {
        "variant": "weights", "signal": "SIGKILL", "processes": 1, "seed": 0, "kills": 3, "equal": 2, "runs": 1,
        "phases": {"step": 3}, "faults": ["killed-0: not the same"], "command": "python -m experiments.trials.kill",
    }  # fmt: skip
    write_results(tmp_path / "kill.md", [row])
    assert "FAULT: killed-0: not the same" in (tmp_path / "kill.md").read_text()
    write_results(tmp_path / "kill.md", [{**row, "equal": 3, "faults": []}, {**row, "variant": "tokens"}])
    text = (tmp_path / "kill.md").read_text()
    assert "| weights | SIGKILL | 1 | 3 | 3 of 3 | 1 | step 3 |" in text
    assert text.count("| SIGKILL |") == 2
