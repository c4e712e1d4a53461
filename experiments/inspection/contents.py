"""What is in a sparse checkpoint, counted on its tensors, beside the dense network that it came from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from experiments.evaluation.measuring import known_tokens
from models import create_model
from sparse_trainer.files.checkpoint import SPARSE_VERSION, SparseFile, SparseInfo, load_sparse, read_sparse
from sparse_trainer.flops import Count, count
from sparse_trainer.scheduler import prunable_weights
from sparse_trainer.units import BlockUnits, find_blocks


@dataclass(frozen=True)
class Layer:
    """One weight tensor, or the product of queries, keys and values in a block, which has no weights."""

    name: str
    block: str | None  #: None outside of the blocks
    shape: tuple[int, ...] | None  #: of the tensor as it is; None for the product
    dense_shape: tuple[int, ...] | None  #: in the dense network; None also for what that has not, a selector's
    live: int  #: weights that are in the network
    total: int  #: weights of the dense network
    macs: float  #: of one image, live weights only
    compact_macs: float  #: as computed, dead weights of live units included
    dense_macs: float  #: of the dense network with all its tokens

    @property
    def density(self) -> float | None:
        return self.live / self.total if self.total else None


@dataclass(frozen=True)
class Part:
    """A block, or a weight outside of the blocks."""

    name: str
    layers: tuple[Layer, ...]
    heads: tuple[int, int] | None = None  #: live and of the dense network
    neurons: tuple[int, int] | None = None
    tokens: float | None = None  #: mean that enters

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its weights, as they are, by name inside of the part."""
        return {
            layer.name.removesuffix(".weight").removeprefix(f"{self.name}."): layer.shape
            for layer in self.layers
            if layer.shape is not None
        }

    @property
    def live(self) -> int:
        return sum(layer.live for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def macs(self) -> float:
        return sum(layer.macs for layer in self.layers)

    @property
    def compact_macs(self) -> float:
        return sum(layer.compact_macs for layer in self.layers)

    @property
    def dense_macs(self) -> float:
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def density(self) -> float:
        return self.live / self.total if self.total else 1.0


@dataclass(frozen=True)
class Contents:
    """A checkpoint as it was found."""

    path: Path
    file: SparseFile
    parts: tuple[Part, ...]  #: in the model's order
    compact: Count  #: of the network in the file
    dense: Count  #: of the dense network: all heads, neurons and tokens, no selector
    dtypes: tuple[str, ...]  #: of its floating tensors
    bytes: int  #: of the file
    dense_bytes: int  #: of the dense network's tensors in the file's precision
    counted: int | None  #: live prunable weights counted here; None where the file cannot tell which are prunable

    @property
    def info(self) -> SparseInfo:
        return self.file.info

    @property
    def layers(self) -> list[Layer]:
        return [layer for part in self.parts for layer in part.layers]


def read_contents(path: Path) -> Contents:
    """Read and count a sparse checkpoint.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = read_sparse(path)
    info = file.info
    model = load_sparse(path, create_model=create_model)
    dense_model = create_dense(info)
    tokens = tokens_entering(model, info)
    size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    blocks: dict[str, BlockUnits] = {}
    try:
        blocks, dense_blocks = find_blocks(model), find_blocks(dense_model)
        compact, dense = count(model, file.masks, tokens=tokens), count(dense_model)
    except ValueError:  # not one of timm's VisionTransformers
        blocks, dense_blocks = {}, {}
        compact = count(model, file.masks, input_size=(info.in_chans, *size))
        dense = count(dense_model, input_size=(info.in_chans, *size))

    grouped: dict[str, list[Layer]] = {}
    for layer in _layers(model, dense_model, compact, dense, blocks):
        grouped.setdefault(layer.block or layer.name.removesuffix(".weight"), []).append(layer)
    order = list(blocks)
    parts = []
    for name, layers in grouped.items():
        if name in blocks:
            block, whole = blocks[name], dense_blocks[name]
            part = Part(
                name,
                tuple(layers),
                heads=(block.heads.count(), whole.heads.count()),
                neurons=(block.neurons.count(), whole.neurons.count()),
                tokens=tokens[order.index(name)] if tokens is not None else None,
            )
        else:
            part = Part(name, tuple(layers))
        parts.append(part)
    floating = [tensor.dtype for tensor in file.tensors.values() if tensor.is_floating_point()]
    width = max((dtype.itemsize for dtype in floating), default=4)
    return Contents(
        path=path,
        file=file,
        parts=tuple(parts),
        compact=compact,
        dense=dense,
        dtypes=tuple(sorted({str(dtype).removeprefix("torch.") for dtype in floating})),
        bytes=path.stat().st_size,
        dense_bytes=sum(
            tensor.numel() * (width if tensor.is_floating_point() else tensor.element_size())
            for tensor in dense_model.state_dict().values()
        ),
        counted=_count_live(file, model, dense_model),
    )


def create_dense(info: SparseInfo) -> nn.Module:
    """The dense network of a checkpoint, without a selector and without memory."""
    with torch.device("meta"):
        return create_model(info.model, **dict(info.model_args))


def tokens_entering(model: nn.Module, info: SparseInfo) -> list[float] | None:
    """Mean tokens that enter each block: known for top-k, measured at the last evaluation for thresholds.

    Returns:
        None without a selector, and where nothing was measured.
    """
    known = known_tokens(model)
    if known is not None:
        return list(known.mean)
    selector = cast(Any, getattr(model, "selector", None))
    if selector is None or any(f"tokens_kept/{stage}" not in info.metrics for stage in selector.stages):
        return None
    prefix, left = cast(Any, model).num_prefix_tokens, float(cast(Any, model).patch_embed.num_patches)
    entering = []
    for block in range(len(cast(Any, model).blocks)):
        left = info.metrics[f"tokens_kept/{block}"] if block in selector.stages else left
        entering.append(prefix + left)
    return entering


def _layers(
    model: nn.Module, dense_model: nn.Module, compact: Count, dense: Count, blocks: Mapping[str, BlockUnits]
) -> list[Layer]:
    """All that was counted, in the model's order; the product of a block stands behind the weights it reads."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    dense_shapes = {name: tuple(parameter.shape) for name, parameter in dense_model.named_parameters()}
    waiting = [name for name in compact.layers if name not in shapes]
    names: list[str] = []
    for name in (name for name in shapes if name in compact.layers):
        names.append(name)
        for product in [product for product in waiting if name.startswith(f"{product}.")]:
            names.append(product)
            waiting.remove(product)
    names += waiting  # products that read no weight of their own, in a network without blocks as known here
    layers = []
    for name in names:
        found, whole = compact.layers[name], dense.layers.get(name)
        layers.append(
            Layer(
                name=name,
                block=next((block for block in blocks if name.startswith(f"{block}.")), None),
                shape=shapes.get(name),
                dense_shape=dense_shapes.get(name),
                live=found.live,
                total=whole.parameters if whole is not None else found.parameters,
                macs=found.live_macs,
                compact_macs=found.macs,
                dense_macs=whole.macs if whole is not None else 0.0,
            )
        )
    return layers


def _count_live(file: SparseFile, model: nn.Module, dense_model: nn.Module) -> int | None:
    """Live prunable weights. Without masks they are known only if every Linear and Conv2d weight is prunable."""
    if file.masks:
        return sum(int(mask.count_nonzero()) for mask in file.masks.values())
    if sum(weight.numel() for weight in prunable_weights(dense_model).values()) != file.info.budget.total:
        return None
    return sum(weight.numel() for weight in prunable_weights(model).values())


def to_json(contents: Contents) -> dict[str, Any]:
    """Everything that a checkpoint says of itself and that was counted on it, as JSON values."""
    info = contents.info
    return {
        "checkpoint": str(contents.path),
        "bytes": contents.bytes,
        "dense_bytes": contents.dense_bytes,
        "dtypes": contents.dtypes,
        "model": info.model,
        "model_args": dict(info.model_args),
        "selector": None if info.selector is None else dict(info.selector),
        "input": {
            "image_size": info.image_size,
            "in_chans": info.in_chans,
            "mean": info.mean,
            "std": info.std,
            "preparation": dict(info.preparation),
        },
        "class_names": info.class_names,
        "parts": [
            {
                "name": part.name,
                "shapes": part.shapes,
                "live": part.live,
                "total": part.total,
                "density": part.density,
                "macs": part.macs,
                "compact_macs": part.compact_macs,
                "dense_macs": part.dense_macs,
                "heads": part.heads,
                "neurons": part.neurons,
                "tokens": part.tokens,
                "layers": [
                    {
                        "name": layer.name,
                        "shape": layer.shape,
                        "dense_shape": layer.dense_shape,
                        "live": layer.live,
                        "total": layer.total,
                        "density": layer.density,
                        "macs": layer.macs,
                        "compact_macs": layer.compact_macs,
                        "dense_macs": layer.dense_macs,
                    }
                    for layer in part.layers
                ],
            }
            for part in contents.parts
        ],
        "live_heads": {block: sorted(units) for block, units in info.live_heads.items()},
        "live_neurons": {block: sorted(units) for block, units in info.live_neurons.items()},
        "live_parameters": info.budget.live,
        "total_parameters": info.budget.total,
        "density": info.budget.density,
        "counted_live_parameters": contents.counted,
        "parameters": {
            "live": contents.compact.live_parameters,
            "compact": contents.compact.parameters,
            "dense": contents.dense.parameters,
        },
        "macs": info.macs,
        "counted_macs": contents.compact.live_macs,
        "compact_macs": contents.compact.macs,
        "dense_macs": contents.dense.macs,
        "provenance": {"recipe": info.recipe, "step": info.step, "metrics": dict(info.metrics)},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the file's format, and of what read it."""
    found = {"file_format": str(SPARSE_VERSION)}
    for package in ("sparse-trainer", "torch", "timm"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from the source, not installed
            found[package] = metadata.version(package)
    return found
