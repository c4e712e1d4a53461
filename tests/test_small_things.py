"""Paths with ~ and spaces, keys that stand twice, empty files, options that would do nothing."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from experiments.__main__ import main, with_home
from experiments.commands.benchmark import COMMANDS
from experiments.config import yaml_text
from experiments.config.run_config import LossConfig, ModelConfig, OutputConfig
from experiments.data.data_config import DataConfig
from experiments.grids.grid import read_grid
from tests.test_cli import SMALL, last_line

SHORT = [*SMALL, "--training.steps=2", "--schedule.warmup_epochs=0", "--sparsity.updates=1"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, whose name has a space, and a place elsewhere."""
    home, here = tmp_path / "my home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_home_in_every_path_of_a_configuration(home: Path) -> None:
    assert OutputConfig(runs="~/x").runs == f"{home}/x"
    assert ModelConfig(start="~/x").start == f"{home}/x"
    assert LossConfig(teacher="~/x").teacher == f"{home}/x"
    assert DataConfig(dataset="folder", root="~/x").root == f"{home}/x"
    assert OutputConfig(runs="a~/x~").runs == "a~/x~"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("~/x", "{home}/x"),
        ("--resume=~/x", "{home}/x"),
        ("--selector=~", "--selector=~"),  # null
        ("--data.root=a/~/x", "--data.root=a/~/x"),
        ("--output.name=x=~/y", "--output.name=x=~/y"),
    ],
)
def test_home_on_the_command_line(argument: str, expected: str, home: Path) -> None:
    option = "--resume=" if argument.startswith("--resume") else ""
    assert with_home(argument) == (option + expected.format(home=home) if "{" in expected else expected)


def test_a_run_at_home_and_the_commands_that_it_prints(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("output: {runs: ~/all runs}\n")
    assert main(["train", "--config=quickstart", "--config=my.yaml", *SHORT, "--output.name=run"]) == 0
    assert [path.name for path in Path().iterdir()] == ["my.yaml"]
    out = capsys.readouterr().out
    evaluate, tensorboard = (shlex.split(line) for line in out.split("next:\n")[1].splitlines())
    assert evaluate == ["sparse-trainer", "evaluate", f"{home}/all runs/run/sparse.safetensors"]
    assert tensorboard == ["tensorboard", "--logdir", f"{home}/all runs"]
    assert main(evaluate[1:]) == 0
    capsys.readouterr()
    assert main(["train", *SHORT, "--output.runs=~/all runs", "--output.name=run"]) == 2
    assert last_line(capsys).endswith(f"or go on with it: --resume '{home}/all runs/run'")
    assert main(["export", "~/all runs/run", "--format=sparse", "--output=~/it's.safetensors"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "~/it's.safetensors", "--json"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", [("a", 1, 3)]),
        ("a: {b: 1, c: {d: 1, d: 2}}\n", [("a.c.d", 1, 1)]),
        ("training:\n  epochs: 1\ntraining:\n  epochs: 2\n", [("training", 1, 3)]),
        ("- {a: 1}\n- {a: 1, a: 1}\n", [("1.a", 2, 2)]),
        ("a: 1\n'a': 1\n", [("a", 1, 2)]),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: *x\n", []),
        ("1: a\n'1': b\n", []),
        ("", []),
    ],
)
def test_keys_that_stand_twice(text: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(yaml_text.duplicates(text)) == expected
    if not expected:
        assert yaml_text.load(text) == yaml.safe_load(text)


def test_aliases_end() -> None:
    with pytest.raises(ValueError, match=r"a\.b\.0 holds itself, in line 1"):
        yaml_text.load("a: &x {b: [*x]}")
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    assert list(yaml_text.duplicates("\n".join(lines))) == []  # 9 ** 39 ones, if each were looked at


def test_they_are_refused_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("training:\n  epochs: 3\n  seed: 1\n  epochs: 5\n")
    assert main(["train", "--config", str(file)]) == 2
    assert last_line(capsys).endswith(
        f"--config: {file}: training.epochs stands twice, at lines 2 and 4; leave one out"
    )
    for given in (["--model.kwargs={depth: 6, depth: 8}"], ["--model.kwargs", "{depth: 6, depth: 8}"]):
        assert main(["train", *given]) == 2
        assert last_line(capsys).endswith("model.kwargs: depth stands twice, in line 1; leave one out")
    file.write_text("recipe: quickstart\nentries: {a: {}, b: {}, a: {}}\n")
    with pytest.raises(ValueError, match=r"my\.yaml: entries\.a stands twice, in line 2"):
        read_grid(file)


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", "---\n", "{}\n", "null\n"])
def test_an_empty_file_is_no_configuration(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(content)
    assert main(["train", "--config", str(file)]) == 2
    assert f"--config: {file} is empty; give sections such as model and training, or leave it" in last_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "x", "--data.mixup=0.8"], "data.mixup: is for training alone; leave it out"),
        (["evaluate", "x", "--data.batch_size", "8"], "data.batch_size: is for training alone; leave it out"),
        (["evaluate", "x", "--data.auto_augment=rand-m9"], "data.auto_augment: is for training alone; leave it out"),
        (["evaluate", "x", "--data.mean=[0.5]"], "data.mean: is that of the checkpoint; leave it out"),
        (["evaluate", "x", "--data.in_chans=1"], "data.in_chans: is that of the checkpoint; leave it out"),
        (["benchmark", "data", "--model=deit_tiny_patch16_224"], "model: unknown key"),
        (["benchmark", "data", "--amp=float32"], "amp: unknown key"),
    ],
)
def test_options_that_would_do_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in last_line(capsys)


def test_the_help_lists_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    assert "--data.fit" in out
    assert not any(f"--data.{key}" in out for key in ("mixup", "horizontal_flip", "batch_size", "mean", "train_split"))
    assert "batch_size" not in COMMANDS["data"].hidden
