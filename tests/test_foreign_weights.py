"""``model.start`` from files that timm and others wrote: the same bits where all fits, else timm's resampling."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from experiments.__main__ import main
from experiments.errors import ConfigError
from experiments.training.foreign_weights import find_foreign, load_foreign, read_weights
from models import create_model
from tests.test_cli import SMALL, last_line

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "img_size": 16, "in_chans": 3, "num_classes": 5}


def make(seed: int, name: str = "deit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name, **{**VIT, **arguments})


def write(model: nn.Module, path: Path) -> Path:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(left: nn.Module, right: nn.Module) -> list[str]:
    """Names of tensors with equal bits."""
    others = right.state_dict()
    return [name for name, value in left.state_dict().items() if torch.equal(value, others[name])]


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pt", ".bin"])
def test_what_fits_is_taken_bit_for_bit(ending: str, tmp_path: Path) -> None:
    source, model = make(0), make(1)
    path = write(source, tmp_path / f"weights{ending}")
    assert find_foreign(path) == path
    assert load_foreign(model, path) == []
    assert same(model, source) == list(model.state_dict())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_as_training_scripts_save_it(wrapper: str, tmp_path: Path) -> None:
    source, other, model = make(0), make(2), make(1)
    content = {"state_dict": other.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3}
    content[wrapper] = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    if wrapper == "model":
        del content["state_dict"]
    torch.save(content, tmp_path / "x.pth")
    assert load_foreign(model, tmp_path / "x.pth") == []
    assert same(model, source) == list(model.state_dict())


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_small_patch14_dinov2", {"num_classes": 0}),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
    ],
)
def test_other_classes_and_another_image_size(name: str, there: dict[str, Any], tmp_path: Path) -> None:
    """DINOv2's shapes with LayerScale, registers and no classifier among them."""
    source = make(0, name, **{"img_size": 28, "num_classes": 1000, **there})
    model = make(1, name)
    head = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("head")}
    notes = load_foreign(model, write(source, tmp_path / "x.safetensors"))
    old, new = source.state_dict(), model.state_dict()
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    expected = resample_abs_pos_embed(old["pos_embed"], [4, 4], [7, 7], num_prefix_tokens=prefix)  # type: ignore[arg-type]
    assert torch.allclose(new["pos_embed"], expected, atol=1e-6)
    for key, value in new.items():
        if key in head:
            assert torch.equal(value, head[key])
        elif key != "pos_embed":
            assert torch.equal(value, old[key]), key
    text = "; ".join(notes)
    assert "start: pos_embed resampled from [1, " in text
    was = "there is none there" if there else "1000 classes there, 5 here"
    assert f"start: the classifier begins anew ({was})" in text


@pytest.mark.parametrize(("there", "here"), [(3, 1), (1, 3)])
def test_other_channels(there: int, here: int, tmp_path: Path) -> None:
    """A grey picture means the same to both: in three channels it is there three times."""
    source, model = make(0, in_chans=there).eval(), make(1, in_chans=here).eval()
    load_foreign(model, write(source, tmp_path / "x.pth"))
    grey = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        outputs = [network(grey.expand(-1, channels, -1, -1)) for network, channels in ((source, there), (model, here))]
    assert torch.allclose(*outputs, atol=1e-5)


def test_another_patch_size(tmp_path: Path) -> None:
    source, model = make(0, patch_size=8, img_size=32), make(1)
    notes = load_foreign(model, write(source, tmp_path / "x.pth"))
    assert notes == ["start: patch_embed.proj.weight resampled from [24, 3, 8, 8] to [24, 3, 4, 4]"]


def test_a_folder_of_timm(tmp_path: Path) -> None:
    source, model = timm.create_model("deit_tiny_patch16_224", **VIT), make(1)
    timm.models.save_for_hf(source, tmp_path / "folder", model_config={"num_classes": 5})  # type: ignore[attr-defined]
    found = find_foreign(tmp_path / "folder")
    assert found is not None
    assert load_foreign(model, found) == []
    assert same(model, source) == list(model.state_dict())


class Bad:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("opened",)


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", pickle.dumps(Bad()), pickle.dumps({"model": 3})],
)
@pytest.mark.parametrize("ending", [".pth", ".bin"])
def test_a_file_that_is_none(content: bytes, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^model\.start: {path} (cannot be read as weights alone|holds )"):
        read_weights(path)
    assert "opened" not in capsys.readouterr().out


def test_another_model(tmp_path: Path) -> None:
    model = make(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write(make(0, embed_dim=48), tmp_path / "x.safetensors")
    with pytest.raises(
        ConfigError, match=r"x\.safetensors is of another model: cls_token is \[1, 1, 48\] there and \[1, 1, 24\]"
    ):
        load_foreign(model, path)
    with pytest.raises(ConfigError, match=r"is of another model: blocks\.1\..* is missing there"):
        load_foreign(model, write(make(0, depth=1), tmp_path / "y.pth"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of colour pictures of 32 pixels and 7 classes, for grey ones of 28 and 10."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 4, "patch_size": 7}
    source = timm.create_model("deit_tiny_patch16_224", img_size=35, in_chans=3, num_classes=7, **sizes)
    path = write(source, tmp_path / "their weights.safetensors")
    arguments = [
        "train", *SMALL, "--model.name=deit_tiny_patch16_224", f"--model.kwargs={sizes}", f"--model.start={path}",
        "--training.epochs=1", "--schedule.warmup_epochs=0", "--sparsity.start=score", f"--output.runs={tmp_path}",
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "note: start: pos_embed resampled from [1, 26, 24] to [1, 17, 24]" in out
    assert "note: start: the classifier begins anew (7 classes there, 10 here)" in out
    assert main([*arguments, "--model.kwargs.embed_dim=36"]) == 2
    assert "their weights.safetensors is of another model" in last_line(capsys)
