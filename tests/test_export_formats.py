"""What each format that is exported holds, and what its reader makes of it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from scipy.sparse import csr_array
from torch import nn

from experiments.exports import csr, writers
from experiments.exports import onnx as onnx_export
from experiments.exports.fixed_tokens import FixedTokens
from models import create_model
from sparse_trainer import load_sparse
from sparse_trainer.files.checkpoint import CheckpointError
from tests.conftest import TINY
from tests.test_export import DTYPES, FOLDERS, TOP_K, images_of, logits, refused, run, save_random


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_random(tmp_path / "sparse.safetensors")
    return tmp_path / "sparse.safetensors"


@FOLDERS
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_small_patch16_224", {"reg_tokens": 2, "global_pool": "avg", "qk_norm": True}),
        ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg", "in_chans": 3}),
        ("vit_small_patch16_224.augreg_in21k", {"img_size": (16, 24), "patch_size": (8, 4), "in_chans": 4}),
        ("vit_small_patch16_224", {"dynamic_img_size": True, "num_classes": 0}),
    ],
    ids=["distilled", "deit3", "registers", "avg", "rectangular", "features"],
)
def test_dense_of_other_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: dict[str, Any]
) -> None:
    model = save_random(tmp_path / "sparse.safetensors", name, **arguments)
    run(capsys, tmp_path / "sparse.safetensors", "--format=dense", "--output", tmp_path / "out")
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(3, arguments.get("in_chans", 1), *np.broadcast_to(arguments.get("img_size", 16), 2).tolist())
    expected = logits(model, images)
    torch.testing.assert_close(logits(opened, images), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    # With any other number of channels older releases of timm would put random weights there.
    assert opened.pretrained_cfg["first_conv"] == (None if images.shape[1] == 4 else "patch_embed.proj")
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert other.head.out_features == 7


def test_fixed_tokens_are_the_model_where_the_counts_agree(tiny_deit: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    selector = {"kind": "threshold", "stages": [1, 2]}
    model: Any = create_model("deit_tiny_distilled_patch16_224", selector=selector, **{**TINY, "depth": 3}).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.selector.thresholds.data.copy_(torch.tensor([0.0048, 0.0083]))
    seen = set()
    for image in images_of().split(1):
        with torch.inference_mode():
            expected, selection = model(image, return_selection=True)
        counts = selection.counts[0].tolist()
        seen.add(tuple(counts))
        torch.testing.assert_close(logits(FixedTokens(model, counts).eval(), image), expected, atol=1e-5, rtol=1e-5)
    assert len(seen) > 2
    for counts, message in (
        ([5], r"1 given and 2 needed, one for each stage \(before block 1, 2\)"),
        ([5, 6], r"\[5, 6\] do not fall from at most 16"),
        ([17, 3], r"\[17, 3\] do not fall"),
        ([3, 0], r"\[3, 0\] do not fall from at most 16, the patches, to at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FixedTokens(model, counts)


def test_an_onnx_file_holds_what_it_needs_and_nothing_of_this_machine(tmp_path: Path, capsys: Any) -> None:
    """Registers, pooling over patches, q-k norm and zeroed tokens in a graph of standard operators alone."""
    path = tmp_path / "sparse.safetensors"
    model = save_random(
        path,
        "vit_small_patch16_224",
        selector={**TOP_K, "gradient": "factor", "zeroing": True},
        reg_tokens=2,
        global_pool="avg",
        qk_norm=True,
    )
    run(capsys, path, "--format=onnx", "--dtype=bfloat16", "--output", tmp_path / "out.onnx")
    graph = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", onnx_export.OPSET)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    assert str(Path.cwd()) not in str(graph)
    assert ".py" not in str(graph)
    weights = [tensor for tensor in graph.graph.initializer if np.prod(tensor.dims) >= 24]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.BFLOAT16}
    (images,), (found,) = graph.graph.input, graph.graph.output
    assert [images.name, found.name] == ["images", "logits"]
    assert images.type.tensor_type.elem_type == found.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert images.type.tensor_type.shape.dim[0].dim_param == found.type.tensor_type.shape.dim[0].dim_param == "batch"
    session = onnx_export.onnx_session(tmp_path / "out.onnx", threads=1)
    rounded = model.to(torch.bfloat16).float()
    for count in (1, 4):
        expected = logits(rounded, images_of(count))
        torch.testing.assert_close(onnx_export.run_onnx(session, images_of(count)), expected, atol=1e-4, rtol=1e-5)


def test_only_what_sixteen_bits_hold_is_narrowed() -> None:
    values = {"exact": [0.5, 65504.0], "inexact": [0.1, 1.0], "scalar": 0.5}
    arrays = {name: np.array(value, dtype=np.float32) for name, value in values.items()}
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    sums = [onnx.helper.make_node("Sum", ["images", *arrays], ["logits"])]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("images", "logits")]
    graph = onnx.helper.make_graph(sums, "sum", ends[:1], ends[1:], initializers)
    opset = onnx.helper.make_opsetid("", onnx_export.OPSET)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx_export.narrow_weights(proto, torch.float16)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert kinds == {"exact.stored": narrow, "inexact": wide, "scalar": wide}
    found = onnx_export.run_onnx(onnx_export.onnx_session(proto.SerializeToString()), torch.zeros(2))
    assert found.tolist() == sum(arrays.values()).tolist()


def test_the_onnx_check_sees_a_difference(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    session, images = SimpleNamespace(), images_of(9)
    monkeypatch.setattr(onnx_export, "run_onnx", lambda session, batch: batch.flatten(1)[:, :5])
    expected = images.flatten(1)[:, :5]
    assert onnx_export.compare_onnx(session, expected, images) == 0
    assert onnx_export.compare_onnx(session, expected + 5e-5, images) == pytest.approx(5e-5, rel=0.01)
    for wrong in (expected + 1e-3, expected.clone().index_fill_(0, torch.tensor(8), torch.nan)):
        with pytest.raises(
            CheckpointError, match=r"onnxruntime's logits differ from PyTorch's by .*nothing was written"
        ):
            onnx_export.compare_onnx(session, wrong, images)
    with pytest.raises(CheckpointError, match=r"onnxruntime gives logits \(9, 5\), PyTorch \(9, 4\)"):
        onnx_export.compare_onnx(session, expected[:, :4], images)

    proto = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    monkeypatch.setattr(onnx_export, "build_onnx", lambda model, size: proto)
    line = refused(capsys, checkpoint, "--format=onnx", "--output", tmp_path / "out.onnx")
    assert line.startswith("onnxruntime cannot run what was written: ")
    monkeypatch.undo()
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: 1 / 0)
    line = refused(capsys, checkpoint, "--format=onnx", "--output", tmp_path / "out.onnx")
    assert line == f"VisionTransformer cannot be written as ONNX by torch {torch.__version__}: division by zero"
    assert list(tmp_path.iterdir()) == [checkpoint]

    def fail(*_: Any, **__: Any) -> None:
        try:
            raise ValueError("\x1b[96mno such\x1b[0m operator\nand more")
        except ValueError as error:
            raise RuntimeError("Failed to decompose. This is step 2/3") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    line = refused(capsys, checkpoint, "--format=onnx", "--output", tmp_path / "out.onnx")
    assert line.endswith(f"by torch {torch.__version__}: no such operator")


def test_a_timm_that_cannot_open_folders_is_told_so(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    own = timm.create_model

    def fail(name: str, **options: Any) -> nn.Module:
        if name.startswith("local-dir:"):
            raise RuntimeError(f"invalid load key of {name}\nand more")
        return own(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    line = refused(capsys, checkpoint, "--format=dense", "--output", tmp_path / "out")
    assert line.endswith("folders with safetensors need timm 1.0.26 or newer: pip install 'timm>=1.0.26'")
    assert f"timm {timm.__version__} cannot open it (invalid load key of local-dir:" in line
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("format", [pytest.param("dense", marks=FOLDERS), "csr", "sparse"])
def test_what_was_written_is_compared(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, format: str
) -> None:
    """A writer that spoils one weight: nothing is left of its work."""
    writer = {
        "dense": (writers.dense, "write_dense"),
        "csr": (writers.csr, "write_csr"),
        "sparse": (writers, "save_sparse"),
    }
    module, name = writer[format]
    right = getattr(module, name)

    def wrong(path: Path, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        model.get_parameter("head.bias").data[0] += 0.1
        right(path, model, *args, **kwargs)
        model.get_parameter("head.bias").data[0] -= 0.1

    monkeypatch.setattr(module, name, wrong)
    line = refused(capsys, checkpoint, "--format", format, "--output", tmp_path / "out")
    assert line.startswith("what was written gives logits that differ from the checkpoint's by 0.1, more than ")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_scipy_matrices_by_hand(tmp_path: Path) -> None:
    weight = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])  # [2, 2, 1, 2]
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1], dtype=torch.bool).view_as(weight)
    matrix = csr.to_csr(weight, mask)
    assert (matrix.shape, matrix.data.tolist()) == ((2, 4), [1, 0, 2, 0])
    assert (matrix.indices.tolist(), matrix.indptr.tolist()) == ([0, 1, 3, 3], [0, 3, 4])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_documented_lines_read_a_csr_file(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, dtype: str
) -> None:
    run(capsys, checkpoint, "--format=csr", "--dtype", dtype, "--output", tmp_path / "sparse.npz")
    monkeypatch.chdir(tmp_path)
    with np.load("sparse.npz") as file:
        stored = {str(file[name].dtype) for name in file.files if name.endswith((".data", ".bias"))}
        assert stored == {dtype}
    assert csr.__doc__ is not None
    lines = textwrap.dedent("    import" + csr.__doc__.split("    import", 1)[1].split("\n\n(", 1)[0])
    if dtype == "float16":
        lines = lines.replace('file[f"{name}.data"]', 'file[f"{name}.data"].astype("f4")')
    found: dict[str, Any] = {}
    exec(lines, found)
    weight = load_sparse(checkpoint).get_parameter(found["name"]).detach()
    assert isinstance(found["weight"], csr_array)
    np.testing.assert_array_equal(found["weight"].toarray(), weight.to(DTYPES[dtype]).float().numpy())


def test_csr_files_that_are_none(tmp_path: Path, checkpoint: Path, capsys: Any) -> None:
    path = tmp_path / "sparse.npz"
    run(capsys, checkpoint, "--format=csr", "--output", path)
    with np.load(path) as file:
        arrays = dict(file)
    name = "blocks.0.attn.qkv.weight"
    for change, message in (
        ({f"{name}.indices": arrays[f"{name}.indices"] + 24}, "expected version 1 of what"),
        ({f"{name}.indptr": arrays[f"{name}.indptr"][:-1]}, "expected version 1 of what"),
        ({f"{name}.shape": np.array([1 << 40])}, "expected version 1 of what"),
        ({"metadata": np.array("[]")}, "expected version 1 of what"),
        ({"metadata": np.array(json.dumps({"format": csr.FORMAT, "version": 9}))}, r"found format .* version 9"),
        ({"head.bias": np.array([print], dtype=object)}, "is damaged or no .npz file: Object arrays cannot be loaded"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(CheckpointError, match=message):
            csr.read_csr(path)
    np.savez(path, **{key: value for key, value in arrays.items() if key != f"{name}.data"})
    with pytest.raises(CheckpointError, match="expected version 1 of what"):
        csr.read_csr(path)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], checkpoint.read_bytes(), b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged or no \.npz file"):
            csr.read_csr(path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        csr.read_csr(tmp_path / "gone.npz")
