"""The sparse checkpoint: exact, small, and safe to open when it comes from a stranger."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from sparse_trainer import units
from sparse_trainer.budget import Budget
from sparse_trainer.files import checkpoint, tensor_file
from sparse_trainer.files.checkpoint import (
    CheckpointError,
    SparseInfo,
    expand,
    load_sparse,
    load_sparse_masks,
    read_info,
    read_sparse,
    save_resume,
    save_sparse,
)
from sparse_trainer.files.masked_tensor import block_of, pack
from sparse_trainer.files.rebuild import build_without_memory
from sparse_trainer.masks import random_mask
from tests.conftest import TINY

DEIT = "deit_tiny_patch16_224"
IMAGE = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def mask_model(model: nn.Module, density: float = 0.5) -> dict[str, Tensor]:
    """Random masks on every Linear and Conv2d weight; dead elements are set to 0."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight
            masks[f"{name}.weight"] = random_mask(weight.shape, round(density * weight.numel()), generator)
            with torch.no_grad():
                weight.masked_fill_(~masks[f"{name}.weight"], 0)
    return masks


def make_info(masks: dict[str, Tensor], **changes: Any) -> SparseInfo:
    live = sum(int(mask.sum()) for mask in masks.values())
    info = SparseInfo(
        model=DEIT,
        model_args=TINY,
        budget=Budget(live, live + sum(int((~mask).sum()) for mask in masks.values())),
        macs=123,
        image_size=16,
        in_chans=1,
        mean=(0.5,),
        std=(0.25,),
        class_names=("a", "b", "c", "d", "é"),
        step=1200,
        recipe="quickstart",
        metrics={"top1": 81.5},
    )
    return replace(info, **changes)


@pytest.fixture
def saved(tmp_path: Path, tiny_deit: Callable[..., nn.Module]) -> tuple[Path, nn.Module, dict[str, Tensor]]:
    """A sparse checkpoint of the tiny DeiT at half density, its model and its masks."""
    model = tiny_deit().eval()
    masks = mask_model(model)
    path = tmp_path / "sparse.safetensors"
    save_sparse(path, model, masks=masks, info=make_info(masks))
    return path, model, masks


def doctor(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change metadata and tensors of a sparse checkpoint and seal it again, as one who means harm can."""
    tensors, metadata = tensor_file.read_tensors(path, format="sparse-trainer", version=(1, 2))
    change(metadata, tensors)
    version = 2 if "blocks" in metadata else 1
    tensor_file.write_tensors(path, tensors, metadata, format="sparse-trainer", version=version)


def test_a_compiled_model_is_written_as_the_model(saved: Any, tmp_path: Path) -> None:
    path, model, masks = saved
    save_sparse(tmp_path / "x", torch.compile(model, backend="eager"), masks=masks, info=make_info(masks))
    assert (tmp_path / "x").read_bytes() == path.read_bytes()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.0\._orig_mod\..*: torch\.compile wraps this layer"):
        save_sparse(tmp_path / "y", model, masks=masks, info=make_info(masks))
    assert not (tmp_path / "y").exists()


def test_same_logits_and_tensors_bit_for_bit(saved: Any) -> None:
    path, model, masks = saved
    before = torch.get_rng_state()
    loaded = load_sparse(path)
    assert torch.equal(torch.get_rng_state(), before), "loading draws no random numbers"
    assert not loaded.training
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    for (name, one), (other_name, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)
    for name, mask in load_sparse_masks(path).items():
        assert torch.equal(mask, masks.pop(name))
    assert not masks


def test_info_comes_back(saved: Any) -> None:
    path, _, masks = saved
    assert read_info(path) == make_info(masks)
    assert read_info(path).image_size == (16, 16)
    assert read_sparse(path).info == make_info(masks)


def test_the_bytes_of_one_tensor_worked_by_hand(tmp_path: Path) -> None:
    weight = torch.tensor([[0.0, 7, 0, 0, 2], [0, 0, 0, 5, 1]])
    mask = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
    model = nn.Linear(5, 2)
    model.load_state_dict({"weight": weight, "bias": torch.tensor([8.0, 9])})
    info = make_info({"weight": mask}, model="custom", model_args={}, class_names=None)
    path = tmp_path / "sparse.safetensors"
    save_sparse(path, model, masks={"weight": mask}, info=info, create_model=lambda name: nn.Linear(5, 2))
    stored = safetensors.torch.load_file(path)
    assert stored["weight.values"].tolist() == [7, 2, 5, 1]
    # Elements 1 and 4 are bits 1 and 4 of the first byte, elements 8 and 9 bits 0 and 1 of the second.
    assert stored["weight.mask"].tolist() == [2 + 16, 1 + 2]
    assert stored["bias"].tolist() == [8, 9]
    assert stored.keys() == {"weight.values", "weight.mask", "bias"}
    loaded = load_sparse(path, create_model=lambda name: nn.Linear(5, 2))
    assert torch.equal(loaded.weight, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.54), (torch.float16, 0.57), (torch.bfloat16, 0.57)])
def test_size_at_half_density(tmp_path: Path, dtype: torch.dtype, share: float) -> None:
    arguments: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 4, "num_classes": 10}
    model = timm.create_model(DEIT, **arguments)
    masks = mask_model(model)
    path, dense = tmp_path / "sparse.safetensors", tmp_path / "dense.safetensors"
    rgb: dict[str, Any] = {"in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    info = make_info(masks, model_args=arguments, class_names=None, image_size=32, **rgb)
    save_sparse(path, model, masks=masks, info=info, dtype=dtype)
    safetensors.torch.save_file(model.to(dtype).state_dict(), dense)
    assert path.stat().st_size <= share * dense.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(saved: Any, dtype: torch.dtype) -> None:
    path, model, masks = saved
    save_sparse(path, model, masks=masks, info=make_info(masks), dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for stored_as, loaded in ((torch.float32, load_sparse(path)), (dtype, load_sparse(path, dtype=None))):
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == stored_as
            assert torch.equal(tensor, expected[name].to(stored_as))
    assert torch.allclose(load_sparse(path)(IMAGE), model(IMAGE), atol=0.05)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_densities_to_the_extremes(tmp_path: Path, tiny_deit: Callable[..., nn.Module], density: float) -> None:
    model = tiny_deit().eval()
    masks = mask_model(model, density)
    save_sparse(tmp_path / "s", model, masks=masks, info=make_info(masks))
    assert torch.equal(load_sparse(tmp_path / "s")(IMAGE), model(IMAGE))


def test_without_weight_masks(tmp_path: Path, tiny_deit: Callable[..., nn.Module]) -> None:
    model = tiny_deit().eval()
    save_sparse(tmp_path / "s", model, masks={}, info=make_info({}, budget=Budget(100, 200)))
    assert torch.equal(load_sparse(tmp_path / "s")(IMAGE), model(IMAGE))
    assert load_sparse_masks(tmp_path / "s") == {}


def test_compact_model(tmp_path: Path, tiny_deit: Callable[..., nn.Module]) -> None:
    model = tiny_deit().eval()
    heads = {"blocks.0": (2, 0), "blocks.1": (1,)}  # in the order of their slots
    neurons = {"blocks.0": tuple(range(5, 40)), "blocks.1": (7, 3)}
    units.compact(model, heads, neurons)
    masks = mask_model(model)
    path = tmp_path / "sparse.safetensors"
    save_sparse(path, model, masks=masks, info=make_info(masks), live_heads=heads, live_neurons=neurons)
    loaded = load_sparse(path)
    assert loaded.blocks[0].attn.num_heads == 2  # type: ignore[index, union-attr]
    assert loaded.blocks[1].mlp.fc1.out_features == 2  # type: ignore[index, union-attr]
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert read_info(path).live_heads == heads
    assert read_info(path).live_neurons == neurons


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "resnet18"],
)
def test_other_models(tmp_path: Path, name: str) -> None:
    small: dict[str, Any] = {} if name == "resnet18" else {"depth": 2, "img_size": 28, "embed_dim": 24, "num_heads": 3}
    model = timm.create_model(name, num_classes=5, **small).eval()
    masks = mask_model(model, 0.3)
    arguments: dict[str, Any] = {"num_classes": 5, **small}
    rgb: dict[str, Any] = {"in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    info = make_info(masks, model=name, model_args=arguments, image_size=28, **rgb)
    save_sparse(tmp_path / "s", model, masks=masks, info=info)
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(load_sparse(tmp_path / "s")(images), model(images))


class Tied(nn.Module):
    """Tied weights, a transposed one, an integer buffer, a buffer that is not saved, and extra state."""

    unsaved: Tensor

    def __init__(self, offset: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.transposed = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.register_buffer("count", torch.tensor([2**40, -1]))
        self.register_buffer("unsaved", torch.empty(3), persistent=False)
        self.state = torch.tensor([1, 2], dtype=torch.uint8)
        self.offset = offset
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        self.unsaved = torch.full_like(self.unsaved, self.offset)

    def get_extra_state(self) -> Tensor:
        return self.state

    def set_extra_state(self, state: Tensor) -> None:
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) @ self.transposed + self.unsaved.sum()


def create_tied(name: str, **_: Any) -> nn.Module:
    return Tied()


def test_tied_strided_integer_and_extra_state(tmp_path: Path) -> None:
    model = Tied().eval()
    model.state = torch.tensor([9, 8], dtype=torch.uint8)
    mask = torch.eye(3).bool()
    with torch.no_grad():
        model.first.weight.masked_fill_(~mask, -0.0)  # minus zero is zero
    masks = {"first.weight": mask}
    info = make_info(masks, model="tied", model_args={}, class_names=None)
    path = tmp_path / "sparse.safetensors"
    save_sparse(path, model, masks=masks, info=info, dtype=torch.float16, create_model=create_tied)
    save_sparse(path, model, masks=masks, info=info, create_model=create_tied)
    loaded = load_sparse(path, create_model=create_tied)
    assert isinstance(loaded, Tied)
    assert loaded.first.weight is loaded.second.weight
    assert loaded.count.tolist() == [2**40, -1]  # type: ignore[operator]
    assert loaded.unsaved.tolist() == [1, 1, 1]
    assert loaded.state.tolist() == [9, 8]
    x = torch.randn(4, 3)
    assert torch.equal(loaded(x), model(x))

    def untie(_: Any, tensors: dict[str, Tensor]) -> None:
        tensors["second.weight"] += 1

    doctor(path, untie)
    with pytest.raises(CheckpointError, match=r"second.weight: is tied to first.weight .* values differ"):
        load_sparse(path, create_model=create_tied)


class Rotary(nn.Module):
    """A buffer of its own that it cannot compute again."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.zeros(size), persistent=False)


def test_buffers_that_no_file_has(tmp_path: Path) -> None:
    info = make_info({}, model="rotary", model_args={}, class_names=None, budget=Budget(1, 2))
    save_sparse(tmp_path / "s", Rotary(), masks={}, info=info, create_model=lambda name: Rotary())
    with pytest.raises(CheckpointError, match="Rotary holds buffers that no file has; to fill them it needs"):
        load_sparse(tmp_path / "s", create_model=lambda name: Rotary())
    with pytest.raises(CheckpointError, match="own buffers take more than"):
        load_sparse(tmp_path / "s", create_model=lambda name: Rotary(1 << 40))


def test_selector_goes_to_the_factory(tmp_path: Path, tiny_deit: Callable[..., nn.Module]) -> None:
    model = tiny_deit().eval()
    selector = {"kind": "top_k", "keep_ratio": 0.7, "stages": [0, 1]}
    info = make_info({}, selector=selector, budget=Budget(1, 2))
    save_sparse(tmp_path / "s", model, masks={}, info=info)
    with pytest.raises(CheckpointError, match=r"token selector \('top_k'\); pass create_model=models.create_model"):
        load_sparse(tmp_path / "s")
    seen: list[Any] = []

    def create_model(name: str, *, selector: Any = None, **arguments: Any) -> nn.Module:
        seen.append(selector)
        return timm.create_model(name, **arguments)

    assert torch.equal(load_sparse(tmp_path / "s", create_model=create_model)(IMAGE), model(IMAGE))
    assert seen == [selector]


def test_saving_refuses_what_would_be_lost_or_lie(tmp_path: Path, tiny_deit: Callable[..., nn.Module]) -> None:
    path = tmp_path / "sparse.safetensors"
    model = tiny_deit()
    masks = mask_model(model)
    info = make_info(masks)

    def save(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            save_sparse(**{"path": path, "model": model, "masks": masks, "info": info, **changes})
        assert not path.exists()

    name = "blocks.0.attn.qkv.weight"
    save("not one of", dtype=torch.float64)
    save("no tensor 'blocks.0.attn.qkv.wait'; close names: blocks.0", masks={"blocks.0.attn.qkv.wait": masks[name]})
    save(r"must be torch.bool \(72, 24\), found torch.bool \(24, 72\)", masks={name: masks[name].t()})
    save("must be torch.bool", masks={name: masks[name].float()})
    save("live parameters, but the masks hold", info=replace(info, budget=Budget(7, 10**6)))
    save("timm has no model 'deit_tyni'; close names: ", info=replace(info, model="deit_tyni"))
    save(r"pos_embed: expected floating \(1, 26, 24\), found", info=replace(info, model_args={**TINY, "img_size": 20}))
    save("missing: 'blocks.2", info=replace(info, model_args={**TINY, "depth": 3}))
    save("class_names: expected 5, one per class, found 2", info=replace(info, class_names=("a", "b")))
    save("no block 'blocks.7'", live_heads={"blocks.7": (0,)})
    with torch.no_grad():
        dead = (~masks[name]).nonzero()[0]
        model.get_parameter(name)[tuple(dead)] = 1e-30
    save("qkv.weight: 1 dead elements are not exactly 0 and would be lost")
    with torch.no_grad():
        model.get_parameter(name)[tuple(dead)] = 0
        model.norm.bias[3] = 1e6  # type: ignore[index, union-attr, operator]
    save("norm.bias: holds NaN or infinity in torch.float16", dtype=torch.float16)
    with torch.no_grad():
        model.norm.bias[3] = math.nan  # type: ignore[index, union-attr, operator]
    save("norm.bias: holds NaN or infinity in torch.float32")


def test_sparse_info_reports_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match="model") as error:
        SparseInfo(
            model="hf_hub:someone/model",
            model_args={"pretrained": True, "depth": 10**9, "img_size": (16, 16, 16), "checkpoint_path": "/etc"},
            budget=Budget(3, 2),
            macs=1.5,  # type: ignore[arg-type]
            image_size=0,
            in_chans=3,
            mean=(0.5,),
            std=(0.0, 1.0, 1.0),
            selector={"a": [[[[1]]]]},
            class_names=("\x1b[2J",),
            metrics={"loss": math.nan},
            live_heads={"blocks.0": (1, 1), "../x": (0,)},
            live_neurons={"blocks.0": ()},
        )
    expected = (
        "model: expected the name of a registered timm model",
        "model_args: expected keys among act_layer",
        "found 'pretrained'",
        "found 'checkpoint_path'",
        "model_args.depth: expected a whole number from 1 to 256, found 1000000000",
        "model_args.img_size",
        "budget: expected whole numbers with 0 <= live <= total",
        "macs",
        "image_size",
        "mean: expected 3 numbers",
        "std: expected 3 positive numbers",
        "selector",
        "class_names: expected None or printable strings",
        "metrics: expected finite numbers",
        "live_heads.'blocks.0': expected distinct unit numbers from 0, found (1, 1)",
        "live_heads: expected block names such as 'blocks.0', found '../x'",
        "live_neurons.'blocks.0'",
    )
    for line in expected:
        assert line in str(error.value)


@pytest.mark.parametrize(
    "name", ["hf-hub:a/b", "local-dir:/tmp", "/etc/passwd", "../x", "a/b", "", "a.b.c", "x\n", "a" * 201, None, 3]
)
def test_names_that_are_no_timm_names(name: Any) -> None:
    with pytest.raises(ValueError, match="registered timm model"):
        make_info({}, model=name)


def test_files_given_by_mistake(tmp_path: Path, tiny_deit: Callable[..., nn.Module]) -> None:
    path = tmp_path / "file"
    save_resume(path, {"model": tiny_deit().state_dict()})
    with pytest.raises(CheckpointError, match=r"expected a sparse checkpoint, found a resume bundle \(for `sparse"):
        load_sparse(path)
    safetensors.torch.save_file(tiny_deit().state_dict(), path)
    with pytest.raises(
        CheckpointError, match="not one that sparse-trainer wrote: expected a sparse checkpoint, found 32"
    ):
        load_sparse(path)
    torch.save(tiny_deit().state_dict(), path)
    with pytest.raises(CheckpointError, match="can run code and is never opened"):
        load_sparse(path)
    path.write_text("a text file of no kind")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_sparse(path)


def set_in(*keys: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """A change of one metadata value, by its keys."""

    def change(metadata: dict[str, Any], _: dict[str, Tensor]) -> None:
        inner = metadata
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


def set_tensor(name: str, tensor: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """A change of one tensor: a new one, None to drop it, or a function of the old one."""

    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor(tensors[name]) if callable(tensor) else tensor

    return change


QKV = "blocks.0.attn.qkv.weight"  # [72, 24]: 1,728 elements, 864 of them live
PATCH = "patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("model", "name", value="hf_hub:someone/evil"), "model: expected the name of a registered"),
        (set_in("model", "name", value="../../etc/passwd"), "model: expected the name of a registered"),
        (set_in("model", "name", value="deit_nonesuch"), "cannot be rebuilt: timm has no model"),
        (set_in("model", "name", value="resnet18"), "cannot be rebuilt: "),
        (set_in("model", "args", "depth", value=10**9), "depth: expected a whole number from 1 to 256"),
        (set_in("model", "args", "depth", value=256), "depth of the model: expected 2 blocks, as stored, found 256"),
        (set_in("model", "args", "embed_dim", value=65535), "cannot be rebuilt: .* expected floating"),
        (set_in("model", "args", "num_classes", value=1 << 24), "head.weight: expected floating"),
        (set_in("model", "args", "img_size", value=1 << 13), "pos_embed: expected floating"),
        (set_in("model", "args", "img_size", value=1 << 14), "img_size: expected 1 to 8192 pixels"),
        (
            set_in("input", "preparation", value={"interpolation": "sharp", "shell": "rm"}),
            r"preparation.interpolation: expected one of bilinear.*preparation: expected keys among interpolation",
        ),
        (set_in("input", "preparation", value={"crop_pct": 0}), r"preparation.crop_pct: expected a share up to 1"),
        (set_in("input", "preparation", value=[1]), "preparation: expected a mapping"),
        (set_in("input", "image_size", value=[64, 64]), r"image_size: expected \(16, 16\), as the model takes, found"),
        (
            set_in("input", value={"image_size": 16, "in_chans": 3, "mean": [0] * 3, "std": [1] * 3}),
            "in_chans: expected 1",
        ),
        (set_in("model", "args", "num_heads", value=5), "cannot be rebuilt: "),
        (set_in("model", "args", "pretrained", value=True), "found 'pretrained'"),
        (set_in("model", "args", "checkpoint_path", value="/etc/passwd"), "found 'checkpoint_path'"),
        (set_in("model", "args", "cache_dir", value="/"), "found 'cache_dir'"),
        (set_in("model", "args", "mlp_ratio", value=1e300), "mlp_ratio: expected a number from 0"),
        (set_in("model", "args", value=[]), "model_args: expected a mapping"),
        (set_in("model", value=3), "model: expected name, args, found int"),
        (set_in("unknown", value=3), "metadata: expected model, live_heads"),
        (set_in("budget", "live", value=7), "live parameters: expected 7, its budget, found"),
        (set_in("budget", "live", value=True), "budget: expected whole numbers"),
        (set_in("class_names", value=["a"]), "class_names: expected 5, one per class, found 1"),
        (set_in("class_names", value=["\x1b[2J"] * 5), r"printable strings, found \('\\x1b"),
        (set_in("live_heads", value={"blocks.0": [3]}), "live heads .* are not distinct numbers from 0 to 2"),
        (set_in("live_heads", value={"blocks.0": [1]}), r"qkv.weight: expected floating \(24, 24\), found .*72"),
        (set_in("live_heads", value={"blocks.9": [1]}), "no block 'blocks.9'"),
        (set_in("live_neurons", value={"blocks.0": [1, 1]}), "expected distinct unit numbers"),
        (set_in("live_neurons", value={"blocks.0": [1 << 30]}), "expected distinct unit numbers"),
        (set_in("selector", value={"kind": "top_k"}), "pass create_model=models.create_model"),
        (set_in("selector", value=7), "selector: expected None or a mapping"),
        (set_in("masked", value=[]), "metadata 'masked': expected shapes by name"),
        (set_in("masked", QKV, value=[1 << 39, 1 << 39]), "size of its masked tensors: expected at most .* memory"),
        (set_in("masked", QKV, value=[24, 72]), r"qkv.weight: expected floating \(72, 24\), found .*\(24, 72\)"),
        (set_in("masked", QKV, value=[-1, -1]), "metadata 'masked': expected shapes by name"),
        (set_in("masked", QKV, value=[1721]), "bits are set after the last of 1,721"),
        (set_in("masked", "no.such", value=[2]), "masked tensor 'no.such': expected .values and .mask"),
        (set_tensor(f"{QKV}.mask", lambda t: t.int()), "qkv.weight'.mask: expected 216 bytes"),
        (set_tensor(f"{QKV}.mask", lambda t: t[:-1]), r"expected 216 bytes for shape \(72, 24\), found .*\(215,\)"),
        (set_tensor(f"{QKV}.mask", lambda t: t | 1 << 3), "one for each live element of its mask, found"),
        (set_tensor(f"{QKV}.mask", None), "expected .values and .mask"),
        (set_tensor(f"{QKV}.values", lambda t: t[:-1]), r"expected 864 values, .*, found torch.float32 \(863,\)"),
        (set_tensor(f"{QKV}.values", lambda t: t.int()), "expected 864 values"),
        (set_tensor(f"{QKV}.values", lambda t: t.view(-1, 2)), "expected 864 values"),
        (set_tensor(f"{QKV}.values", lambda t: t * math.inf), "qkv.weight': expected finite numbers, found NaN or"),
        (set_tensor("cls_token", lambda t: t * math.nan), "values of 'cls_token': expected finite numbers"),
        (set_tensor("cls_token", lambda t: t.double()), "dtype of 'cls_token': expected torch.float32, .*float64"),
        (set_tensor("cls_token", lambda t: t.int()), "cls_token: expected floating"),
        (set_tensor("cls_token", lambda t: t[0]), r"cls_token: expected floating \(1, 1, 24\), found .*\(1, 24\)"),
        (set_tensor("cls_token", None), "missing: 'cls_token'; not in the model: none"),
        (set_tensor("evil\n", torch.zeros(1)), r"missing: none; not in the model: 'evil\\n'"),
        (set_tensor(QKV, torch.zeros(72, 24)), "expected .values and .mask, found not just these"),
    ],
)
def test_a_lying_file(saved: Any, change: Any, message: str) -> None:
    path, _, _ = saved
    doctor(path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_sparse(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 2000


# Blocks of 8x1 in a [72, 24] weight: 9 x 24 = 216 bits are 27 bytes.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("blocks", value=[]), "metadata 'blocks': expected two sides of 1 to 32 for names of 'masked'"),
        (set_in("blocks", QKV, value=[8]), "metadata 'blocks': expected two sides"),
        (set_in("blocks", QKV, value=[8, 0]), "metadata 'blocks': expected two sides"),
        (set_in("blocks", QKV, value=[72, 1]), "metadata 'blocks': expected two sides of 1 to 32"),
        (set_in("blocks", QKV, value=[8.0, 1]), "metadata 'blocks': expected two sides"),
        (set_in("blocks", "no.such", value=[8, 1]), "metadata 'blocks': expected two sides"),
        (set_in("blocks", QKV, value=[16, 1]), r"blocks of 'blocks.0.attn.qkv.weight': expected sides that divide"),
        (set_in("blocks", QKV, value=[4, 1]), "qkv.weight'.mask: expected 54 bytes"),
        (set_in("blocks", QKV, value=[8, 3]), "qkv.weight'.mask: expected 9 bytes"),
        (set_tensor(f"{QKV}.mask", lambda t: t | 1 << 3), "one for each live element of its mask, found"),
        (set_tensor(f"{QKV}.values", lambda t: t[:-1]), r"expected 864 values, .*, found torch.float32 \(863,\)"),
    ],
)
def test_a_lying_file_of_blocks(tmp_path: Path, tiny_deit: Callable[..., nn.Module], change: Any, message: str) -> None:
    model = tiny_deit().eval()
    masks = {QKV: block_mask((72, 24), 8, 1)}
    with torch.no_grad():
        model.get_parameter(QKV).mul_(masks[QKV])
    path = tmp_path / "sparse.safetensors"
    save_sparse(path, model, masks=masks, info=make_info(masks))
    doctor(path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_sparse(path)
    assert str(error.value).startswith(f"{path}: ")


def block_mask(shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """Half of the blocks live."""
    grid = (shape[0] // rows, math.prod(shape[1:]) // columns)
    blocks = random_mask(grid, math.prod(grid) // 2, torch.Generator().manual_seed(1))
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1).reshape(shape)


@pytest.mark.parametrize("block", [(2, 1), (1, 2), (16, 1), (6, 4), (32, 32), (3, 5)])
@pytest.mark.parametrize("shape", [(96, 160), (96, 5, 8, 4)])
def test_a_mask_of_blocks_takes_one_bit_each(tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int]) -> None:
    mask = block_mask(shape, *block)
    assert block_of(mask) == block
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape) * mask)

    def create(name: str) -> nn.Module:
        again = nn.Module()
        again.weight = nn.Parameter(torch.zeros(shape))
        return again

    info = make_info({"weight": mask}, model="custom", model_args={}, class_names=None)
    path = tmp_path / "sparse.safetensors"
    save_sparse(path, model, masks={"weight": mask}, info=info, create_model=create)
    stored = safetensors.torch.load_file(path)
    assert stored["weight.mask"].numel() == -(-mask.numel() // (block[0] * block[1]) // 8)
    found = read_sparse(path)
    assert torch.equal(found.masks["weight"], mask)
    assert torch.equal(found.tensors["weight"], model.weight)


def test_a_mask_of_blocks_worked_by_hand(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    values, bits, block = pack("w", torch.arange(1.0, 17).view(4, 4) * mask, mask, torch.float32)
    assert values.tolist() == [1, 3, 5, 7, 11, 12, 15, 16]
    assert (bits.tolist(), block) == ([1 + 4 + 64 + 128], (2, 1))
    # A layer in which nothing is dead has no pattern, and 32 rows are the most.
    assert block_of(torch.ones(64, 64, dtype=torch.bool)) == block_of(torch.zeros(64, 64, dtype=torch.bool)) == (1, 1)
    assert block_of(torch.arange(128)[:, None].expand(128, 6) >= 64) == (32, 6)


def test_size_of_16x1_at_half_density(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 384, "depth": 4, "num_classes": 10}
    model = timm.create_model(DEIT, **arguments)
    masks = {
        f"{name}.weight": block_mask(tuple(module.weight.shape), 16, 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "head"
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    path, dense = tmp_path / "sparse.safetensors", tmp_path / "dense.safetensors"
    rgb: dict[str, Any] = {"in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    info = make_info(masks, model_args=arguments, class_names=None, image_size=32, **rgb)
    save_sparse(path, model, masks=masks, info=info)
    safetensors.torch.save_file(model.state_dict(), dense)
    assert path.stat().st_size <= 0.51 * dense.stat().st_size


def test_padding_bits_must_be_zero(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    mask = torch.ones(3, 1, dtype=torch.bool)  # three bits of a byte, five of padding
    info = make_info({"weight": mask}, model="custom", model_args={}, class_names=None)

    def create_model(name: str) -> nn.Module:
        return nn.Linear(1, 3)

    save_sparse(path, nn.Linear(1, 3), masks={"weight": mask}, info=info, create_model=create_model)

    def move_a_bit(_: Any, tensors: dict[str, Tensor]) -> None:
        tensors["weight.mask"] = torch.tensor([0b1011], dtype=torch.uint8)

    doctor(path, move_a_bit)
    with pytest.raises(CheckpointError, match=r"'weight'.mask: bits are set after the last of 3"):
        load_sparse(path, create_model=create_model)


def test_a_model_far_larger_than_its_file_is_never_made(saved: Any) -> None:
    path, _, _ = saved

    def change(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Everything is consistent but for a dense model of 2^44 elements, of which one neuron is live."""
        metadata["model"]["args"]["mlp_ratio"] = 1000.0
        metadata["model"]["args"]["embed_dim"] = 65535  # a multiple of three heads
        metadata["live_neurons"] = {"blocks.0": [0], "blocks.1": [0]}

    doctor(path, change)
    with pytest.raises(CheckpointError, match="expected a dense block of at most 131,072 units, found 65,535,000"):
        load_sparse(path)


def test_the_initialisation_that_is_skipped_is_that_of_values(tiny_deit: Callable[..., nn.Module]) -> None:
    """A model built without memory has the tensors of any other, and a model built after it its usual values."""
    info = make_info({}, budget=Budget(1, 2))
    built = build_without_memory(info, None)
    expected = tiny_deit()
    assert {name: (t.shape, t.dtype) for name, t in built.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in expected.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in built.state_dict().values())
    for one, other in zip(tiny_deit().parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def mix(model: nn.Module) -> nn.Module:
    """Norms in float32, the last block in float16, all else in bfloat16."""
    model = model.bfloat16()
    model.blocks[1].half()  # type: ignore[index, union-attr, operator]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


@pytest.mark.parametrize("stored", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", ["float32", "float16", "bfloat16", "mixed"])
def test_round_trip_of_every_type(
    tmp_path: Path, tiny_deit: Callable[..., nn.Module], held: str, stored: torch.dtype | None
) -> None:
    """Stored as it is, or in another type; what is loaded is what was stored, in every bit."""
    model = tiny_deit()
    masks = mask_model(model)
    model = mix(model) if held == "mixed" else model.to(getattr(torch, held))
    save_sparse(tmp_path / "s", model, masks=masks, info=make_info(masks), dtype=stored)
    expected = {name: tensor.to(stored or tensor.dtype) for name, tensor in model.state_dict().items()}
    for dtype in (None, torch.float32, torch.bfloat16):
        found = load_sparse(tmp_path / "s", dtype=dtype).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == (dtype or tensor.dtype)
            assert torch.equal(found[name], tensor.to(dtype or tensor.dtype))
    assert len({t.dtype for t in load_sparse(tmp_path / "s", dtype=None).parameters()}) == (
        3 if held == "mixed" and stored is None else 1
    )


def test_types_that_no_checkpoint_holds(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False]])
    info = make_info({"weight": mask}, model="custom", model_args={}, class_names=None)
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight[0, 1] = 0
    create: dict[str, Any] = {"create_model": lambda name: nn.Linear(2, 1)}
    with pytest.raises(ValueError, match=r"weight: is torch.float64; give a dtype among torch.float32, torch.float16"):
        save_sparse(tmp_path / "s", model, masks={"weight": mask}, info=info, dtype=None, **create)
    save_sparse(tmp_path / "s", model, masks={"weight": mask}, info=info, **create)
    tied = Tied()
    info = make_info({}, model="tied", model_args={}, class_names=None, budget=Budget(1, 2))
    with pytest.raises(ValueError, match=r"count is torch.int64; only floating tensors have masks"):
        save_sparse(tmp_path / "s", tied, masks={"count": torch.tensor([True, False])}, info=info)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_minus_zero_is_dead_and_anything_else_is_not(tmp_path: Path, dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False, True, False]])
    info = make_info({"weight": mask}, model="custom", model_args={}, class_names=None)
    model = nn.Linear(4, 1).to(dtype)
    create: dict[str, Any] = {"create_model": lambda name: nn.Linear(4, 1)}
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the least number above zero
    for value, lost in ((-0.0, 0), (tiny, 2), (-tiny, 2), (math.nan, 2)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.0, value, -0.0, value]]))  # also a live one may be zero
        if not lost:
            save_sparse(tmp_path / "s", model, masks={"weight": mask}, info=info, dtype=None, **create)
            loaded = read_sparse(tmp_path / "s").tensors["weight"]
            assert loaded.tolist() == [[0, 0, 0, 0]]
            assert loaded.signbit().tolist() == [[False, False, True, False]]
            continue
        with pytest.raises(ValueError, match=f"weight: {lost} dead elements are not exactly 0"):
            save_sparse(tmp_path / "s", model, masks={"weight": mask}, info=info, dtype=None, **create)


def test_the_same_model_makes_the_same_bytes(saved: Any) -> None:
    path, model, masks = saved
    content = path.read_bytes()
    save_sparse(path, model, masks=dict(reversed(masks.items())), info=make_info(masks))
    assert path.read_bytes()[8:] != b""
    first, second = (json.loads(c[8 : 8 + int.from_bytes(c[:8], "little")]) for c in (content, path.read_bytes()))
    assert first["__metadata__"]["data_sha256"] == second["__metadata__"]["data_sha256"]


def test_images_that_the_model_does_not_take(tmp_path: Path) -> None:
    def save(name: str = DEIT, image_size: Any = 16, **changes: Any) -> None:
        arguments = {**TINY, **changes} if name == DEIT else {"num_classes": 5}
        model = timm.create_model(name, **arguments)
        info = make_info({}, model=name, model_args=arguments, budget=Budget(1, 2), image_size=image_size)
        save_sparse(tmp_path / "s", model, masks={}, info=info)
        load_sparse(tmp_path / "s")

    save()
    save(img_size=(16, 32), image_size=(16, 32))
    save(dynamic_img_size=True, image_size=64)
    refused: tuple[tuple[str, dict[str, Any]], ...] = (
        (r"image_size: expected \(16, 16\), as the model takes, found \(32, 32\)", {"image_size": 32}),
        (r"image_size: expected at most 4 times \(16, 16\)", {"image_size": 65, "dynamic_img_size": True}),
        ("in_chans: expected 3, as the model takes, found 1", {"in_chans": 3}),
        ("in_chans: expected 3, as the model takes, found 1", {"name": "resnet18"}),
        (r"patch_size: expected at most the image, \(16, 16\), found a larger one", {"patch_size": 32}),
    )
    for match, changes in refused:
        with pytest.raises(ValueError, match=match):
            save(**changes)


def test_expanding_is_bounded_by_the_file(
    tmp_path: Path, tiny_deit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One live neuron in ten thousand is a small file; its dense model, all zeros, is not."""
    model = tiny_deit(mlp_ratio=400)
    neurons = {"blocks.0": (9000,), "blocks.1": (3,)}
    units.compact(model, {}, neurons)
    info = make_info({}, model_args={**TINY, "mlp_ratio": 400}, budget=Budget(1, 2), live_neurons=neurons)
    save_sparse(tmp_path / "s", model, masks={}, info=info)
    assert expand(tmp_path / "s").blocks[0].mlp.fc1.weight.shape == (9600, 24)  # type: ignore[index, union-attr]
    monkeypatch.setattr(checkpoint, "_UNSAVED_BYTES", 0)
    monkeypatch.setattr(checkpoint, "_MAX_EXPANSION", 50)
    with pytest.raises(CheckpointError, match=r"the size of the dense model: expected at most [\d,]+ bytes, found 3,7"):
        expand(tmp_path / "s")
    assert load_sparse(tmp_path / "s").blocks[0].mlp.fc1.weight.shape == (1, 24)  # type: ignore[index, union-attr]
