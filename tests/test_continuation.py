"""A run that goes on as another one: longer, or under other settings, from the state of the first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.config.reading import build, load_config, read_output
from experiments.run_folder.folder import RunFolder
from experiments.training.continuation import MAY_DIFFER, changes
from experiments.trials.compare import differences, fingerprint
from sparse_trainer.files.checkpoint import load_resume, read_info
from sparse_trainer.mask_log import read_timeline
from tests.test_cli import last_line
from tests.test_folders import two_classes

SMALL = [
    "--selector=null", "--losses.macs_target=null", "--model.kwargs={embed_dim: 24, depth: 2, patch_size: 7}",
    "--data.train_subset=60", "--data.eval_subset=20", "--data.batch_size=10", "--training.epochs=2",
    "--schedule.warmup_epochs=0.5", "--sparsity.update_every=2", "--sparsity.updates=null", "--training.device=cpu",
    "--training.log_every=1", "--training.amp=float32", "--sparsity.stop_at=0.8",
]  # fmt: skip
"""Twelve steps, six an epoch."""


def train(runs: Path, name: str, *options: str) -> RunFolder:
    assert main(["train", *SMALL, *options, f"--output.runs={runs}", f"--output.name={name}"]) == 0
    return RunFolder(runs / name)


def go_on(folder: RunFolder, *options: str) -> None:
    assert main(["train", f"--resume={folder.path}", *options]) == 0


def metrics(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """By step; no step twice."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line for line in lines}


def files(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.path.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        ("--sparsity=null",),
        ("--sparsity=null", "--optimizer.name=lamb"),
        ("--sparsity=null", "--training.ema_decay=0.9", "--data.mixup=0.4", "--model.drop_path=0.2"),
        # Its updates are over before the first run ends, or come in both at the same steps.
        ("--sparsity.update_every=2", "--sparsity.stop_at=0.2", "--sparsity.drop_fraction_end=0.3"),
        ("--sparsity.update_every=20", "--sparsity.head_density=0.67", "--sparsity.neuron_density=0.5"),
    ],
    ids=["dense", "steps beside the settings", "average", "weights", "units"],
)
@pytest.mark.filterwarnings("ignore:no update fits")
def test_where_no_schedule_depends_on_the_length_it_is_the_long_run(options: tuple[str, ...], tmp_path: Path) -> None:
    """In every bit of weights, moments, averages and random states."""
    constant = [*options, "--schedule.name=constant"]
    short = train(tmp_path, "short", *constant)
    before = files(short)
    go_on(short, "--training.epochs=4")
    assert files(short) == before
    later = RunFolder(tmp_path / "short-2")
    if "--sparsity.stop_at=0.2" in options:  # updates at 2; of the long run also at 4
        assert [record.step for record in read_timeline(later.path)] == [12]
        return
    whole = train(tmp_path, "whole", *constant, "--training.epochs=4")
    ours, theirs = (load_resume(folder.bundles()[0])["trainer"] for folder in (later, whole))
    assert ours["tried"] == theirs["tried"] == 24
    left, right = fingerprint(later.path), fingerprint(whole.path)
    for part in ("model", "ema", "optimizer", "random", "step", "scaler"):
        assert left[f"state: {part}"] == right[f"state: {part}"], part


def test_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = train(tmp_path, "run")
    capsys.readouterr()
    go_on(short, "--training.epochs=4", "--optimizer.lr=0.001")
    out = capsys.readouterr().out
    assert (
        f"going on from {short.path} at step 12 in a new run: optimizer.lr 0.001 (was 0.002), "
        "training.epochs 4 (was 2)\n"
    ) in out
    assert f"folder    {short.path}-2\n" in out
    later = RunFolder(tmp_path / "run-2")
    found = metrics(later)
    assert sorted(found) == list(range(12, 25))
    # The cosine of 24 steps with the new height, entered after 12; no warm-up.
    whole = metrics(train(tmp_path, "whole", "--training.epochs=4", "--optimizer.lr=0.001"))
    assert [found[step]["train/lr"] for step in range(13, 25)] == [whole[step]["train/lr"] for step in range(13, 25)]
    # Updates every two steps while less than 0.8 of 24 are done; the record of the start comes first.
    assert [record.step for record in read_timeline(later.path)] == [12, 14, 16, 18]
    info = read_info(later.sparse)
    assert (info.step, info.budget) == (24, read_info(short.sparse).budget)
    assert json.loads(later.origin_file.read_text())["run"] == str(short.path)
    # Once more: of the new run, and from the old one under a name of its own.
    go_on(later)
    assert "the run is complete" in capsys.readouterr().out
    go_on(short, "--training.epochs=3", "--output.name=third")
    assert sorted(metrics(RunFolder(tmp_path / "third"))) == list(range(12, 19))


@pytest.mark.parametrize(
    ("options", "start", "total"),
    [
        (("--data.batch_size=20", "--training.epochs=4"), 6, 12),
        (("--data.batch_size=5", "--training.epochs=3"), 24, 36),
        (("--training.accumulate=2", "--training.epochs=4"), 6, 12),
        (("--data.batch_size=30", "--training.epochs=3", "--training.ema_decay=0.9"), 4, 6),
        (("--training.steps=15", "--optimizer.weight_decay=0.2", "--data.mixup=0.3"), 12, 15),
    ],
)
@pytest.mark.filterwarnings("ignore:no update fits")
def test_the_place_in_epochs_is_kept(options: tuple[str, ...], start: int, total: int, tmp_path: Path) -> None:
    run = train(tmp_path, "run")
    go_on(run, *options)
    later = RunFolder(tmp_path / "run-2")
    found = metrics(later)
    assert (min(found), max(found)) == (start, total)
    if "--training.steps=15" not in options:
        assert found[start]["eval/top1"] == metrics(run)[12]["eval/top1"]
    state = load_resume(later.bundles()[0])["trainer"]
    decay = 0.2 if "--optimizer.weight_decay=0.2" in options else 0.05
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.0, decay}
    assert read_info(later.sparse).budget == read_info(run.sparse).budget


def test_a_learning_rate_by_the_batch(tmp_path: Path) -> None:
    run = train(tmp_path, "run")
    go_on(run, "--training.epochs=3", "--optimizer.base_lr=0.0512")
    assert load_config(RunFolder(tmp_path / "run-2").config).optimizer.lr == pytest.approx(0.0512 * 10 / 512)
    go_on(run, "--training.epochs=3", "--data.batch_size=20")
    assert load_config(RunFolder(tmp_path / "run-3").config).optimizer.lr == load_config(run.config).optimizer.lr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.epochs=1"], "training.epochs: 1 epochs are done after 6 steps, and "),
        (
            ["--training.epochs=2", "--training.seed=3"],
            "training.seed: 3 differs from 0, which the run was started with",
        ),
        (["--training.epochs=4", "--sparsity.density=0.3"], "sparsity.density: 0.3 differs from 0.5, which the run"),
        (["--model.kwargs.depth=3", "--data.mixup=0.3"], "model.kwargs.depth: 3 differs from 2, which the run was"),
        (["--sparsity=null"], "sparsity.density: None differs from 0.5; "),
        (["--data.train_subset=50"], "data.train_subset: 50 differs from 60, which the run was started with"),
    ],
)
def test_what_cannot_be(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "run")
    before = files(run)
    capsys.readouterr()
    assert main(["train", f"--resume={run.path}", *options]) == 2
    assert message in last_line(capsys)
    assert files(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_auto_never_makes_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pieces of a job that is queued several times would each make one."""
    train(tmp_path, "run")
    capsys.readouterr()
    assert main(["train", *SMALL, "--resume=auto", f"--output.runs={tmp_path}", "--training.epochs=4"]) == 2
    assert "training.epochs: 4 differs from 2, which the run was started with" in last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_killed_before_it_had_saved_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It starts from the other run again, and not from nothing."""
    run = train(tmp_path, "run")
    go_on(run, "--training.epochs=3")
    later = RunFolder(tmp_path / "run-2")
    expected = fingerprint(later.path)
    for path in ("checkpoints", "masks", "tensorboard"):
        shutil.rmtree(later.path / path)
    for path in ("README.md", "metrics.jsonl", "sparse.safetensors"):
        (later.path / path).unlink()
    capsys.readouterr()
    go_on(later)
    assert f"going on from {run.path} at step 12 in a new run: training.epochs 3 (was 2)" in capsys.readouterr().out
    assert not differences(expected, fingerprint(later.path))
    (later.path / "origin.json").write_text("[]")
    shutil.rmtree(later.path / "checkpoints")
    for path in ("README.md", "sparse.safetensors"):
        (later.path / path).unlink()
    assert main(["train", f"--resume={later.path}"]) == 2
    assert "origin.json cannot be read" in last_line(capsys)


@pytest.mark.parametrize("how", ["named", "auto", "auto by name"])
def test_images_that_were_moved(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options are held against the settings of the run, which reads folders, not against those of the quick start."""
    images = two_classes(tmp_path / "images")
    run = train(
        tmp_path / "runs", "run", "--data.dataset=folder", f"--data.root={images}", "--data.train_subset=null",
        "--data.eval_subset=null", "--data.batch_size=8", "--data.image_size=14",
    )  # fmt: skip
    run.sparse.unlink()
    images.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    which = {"named": [f"--resume={run.path}"], "auto": ["--resume", "auto", f"--output.runs={tmp_path / 'runs'}"]}
    which["auto by name"] = [*which["auto"], "--output.name=run"]
    assert main(["train", *which[how], f"--data.root={tmp_path / 'elsewhere'}"]) == 0
    assert "the run is complete" in capsys.readouterr().out or run.sparse.is_file()


def test_where_a_run_writes_is_read_from_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("output: {runs: there, name: one}\ndata: {mixup: -1}\n")
    assert read_output([])[1] is None
    output, recipe = read_output([f"--config={file}", "--output.name=two", "--data.root=x"])
    assert (output.runs, output.name, recipe) == ("there", "two", "my")
    assert read_output(["--output={runs: x, name: y}", "--output.name", "z"])[0].name == "z"


def test_every_setting_that_may_differ_is_one() -> None:
    before = build({"sparsity": {}})
    now = build({"sparsity": {"updates": 7}, "training": {"epochs": 9}, "optimizer": {"betas": [0.8, 0.9]}})
    assert changes(before, before) == {}
    assert changes(before, now) == {
        "optimizer.betas": (None, [0.8, 0.9]), "sparsity.updates": (None, 7), "training.epochs": (300, 9),
    }  # fmt: skip
    for key in MAY_DIFFER:
        section, name = key.split(".")
        assert hasattr(getattr(before, section), name), key
