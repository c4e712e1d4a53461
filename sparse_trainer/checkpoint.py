"""The sparse checkpoint that is deployed (and, by import, the resume bundle that training continues from).

A sparse checkpoint is one ``.safetensors`` file. A prunable tensor ``w`` is stored as ``w.values``, its live
values in row-major order, and ``w.mask``, one bit per element (:func:`sparse_trainer.masks.pack_bits`); every
other tensor is stored as it is. A worked example, a weight of ten elements with four live::

    w         [[0, 7, 0, 0, 2], [0, 0, 0, 5, 1]]
    w.values  [7, 2, 5, 1]
    w.mask    live elements 1, 4 | 8, 9  ->  bytes [2 + 16, 1 + 2] = [18, 3]

The metadata holds what :class:`SparseInfo` says and the shapes of the masked tensors. A file is checked
before it is believed: :mod:`sparse_trainer.tensor_file` does its bytes, :func:`load_sparse` its contents.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from sparse_trainer import units
from sparse_trainer.masks import count_bits, pack_bits, unpack_bits
from sparse_trainer.resume import load_resume, save_resume
from sparse_trainer.sparse_info import SparseInfo
from sparse_trainer.tensor_file import (
    CheckpointError,
    fault,
    quote,
    read_metadata,
    read_tensors,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "SparseFile",
    "SparseInfo",
    "load_resume",
    "load_sparse",
    "load_sparse_masks",
    "read_info",
    "read_sparse",
    "save_resume",
    "save_sparse",
]

SPARSE_FORMAT, SPARSE_VERSION = "sparse-trainer", 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Buffers that a model computes for itself and does not save may take the file's size and this much more.
_UNSAVED_BYTES = 64 << 20

#: Heads or neurons of a dense block; the largest ViTs have some 16,000. Units are handled as Python numbers.
_MAX_UNITS = 1 << 17

ModelFactory = Callable[..., nn.Module]


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
    dtype: torch.dtype = torch.float32,
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
        dtype: float32, float16 or bfloat16, for every floating tensor; others stay as they are.
        create_model: what :func:`load_sparse` will be given, if not ``timm.create_model``.

    Raises:
        ValueError: if masks, model and info do not go together, a dead element is not exactly 0 (it would be
            lost), or a value is not finite in ``dtype``.
        CheckpointError: if the file cannot be written; the file that was there is unchanged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if live_heads is not None:
        info = replace(info, live_heads={name: tuple(live) for name, live in live_heads.items()})
    if live_neurons is not None:
        info = replace(info, live_neurons={name: tuple(live) for name, live in live_neurons.items()})
    state = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise ValueError(f"{name}: only real tensors can be stored, found {type(tensor).__name__}")
        state[name] = tensor.detach().cpu()
    _check_masks(masks, state, info)
    if create_model is not None or info.selector is None:
        _check_agreement(_build_on_meta(info, create_model), state, info)

    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = name
        if name in masks:
            values = _gather(tensor, masks[name])
            lost = _nonzeros(tensor) - _nonzeros(values)
            if lost:
                raise ValueError(f"{name}: {lost:,} dead elements are not exactly 0 and would be lost")
            key, tensor = f"{name}.values", values
            stored[f"{name}.mask"] = pack_bits(masks[name])
        stored[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not _is_finite(stored[key]):
            raise ValueError(f"{name}: holds NaN or infinity in {dtype}, so it cannot be deployed")
    assert len(stored) == len(state) + len(masks), "a state_dict name ends in .values or .mask"
    metadata = {**info.to_metadata(), "masked": {name: list(mask.shape) for name, mask in masks.items()}}
    write_tensors(path, stored, metadata, format=SPARSE_FORMAT, version=SPARSE_VERSION)


def load_sparse(
    path: str | os.PathLike[str],
    *,
    create_model: ModelFactory | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """The model in a sparse checkpoint, in eval mode; in float32 its logits are the saved ones bit for bit.

    The file may come from a stranger. Its checksums, counts, shapes and bits must agree; the model's name
    must be a registered one and its arguments plain numbers and words; the model is built without memory
    first and then filled with the tensors of the file, so that no claim in the file makes anything allocate.

    Args:
        create_model: called as ``create_model(name, **args)``, with ``selector=`` where there is one. The
            default is ``timm.create_model``; a checkpoint with a selector needs ``models.create_model``.
        dtype: of the floating tensors of the model; None keeps the dtype of the file.

    Raises:
        CheckpointError: whatever is wrong with the file; it names the file, what was expected and found.
    """
    device = torch.device(device)
    contents = read_sparse(path)
    info = contents.info
    if info.selector is not None and create_model is None:
        raise CheckpointError(
            f"{path}: holds a token selector ({quote(info.selector.get('kind'))}); "
            "pass create_model=models.create_model"
        )
    depth = info.model_args.get("depth")
    blocks = {found[1] for name in contents.tensors if (found := re.search(r"(?:^|\.)blocks\.(\d{1,6})\.", name))}
    if depth is not None and depth != len(blocks):
        raise fault(path, "the depth of the model", expected=f"{len(blocks)} blocks, as stored", found=quote(depth))
    try:
        model = _build_on_meta(info, create_model)
        _check_agreement(model, contents.tensors, info)
        state = dict(contents.tensors)
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        _fill(model, state, unsaved_limit=os.path.getsize(path) + _UNSAVED_BYTES)
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        raise CheckpointError(f"{path}: the model cannot be rebuilt: {message[:1000]}") from error
    return model.to(device).eval()


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
    dense = _build_on_meta(dataclasses.replace(info, live_heads={}, live_neurons={}), create_model)
    blocks = units.find_blocks(dense)
    state = units.expand_state_dict(
        model,
        info.live_heads,
        info.live_neurons,
        {name: block.heads.count() for name, block in blocks.items()},
        {name: block.neurons.count() for name, block in blocks.items()},
    )
    _fill(dense, state, unsaved_limit=os.path.getsize(path) + _UNSAVED_BYTES)
    return dense.to(device).eval()


def read_info(path: str | os.PathLike[str]) -> SparseInfo:
    """What a sparse checkpoint says about itself; only the header is read.

    Raises:
        CheckpointError: if the header is damaged or says something impossible.
    """
    info, _ = _parse(path, read_metadata(path, format=SPARSE_FORMAT, version=SPARSE_VERSION))
    return info


def load_sparse_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks in a sparse checkpoint: bool, by parameter name.

    Raises:
        CheckpointError: if the file is damaged.
    """
    return dict(read_sparse(path).masks)


def read_sparse(path: str | os.PathLike[str]) -> SparseFile:
    """Everything in a sparse checkpoint, without building its model.

    Raises:
        CheckpointError: if the file is damaged, or its parts do not agree.
    """
    tensors, metadata = read_tensors(path, format=SPARSE_FORMAT, version=SPARSE_VERSION)
    info, shapes = _parse(path, metadata)
    masks = {}
    live = 0
    for name, shape in shapes.items():
        values, packed = tensors.pop(f"{name}.values", None), tensors.pop(f"{name}.mask", None)
        if values is None or packed is None or name in tensors:
            raise fault(path, f"masked tensor {quote(name)}", expected=".values and .mask", found="not just these")
        numel = math.prod(shape)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != ((numel + 7) // 8,):
            expected = f"{(numel + 7) // 8:,} bytes for shape {shape}"
            raise fault(path, f"{quote(name)}.mask", expected=expected, found=_describe(packed))
        if not values.is_floating_point() or tuple(values.shape) != (count_bits(packed),):
            expected = f"{count_bits(packed):,} values, one for each bit set in its mask"
            raise fault(path, f"{quote(name)}.values", expected=expected, found=_describe(values))
        try:
            mask = unpack_bits(packed, numel)
            tensors[name], masks[name] = _scatter(values, mask).view(shape), mask.view(shape)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {quote(name)}.mask: {error}") from error
        live += values.numel()
    if masks and live != info.budget.live:
        raise fault(path, "live parameters", expected=f"{info.budget.live:,}, its budget", found=f"{live:,}")
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name, tensor in floating.items():
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise fault(path, f"the dtype of {quote(name)}", expected=allowed, found=tensor.dtype)
        if not _is_finite(tensor):
            raise fault(path, f"the values of {quote(name)}", expected="finite numbers", found="NaN or infinity")
    return SparseFile(info, tensors, masks)


def _parse(path: str | os.PathLike[str], metadata: dict[str, Any]) -> tuple[SparseInfo, dict[str, tuple[int, ...]]]:
    """The metadata as :class:`SparseInfo`, and the shapes of the masked tensors."""
    shapes = metadata.pop("masked", None)
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
        for shape in shapes.values()
    ):
        raise fault(path, "metadata 'masked'", expected="shapes by name", found=quote(shapes))
    try:
        info = SparseInfo.from_metadata(metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return info, {name: tuple(shape) for name, shape in shapes.items()}


# NumPy finds and moves the live elements about five times faster than torch's boolean indexing on a CPU.
# It has no bfloat16, whose bits travel as integers.


def _gather(tensor: Tensor, mask: Tensor) -> Tensor:
    """The elements of ``tensor`` where ``mask`` is True, in row-major order."""
    flat = tensor.contiguous().view(-1)
    bits = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat
    live = np.flatnonzero(mask.detach().cpu().contiguous().numpy())
    return torch.from_numpy(bits.numpy().take(live)).view(flat.dtype)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of :func:`_gather` for a flat mask: zeros where it is False."""
    dense = torch.zeros(mask.numel(), dtype=values.dtype)
    bits, source = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (dense, values))
    bits.numpy()[np.flatnonzero(mask.numpy())] = source.numpy()
    return dense


def _nonzeros(tensor: Tensor) -> int:
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return int(np.count_nonzero(tensor.numpy()))


def _is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity in it; both show in the extremes."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _check_masks(masks: Mapping[str, Tensor], state: Mapping[str, Tensor], info: SparseInfo) -> None:
    for name, mask in masks.items():
        if name not in state:
            close = difflib.get_close_matches(name, state, n=3)
            raise ValueError(f"masks: the model has no tensor {name!r}; close names: {', '.join(close) or 'none'}")
        if mask.dtype != torch.bool or mask.shape != state[name].shape:
            raise ValueError(f"masks: {name} must be torch.bool {tuple(state[name].shape)}, found {_describe(mask)}")
    live = sum(int(mask.count_nonzero()) for mask in masks.values())
    if masks and live != info.budget.live:
        raise ValueError(f"info.budget: {info.budget.live:,} live parameters, but the masks hold {live:,}")


def _build_on_meta(info: SparseInfo, create_model: ModelFactory | None) -> nn.Module:
    """The compact model that ``info`` describes, with shapes and no memory.

    Raises:
        ValueError: if there is no such model, or no such units in it. Also whatever the factory raises.
    """
    args = dict(info.model_args)
    if info.selector is not None:
        args["selector"] = dict(info.selector)
    if create_model is None:
        if not timm.is_model(info.model):
            close = difflib.get_close_matches(info.model, timm.list_models(), n=3)
            raise ValueError(f"timm has no model {info.model!r}; close names: {', '.join(close) or 'none'}")
        create_model, args["pretrained"] = timm.create_model, False
    with torch.device("meta"):
        model = create_model(info.model, **args)
        if info.live_heads or info.live_neurons:
            dense = max(max(b.heads.count(), b.neurons.count()) for b in units.find_blocks(model).values())
            if dense > _MAX_UNITS:
                raise ValueError(f"expected a dense block of at most {_MAX_UNITS:,} units, found {dense:,}")
            units.compact(model, info.live_heads, info.live_neurons)
    return model


def _check_agreement(model: nn.Module, state: Mapping[str, Tensor], info: SparseInfo) -> None:
    """Compare a model rebuilt from ``info`` with the tensors that are to fill it.

    Raises:
        ValueError: naming the tensors that are missing, left over, or of another shape or kind.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{info.model} with the arguments given: expected {len(expected)} tensors, found {len(state)}; "
            f"missing: {_some(missing)}; not in the model: {_some(unexpected)}"
        )
    for name, tensor in expected.items():
        kind = "floating" if tensor.is_floating_point() else tensor.dtype
        found_kind = "floating" if state[name].is_floating_point() else state[name].dtype
        if tensor.shape != state[name].shape or kind != found_kind:
            raise ValueError(
                f"{info.model} with the arguments given: {name}: expected {kind} {tuple(tensor.shape)}, "
                f"found {_describe(state[name])}"
            )
    classes = getattr(model, "num_classes", None)
    if info.class_names is not None and isinstance(classes, int) and classes != len(info.class_names):
        raise ValueError(f"class_names: expected {classes}, one per class, found {len(info.class_names)}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _fill(model: nn.Module, state: Mapping[str, Tensor], *, unsaved_limit: int) -> None:
    """Give a model built on the meta device its tensors; tied parameters stay tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.load_state_dict(dict(state), strict=True, assign=True)
    for first, *others in names.values():
        for name in others:
            if not torch.equal(state[first], state[name]):
                raise ValueError(f"{name}: is tied to {first} in the model, but their values differ")
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))

    unsaved = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta
    ]
    if sum(buffer.nbytes for *_, buffer in unsaved) > unsaved_limit:
        raise ValueError(f"the model's own buffers take more than {unsaved_limit:,} bytes")
    for module, name, buffer in unsaved:
        setattr(module, name, torch.empty_like(buffer, device="cpu"))
    for module in dict.fromkeys(module for module, *_ in unsaved):
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is None:
            raise ValueError(
                f"{type(module).__name__} holds buffers that no file has; to fill them it needs a method "
                "init_non_persistent_buffers(), as timm's layers have"
            )
        compute()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(f"{type(module).__name__}.{name} is a tensor that no file has")
