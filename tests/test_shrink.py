"""``sparse-trainer shrink``: plans by hand, every kind of network it takes, and one made small from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from experiments.__main__ import main
from experiments.config.reading import load_config
from experiments.errors import ConfigError
from experiments.shrinking.plan import (
    Plan,
    Shares,
    Target,
    choose_units,
    first_thresholds,
    keep_ratio,
    make_compact,
    make_plan,
    meet_latency,
    shares_of,
    stages_of,
)
from experiments.shrinking.source import find_source
from models import create_model
from sparse_trainer import SparsityConfig, SparsityScheduler, flops
from sparse_trainer.files.checkpoint import load_sparse_masks, read_info
from tests.test_data import CLASSES, write_folder
from tests.test_one_scheduler import save

Factory = Callable[..., nn.Module]
DINO = "vit_small_patch14_dinov2"
SMALL = {"depth": 2}


def no_clock(heads: float, neurons: float) -> float:
    raise AssertionError("no latency was asked for")


def no_images() -> torch.Tensor:
    raise AssertionError("no tokens are dropped")


def test_units_by_hand() -> None:
    """Half of the MACs in the heads, four tenths in the neurons: half is met by 2 of 4 heads and 0.375 of the neurons,
    0.2 from each, or by one head and 0.6875; the former are more alike."""
    shares = Shares(fixed=0.1, heads=0.5, neurons=0.4, head_count=4)
    assert choose_units(shares, 0.5) == (0.5, 0.375)
    assert choose_units(shares, 1.0) == (1.0, 1.0)
    assert shares.least() == pytest.approx(0.1 + 0.125 + 0.04)
    with pytest.raises(ConfigError, match=r"0.200 of the MACs cannot be met: .* 0.265 are left"):
        choose_units(shares, 0.2)


@pytest.mark.parametrize("target", [0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_plan_of_units_is_met_by_the_network(target: float, tiny_deit: Factory) -> None:
    model = tiny_deit(embed_dim=48, num_heads=6)
    heads, neurons = choose_units(shares_of(model), target)
    found = flops.count(make_compact(model, heads, neurons)).macs / flops.count(model).macs
    # One neuron of 192 is the nearest that whole numbers come.
    assert found == pytest.approx(target, abs=0.004)


def test_tokens_do_what_units_leave(tiny_deit: Factory) -> None:
    model = tiny_deit(depth=12, embed_dim=48, num_heads=6)
    assert stages_of(model) == (4, 7, 10)
    assert type(model).__name__ == "VisionTransformer"  # nothing of the trial is left
    assert not hasattr(model, "selector")
    images = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = make_plan(model, Target(macs=0.5), no_clock, lambda: images)
    assert (plan.macs_target, plan.stages) == (0.5, (4, 7, 10))
    assert plan.units_macs == pytest.approx(0.5**0.5, abs=0.004)
    keep = keep_ratio(model, plan, plan.stages, 0.5)
    assert keep is not None
    small = make_compact(model, plan.head_density, plan.neuron_density)
    tokens = 1 + 16 * torch.tensor([[keep ** ((block >= 4) + (block >= 7) + (block >= 10)) for block in range(12)]])
    assert float(flops.model_macs(small, tokens)) / flops.count(model).macs == pytest.approx(0.5, abs=1e-4)
    assert plan.thresholds == first_thresholds(model, plan.stages, keep, images)
    assert list(plan.thresholds) == sorted(plan.thresholds)


def test_where_no_token_can_be_dropped_units_do_it_all(tiny_deit: Factory) -> None:
    model = tiny_deit(global_pool="avg", embed_dim=48, num_heads=6)
    plan = make_plan(model, Target(macs=0.6, density=0.3), no_clock, no_images)
    assert (plan.macs_target, plan.density) == (None, 0.3)
    assert plan.units_macs == pytest.approx(0.6, abs=0.004)
    assert plan.sections(100)["sparsity"]["unit_distribution"] == "by_score"
    assert plan.sections(100)["selector"] is None
    assert plan.sections(100)["sparsity"]["density"] == 0.3


def test_weights_alone_need_no_unit(tiny_deit: Factory) -> None:
    plan = make_plan(tiny_deit(), Target(density=0.2), no_clock, no_images)
    assert plan == Plan(density=0.2)
    assert plan.sections(10)["sparsity"]["updates"] == 7  # as many as there is time for
    assert plan.sections(2)["sparsity"] == {"density": 0.2, "start": "score", "updates": 0}  # at once
    assert plan.sections(100) == {
        "sparsity": {"density": 0.2, "start": "score", "initial_density": 1.0, "updates": 20},
        "selector": None,
        "losses": {"macs_target": None},
    }


def test_a_latency_is_met_by_halving() -> None:
    """A machine whose latency is a third plus two thirds of the MACs: 0.6 is met by 0.4 of them."""
    shares = Shares(fixed=0.1, heads=0.5, neurons=0.4, head_count=12)

    def latency(heads: float, neurons: float) -> float:
        return (1 + 2 * (0.1 + 0.5 * heads + 0.4 * neurons)) / 3

    assert meet_latency(shares, 0.6, latency) == pytest.approx(0.4, abs=0.03)
    with pytest.raises(ConfigError, match=r"--latency: 0\.3 cannot be met on this machine"):
        meet_latency(shares, 0.3, latency)


def write_dino(path: Path, classes: int = 3, image_size: int = 56) -> Path:
    """A file of weights as others leave it: of DINOv2's ViT-S, but for its depth."""
    torch.manual_seed(0)
    model = create_model(DINO, img_size=image_size, num_classes=classes, **SMALL)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


def write_timm_folder(folder: Path) -> Path:
    folder.mkdir()
    write_dino(folder / "model.safetensors", image_size=28)
    config = {
        "architecture": DINO,
        "num_classes": 3,
        "model_args": {**SMALL, "img_size": 28},
        "label_names": list(CLASSES),
        "pretrained_cfg": {
            "input_size": [3, 28, 28], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.875,
            "interpolation": "bilinear",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def options(folder: Path, root: Path, *more: str) -> list[str]:
    return [
        *("--data.root", str(root), "--data.eval_split", "validation", "--data.batch_size", "6"),
        *("--training.amp", "float32", "--training.device", "cpu", "--output.runs", str(folder / "runs"), *more),
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shrink") / "images", per_class=4, side=28)


def test_a_foreign_file_from_end_to_end(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DINOv2's ViT-S: patches of 14 pixels, LayerScale, and positions that are resampled to another image size."""
    file = write_dino(tmp_path / "dino.safetensors")
    more = ["--model.name", DINO, "--model.kwargs", json.dumps(SMALL), "--data.image_size", "42", "--output.name", "s"]
    more += ["--data.mean", "[0.5, 0.5, 0.5]", "--data.std", "[0.25, 0.25, 0.25]"]
    command = ["shrink", str(file), *options(tmp_path, images, *more), "--macs", "0.49", "--density", "0.4"]
    assert main([*command, "--epochs", "1"]) == 0
    output = capsys.readouterr().out
    assert "pos_embed resampled" in output
    assert all((tmp_path / "runs" / name / "README.md").is_file() for name in ("s-dense", "s")), "a card beside each"
    dense, small = (read_info(tmp_path / "runs" / name / "sparse.safetensors") for name in ("s-dense", "s"))
    assert (dense.class_names, dense.mean, dense.image_size) == (CLASSES, (0.5, 0.5, 0.5), (42, 42))
    assert (small.class_names, small.mean, small.std) == (CLASSES, dense.mean, dense.std)
    # With one stage before the last of two blocks tokens save less than half: units go to 0.49 ** 0.75 of the MACs.
    assert sum(len(units) for units in small.live_heads.values()) == 2 * 3
    assert small.budget.live == round(0.4 * dense.budget.total)
    assert any(not mask.all() for mask in load_sparse_masks(tmp_path / "runs" / "s" / "sparse.safetensors").values())
    config = load_config(tmp_path / "runs" / "s" / "config.yaml")
    assert config.losses.teacher == config.model.start == str(tmp_path / "runs" / "s-dense" / "sparse.safetensors")
    assert (config.data.interpolation, config.data.crop_pct) == ("bicubic", 1.0)
    assert config.losses.macs_target == 0.49
    for row in ("top-1", "MACs of an image", "file", "throughput", "latency, batch 1, p50"):
        assert any(row in line and "before" in line and "after" in line for line in output.splitlines()), row


def test_a_folder_of_timm_is_planned_with_its_own_images(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_timm_folder(tmp_path / "source")
    assert main(["shrink", str(folder), *options(tmp_path, images), "--density", "0.3", "--plan-only"]) == 0
    assert "30.0% stay live" in capsys.readouterr().out
    (dense,) = (tmp_path / "runs").iterdir()
    config = load_config(dense / "plan.yaml")
    assert (config.data.mean, config.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config.data.interpolation, config.data.crop_pct, config.data.image_size) == ("bilinear", 0.875, 28)
    assert config.model.kwargs == SMALL
    assert config.sparsity is not None
    assert (config.sparsity.density, config.sparsity.start, config.selector) == (0.3, "score", None)
    # A checkpoint of ours is a source too: what it knows of its images goes on.
    own = find_source(str(dense), None)
    assert (own.name, own.num_classes, own.class_names, own.image_size) == (DINO, 3, CLASSES, 28)
    assert own.images["mean"] == (0.1, 0.2, 0.3)
    assert own.images["crop_pct"] == 0.875


@pytest.mark.parametrize(
    ("where", "more", "words"),
    [
        ("dino.safetensors", ["--macs", "0.5"], "holds weights and not what they are of; add --model.name"),
        ("dino.safetensors", ["--model.name", DINO], "say what to shrink to: --macs 0.5"),
        ("dino.safetensors", ["--macs", "1.5"], "--macs: 1.5 is not a share of the dense network's"),
        ("dino.safetensors", ["--macs", ".5", "--latency", ".5"], "--macs and --latency: give one of them"),
        ("folder", ["--macs", "0.01"], "--macs: 0.010 of the MACs cannot be met: with a tenth"),
        (
            "folder",
            ["--macs", "0.5", "--data.image_size", "30"],
            "patch_size (14, 14) does not divide img_size (30, 30)",
        ),
        ("five.safetensors", ["--model.name", DINO, "--macs", "0.5"], "has no classifier of the data's 3 classes"),
        ("broken.pth", ["--model.name", DINO, "--macs", "0.5"], "cannot be read as weights alone"),
        ("nothing.pth", ["--model.name", DINO, "--macs", "0.5"], "there is no file"),
        ("deit_tiny_patch16_225", ["--macs", "0.5"], "close names: deit_tiny_patch16_224"),
        ("vit_small_patch16_36x1_224", ["--macs", "0.5"], "timm has no pretrained weights of"),
        ("empty", ["--macs", "0.5"], "holds no network"),
        (
            "transformers",
            ["--macs", "0.5"],
            "names no architecture of timm's (it is of transformers, model_type 'vit')",
        ),
    ],
)
def test_what_cannot_be_shrunk_is_said_in_one_line(
    where: str, more: list[str], words: str, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    makers: dict[str, Callable[[Path], Any]] = {
        "dino.safetensors": write_dino,
        "five.safetensors": lambda path: write_dino(path, classes=5),
        "broken.pth": lambda path: path.write_bytes(b"no weights"),
        "folder": write_timm_folder,
        "empty": Path.mkdir,
    }
    path = tmp_path / where
    if where in makers:
        makers[where](path)
    if where == "transformers":
        write_timm_folder(path)
        (path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    given = str(path) if path.exists() or path.suffix == ".pth" else where
    sizes = [] if where in ("folder",) else ["--model.kwargs", json.dumps(SMALL), "--data.image_size", "28"]
    assert main(["shrink", given, *options(tmp_path, images, *sizes), *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("sparse-trainer shrink: error: ")
    assert words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_other_classes_are_refused(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_timm_folder(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 4}))
    assert main(["shrink", str(folder), *options(tmp_path, images), "--macs", "0.5"]) == 2
    assert "knows 4 classes and the data has 3; train it on them first" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps({**config, "label_names": ["a", "b", "c"]}))
    assert main(["shrink", str(folder), *options(tmp_path, images), "--macs", "0.5"]) == 2
    assert "knows other classes than the data" in capsys.readouterr().err
    assert main(["shrink", "--macs", "0.5"]) == 2
    assert "give the network first" in capsys.readouterr().err
    assert main(["shrink", str(folder), "--macs", "0.5"]) == 2
    assert "data.root: give the images, as --data.root FOLDER with" in capsys.readouterr().err


def test_what_is_sparse_already_is_refused(
    tiny_deit: Factory, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = SparsityScheduler(tiny_deit(), SparsityConfig(density=0.5, updates=0), total_steps=9)
    save(tmp_path / "sparse.safetensors", scheduler)
    assert main(["shrink", str(tmp_path / "sparse.safetensors"), *options(tmp_path, images), "--macs", "0.5"]) == 2
    assert "is sparse already (7,164 of 14,328 (50.00%)); give the dense network" in capsys.readouterr().err
    assert main(["shrink", "--help"]) == 0
