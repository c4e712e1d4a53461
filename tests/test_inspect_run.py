"""How far a run is: read from its files, in whatever state they were left."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.__main__ import main
from experiments.config.reading import to_yaml
from experiments.inspection.run import find_run, last_written, read_metrics, read_run, to_json
from experiments.run_folder.folder import RunFolder
from sparse_trainer import BlockUpdate, Budget, CheckpointError, LayerUpdate, MaskUpdate
from sparse_trainer.mask_log import record_path, write_record
from tests.test_training import configure

WEIGHT = "blocks.0.mlp.fc1.weight"
LINES = [
    {"step": 0, "budget/live_parameters": 5, "budget/total_parameters": 10},
    {"step": 5, "train/loss": 2.0, "train/epoch": 0.5, "train/bad_steps": 0, "eval/top1": 40.0, "eval/loss": 2.1},
    {"step": 10, "train/loss": None, "train/epoch": 1, "train/bad_steps": 2, "eval/top1": 60, "eval/loss": 1.5},
    {"step": 15, "train/loss": 1.0, "train/epoch": 1.5, "train/bad_steps": 2, "eval/top1": 50.0, "eval/loss": 1.7},
]
"""Ten steps an epoch."""


def update_at(step: int, **changes: Any) -> MaskUpdate:
    """Five of ten weights live, two of three heads, 4 of 8 neurons."""
    values: dict[str, Any] = {
        "drop_fraction": 0.25,
        "layers": {WEIGHT: LayerUpdate(pruned=1, grown=1, live=5, total=10, explored=7, threshold=0.1)},
        "blocks": {
            "blocks.0": BlockUpdate(
                heads_removed=(1,),
                heads_added=(2,),
                neurons_removed=(0,),
                neurons_added=(5,),
                live_heads=(0, 2),
                heads=3,
                live_neurons=4,
                neurons=8,
                explored_heads=3,
                explored_neurons=5,
            )
        },
    }
    return MaskUpdate(step=step, budget=Budget(5, 10), seconds=0.1, **{**values, **changes})


def write_run(path: Path, lines: list[dict[str, Any]] = LINES, updates: tuple[int, ...] = (4, 8)) -> RunFolder:
    """A run of 20 steps in two epochs, with four updates planned, that has come as far as ``lines`` and ``updates``."""
    path.mkdir()
    folder = RunFolder(path)
    folder.config.write_text(to_yaml(configure()))
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    masks = {WEIGHT: torch.arange(10).view(2, 5) < 4}
    write_record(path, 0, masks, {"blocks.0": (0, 1)}, {"blocks.0": (0, 1, 2, 3)}, None)
    for step in updates:
        write_record(path, step, masks, {"blocks.0": (2, 0)}, {"blocks.0": (1, 2, 3, 5)}, update_at(step))
    return folder


def test_a_run_by_hand(tmp_path: Path) -> None:
    found = to_json(read_run(write_run(tmp_path / "run")))
    assert found.pop("last_written") is not None
    assert found.pop("folder") == str(tmp_path / "run")
    assert found == {
        "recipe": "test",
        "finished": False,
        "step": 15,
        "total_steps": 20,
        "epochs": 2,
        "score": "top1",
        "last": {"step": 15, "top1": 50.0, "loss": 1.7},
        "best": {"step": 10, "value": 60},
        "evaluations": [
            {"step": 5, "top1": 40.0, "loss": 2.1},
            {"step": 10, "top1": 60, "loss": 1.5},
            {"step": 15, "top1": 50.0, "loss": 1.7},
        ],
        "updates": {"done": 2, "planned": 4, "last_step": 8},
        "dropped_steps": 2,
        "train_loss": 1.0,
        "bundle": None,
        "checkpoint": None,
        "notes": [],
    }


def test_the_average_decides_where_there_is_one(tmp_path: Path) -> None:
    lines = [{**line, "eval/ema_top1": 100 - line["eval/top1"]} for line in LINES[1:]]
    found = to_json(read_run(write_run(tmp_path / "run", lines)))
    assert found["score"] == "ema_top1"
    assert found["best"] == {"step": 5, "value": 60.0}


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """How long it will be is not known before the first record of the training says where in an epoch it is."""
    folder = write_run(tmp_path / "run", LINES[:1], ())
    found = to_json(read_run(folder))
    assert (found["step"], found["total_steps"], found["epochs"], found["last"]) == (0, None, 2, None)
    assert found["updates"] == {"done": 0, "planned": None, "last_step": None}
    folder.metrics.unlink()
    folder.config.write_text(to_yaml(configure({"training": {"steps": 7}, "sparsity": None})))
    found = to_json(read_run(folder))
    assert (found["total_steps"], found["epochs"], found["updates"]["planned"]) == (7, None, 0)
    for steps in (3, 1 << 40):  # fewer than its updates, or more than can be believed
        folder.config.write_text(to_yaml(configure({"training": {"steps": steps}})))
        assert to_json(read_run(folder))["updates"]["planned"] is None


@pytest.mark.parametrize("tail", [b'{"step": 20, "train/lo', b'{"step": 20', b"\xff\xfe", b'{"train/loss": 1}', b"7"])
def test_a_last_line_that_is_cut_off_is_noted(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 5, "a": 1}\n' + tail)
    series, notes = read_metrics(path)
    assert series == {"a": [(5, 1)]}
    assert notes == ["the last line of metrics.jsonl is cut off, as if it was just being written; it is left out"]


@pytest.mark.parametrize("tail", [b"", b"\0\0\0\0", b'{"step": 6, "a": 2}'])
def test_a_whole_last_line_is_not(tail: bytes, tmp_path: Path) -> None:
    """A disk that was not synced leaves zeros."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 5, "a": 1}\n' + tail)
    series, notes = read_metrics(path)
    assert series == {"a": [(5, 1), (6, 2)] if b"6" in tail else [(5, 1)]}
    assert notes == []


def test_a_last_line_that_is_ended_and_damaged_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 5, "a": 1}\n{"step": 6, "a"\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2: expected a JSON object"):
        read_metrics(path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 20, "tr',
        b"",
        b"[1]",
        b'{"a": 1}',
        b'{"step": -1}',
        b'{"step": 1, "a": "x"}',
        b'{"step": 1, "a": 1e999}',
    ],
)
def test_a_damaged_line_among_others_is_an_error(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    lines = folder.metrics.read_bytes().split(b"\n")
    folder.metrics.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    assert main(["inspect", str(folder.path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"sparse-trainer inspect: error: {folder.metrics}: line 3: expected a JSON object of numbers with a step, found"
    )
    assert error.count("\n") == 1


def test_a_damaged_timeline_or_configuration_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    record = record_path(folder.path, 4)
    record.write_bytes(record.read_bytes().replace(b"drop_fraction", b"drop_friction"))
    assert main(["inspect", str(folder.path), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{record}: " in captured.err
    for text, message in (("{", "is not YAML at line 1"), ("sparsity: {density: 7}", "sparsity.density: 7")):
        folder.config.write_text(text)
        assert main(["inspect", str(folder.path)]) == 2
        assert f"error: {folder.config}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, block: ({"live": 0}, {}),
        lambda layer, block: ({"explored": 4}, {}),
        lambda layer, block: ({"grown": -1}, {}),
        lambda layer, block: ({}, {"live_heads": ()}),
        lambda layer, block: ({}, {"neurons": 1 << 40}),
        lambda layer, block: ({}, {"explored_heads": 4}),
    ],
)
def test_a_report_whose_counts_do_not_add_up_is_refused(
    change: Callable[[LayerUpdate, BlockUpdate], tuple[dict[str, Any], dict[str, Any]]], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run")
    update = update_at(8)
    layer, block = update.layers[WEIGHT], update.blocks["blocks.0"]
    of_layer, of_block = change(layer, block)
    layers, blocks = dataclasses.replace(layer, **of_layer), dataclasses.replace(block, **of_block)
    write_record(folder.path, 8, {}, {}, {}, update_at(8, layers={WEIGHT: layers}, blocks={"blocks.0": blocks}))
    with pytest.raises(CheckpointError, match=r"step_00000008\.safetensors: the report: expected counts that go"):
        read_run(folder)


def test_when_it_was_last_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for file in folder.path.rglob("*"):
        os.utime(file, (1_000_000, 1_000_000))
    os.utime(record_path(folder.path, 4), (2_000_000, 2_000_000))
    assert last_written(folder) == datetime.fromtimestamp(2_000_000, UTC)


def test_what_is_a_run(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "sparse.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).touch()
        assert find_run(folder) == RunFolder(folder)
