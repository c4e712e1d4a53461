"""``sparse-trainer export``: what comes out is the network that went in, or nothing comes out."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import exports
from experiments.__main__ import commands, main
from experiments.exports import csr
from experiments.exports import onnx as onnx_export
from models import create_model
from sparse_trainer import SparseInfo, SparsityConfig, SparsityScheduler, load_sparse, save_sparse
from sparse_trainer.budget import Budget
from sparse_trainer.files.checkpoint import CheckpointError, load_sparse_masks, read_info
from sparse_trainer.units import compact, find_blocks
from tests.conftest import TINY

NAME = "deit_tiny_patch16_224"
HEADS, NEURONS = {"head_density": 0.67}, {"neuron_density": 0.5}
TOP_K = {"kind": "top_k", "keep_ratio": 0.6}
THRESHOLD = {"kind": "threshold", "stages": [1], "thresholds": [0.0045]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "weights": ({"density": 0.5}, None),
    "heads": ({"density": None, **HEADS}, None),
    "neurons": ({"density": None, **NEURONS}, None),
    "top_k": ({"density": 0.5}, TOP_K),
    "threshold": ({"density": 0.5}, THRESHOLD),
    "joint_top_k": ({"density": 0.4, **HEADS, **NEURONS}, {**TOP_K, "stages": [0, 1], "dropped": "fused"}),
    "joint_threshold": ({"density": 0.4, **HEADS, **NEURONS}, {**THRESHOLD, "dropped": "fused"}),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def info_of(**changes: Any) -> SparseInfo:
    """What a checkpoint of a tiny model says of itself."""
    values = {
        "model": NAME,
        "model_args": TINY,
        "budget": Budget(0, 0),
        "macs": 1,
        "image_size": 16,
        "in_chans": 1,
        "mean": (0.25,),
        "std": (0.5,),
        "class_names": ("a", "b", "c", "d", "é"),
        "recipe": "test",
        "metrics": {"top1": 50.0, "tokens_kept/1": 8.6},
    }
    return SparseInfo(**{**values, **changes})


def images_of(count: int = 10, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def kept_by(model: nn.Module) -> Tensor:
    """Patches that a threshold selector keeps of each image."""
    return model(images_of(), return_selection=True)[1].counts[:, 0]


def halve(model: Any) -> None:
    """Set the threshold so that about half of the patches are kept, of some images more than of others."""
    low, high = 0.0, 1.0
    for _ in range(20):
        model.selector.thresholds.data.fill_((low + high) / 2)
        low, high = ((low + high) / 2, high) if kept_by(model).float().mean() > 8 else (low, (low + high) / 2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained checkpoint of each kind; one live weight of each is too small for float16."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    images, targets = images_of(8), torch.arange(8) % 5
    paths = {}
    for kind, (sparsity, selector) in KINDS.items():
        torch.manual_seed(0)
        model = create_model(NAME, selector=selector, **TINY)
        config = SparsityConfig(**{"update_every": 1, "drop_fraction": 0.6, **sparsity})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(is rounded to|growth changes nothing)")
            scheduler = SparsityScheduler(model, config, total_steps=20)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            scheduler.attach(optimizer)
            for _ in range(4):
                F.cross_entropy(model(images), targets).backward()
                optimizer.step()
                scheduler.step(lambda model=model: F.cross_entropy(model(images), targets))
                optimizer.zero_grad()
        if "threshold" in kind:
            halve(model.eval())
        weight = model.get_parameter("blocks.1.mlp.fc1.weight")
        mask = scheduler.masks.get("blocks.1.mlp.fc1.weight", torch.ones_like(weight, dtype=torch.bool))
        with torch.no_grad():
            weight.view(-1)[mask.view(-1).nonzero()[0]] = 1e-9
        paths[kind] = folder / f"{kind}.safetensors"
        save_sparse(
            paths[kind],
            model,
            masks=scheduler.masks,
            live_heads=scheduler.live_heads,
            live_neurons=scheduler.live_neurons,
            info=info_of(selector=selector, budget=scheduler.budget),
            create_model=create_model,
        )
    return paths


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The command's JSON; it must say nothing else."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err.removeprefix("sparse-trainer export: error: ").removesuffix("\n")


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def keeping_all(model: Any) -> nn.Module:
    """The model with a selector that drops nothing."""
    if getattr(model, "selector", None) is None:
        return model
    selector = model.selector
    if selector.config.kind == "top_k":
        selector.config = dataclasses.replace(selector.config, keep_ratio=1.0)
    else:
        selector.thresholds.data.fill_(-1.0)
    return model


def check_dense(path: Path, expected: nn.Module, checkpoint: Path) -> None:
    opened = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    images = images_of()
    torch.testing.assert_close(logits(opened, images), logits(keeping_all(expected), images), atol=1e-5, rtol=0)
    info = read_info(checkpoint)
    if not (info.live_heads or info.live_neurons or info.selector):
        assert torch.equal(logits(opened, images), logits(expected, images))
    assert {block.heads.count() for block in find_blocks(opened).values()} == {3}
    assert {block.neurons.count() for block in find_blocks(opened).values()} == {96}
    data = timm.data.resolve_model_data_config(opened)
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()} == {
        "input_size": [1, 16, 16], "mean": [0.25], "std": [0.5], "interpolation": "bicubic", "crop_pct": 1.0,
        "crop_mode": "center",
    }  # fmt: skip
    assert tuple(opened.pretrained_cfg["label_names"]) == info.class_names
    said = json.loads((path / "config.json").read_text(encoding="utf-8"))["sparse_trainer"]
    assert said["live_parameters"] == info.budget.live
    assert ("left_out" in said) == (info.selector is not None)


def common_count(model: nn.Module) -> int:
    """The number of patches that it keeps most often: of some images, but not of all."""
    kept = kept_by(model)
    count = int(kept.mode().values)
    assert 1 < kept.eq(count).sum() < len(kept)
    return count


def check_onnx(path: Path, expected: Any, checkpoint: Path) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = images_of()
    if "threshold" in checkpoint.stem:  # only of images for which the counts are those of the thresholds
        images = images[kept_by(expected) == common_count(expected)]
    for batch in (images[:1], images[1:]):
        found = torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
        torch.testing.assert_close(found, logits(expected, batch), atol=1e-5, rtol=0)
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (said["mean"], said["std"], said["image_size"]) == ([0.25], [0.5], [16, 16])
    assert said["class_names"] == ["a", "b", "c", "d", "é"]


def check_csr(path: Path, expected: nn.Module, checkpoint: Path) -> None:
    matrices, masks = csr.read_csr(path), load_sparse_masks(checkpoint)
    state = expected.state_dict()
    for name, matrix in matrices.items():
        mask = masks.get(name, torch.ones_like(state[name], dtype=torch.bool))
        rows, columns = mask.flatten(1).nonzero().T
        assert np.array_equal(matrix.tocoo().row, rows)
        assert np.array_equal(matrix.tocoo().col, columns)
        assert np.array_equal(matrix.toarray(), state[name].flatten(1).numpy())
    assert {name for name, module in expected.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)} == {
        name.removesuffix(".weight") for name in matrices
    }
    opened = create_model(NAME, selector=read_info(checkpoint).selector, **TINY).eval()
    file = csr.read_csr_file(path)
    if file.metadata["live_heads"] or file.metadata["live_neurons"]:
        compact(opened, file.metadata["live_heads"], file.metadata["live_neurons"])
    opened.load_state_dict(file.state_dict())
    assert torch.equal(logits(opened, images_of()), logits(expected, images_of()))
    assert SparseInfo.from_metadata(
        {key: value for key, value in file.metadata.items() if key not in ("format", "version", "dtype", "shapes")}
    ) == read_info(checkpoint)


def check_sparse(path: Path, expected: nn.Module, checkpoint: Path) -> None:
    assert torch.equal(logits(load_sparse(path, create_model=create_model), images_of()), logits(expected, images_of()))
    assert read_info(path) == read_info(checkpoint)
    masks = load_sparse_masks(checkpoint)
    found = load_sparse_masks(path)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


CHECKS: dict[str, Callable[[Path, nn.Module, Path], None]] = {
    "dense": check_dense, "onnx": check_onnx, "csr": check_csr, "sparse": check_sparse,
}  # fmt: skip
FOLDERS = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26),
    reason="timm opens folders with safetensors from 1.0.26",
)
CASES = [
    pytest.param(kind, format, dtype, id=f"{kind}-{format}-{dtype}", marks=FOLDERS if format == "dense" else ())
    for kind in KINDS
    for format in CHECKS
    for dtype in DTYPES
    # An ONNX graph takes more than a second to build, and is the same for all dtypes but for the stored weights.
    if format != "onnx" or dtype == "float32" or kind == "joint_top_k"
]


@pytest.mark.parametrize(("kind", "format", "dtype"), CASES)
def test_round_trip(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    format: str,
    dtype: str,
) -> None:
    path, checkpoint = tmp_path / "out", checkpoints[kind]
    model = load_sparse(checkpoint, create_model=create_model)
    tokens = [f"--tokens={common_count(model)}"] if format == "onnx" and "threshold" in kind else []
    found = run(capsys, checkpoint, "--format", format, "--dtype", dtype, "--output", path, *tokens)
    CHECKS[format](path, model.to(DTYPES[dtype]).float(), checkpoint)
    assert (found["format"], found["dtype"], found["output"]) == (format, dtype, str(path))
    files = list(path.iterdir()) if path.is_dir() else [path]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert found["dense_bytes"] == 15_461 * DTYPES[dtype].itemsize
    assert list(tmp_path.iterdir()) == [path]
    if dtype == "float32":
        assert found["difference"] <= 1e-5
    elif "threshold" not in kind and "top_k" not in kind:  # other weights may choose other patches
        assert 0 < found["difference"] < 0.1


def save_random(path: Path, name: str = NAME, selector: dict[str, Any] | None = None, **arguments: Any) -> nn.Module:
    """A checkpoint of random weights, half of them under a mask, with two of three heads and half of the neurons."""
    torch.manual_seed(1)
    arguments = {**TINY, **arguments}
    model = create_model(name, selector=selector, **arguments).eval()
    blocks = find_blocks(model)
    units = dict.fromkeys(blocks, (2, 0)), dict.fromkeys(blocks, tuple(range(1, 96, 2)))
    compact(model, *units)
    masks = {}
    for key, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.3)
        if key.endswith(("qkv.weight", "fc1.weight", "patch_embed.proj.weight")):
            masks[key] = torch.rand_like(parameter) < 0.5
            parameter.data.mul_(masks[key])
    live = sum(int(mask.sum()) for mask in masks.values())
    size = arguments["img_size"]
    info = info_of(
        model=name,
        model_args=arguments,
        selector=selector,
        budget=Budget(live, live * 3),
        image_size=size,
        in_chans=arguments["in_chans"],
        mean=(0.25,) * arguments["in_chans"],
        std=(0.5,) * arguments["in_chans"],
        live_heads=units[0],
        live_neurons=units[1],
        class_names=None if arguments["num_classes"] == 0 else ("a", "b", "c", "d", "é"),
    )
    save_sparse(path, model, masks=masks, info=info, create_model=create_model)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_random(tmp_path / "sparse.safetensors")
    return tmp_path / "sparse.safetensors"


@FOLDERS
def test_names_beside_the_checkpoint(checkpoint: Path, capsys: Any) -> None:
    folder = checkpoint.parent
    for format, dtype, name in (
        ("dense", None, "sparse-dense"),
        ("dense", "float16", "sparse-dense-float16"),
        ("csr", None, "sparse.npz"),
        ("sparse", "bfloat16", "sparse-bfloat16.safetensors"),
    ):
        options = [f"--format={format}", *([f"--dtype={dtype}"] if dtype else [])]
        assert run(capsys, checkpoint, *options)["output"] == str(folder / name)
        assert (folder / name).exists()
        assert refused(capsys, checkpoint, *options) == (
            f"--output: {folder / name} exists; give another name, or --overwrite"
        )
    half = folder / "sparse-bfloat16.safetensors"
    assert run(capsys, half, "--format=sparse", "--output", folder / "again")["dtype"] == "bfloat16"
    assert (folder / "again").read_bytes() == half.read_bytes()
    assert run(capsys, half, "--format=csr")["output"] == str(folder / "sparse-bfloat16-bfloat16.npz")


@FOLDERS
def test_the_table(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(checkpoint), "--format=dense", "--output", str(tmp_path / "[red]out")]) == 0
    out = capsys.readouterr().out
    for text in ("[red]out", "MB, 1", "of the dense network in float32", "largest logit difference", "local-dir:"):
        assert text in out
    save_random(tmp_path / "b.safetensors", selector=TOP_K)
    assert main(["export", str(tmp_path / "b.safetensors"), "--format=dense", "--dtype=float16"]) == 0
    assert "timm has no token selectors" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@FOLDERS
def test_overwriting(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    run(capsys, checkpoint, "--format=dense", "--output", folder)
    run(capsys, checkpoint, "--format=csr", "--output", file)
    (folder / "config.json").write_text("old")
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "folder").write_text("of an export that was killed")
    run(capsys, checkpoint, "--format=dense", "--output", folder, "--overwrite")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_classes"] == 5
    run(capsys, checkpoint, "--format=sparse", "--output", file, "--overwrite")
    assert file.read_bytes() == checkpoint.read_bytes()
    rename, done = os.rename, []

    def once(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", once)
        line = refused(capsys, checkpoint, "--format=dense", "--dtype=float16", "--output", folder, "--overwrite")
    assert line == f"{folder}: cannot be written: Input/output error"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "sparse.safetensors"]
    assert (folder / "model.safetensors").stat().st_size > 4 * 15_461  # float32, as before
    (folder / "mine.txt").write_text("keep me")
    (tmp_path / "link").symlink_to(checkpoint)
    for output, format, message in (
        (folder, "dense", f"{folder} holds other things (mine.txt, ...) that are not overwritten"),
        (folder, "csr", f"{folder} is a folder, and this format is one file; give another name"),
        (file, "dense", f"{file} is a file, and this format is a folder; give another name"),
        (checkpoint, "sparse", f"{checkpoint} is the checkpoint itself; give another name"),
        (tmp_path / "link", "sparse", f"{tmp_path / 'link'} is the checkpoint itself; give another name"),
        (tmp_path / "gone" / "x", "csr", f"there is no folder {tmp_path / 'gone'}; make it, or give another place"),
        (Path("/"), "csr", "/ is no name of a file"),
    ):
        line = refused(capsys, checkpoint, "--format", format, "--output", output, "--overwrite")
        assert line == f"--output: {message}"
    assert (folder / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("format", [pytest.param("dense", marks=FOLDERS), "csr", "sparse", "onnx"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, format: str
) -> None:
    target = tmp_path / "out"
    if format == "dense":
        target.mkdir()
        (target / "config.json").write_text("old")
    else:
        target.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if format == "onnx":
        export_tiny = nn.Sequential(nn.Flatten(), nn.Linear(256, 5)).eval()
        with pytest.raises(CheckpointError, match=f"{target}: cannot be written: No space left on device"):
            onnx_export.export_onnx(export_tiny, target, input_size=(1, 16, 16), overwrite=True)
    else:
        line = refused(capsys, checkpoint, "--format", format, "--output", target, "--overwrite")
        assert line.startswith(f"{target}: cannot be written: No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sparse.safetensors"]
    assert (target / "config.json" if format == "dense" else target).read_text() == "old"


def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert "export" in commands()
    threshold, large = tmp_path / "threshold.safetensors", tmp_path / "large.safetensors"
    save_random(threshold, selector=THRESHOLD)
    model = load_sparse(checkpoint)
    model.get_parameter("norm.weight").data[3] = 1e5
    save_sparse(large, model, masks=load_sparse_masks(checkpoint), info=read_info(checkpoint))
    any_size = timm.create_model("test_resnet")  # it takes images of any size
    anything = info_of(
        model="test_resnet",
        model_args={},
        in_chans=3,
        mean=(0,) * 3,
        std=(1,) * 3,
        image_size=8192,
        class_names=None,
    )
    save_sparse(tmp_path / "vast.safetensors", any_size, masks={}, info=anything)
    (tmp_path / "text").write_text("hello")
    onnx_file = f"--output={tmp_path / 'x.onnx'}"
    for arguments, message in (
        ([], "give a sparse checkpoint, such as runs/<name>/sparse.safetensors"),
        ([checkpoint], "--format: give one of dense, onnx, csr, sparse"),
        ([checkpoint, "--format=onx"], "--format: 'onx' is not one of dense, onnx, csr, sparse"),
        ([checkpoint, "--format=csr", "--dtype=int8"], "--dtype: 'int8' is not one of float32, float16, bfloat16"),
        ([checkpoint, "--formt=csr"], "formt: unknown key; did you mean format?"),
        (["gone", "--format=csr"], "checkpoint: there is no gone; "),
        ([tmp_path / "text", "--format=csr"], f"{tmp_path / 'text'}: is truncated or no safetensors file"),
        ([large, "--format=csr", "--dtype=float16"], "--dtype: float16 holds at most 65,504, and norm.weight has a "),
        (
            [tmp_path / "vast.safetensors", "--format=csr"],
            f"{tmp_path / 'vast.safetensors'}: images of 8192 x 8192 x 3 ",
        ),
        ([threshold, "--format=onnx", onnx_file], "--format onnx: this checkpoint keeps another number of patches of "),
        ([threshold, "--format=onnx", onnx_file, "--tokens=9,8"], "--tokens: 2 given and 1 needed, one for each "),
        ([threshold, "--format=onnx", onnx_file, "--tokens=many"], "--tokens: 'many' is not whole numbers with commas"),
        ([threshold, "--format=dense", "--tokens=9"], "--tokens: goes with --format onnx; leave it out"),
        ([checkpoint, "--format=onnx", "--tokens=9"], "--tokens: is for checkpoints with a threshold selector; leave"),
    ):
        assert refused(capsys, *arguments).startswith(message)
    assert refused(capsys, threshold, "--format=onnx").endswith("--tokens 9 (the means of its last evaluation)")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert refused(capsys, checkpoint, "--format=onnx") == (
        "--format onnx needs onnxscript: pip install 'sparse-trainer[onnx]'"
    )
    assert not (tmp_path / "x.onnx").exists()


def test_nothing_but_the_onnx_export_needs_its_libraries(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delattr(exports, "onnx")
    for name in ("experiments.commands.export", "experiments.exports.onnx"):
        monkeypatch.delitem(sys.modules, name)
    run(capsys, checkpoint, "--format=csr")
