from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from experiments.config.reading import create_parser, parse
from experiments.config.run_config import resolve
from experiments.grids import plot as grid_plot
from experiments.grids import speed as grid_speed
from experiments.grids import speed_picture
from experiments.grids.grid import Grid, Runs, main, read_grid
from experiments.grids.report import (
    Outcome,
    compare,
    compare_with_chance,
    describe_curve,
    interval,
    read_outcome,
    summarize,
    to_markdown,
)

RECIPES = Path(__file__).parent.parent / "experiments" / "config" / "recipes"


def write_run(folder: Path, top1: list[float], live: int, macs: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": 0, "budget/live_parameters": live, "budget/macs": macs}]
    lines += [{"step": 10 * (i + 1), "eval/top1": value, "eval/loss": 1 - value / 100} for i, value in enumerate(top1)]
    lines.append({"step": 10 * len(top1), "train/images_per_second": 100.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "sparse.safetensors").touch()


def test_the_comparison_by_hand(tmp_path: Path) -> None:
    outcomes: dict[str, dict[int, Outcome]] = {"dense": {}, "half": {}, "unfinished": {}}
    for seed, (dense, half) in enumerate([(80.0, 81.0), (82.0, 82.0), (81.0, 83.0)]):
        write_run(tmp_path / f"dense-seed{seed}", [50.0, dense], 100, 1000.0)
        write_run(tmp_path / f"half-seed{seed}", [40.0, half], 50, 600.0)
        for entry in ("dense", "half"):
            found = read_outcome(tmp_path / f"{entry}-seed{seed}")
            assert found is not None
            outcomes[entry][seed] = found
    assert read_outcome(tmp_path / "unfinished-seed0") is None
    dense_row, half_row = summarize(outcomes, "dense")
    assert dense_row["top1_mean"] == 81.0
    assert dense_row["top1_spread"] == 1.0
    # paired differences 1, 0, 2: mean 1, standard error 1 / sqrt(3), Student's t of 2 degrees at 97.5 % is 4.3027
    assert half_row["difference"] == 1.0
    assert half_row["interval"] == pytest.approx([1 - 4.3027 / 3**0.5, 1 + 4.3027 / 3**0.5], abs=1e-3)
    assert (dense_row["loss_mean"], half_row["loss_difference"]) == pytest.approx((0.19, -0.01))
    assert half_row["loss_interval"] == pytest.approx([-0.01 - 0.043027 / 3**0.5, -0.01 + 0.043027 / 3**0.5], abs=1e-5)
    assert (half_row["live_ratio"], half_row["macs_ratio"]) == (0.5, 0.6)


def test_the_macs_of_training_are_those_it_noted(tmp_path: Path) -> None:
    """On a ramp evaluation keeps few patches from the start; training comes down to them at half of the steps."""
    write_run(tmp_path / "plain", [50.0, 60.0], 100, 600.0)
    write_run(tmp_path / "ramp", [50.0, 60.0], 100, 600.0)
    with (tmp_path / "ramp" / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"step": step, "train/macs": macs}) + "\n" for step, macs in ((5, 1000.0), (10, 600.0))
        )
    plain, ramp = (read_outcome(tmp_path / name) for name in ("plain", "ramp"))
    assert plain is not None
    assert ramp is not None
    assert (plain.macs, plain.training_macs) == (600.0, 600.0)
    assert (ramp.macs, ramp.training_macs) == (600.0, pytest.approx((5 * 1000 + 10 * 600) / 15))


def test_pairs_are_compared_over_the_seeds_they_share() -> None:
    """Seeds 1 and 2 differ by 3 and 1: mean 2, standard error 1, Student's t of one degree at 97.5 % is 12.7062."""

    def outcome(accuracy: float) -> Outcome:
        return Outcome(accuracy, 1 - accuracy / 100, ((1, accuracy),), 1, 1.0)

    outcomes = {
        "a": {0: outcome(90.0), 1: outcome(83.0), 2: outcome(82.0)},
        "b": {1: outcome(80.0), 2: outcome(81.0), 3: outcome(10.0)},
        "c": {2: outcome(50.0)},
    }
    (row,) = compare(outcomes, [("a", "b"), ("a", "c")])
    assert (row["entry"], row["beside"], row["paired_seeds"], row["difference"]) == ("a", "b", 2, 2.0)
    assert row["interval"] == pytest.approx([2 - 12.7062, 2 + 12.7062], abs=1e-3)


def test_seeds_that_the_baseline_lacks_are_not_in_the_difference() -> None:
    """A mean of 70 over two seeds, and a difference of 81 - 80 over the one that both have."""

    def outcome(accuracy: float) -> Outcome:
        return Outcome(accuracy, 1.0, ((1, accuracy),), 1, 1.0)

    outcomes = {"dense": {0: outcome(80.0)}, "half": {0: outcome(81.0), 1: outcome(59.0)}}
    report = {"baseline": "dense", "title": "", "command": "", "labels": {}, "pairs": [], "speeds": {}}
    text = to_markdown("g", {**report, "rows": summarize(outcomes, "dense")})
    assert "| half | 2, 1 paired | 70.00 ± 15.56 | +1.00 |" in text


def test_a_choice_is_compared_with_chance_seed_by_seed() -> None:
    """Chosen 63 and 62, at random 60 and 61: differences 3 and 1, mean 2, and 12.7062 for one degree of freedom."""
    outcomes = {"tokens": {0: Outcome(63.0, 1.0, ((1, 63.0),), 1, 1.0), 2: Outcome(62.0, 1.0, ((1, 62.0),), 1, 1.0)}}
    (row,) = compare_with_chance(outcomes, {"tokens": {"0": 60.0, "2": 61.0}})
    assert (row["chosen"], row["random"], row["difference"], row["seeds"]) == (62.5, 60.5, 2.0, 2)
    assert row["interval"] == pytest.approx([2 - 12.7062, 2 + 12.7062], abs=1e-3)


def test_an_interval_of_equal_differences() -> None:
    assert interval([0.5, 0.5, 0.5]) == [0.5, 0.5]


def test_whether_a_curve_is_flat() -> None:
    """Means 10, 20, 30, 31, 32 of which the last quarter rises from 31 to 32; seeds differ by 0.5 or by 2."""
    curves = [[(step, float(value)) for step, value in enumerate((10, 20, 30, 31, 32), start=1)]] * 2
    row = {"entry": "dense", "curves": curves, "top1_spread": 0.5}
    assert "In the last quarter of the run +1.00, more than the 0.50 by which seeds differ" in describe_curve(row)
    assert describe_curve(row).count(" at step 5") == 1
    assert "+1.00, less than the 2.00" in describe_curve({**row, "top1_spread": 2.0})
    assert describe_curve({**row, "top1_spread": None}).endswith("+1.00.")


@pytest.mark.parametrize("count", [10, 31])
def test_names_that_crowd_at_the_edge_are_all_drawn(count: int) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 1))
    points = {f"entry_{i}": (50.0, 0.99 + 0.0001 * i) for i in range(count)} | {"low": (50.0, 0.0)}
    grid_plot._label(axes, points, near=25)
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert set(heights) == set(points)
    assert all(0 < height < 1 for height in heights.values())
    ordered = sorted(heights.values())
    assert min(after - before for before, after in pairwise(ordered)) > 0.97 * grid_plot.LABEL_GAP
    assert heights[f"entry_{count - 1}"] == ordered[-1]
    assert len(axes.lines) == count - 1  # a name that was pushed away is tied to its point


def test_a_run_that_needs_another() -> None:
    entries = {"dense": {}, "more": {"model": {"start": "{run:dense}"}, "losses": {"teacher": "{run:dense}"}}}
    grid = Grid("g", "quickstart", (3,), "dense", entries)
    assert (grid.needs("dense"), grid.needs("more")) == (set(), {"dense"})
    assert list(Runs(grid, Path("runs/g"), 1, [], ["more"]).tasks()) == [("dense", 3), ("more", 3)]
    assert list(Runs(grid, Path("runs/g"), 1, [], ["dense"]).tasks()) == [("dense", 3)]
    runs = Runs(grid, Path("runs/g"), 1, [])
    text = runs._filled_in(yaml.safe_dump({"start": "{run:dense}", "seed": "{seed}"}), 3)
    assert yaml.safe_load(text) == {"start": "runs/g/dense-seed3", "seed": "3"}


def test_a_grid_runs_goes_on_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        "entries": {
            "dense": {"sparsity": None},
            "half": {"sparsity": {"updates": 1}},
            "pruned": {"model": {"start": "{run:dense}"}, "sparsity": {"density": 0.3, "start": "score", "updates": 0}},
            "tokens": {
                "sparsity": None,
                "model": {"start": "{run:dense}"},
                # Half of the patches lie below it.
                "selector": {"kind": "threshold", "stages": [1], "thresholds": [0.0045], "temperature": 2000},
                "losses": {"macs_target": 0.7, "macs_weight": 500},
            },
        },
        "title": "Is a grid run?",
        "labels": {"half": "half of the weights"},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(grid))
    options = [str(file), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--threads", "1"]
    assert main([*options, "--jobs", "2"]) == 0
    report = (tmp_path / "results" / "small.md").read_text()
    assert "Is a grid run?" in report
    for entry in grid["entries"]:
        assert (f"| {entry} | 1 |" if entry != "half" else "| half of the weights (`half`) | 1 |") in report
    assert (tmp_path / "results" / "small.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "runs" / "small" / "half-seed0" / "sparse.safetensors").stat().st_mtime_ns
    assert main(options) == 0
    assert (tmp_path / "runs" / "small" / "half-seed0" / "sparse.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(grid_speed, "PAIRS", 1)
    monkeypatch.setattr(grid_speed, "STEPS", 1)
    assert main([*options, "--report-only", "--measure", "--measure-amp", "float32"]) == 0
    content = json.loads((tmp_path / "results" / "small.json").read_text())
    assert content["speeds"]["entries"]["half"]["step_seconds"] > 0
    assert content["speeds"]["entries"]["half"]["kernels_ratio"] > 0
    assert content["speeds"]["baseline"]["onnxruntime_ratio"] > 0
    assert "onnxruntime classifies with that dense network" in (tmp_path / "results" / "small.md").read_text()
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(speed_picture, "RESULTS", tmp_path / "results")
    assert (
        speed_picture.main(
            ["small=Small:dense,half=half of the weights", "--output", str(picture), "--kernels", "small"]
        )
        == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        speed_picture.main(["small:dense,halves", "--output", str(picture)])
    assert "halves was not run and timed in this grid; these were: half, pruned, tokens" in capsys.readouterr().err
    assert "| with kernels |" in (tmp_path / "results" / "small.md").read_text()
    assert content["speeds"]["entries"]["half"]["kept"] is None
    assert content["speeds"]["entries"]["tokens"]["kept"]["patches"] == 16
    assert "Patches that images keep" in (tmp_path / "results" / "small.md").read_text()
    (chance,) = content["chance"]
    (tokens,) = (row for row in content["rows"] if row["entry"] == "tokens")
    assert (chance["entry"], chance["seeds"], chance["chosen"]) == ("tokens", 1, tokens["top1_mean"])
    assert chance["random"] != chance["chosen"]
    assert (
        f"| tokens | 1 | {chance['chosen']:.2f} | {chance['random']:.2f} |"
        in (tmp_path / "results" / "small.md").read_text()
    )
    assert main([*options, "--report-only"]) == 0  # what was timed stays
    assert json.loads((tmp_path / "results" / "small.json").read_text()) == content
    capsys.readouterr()
    assert main([*options, "--only", "hlaf"]) == 2
    assert "--only: 'hlaf' is none of the entries dense, half" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("python -m experiments.grids: error:")


@pytest.mark.parametrize("file", sorted((RECIPES / "grids").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_entry_of_the_grids_that_come_along_is_a_run(file: Path, tmp_path: Path) -> None:
    grid = read_grid(file)
    runs = Runs(grid, tmp_path, 1, [])
    seed = grid.seeds[-1]
    for entry in grid.entries:
        command, *arguments = runs.command(entry, seed)
        assert command == "train"
        parser = create_parser(command)
        parser.add_argument("--resume")
        config = resolve(parse(parser, arguments)[0])
        assert (config.training.seed, config.output.name) == (seed, f"{entry}-seed{seed}")


def test_a_wrong_grid(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("recipe: quickstart\nseeds: [0]\nbaseline: dense\nentries: {half: {}}\n")
    with pytest.raises(ValueError, match="baseline 'dense' is none of the entries half"):
        read_grid(file)
    file.write_text("recipe: quickstart\nseeds: [0]\nbaseline: a\nentries: {a: {model: {start: '{run:b}'}}, b: {}}\n")
    with pytest.raises(ValueError, match="a needs the run of 'b', which is no entry before it"):
        read_grid(file)
    begin = "recipe: quickstart\nseeds: [0]\nbaseline: a\nentries: {a: {}, b: {}}\n"
    file.write_text(begin + "labels: {c: third}\n")
    with pytest.raises(ValueError, match="labels 'c' is none of the entries a, b"):
        read_grid(file)
    file.write_text(begin + "compare: [[b, c]]\n")
    with pytest.raises(ValueError, match="compare 'c' is none of the entries a, b"):
        read_grid(file)
    for wrong in ("[a, b]", "[[a, b, a]]"):
        file.write_text(f"{begin}compare: {wrong}\n")
        with pytest.raises(ValueError, match="compare is a list of pairs"):
            read_grid(file)
    file.write_text("recipe: quickstart\n")
    with pytest.raises(ValueError, match="a grid has the keys"):
        read_grid(file)


def test_what_a_grid_knows_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results of another machine are enough, as long as the settings are the same."""
    trained: list[str] = []

    def train(self: Runs, entry: str, seed: int) -> None:
        trained.append(f"{entry}-{seed}")
        write_run(self.path(entry, seed), [50.0 + seed], 100, 1000.0)

    monkeypatch.setattr(Runs, "_train", train)
    monkeypatch.setattr("experiments.grids.grid.draw", lambda *_: None)
    file = tmp_path / "g.yaml"

    def run(runs: str, density: float, *options: str, more: bool = False) -> list[str]:
        trained.clear()
        entries: dict[str, object] = {"dense": {"sparsity": None}, "half": {"sparsity": {"density": density}}}
        if more:
            entries["more"] = {"model": {"start": "{run:dense}"}}
        grid = {"recipe": "quickstart", "seeds": [0, 1], "baseline": "dense", "entries": entries}
        file.write_text(yaml.safe_dump(grid))
        assert main([str(file), "--runs", str(tmp_path / runs), "--results", str(tmp_path), *options]) == 0
        return sorted(trained)

    assert run("here", 0.5, "--only", "dense") == ["dense-0", "dense-1"]
    assert run("elsewhere", 0.5) == ["half-0", "half-1"]
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [(row["entry"], row["top1"]) for row in rows] == [("dense", [50.0, 51.0]), ("half", [50.0, 51.0])]
    assert rows[1]["difference"] == 0.0
    assert run("elsewhere again", 0.4) == ["half-0", "half-1"], "another density is another run"
    assert run("for others", 0.4, more=True) == ["dense-0", "dense-1", "more-0", "more-1"], "its folder is needed"
    assert run("nowhere", 0.4, more=True) == []
    assert run("with options", 0.4, "--training.epochs=1") == ["dense-0", "dense-1", "half-0", "half-1"]
    capsys.readouterr()
