"""The sparse checkpoint that is deployed (and, by import, the resume bundle that training continues from).

A sparse checkpoint is one ``.safetensors`` file. A prunable tensor ``w`` is stored as ``w.values``, its live
values in row-major order, and ``w.mask``, one bit per element (:func:`sparse_trainer.masks.pack_bits`); every
other tensor is stored as it is. A worked example, a weight of ten elements with four live::

    w         [[0, 7, 0, 0, 2], [0, 0, 0, 5, 1]]
    w.values  [7, 2, 5, 1]
    w.mask    live elements 1, 4 | 8, 9  ->  bytes [2 + 16, 1 + 2] = [18, 3]

Where weights live and die in blocks, the mask has one bit per block (:mod:`sparse_trainer.files.masked_tensor`).
The metadata holds what :class:`SparseInfo` says and the shapes of the masked tensors. A file is checked
before it is believed: :mod:`sparse_trainer.files.tensor_file` does its bytes, :func:`load_sparse` its contents.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer import units
from sparse_trainer.construction import LiveNetwork
from sparse_trainer.files.masked_tensor import DTYPES, MAX_SIDE, Block, check_values, convert, pack, unpack
from sparse_trainer.files.rebuild import (
    ModelFactory,
    build_without_memory,
    check_agreement,
    check_depth,
    describe,
    fill,
)
from sparse_trainer.files.resume import load_resume, save_resume
from sparse_trainer.files.sparse_info import SparseInfo
from sparse_trainer.files.tensor_file import (
    CheckpointError,
    fault,
    memory,
    quote,
    read_metadata,
    read_tensors,
    write_tensors,
)
from sparse_trainer.kernels.accelerate import KERNELS, accelerate
from sparse_trainer.masks import count_live
from sparse_trainer.wrappers import unwrapped

__all__ = [
    "CheckpointError",
    "SparseFile",
    "SparseInfo",
    "live_network",
    "load_resume",
    "load_sparse",
    "load_sparse_masks",
    "read_info",
    "read_sparse",
    "save_resume",
    "save_sparse",
]

SPARSE_FORMAT = "sparse-trainer"
SPARSE_VERSION, BLOCKS_VERSION = 1, 2
"""A file has the second number only where a mask is stored by blocks."""

#: Buffers that a model computes for itself and does not save may take the file's size and this much more.
_UNSAVED_BYTES = 16 << 20

#: What :func:`expand` makes of a file of few units is all zeros but for them: so many times the file's size at most.
_MAX_EXPANSION = 256

#: Masked tensors that are packed or unpacked at a time; NumPy releases Python's lock.
_AT_A_TIME = 2


@dataclass(frozen=True)
class SparseFile:
    """The contents of a sparse checkpoint, checked against each other but not against a model."""

    info: SparseInfo
    tensors: Mapping[str, Tensor]  #: by state_dict name, zeros put back where an element is dead
    masks: Mapping[str, Tensor]  #: bool, by parameter name, of the shape of the parameter


def save_sparse(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    masks: Mapping[str, Tensor],
    info: SparseInfo,
    live_heads: Mapping[str, Sequence[int]] | None = None,
    live_neurons: Mapping[str, Sequence[int]] | None = None,
    dtype: torch.dtype | None = torch.float32,
    create_model: ModelFactory | None = None,
) -> None:
    """Write a model and its masks as one sparse checkpoint, atomically.

    Before anything is written the model is rebuilt from ``info`` without memory and compared, so that a wrong
    argument is found now and not when the file is needed. A model with a selector can be rebuilt only if its
    factory is given.

    Args:
        model: the compact model, or its EMA copy.
        masks: bool, by parameter name; empty if there are no weight masks.
        live_heads, live_neurons: unit numbers by block; None takes those of ``info``.
        dtype: float32, float16 or bfloat16, for every floating tensor; others stay as they are. None keeps the
            dtype of each, which may be any of these three.
        create_model: what :func:`load_sparse` will be given, if not ``timm.create_model``.

    Raises:
        ValueError: if masks, model and info do not go together, a dead element is not exactly 0 (it would be
            lost), or a value is not finite in its dtype.
        CheckpointError: if the file cannot be written; the file that was there is unchanged.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: {dtype} is not one of {', '.join(map(str, DTYPES))}, None")
    if live_heads is not None:
        info = replace(info, live_heads={name: tuple(live) for name, live in live_heads.items()})
    if live_neurons is not None:
        info = replace(info, live_neurons={name: tuple(live) for name, live in live_neurons.items()})
    state = {}
    for name, tensor in unwrapped(model).state_dict().items():
        if "_orig_mod." in name:
            raise ValueError(
                f"{name}: torch.compile wraps this layer, so the file would have other names than the model; compile "
                "layers in place, by layer.compile()"
            )
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise ValueError(f"{name}: only real tensors can be stored, found {type(tensor).__name__}")
        state[name] = tensor.detach().cpu()
    _check_masks(masks, state, info)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        packing = pool.map(lambda name: pack(name, state[name], masks[name], dtype), masks)
        if create_model is not None or info.selector is None:  # meanwhile
            check_agreement(build_without_memory(info, create_model), state, info)
        packed = dict(zip(masks, packing, strict=True))
    stored = {f"{name}.values": values for name, (values, _, _) in packed.items()}
    stored |= {f"{name}.mask": bits for name, (_, bits, _) in packed.items()}
    blocks = {name: list(block) for name, (_, _, block) in packed.items() if block != (1, 1)}
    others = [name for name in state if name not in masks]
    assert not stored.keys() & set(others), "a name in the state_dict ends in .values or .mask"
    stored |= {name: convert(name, state[name], dtype) for name in others}
    metadata = {**info.to_metadata(), "masked": {name: list(mask.shape) for name, mask in masks.items()}}
    if blocks:
        metadata["blocks"] = blocks
    version = BLOCKS_VERSION if blocks else SPARSE_VERSION
    write_tensors(path, stored, metadata, format=SPARSE_FORMAT, version=version)


def load_sparse(
    path: str | os.PathLike[str],
    *,
    create_model: ModelFactory | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    kernels: str = "dense",
) -> nn.Module:
    """The model in a sparse checkpoint, in eval mode; in float32 its logits are the saved ones bit for bit.

    The file may come from a stranger. Its checksums, counts, shapes and bits must agree; the model's name
    must be a registered one and its arguments plain numbers and words; the model is built without memory
    first and then filled with the tensors of the file, so that no claim in the file makes anything allocate.

    Args:
        create_model: called as ``create_model(name, **args)``, with ``selector=`` where there is one. The
            default is ``timm.create_model``; a checkpoint with a selector needs ``models.create_model``.
        dtype: of the floating tensors of the model; None keeps the dtype of the file.
        kernels: ``auto`` or ``sparse`` give a model for inference whose layers skip dead weights
            (:func:`sparse_trainer.accelerate`); ``dense`` one that can train.

    Raises:
        CheckpointError: whatever is wrong with the file; it names the file, what was expected and found.
        ValueError: for unknown ``kernels``.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: {kernels!r} is not one of {', '.join(KERNELS)}")
    device = torch.device(device)
    contents = read_sparse(path)
    info = contents.info
    if info.selector is not None and create_model is None:
        raise CheckpointError(
            f"{path}: holds a token selector ({quote(info.selector.get('kind'))}); "
            "pass create_model=models.create_model"
        )
    try:
        check_depth(info, contents.tensors)
        model = build_without_memory(info, create_model)
        check_agreement(model, contents.tensors, info)
        state = dict(contents.tensors)
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        fill(model, state, unsaved_limit=os.path.getsize(path) + _UNSAVED_BYTES)
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: the model cannot be rebuilt: {message[:1000]}") from error
    model = model.to(device).eval()
    return model if kernels == "dense" else accelerate(model, contents.masks, kernels=kernels)


def expand(
    path: str | os.PathLike[str],
    *,
    create_model: ModelFactory | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """The model in a sparse checkpoint in timm's dense layout: dormant heads and neurons are there, as zeros.

    A unit that writes nothing changes nothing, so its logits are those of :func:`load_sparse` up to the order of
    summation. Arguments and errors are the same.
    """
    model = load_sparse(path, create_model=create_model, dtype=dtype)
    info = read_info(path)
    if not (info.live_heads or info.live_neurons):
        return model.to(device)
    dense = build_without_memory(replace(info, live_heads={}, live_neurons={}), create_model)
    needed, limit = sum(p.nbytes for p in dense.parameters()), _MAX_EXPANSION * os.path.getsize(path) + _UNSAVED_BYTES
    if needed > limit:
        raise fault(path, "the size of the dense model", expected=f"at most {limit:,} bytes", found=f"{needed:,}")
    blocks = units.find_blocks(dense)
    state = units.expand_state_dict(
        model,
        info.live_heads,
        info.live_neurons,
        {name: block.heads.count() for name, block in blocks.items()},
        {name: block.neurons.count() for name, block in blocks.items()},
    )
    fill(dense, state, unsaved_limit=os.path.getsize(path) + _UNSAVED_BYTES)
    return dense.to(device).eval()


def read_info(path: str | os.PathLike[str]) -> SparseInfo:
    """What a sparse checkpoint says about itself; only the header is read.

    Raises:
        CheckpointError: if the header is damaged or says something impossible.
    """
    info, _, _ = _parse(path, read_metadata(path, format=SPARSE_FORMAT, version=(SPARSE_VERSION, BLOCKS_VERSION)))
    return info


def load_sparse_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks in a sparse checkpoint: bool, by parameter name.

    Raises:
        CheckpointError: if the file is damaged.
    """
    return dict(read_sparse(path).masks)


def live_network(path: str | os.PathLike[str], *, create_model: ModelFactory | None = None) -> LiveNetwork:
    """What is live in a sparse checkpoint, for a scheduler that trains on from it::

        model = load_sparse(path)
        scheduler = SparsityScheduler(model, config, total_steps=1000, resume_from=live_network(path))

    Between the two lines the model may get another classifier, image size or number of channels by timm's own methods
    (``reset_classifier``, ``set_input_size``): a layer of another shape gets a new mask of the same density.

    Args:
        create_model: as for :func:`load_sparse`.

    Raises:
        CheckpointError: if the file is damaged, or its model cannot be built.
    """
    contents = read_sparse(path)
    info = contents.info
    heads: dict[str, int] = {}
    neurons: dict[str, int] = {}
    if info.live_heads or info.live_neurons:
        try:
            dense = build_without_memory(replace(info, live_heads={}, live_neurons={}, selector=None), create_model)
            blocks = units.find_blocks(dense)
        except Exception as error:
            raise CheckpointError(f"{path}: the dense model cannot be built: {str(error)[:300]}") from error
        heads = {name: block.heads.count() for name, block in blocks.items()}
        neurons = {name: block.neurons.count() for name, block in blocks.items()}
    return LiveNetwork(dict(contents.masks), dict(info.live_heads), dict(info.live_neurons), heads, neurons)


def read_sparse(path: str | os.PathLike[str]) -> SparseFile:
    """Everything in a sparse checkpoint, without building its model.

    Raises:
        CheckpointError: if the file is damaged, or its parts do not agree.
    """
    stored, metadata = read_tensors(path, format=SPARSE_FORMAT, version=(SPARSE_VERSION, BLOCKS_VERSION))
    info, shapes, blocks = _parse(path, metadata)
    for name in shapes:
        if name in stored or not {f"{name}.values", f"{name}.mask"} <= stored.keys():
            raise fault(path, f"masked tensor {quote(name)}", expected=".values and .mask", found="not just these")
    claimed = 4 * sum(math.prod(shape) for shape in shapes.values())  # dead elements take no place in the file
    if claimed > memory():
        expected = f"at most {memory():,} bytes, the memory of this machine"
        raise fault(path, "the size of its masked tensors", expected=expected, found=f"{claimed:,}")
    packed = {name: (stored.pop(f"{name}.values"), stored.pop(f"{name}.mask")) for name in shapes}
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = pool.map(lambda name: unpack(path, name, *packed[name], shapes[name], blocks.get(name, (1, 1))), shapes)
        unpacked = dict(zip(shapes, found, strict=True))
    live = sum(values.numel() for values, _ in packed.values())
    if shapes and live != info.budget.live:
        raise fault(path, "live parameters", expected=f"{info.budget.live:,}, its budget", found=f"{live:,}")
    for name, tensor in stored.items():
        check_values(path, name, tensor)
    tensors = {**stored, **{name: tensor for name, (tensor, _) in unpacked.items()}}
    masks = {name: mask for name, (_, mask) in unpacked.items()}
    return SparseFile(info, tensors, masks)


def _parse(
    path: str | os.PathLike[str], metadata: dict[str, Any]
) -> tuple[SparseInfo, dict[str, tuple[int, ...]], dict[str, Block]]:
    """The metadata as :class:`SparseInfo`, the shapes of the masked tensors, and the blocks of those that have any."""
    shapes, blocks = metadata.pop("masked", None), metadata.pop("blocks", {})
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
        for shape in shapes.values()
    ):
        raise fault(path, "metadata 'masked'", expected="shapes by name", found=quote(shapes))
    if not isinstance(blocks, dict) or not all(
        name in shapes
        and isinstance(block, list)
        and len(block) == 2
        and all(type(side) is int and 0 < side <= MAX_SIDE for side in block)
        for name, block in blocks.items()
    ):
        expected = f"two sides of 1 to {MAX_SIDE} for names of 'masked'"
        raise fault(path, "metadata 'blocks'", expected=expected, found=quote(blocks))
    try:
        info = SparseInfo.from_metadata(metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: {'; '.join(str(error).splitlines())}") from error
    whole = {name: tuple(shape) for name, shape in shapes.items()}
    return info, whole, {name: (block[0], block[1]) for name, block in blocks.items()}


def _check_masks(masks: Mapping[str, Tensor], state: Mapping[str, Tensor], info: SparseInfo) -> None:
    for name, mask in masks.items():
        if name not in state:
            close = difflib.get_close_matches(name, state, n=3)
            raise ValueError(f"masks: the model has no tensor {name!r}; close names: {', '.join(close) or 'none'}")
        if not state[name].is_floating_point():
            raise ValueError(f"masks: {name} is {state[name].dtype}; only floating tensors have masks")
        if mask.dtype != torch.bool or mask.shape != state[name].shape:
            raise ValueError(f"masks: {name} must be torch.bool {tuple(state[name].shape)}, found {describe(mask)}")
    live = sum(count_live(mask.detach()) for mask in masks.values())
    if masks and live != info.budget.live:
        raise ValueError(f"info.budget: {info.budget.live:,} live parameters, but the masks hold {live:,}")
