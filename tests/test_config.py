"""Configuration: what is read, what is refused and in which words, and that it can be written and read again."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from experiments.config.reading import create_parser, find_config, flatten, load_config, parse, recipes, to_yaml
from experiments.config.records import RECORDS
from experiments.config.run_config import RunConfig, has_bfloat16_matmul, resolve
from experiments.errors import ConfigError
from sparse_trainer import SparsityConfig


def read(*arguments: str) -> RunConfig:
    return parse(create_parser("train"), arguments)[0]


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(read(*arguments))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_without_a_file_it_is_the_quick_start() -> None:
    config = read()
    assert config == read("--config", "quickstart")
    assert config.recipe == "quickstart"
    assert config.model.name == "deit_quickstart"
    assert config.sparsity is not None
    assert config.sparsity.density == 0.5


@pytest.mark.parametrize("name", recipes())
def test_recipes_parse_and_come_back_equal(name: str, tmp_path: Path) -> None:
    config = resolve(read("--config", name))
    assert config.recipe == name
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert resolve(again) == config


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_recipe_of_the_paper(size: str) -> None:
    config = resolve(read("--config", f"svite_deit_{size}"))
    assert config.model.name == f"deit_{size}_patch16_224"
    assert config.optimizer.lr == pytest.approx(5e-4)  # at 512 images a step
    assert config.step_images == 512
    assert (config.training.epochs, config.schedule.warmup_epochs, config.schedule.min_lr) == (600, 5, 1e-5)
    assert (config.optimizer.name, config.optimizer.weight_decay, config.model.drop_path) == ("adamw", 0.05, 0.1)
    assert config.training.ema_decay == 0.99996
    data = config.data
    assert (data.mixup, data.cutmix, data.label_smoothing, data.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert data.auto_augment == "rand-m9-mstd0.5-inc1"
    assert data.repeated_augmentation == 3
    assert config.sparsity == SparsityConfig(density=0.5, updates=80, drop_fraction=0.5)


def test_overrides_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("sparsity: {density: 0.3, seed: 4}\ntraining: {epochs: 7}\n")
    second.write_text("sparsity: {density: 0.2}\n")
    config = read("--training.epochs", "9", "--config", str(first), "--config", str(second))
    assert config.sparsity == SparsityConfig(density=0.2, seed=4)
    assert config.training.epochs == 9
    assert config.recipe == "second"


def test_values_of_all_kinds() -> None:
    config = read(
        "--model.kwargs.depth=2", "--model.kwargs.embed_dim", "24", "--optimizer.betas", "[0.9, 0.95]",
        "--sparsity.exclude", "[head, patch_embed.*]", "--training.clip_grad", "null", "--training.steps", "30",
    )  # fmt: skip
    assert config.model.kwargs == {"depth": 2, "embed_dim": 24}
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.sparsity is not None
    assert config.sparsity.exclude == ("head", "patch_embed.*")
    assert config.training.clip_grad is None
    assert config.training.steps == 30


def test_sparsity_and_selector_can_be_off_and_on(tmp_path: Path) -> None:
    assert read("--sparsity", "null").sparsity is None
    path = tmp_path / "dense.yaml"
    path.write_text("sparsity: null\n")
    config = load_config(path)
    assert config.sparsity is None
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert read("--selector", "null").selector is None
    selector = read("--config", "svite_plus_deit_small", "--selector.keep_ratio", "0.5").selector
    assert selector is not None
    assert selector.keep_ratio == 0.5


def test_the_learning_rate_follows_the_images_per_step() -> None:
    config = resolve(
        read("--optimizer.lr", "null", "--optimizer.base_lr", "1e-3", "--data.batch_size", "64",
             "--training.accumulate", "4")
    )  # fmt: skip
    assert config.optimizer.lr == 1e-3 * 256 / 512


def test_auto_precision_is_bfloat16_only_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, expected in ((False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert has_bfloat16_matmul(torch.device("cpu")) == (expected == "bfloat16")
        assert resolve(read("--training.device", "cpu")).training.amp == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity.desnity", "0.5"], "sparsity.desnity: unknown key; did you mean sparsity.density?"),
        (["--training.epoch", "3"], "training.epoch: unknown key; did you mean training.epochs?"),
        (["--epochs", "3"], "epochs: unknown key; did you mean training.epochs?"),
        (["--data.lr", "3"], "data.lr: unknown key; did you mean optimizer.lr?"),
        (
            ["--xyz", "1"],
            "xyz: unknown key; there are recipe, model, data, sparsity, selector, losses, optimizer, schedule, "
            "training, output, config",
        ),
        (["--training.epochs", "many"], "training.epochs: 'many' is not a whole number"),
        (["--training.steps", "2.5"], "training.steps: '2.5' is not a whole number or null"),
        (["--sparsity.density", "half"], "sparsity.density: 'half' is not a number or null"),
        (["--model.pretrained", "maybe"], "model.pretrained: 'maybe' is not true or false"),
        (["--training.amp", "int8"], "training.amp: 'int8' is not one of auto, float32, bfloat16, float16"),
        (["--sparsity.include", "head"], "sparsity.include: 'head' is not a list such as [a, b]"),
        (["--sparsity.density", "1.5"], "sparsity.density: 1.5 is not a share in (0, 1] or null"),
        (["--sparsity.density", "0"], "sparsity.density: 0.0 is not a share in (0, 1] or null"),
        (["--sparsity.density", ".nan"], "sparsity.density: nan is not a share in (0, 1] or null"),
        (
            ["--sparsity.updates", "4", "--sparsity.update_every", "5"],
            "sparsity.updates and update_every: give one of them, not both",
        ),
        (["--data.batch_size", "0"], "data.batch_size is 0; it must be 1 or more"),
        (
            ["--training.epochs", "0", "--training.clip_grad=-1", "--optimizer.weight_decay=-1"],
            "optimizer.weight_decay: -1.0 is not 0 or more; training.epochs: 0 is not a positive whole number; "
            "training.clip_grad: -1.0 is not a positive number or null",
        ),
        (
            ["--selector=null", "--selector.keep_ratio=2"],
            "selector.keep_ratio: 2.0 is not a share in (0, 1]",
        ),
        (
            ["--output.name", "../elsewhere"],
            "output.name: '../elsewhere' is not a folder name (letters, digits, '.', '_', '-') or null",
        ),
        (["--config"], "--config: needs a file or the name of a recipe"),
        (['--sparsity={"densty": 0.5}'], "sparsity.densty: unknown key; did you mean sparsity.density?"),
        (["--training", '{"epoch": 1}'], "training.epoch: unknown key; did you mean training.epochs?"),
        (["--training.eval_every=.inf"], "training.eval_every: inf is not a finite number"),
        (["--model.kwargs={mlp_ratio: .nan}"], "model.kwargs.mlp_ratio: nan is not a finite number"),
        (["--optimizer.betas=[0.9, .inf]"], "optimizer.betas.1: inf is not a finite number"),
        (["--data.image_size", "99999999999"], "data.image_size is 99999999999; it must be 65,536 at most"),
        (["--optimizer.lr=.inf"], "optimizer.lr: inf is not a finite number"),
        (["--training.seed", "9" * 20], f"training.seed: {'9' * 20} is not a whole number from 0 to 2^63 - 1"),
        (
            ["--data.subset_seed", "9" * 20],
            f"data.subset_seed is {'9' * 20}; it must be a whole number from 0 to 2^63 - 1",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], message: str) -> None:
    assert refused(*arguments) == message


@pytest.mark.parametrize("value", ["5", "[1]", "text"])
@pytest.mark.parametrize("section", ["selector", "training"])
def test_a_section_on_the_line_is_a_mapping(section: str, value: str) -> None:
    for arguments in ((f"--{section}={value}",), (f"--{section}", value)):
        assert " is not a section with keys such as " in refused(*arguments)


@pytest.mark.parametrize(
    ("section", "name", "hint"),
    [(section, field.name, str(field.type)) for section, record in RECORDS.items() for field in fields(record)],
)
def test_a_value_is_null_only_where_it_may_be(section: str, name: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}:\n  {name}:\n")
    if "None" in hint:
        assert getattr(getattr(load_config(path), section), name, None) is None or section in ("sparsity", "selector")
    else:
        assert refused("--config", str(path)).startswith((f"{section}.{name}", f"{section}: {name}"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training: {epoch: 3}\nmodl: {name: x}\n", "training.epoch: unknown key; did you mean training.epochs?; "
         "modl.name: unknown key; did you mean model?"),
        ("sparsity: {density: high}\n", "sparsity.density: 'high' is not a number or null"),
        ("schedule: 3\n", "schedule: 3 is not a section with keys such as name, warmup_epochs, warmup_lr, min_lr"),
        ("training:\n", "training: None is not a section with keys such as epochs, steps"),
        ("data:\n  batch_size:\n", "data.batch_size: null is not a whole number; leave the key out for its default"),
        ("training: {device: null, compile: null}\n", "training.compile: null is not true or false; leave the key out "
         "for its default; training.device: null is not a text; leave the key out for its default"),
        ("model:\n  kwargs:\n", "model.kwargs: null is not a mapping such as {depth: 6}"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert refused("--config", str(path)).startswith(message)


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: [\n")
    assert refused("--config", str(path)) == f"--config: {path} is not YAML at line 2"
    path.write_text("- a\n")
    assert refused("--config", str(path)) == f"--config: {path} holds list, not sections such as model and training"
    path.write_bytes(b"\xff\xfe\x00")
    assert refused("--config", str(path)).startswith(f"--config: cannot read {path}")


def test_a_missing_file_lists_the_recipes() -> None:
    known = ", ".join(recipes())
    assert refused("--config", "quickstrat") == (
        f"--config: quickstrat is no file and no recipe; did you mean quickstart? recipes: {known}"
    )
    assert find_config("svite_deit_small.yaml") == recipes()["svite_deit_small"]


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        assert refused("--training.device", "cuda") == (
            "training.device: 'cuda' is not a device of this machine; use auto or cpu"
        )
    assert refused("--training.device", "gpu").startswith("training.device: 'gpu' is not a device")


def test_flatten_names_every_value() -> None:
    flat = flatten(read("--selector", "null", "--model.kwargs.depth", "2"))
    assert flat["sparsity.density"] == 0.5
    assert flat["model.kwargs.depth"] == 2
    assert flat["selector"] is None
    fields = dataclasses.fields(RunConfig)
    assert {key.split(".")[0] for key in flat} == {item.name for item in fields}
