"""One function for each format: write it, open it again, compare its logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.errors import ConfigError
from experiments.exports import csr, dense, hub, onnx
from experiments.exports.fixed_tokens import FixedTokens
from experiments.exports.source import Source, check, compare, images_of, name_of
from experiments.exports.staging import staged
from models import create_model
from sparse_trainer.files.checkpoint import expand, load_sparse, save_sparse


def export_dense(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """timm's folder; the largest difference of its logits, and notes."""
    info = source.info
    interpolation, crop_pct, notes = images_of(source)
    expected = dense.without_selector(source.model, info, compacted=True)
    expanded = dense.without_selector(expand(source.path, create_model=create_model), info, compacted=False)
    config = dense.timm_config(expanded, info, interpolation=interpolation, crop_pct=crop_pct)
    written = source.rounded(expanded)
    with staged(target, overwrite=overwrite) as new:
        dense.write_dense(new, written, config, source.dtype)
        opened = dense.open_dense(new)
        check(opened, source.rounded(expected), source.images)
    if info.selector is not None:
        notes.append(f"{dense.LEFT_OUT}. Logits are compared with the checkpoint's with all tokens kept")
    return compare(opened, expected, source.images), notes


def export_onnx(source: Source, target: Path, overwrite: bool, counts: Sequence[int] | None) -> tuple[float, list[str]]:
    """The ONNX file; as :func:`export_dense`."""
    info, model = source.info, source.model
    interpolation, crop_pct, notes = images_of(source)
    if counts is not None:
        try:
            model = FixedTokens(model, counts).eval()
        except ValueError as error:
            raise ConfigError(f"--tokens: {error}") from error
        notes.append(
            f"every image keeps its best {', '.join(map(str, counts))} patches, where the checkpoint decides image by "
            "image, so its accuracy may be another; measure it. Logits are compared with the checkpoint's by this rule"
        )
    if source.dtype != torch.float32:
        notes.append("weights are stored in 16 bits; input, output and arithmetic are float32")
    said = {
        **info.to_metadata(),
        "mean": info.mean,
        "std": info.std,
        "image_size": info.image_size,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "tokens": counts,
        "weights_dtype": name_of(source.dtype),
    }
    said.pop("input")
    rounded = source.rounded(model)
    _, channels, height, width = source.images.shape
    size = channels, height, width
    onnx.export_onnx(rounded, target, input_size=size, dtype=source.dtype, metadata=said, overwrite=overwrite)
    with torch.inference_mode():
        found = onnx.run_onnx(onnx.onnx_session(target), source.images)
        return float((found - model(source.images)).abs().max()), notes


def export_csr(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """The ``.npz`` file; as :func:`export_dense`."""
    rounded, notes = source.rounded(source.model), []
    opened = copy.deepcopy(source.model)
    with staged(target, overwrite=overwrite) as new:
        csr.write_csr(new, rounded, source.masks, source.info, source.dtype)
        opened.load_state_dict(csr.read_csr_file(new).state_dict())
        check(opened, rounded, source.images)
    if source.dtype == torch.bfloat16:
        notes.append("NumPy has no bfloat16: values are rounded to it and stored as float32")
    return compare(opened, source.model, source.images), notes


def _write_sparse(source: Source, path: Path) -> float:
    """A sparse checkpoint, opened again and compared; the largest difference of its logits."""
    save_sparse(path, source.model, masks=source.masks, info=source.info, dtype=source.dtype, create_model=create_model)
    opened = load_sparse(path, create_model=create_model)
    check(opened, source.rounded(source.model), source.images)
    return compare(opened, source.model, source.images)


def export_sparse(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """The sparse checkpoint; as :func:`export_dense`."""
    with staged(target, overwrite=overwrite) as new:
        return _write_sparse(source, new), []


def export_hub(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """The folder for the hub; as :func:`export_dense`."""
    with staged(target, overwrite=overwrite) as new:
        new.mkdir()
        difference = _write_sparse(source, new / hub.CHECKPOINT)
        hub.write_hub(new, source)
        return difference, ["nothing was uploaded; read README.md before you do"]


WRITERS: dict[str, Callable[[Source, Path, bool], tuple[float, list[str]]]] = {
    "dense": export_dense,
    "csr": export_csr,
    "sparse": export_sparse,
    "hub": export_hub,
}
