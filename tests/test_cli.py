"""The command line: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from experiments.__main__ import commands, main
from experiments.commands.conclusion import dense_accuracy, is_unchanged, references
from experiments.commands.train_help import MATTER
from experiments.config.reading import load_config, recipes
from experiments.config.records import RECORDS
from experiments.evaluation.speed import images_per_second
from experiments.run_folder.folder import RunFolder
from experiments.terminal import run_command
from models.selector_config import SelectorConfig
from sparse_trainer import SparsityConfig

ROOT = Path(__file__).parent.parent
SMALL = [
    "--selector=null", "--losses.macs_target=null",
    "--model.kwargs={embed_dim: 24, depth: 2, patch_size: 7}", "--data.train_subset=100", "--data.eval_subset=20",
    "--data.batch_size=10", "--training.epochs=2", "--schedule.warmup_epochs=1", "--sparsity.updates=3",
    "--training.device=cpu", "--training.log_every=5",
]  # fmt: skip


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: exactly one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_that_misses_its_target_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selector = "--selector={kind: threshold, stages: [1], thresholds: [-1.0]}"
    asked = ["--losses.macs_target=0.7", "--losses.macs_weight=1e-9", "--sparsity=null"]
    assert main(["train", *SMALL, selector, *asked, f"--output.runs={tmp_path}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "100.0% of the dense MACs are computed, far above losses.macs_target (70.0%)" in out
    assert "before block 1 drop nothing" in out


def test_train_evaluate_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, run = tmp_path / "runs", tmp_path / "runs" / "first"
    assert main(["train", *SMALL, f"--output.runs={runs}", "--output.name=first"]) == 0
    out = capsys.readouterr().out
    for row in ("accuracy", "live parameters", "MACs per image", "sparse file", "training time", "written to"):
        assert f"│ {row}" in out
    assert f"sparse-trainer evaluate {run}/sparse.safetensors" in out
    assert f"tensorboard --logdir {runs}" in out
    assert {path.name for path in run.iterdir()} == {
        ".lock", "README.md", "checkpoints", "config.yaml", "masks", "metrics.jsonl", "sparse.safetensors",
        "tensorboard",
    }  # fmt: skip
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])

    assert main(["evaluate", str(run / "sparse.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 20
    assert found["top1"] == last["eval/top1"]
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert found["live_parameters"] == last.get("budget/live_parameters", found["live_parameters"])
    assert main(["evaluate", str(run / "sparse.safetensors"), "--data.eval_subset=null", "--batch-size=500"]) == 0
    assert "2,000 of fashion-mnist-10k" in capsys.readouterr().out

    assert main(["train", "--resume", str(run)]) == 0
    assert "the run is complete" in capsys.readouterr().out
    assert main(["train", "--resume", "auto", f"--output.runs={runs}"]) == 0
    assert "the run is complete" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--training.seed=3"]) == 2
    assert last_line(capsys).startswith(
        "sparse-trainer train: error: training.seed: 3 differs from 0, which the run was started with, and its state "
        "is of that; leave it out to resume"
    )


def test_the_written_configuration_makes_the_same_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert main(["train", *SMALL, "--training.seed=3", f"--output.runs={runs}", "--output.name=first"]) == 0
    assert main(["train", "--config", str(runs / "first" / "config.yaml")]) == 0
    (second,) = (path for path in runs.iterdir() if path.name != "first")
    assert second.name == "quickstart"
    assert load_config(second / "config.yaml") == load_config(runs / "first" / "config.yaml")
    assert (second / "sparse.safetensors").read_bytes() == (runs / "first" / "sparse.safetensors").read_bytes()


def test_a_checkpoint_without_its_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run"]) == 0
    lonely = (tmp_path / "run" / "sparse.safetensors").rename(tmp_path / "lonely.safetensors")
    capsys.readouterr()
    assert main(["evaluate", str(lonely)]) == 0
    assert "2,000 of fashion-mnist-10k" in capsys.readouterr().out
    assert main(["evaluate", str(lonely), "--data.image_size=32"]) == 2
    assert last_line(capsys) == (
        "sparse-trainer evaluate: error: data.image_size: 32 does not match the checkpoint's image size 28; "
        "leave it out"
    )


def test_resume_auto_starts_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *SMALL, "--resume=auto", f"--output.runs={tmp_path}", "--output.name=run"]
    assert main(arguments) == 0
    assert "resuming" not in capsys.readouterr().out
    assert main([*arguments, "--config=quickstart"]) == 0
    assert "the run is complete" in capsys.readouterr().out


def test_resume_of_a_run_that_was_killed_before_it_saved_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run"]
    assert main(arguments) == 0
    whole = (tmp_path / "run" / "sparse.safetensors").read_bytes()
    for name in ("checkpoints", "masks", "tensorboard"):
        shutil.rmtree(tmp_path / "run" / name)
    for name in ("README.md", "sparse.safetensors", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert f"{tmp_path}/run ended before its first step; it begins anew" in capsys.readouterr().out
    assert (tmp_path / "run" / "sparse.safetensors").read_bytes() == whole


def test_interrupt_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "experiments", "train", *SMALL, "--training.epochs=2000", "--sparsity=null",
        f"--output.runs={tmp_path}", "--output.name=run",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert "everything is saved" in out
    assert f"  sparse-trainer train --resume {run}\n" in out
    assert RunFolder(run).bundles()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--sparsity.density=2"], "train: error: sparsity.density: 2.0 is not a share in (0, 1] or null"),
        (["train", "--data.lr=2"], "train: error: data.lr: unknown key; did you mean optimizer.lr?"),
        (["train", "--resum=x"], "train: error: resum: unknown key; did you mean resume?"),
        (
            ["train", "--resume=nowhere"],
            "train: error: --resume: nowhere holds no checkpoints/step_*.resume; give the folder of a run, or auto",
        ),
        (
            ["train", "--config=svite_deit_small", "--data.root=nowhere"],
            "train: error: data.root 'nowhere' is not a folder; it must hold 'train' with a folder a class",
        ),
        (
            ["train", "--model.kwargs.img_size=32"],
            "train: error: model.kwargs.img_size: 32 does not match data.image_size (28); leave it out, or change the "
            "data",
        ),
        (["evaluate"], "evaluate: error: give a sparse checkpoint, such as runs/<name>/sparse.safetensors"),
        (["evaluate", "nowhere.safetensors"], "evaluate: error: nowhere.safetensors: there is no such file"),
        (["evaluate", "x", "--amp=y"], "evaluate: error: --amp: 'y' is not one of auto, float32, bfloat16, float16"),
        (["evaluate", "x", "--batch-size=many"], "evaluate: error: --batch-size: 'many' is not a whole number"),
        (["evaluate", "x", "--batchsize=1"], "evaluate: error: batchsize: unknown key; did you mean batch-size?"),
        (["evaluat", "x"], "error: unknown command 'evaluat'; did you mean evaluate?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    expected = "sparse-trainer: " if message.startswith("error") else "sparse-trainer "
    assert last_line(capsys) == expected + message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")
def test_what_is_said_on_the_way_has_no_place_in_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        warnings.warn("no C++ compiler\n  was found", stacklevel=2)
        return 0

    assert run_command("evaluate", command) == 0
    assert capsys.readouterr().err == "note: no C++ compiler was found\n"


def test_files_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run", "--training.epochs=1",
                 "--schedule.warmup_epochs=0"]) == 0  # fmt: skip
    capsys.readouterr()
    newest, before = RunFolder(run).bundles()
    assert main(["evaluate", str(newest)]) == 2
    assert "is another kind of file: expected a sparse checkpoint, found a resume bundle" in last_line(capsys)
    assert main(["evaluate", str(run / "config.yaml")]) == 2
    assert "is truncated or no safetensors file" in last_line(capsys)
    for bundle in (newest, before):
        damaged = bytearray(bundle.read_bytes())
        damaged[-1] ^= 1
        bundle.write_bytes(damaged)
    assert main(["train", "--resume", str(run)]) == 2
    line = last_line(capsys)
    assert line.startswith(f"sparse-trainer train: error: {newest}: the tensor data is damaged: expected sha256")
    assert line.endswith("; the 1 before it cannot be read either")


def test_a_run_that_cannot_go_on_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 1e30 makes every weight, and so the loss, infinite after the first step."""
    arguments = ["--optimizer.lr=1e30", "--schedule.warmup_epochs=0", "--training.max_bad_steps=2", "--sparsity=null"]
    assert main(["train", *SMALL, *arguments, f"--output.runs={tmp_path}"]) == 1
    assert "loss or gradient was not finite in 2 steps in a row" in last_line(capsys)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert {"train", "evaluate"} <= set(commands())
    assert all(f"  {name}" in out for name in commands())
    assert main([]) == 2
    capsys.readouterr()
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 30
    assert all(option in short for option, _ in MATTER)
    for option, _ in MATTER:
        section, _, setting = option.removeprefix("--").partition(".")
        assert not setting or setting in {field.name for field in fields(RECORDS[section])}
    assert main(["train", "--help", "all"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for section, record in (("sparsity", SparsityConfig), ("selector", SelectorConfig)):
        assert all(f"--{section}.{field.name}: " in out for field in fields(record))


@pytest.mark.parametrize("section", RECORDS)
def test_help_on_a_section_has_all_its_settings(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", section]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert lines == [f"--{section}.{field.name}" for field in fields(RECORDS[section])]


def test_help_on_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "weather"]) == 2
    assert "there is no section 'weather'; there are model, data," in last_line(capsys)


def test_the_dense_network_stands_beside_the_result(tmp_path: Path) -> None:
    """Its accuracy is known for a recipe as it is, whatever the seed; of any other run it is said how to find out."""
    plain = load_config(recipes()["quickstart"])
    report = json.loads((ROOT / "experiments" / "results" / "quickstart.json").read_text())
    (row,) = [row for row in report["rows"] if row["entry"] == "dense"]
    assert references() == {"quickstart": {"top1": round(row["top1_mean"], 2), "seeds": row["seeds"]}}
    assert re.fullmatch(rf"top-1 {row['top1_mean']:.2f} % \((one seed|mean of \d seeds)\)", dense_accuracy(plain))
    for section, changes in (("training", {"seed": 3}), ("output", {"name": "mine"}), ("training", {"amp": "float32"})):
        changed = dataclasses.replace(getattr(plain, section), **changes)
        assert is_unchanged(dataclasses.replace(plain, **{section: changed}))
    for section, changes in (("training", {"epochs": 2}), ("optimizer", {"lr": 1.0}), ("data", {"batch_size": 8})):
        changed = dataclasses.replace(getattr(plain, section), **changes)
        other = dataclasses.replace(plain, **{section: changed})
        assert dense_accuracy(other) == "not known: train it with --sparsity null --selector null"
    assert dense_accuracy(dataclasses.replace(plain, sparsity=None, selector=None)) == ""
    assert not is_unchanged(dataclasses.replace(plain, recipe="mine"))


def test_speeds_are_medians_of_networks_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round does not count, and each network is left in the mode it was in."""
    calls: list[str] = []

    class Network(torch.nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training
            calls.append(self.name)
            now[0] += self.seconds
            return images

    now = [0.0]
    monkeypatch.setattr("experiments.evaluation.speed.time.perf_counter", lambda: now[0])
    slow, fast = Network("slow", 0.5), Network("fast", 0.25).eval()
    found = images_per_second((slow, fast), torch.zeros(2, 1), contextlib.nullcontext)
    assert found == [4.0, 8.0]
    assert calls[:4] == ["slow", "fast", "slow", "fast"]
    assert len(calls) == 2 * 6  # rounds of 0.75 seconds; none begins after 4
    assert slow.training
    assert not fast.training


def test_a_trained_run_is_not_lost_for_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(trainer: object) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr("experiments.training.loop.measure_speeds", fail)
    assert main(["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run"]) == 0
    assert (tmp_path / "run" / "sparse.safetensors").is_file()
    out = capsys.readouterr().out
    assert "note: images per second were not measured: RuntimeError('no clock')" in out
    assert "images per second \u2502" not in out
