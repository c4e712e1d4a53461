"""``python3 -m experiments.gpu``: what it decides by hand, and all of it in miniature on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.gpu import checks, comparison
from experiments.gpu.comparison import greatest_two_of_four
from experiments.gpu.record import Record, read_record
from experiments.gpu.results import Results
from experiments.gpu.settings import Settings, read_settings
from experiments.gpu.summary import summarize
from experiments.gpu.train import prepare
from experiments.gpu.worth import Pace, Progress, expected_seconds, next_task, shorten, tasks, to_give_up
from experiments.grids.grid import Grid
from experiments.grids.report import Outcome

GRID = Grid(
    name="g",
    recipe="r",
    seeds=(0, 1),
    baseline="dense",
    entries={
        "dense": {},
        "half": {"sparsity": {"density": 0.5}},
        "tokens": {"model": {"start": "{run:dense}"}, "training": {"epochs": 20, "seed": 3}},
    },
)


def settings_of(folder: Path, *more: str) -> Settings:
    return read_settings(["--output", str(folder), *more])


def test_all_runs_become_shorter_by_as_much() -> None:
    entries = shorten(GRID, 200, 60).entries
    assert {name: entry["training"] for name, entry in entries.items()} == {
        "dense": {"epochs": 60},
        "half": {"epochs": 60},
        "tokens": {"epochs": 6, "seed": 3},
    }
    assert entries["half"]["sparsity"] == {"density": 0.5}
    assert shorten(GRID, 200, 1).entries["tokens"]["training"]["epochs"] == 1


def test_a_run_waits_for_what_it_starts_from() -> None:
    order = tasks(["dense", "tokens", "half"], [0, 1])
    assert order[:4] == [("dense", 0), ("tokens", 0), ("half", 0), ("dense", 1)]
    assert next_task(order, GRID, set(), set()) == ("dense", 0)
    waiting = order[1:]
    assert next_task(waiting, GRID, set(), {("dense", 0)}) == ("half", 0)
    assert next_task(waiting, GRID, {("dense", 0)}, set()) == ("tokens", 0)
    assert next_task([("tokens", 0)], GRID, set(), set()) is None  # dense failed, or was of an earlier call
    assert next_task([], GRID, set(), set()) is None


def test_what_does_not_end_in_time_makes_room() -> None:
    """At 2 steps a second 100 steps are 50 seconds; at 1 a second they are 100."""
    fast, slow = Progress(20, 120, 10.0), Progress(10, 110, 10.0)
    assert (fast.left, slow.left) == (50.0, 100.0)
    order = [("dense", 0), ("half", 0), ("dense", 1)]
    running = {("dense", 0): slow, ("dense", 1): fast}
    assert to_give_up(running, order, 101.0) is None
    assert to_give_up(running, order, 99.0) == ("dense", 1)
    assert to_give_up({("dense", 0): slow}, order, 1.0) is None  # nobody gains by its end
    pace = Pace()
    assert pace.hear(1, 101, 10.0).left == 1000.0  # no more is known than its slow start
    assert pace.hear(11, 101, 20.0).left == 90.0  # 10 steps in 10 seconds
    for second in range(21, 60):
        later = pace.hear(11 + 2 * (second - 20), 101, float(second))
    assert later.step_seconds == 0.5  # its start is forgotten
    assert expected_seconds("as_vit_65", 6, 2.0) == pytest.approx(15 + 1.1 * 2.5 * 12)


def test_a_record_is_whole_after_each_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(tmp_path / "speed.json", machine="m")
    assert read_record(tmp_path / "speed.json") == {"machine": "m", "entries": []}

    def fail() -> dict[str, Any]:
        raise RuntimeError("no\n  memory")

    assert record.attempt("good", lambda: {"seconds": 1.0}, batch=2)
    assert not record.attempt("bad", fail)
    good, bad = read_record(tmp_path / "speed.json")["entries"]
    assert (good["name"], good["seconds"], good["batch"]) == ("good", 1.0, 2)
    assert bad == {"name": "bad", "failed": "RuntimeError: no memory"}
    assert "bad: failed: RuntimeError: no memory" in capsys.readouterr().out
    assert read_record(tmp_path / "nothing.json") == {"entries": []}


def outcome(accuracy: float) -> Outcome:
    return Outcome(accuracy, 1 - accuracy / 100, ((10, accuracy - 10), (20, accuracy)), 100, 1000.0)


def test_a_call_goes_on_where_another_ended(tmp_path: Path) -> None:
    first = settings_of(tmp_path / "first", "--epochs", "7")
    first.output.mkdir()
    grid = prepare(first)
    results = Results(first, grid)
    machine = {"device": "Card"}
    results.add(("dense", 0), outcome(80.0), machine=machine, seconds=3.0)
    results.add(("svite_50", 0), outcome(81.0), machine=machine, seconds=4.0)
    have = ["--have", str(first.output / "cifar10.json")]

    second = settings_of(tmp_path / "second", "--epochs", "7", *have)
    second.output.mkdir()
    results = Results(second, grid)
    assert results.done == {("dense", 0), ("svite_50", 0)}
    results.add(("dense", 1), outcome(82.0), machine=machine, seconds=3.0)
    report = json.loads((second.output / "cifar10.json").read_text())
    rows = {row["entry"]: row for row in report["rows"]}
    assert (rows["dense"]["top1"], rows["svite_50"]["difference"]) == ([80.0, 82.0], 1.0)
    text = (second.output / "cifar10.md").read_text()
    assert "dense has 7 epochs" in text
    assert "On Card" in text
    assert (second.output / "cifar10.png").stat().st_size > 1000
    # A run of another length is no seed of the same grid.
    third = settings_of(tmp_path / "third", "--epochs", "8", *have)
    assert Results(third, prepare(third)).done == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "speeds"], "--only: speeds is none of tests, speed, train"),
        (["--minutes", "0"], "--minutes: 0.0 is not positive"),
        (["--have", "nothing.json"], "--have: there is no file nothing.json"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert read_settings(["--only", "train,tests"]).only == ("tests", "train")


def test_two_of_four_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 5.0, -6.0, 4.0]])
    assert greatest_two_of_four(weight).tolist() == [[0.0, -3.0, 2.0, 0.0, 0.0, 5.0, -6.0, 0.0]]


def test_only_linear_layers_of_blocks_run_on_2_of_4(tiny_deit: Any) -> None:
    model: nn.Module = tiny_deit()
    # Two blocks of 17 tokens: qkv 3 * 24 * 24, proj 24 * 24, two of 24 * 96.
    assert comparison._linear_macs(model) == 2 * 17 * (4 * 24 * 24 + 2 * 24 * 96)


def test_outcomes_of_tests_are_read_as_pytest_prints_them() -> None:
    lines = [
        "tests/test_gpu.py::test_a[cuda-x y] PASSED                    [ 50%]",
        "tests/test_gpu.py::test_b SKIPPED (there is no GPU)           [100%]",
        "FAILED tests/test_gpu.py::test_a - PASSED is no word for it",
    ]
    found = [checks.OUTCOME.match(line) for line in lines]
    assert [match and match.groups() for match in found] == [
        ("tests/test_gpu.py::test_a[cuda-x y]", "PASSED"),
        ("tests/test_gpu.py::test_b", "SKIPPED"),
        None,
    ]


def test_everything_in_miniature(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    output = tmp_path / "results"
    # Nothing here waits for the time to be over; so many minutes let a machine be as slow as it likes.
    command = [sys.executable, "-m", "experiments.gpu", "--dry", "--minutes", "60", "--output", str(output)]
    command += ["--epochs", "1", "--jobs", "2"]
    # Its processes would each take all cores, and those that share them wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    log = (output / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    tests, speed, train = (read_record(output / f"{part}.json")["entries"] for part in ("tests", "speed", "train"))
    assert tests
    assert all(entry["outcome"] in ("passed", "skipped") for entry in tests)
    assert not [entry for entry in (*speed, *train) if "failed" in entry or "skipped" in entry]
    compared = {(entry["task"], entry["variant"]) for entry in speed if "variant" in entry}
    both = {"dense", "units", "tokens by threshold", "units and tokens by threshold", "tokens by top-k"}
    assert compared == {("inference", name) for name in both} | {("training", name) for name in both | {"weight masks"}}
    assert {entry["name"] for entry in train if "top1" in entry} == {"dense-seed0", "svite_90-seed0", "as_vit_65-seed0"}
    report = json.loads((output / "cifar10.json").read_text())
    assert [(run["entry"], run["seed"], run["dry"]) for run in report["runs"]].count(("as_vit_65", 0, True)) == 1
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.parent == output and path.stat().st_size < 16e6 for path in files)
    assert "train: as_vit_65-seed0: top-1" in done.stdout
    assert "failed" not in done.stdout


def test_the_summary_names_what_failed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    tests = Record(tmp_path / "tests.json")
    tests.add(name="tests/test_gpu.py::test_a", outcome="failed")
    tests.add(name="tests/test_gpu.py::test_b", outcome="passed")
    speed = Record(tmp_path / "speed.json", machine={"device": "Card", "torch": "2"})
    speed.add(name="x: dense", failed="OutOfMemoryError: of memory")
    text = summarize(settings)
    assert "tests: 1 failed, 1 passed" in text
    assert text.splitlines()[-3:] == [
        "failed:",
        "  tests/test_gpu.py::test_a",
        "  x: dense: OutOfMemoryError: of memory",
    ]
