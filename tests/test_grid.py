from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments.grid import Grid, main, read_grid, summarize

RECIPES = Path(__file__).parent.parent / "experiments" / "recipes"


def write_run(folder: Path, top1: list[float], live: int, macs: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": 0, "budget/live_parameters": live, "budget/macs": macs}]
    lines += [{"step": 10 * (i + 1), "eval/top1": value} for i, value in enumerate(top1)]
    lines.append({"step": 10 * len(top1), "train/images_per_second": 100.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "sparse.safetensors").touch()


def test_the_comparison_by_hand(tmp_path: Path) -> None:
    grid = Grid("g", "quickstart", (0, 1, 2), "dense", {"dense": {}, "half": {}, "unfinished": {}})
    for seed, (dense, half) in enumerate([(80.0, 81.0), (82.0, 82.0), (81.0, 83.0)]):
        write_run(tmp_path / f"dense-seed{seed}", [50.0, dense], 100, 1000.0)
        write_run(tmp_path / f"half-seed{seed}", [40.0, half], 50, 600.0)
    dense_row, half_row = summarize(grid, tmp_path)
    assert dense_row["top1_mean"] == 81.0
    assert dense_row["top1_spread"] == 1.0
    # paired differences 1, 0, 2: mean 1, standard error 1 / sqrt(3), Student's t of 2 degrees at 97.5 % is 4.3027
    assert half_row["difference"] == 1.0
    assert half_row["interval"] == pytest.approx([1 - 4.3027 / 3**0.5, 1 + 4.3027 / 3**0.5], abs=1e-3)
    assert (half_row["live_ratio"], half_row["macs_ratio"]) == (0.5, 0.6)


def test_a_grid_runs_goes_on_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {
        "recipe": "quickstart",
        "seeds": [0],
        "baseline": "dense",
        "common": {
            "losses": {"macs_target": None},
            "model": {"kwargs": {"patch_size": 7, "depth": 2}},
            "data": {"train_subset": 200, "eval_subset": 100, "batch_size": 20},
            "selector": None,
            "training": {"epochs": 1},
            "schedule": {"warmup_epochs": 0},
        },
        "entries": {"dense": {"sparsity": None}, "half": {"sparsity": {"updates": 1}}},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(grid))
    options = [str(file), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--threads", "1"]
    assert main(options) == 0
    report = (tmp_path / "results" / "small.md").read_text()
    assert "| dense | 1 |" in report
    assert "| half | 1 |" in report
    before = (tmp_path / "runs" / "small" / "half-seed0" / "sparse.safetensors").stat().st_mtime_ns
    assert main(options) == 0
    assert (tmp_path / "runs" / "small" / "half-seed0" / "sparse.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("python -m experiments.grid: error:")


def test_the_grids_that_come_along_are_read() -> None:
    files = sorted((RECIPES / "grids").glob("*.yaml"))
    assert files
    for file in files:
        assert read_grid(file).baseline


def test_a_wrong_grid(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("recipe: quickstart\nseeds: [0]\nbaseline: dense\nentries: {half: {}}\n")
    with pytest.raises(ValueError, match="baseline 'dense' is none of the entries half"):
        read_grid(file)
    file.write_text("recipe: quickstart\n")
    with pytest.raises(ValueError, match="a grid has the keys"):
        read_grid(file)
