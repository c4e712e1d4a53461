"""The model that a sparse checkpoint describes: built without memory, compared with the file, filled from it.

The description may come from a stranger. Nothing it says makes anything allocate: the model is built on torch's
meta device, where tensors have shapes and no data, and takes its tensors from the file once all shapes agree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparse_trainer import units
from sparse_trainer.files.sparse_info import SparseInfo
from sparse_trainer.files.tensor_file import quote

#: Heads or neurons of a dense block; the largest ViTs have some 16,000. Units are handled as Python numbers.
MAX_UNITS = 1 << 17

#: A model that takes images of any size is told one by the file, which nothing stored confirms.
_MAX_ENLARGEMENT = 4

#: What sets values in place and leaves the shape: it has nothing to do where there is no memory.
_SETS_VALUES = frozenset(
    {
        "add_",
        "clamp_",
        "constant_",
        "copy_",
        "div_",
        "erfinv_",
        "eye_",
        "fill_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "mul_",
        "normal_",
        "ones_",
        "orthogonal_",
        "sub_",
        "trunc_normal_",
        "uniform_",
        "xavier_normal_",
        "xavier_uniform_",
        "zero_",
        "zeros_",
    }
)

ModelFactory = Callable[..., nn.Module]


class _WithoutValues(TorchFunctionMode):
    """Skips the initialisation of weights on the meta device, which takes longer there than on the CPU."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta and getattr(func, "__name__", "") in _SETS_VALUES:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_without_memory(info: SparseInfo, create_model: ModelFactory | None) -> nn.Module:
    """The compact model that ``info`` describes, on the meta device.

    Args:
        create_model: called as ``create_model(name, **args)``, with ``selector=`` where there is one; None is
            ``timm.create_model``, for registered names only and without pretrained weights.

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
    with torch.device("meta"), _WithoutValues():
        model = create_model(info.model, **args)
        if info.live_heads or info.live_neurons:
            dense = max(max(b.heads.count(), b.neurons.count()) for b in units.find_blocks(model).values())
            if dense > MAX_UNITS:
                raise ValueError(f"expected a dense block of at most {MAX_UNITS:,} units, found {dense:,}")
            units.compact(model, info.live_heads, info.live_neurons)
    return model


def check_depth(info: SparseInfo, names: Iterable[str]) -> None:
    """Compare the blocks that ``info`` asks for with those that are stored; building them takes time for each.

    Raises:
        ValueError: if they differ.
    """
    depth = info.model_args.get("depth")
    blocks = {found[1] for name in names if (found := re.search(r"(?:^|\.)blocks\.(\d{1,6})\.", name))}
    if depth is not None and depth != len(blocks):
        raise ValueError(f"the depth of the model: expected {len(blocks)} blocks, as stored, found {quote(depth)}")


def check_agreement(model: nn.Module, state: Mapping[str, Tensor], info: SparseInfo) -> None:
    """Compare a model rebuilt from ``info`` with the tensors that are to fill it, and with the images it is given.

    Raises:
        ValueError: naming the tensors that are missing, left over, or of another shape or kind.
    """
    arguments = f"model_args {quote(dict(info.model_args))}" if info.model_args else "no model_args"
    given = f"{info.model} with {arguments}"
    expected = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{given}: expected {len(expected)} tensors, found {len(state)}; "
            f"missing: {_some(missing)}; not in the model: {_some(unexpected)}"
        )
    for name, tensor in expected.items():
        kind = "floating" if tensor.is_floating_point() else tensor.dtype
        found_kind = "floating" if state[name].is_floating_point() else state[name].dtype
        if tensor.shape != state[name].shape or kind != found_kind:
            raise ValueError(f"{given}: {name}: expected {kind} {tuple(tensor.shape)}, found {describe(state[name])}")
    classes = getattr(model, "num_classes", None)
    if info.class_names is not None and isinstance(classes, int) and classes != len(info.class_names):
        raise ValueError(f"class_names: expected {classes}, one per class, found {len(info.class_names)}")
    _check_images(model, info)


def _check_images(model: nn.Module, info: SparseInfo) -> None:
    """What ``info`` says of the images must be what the model takes, as far as timm's models tell."""
    first = getattr(model, "default_cfg", {}).get("first_conv")
    modules = dict(model.named_modules())
    channels = getattr(modules.get(first) if isinstance(first, str) else None, "in_channels", info.in_chans)
    if channels != info.in_chans:
        raise ValueError(f"in_chans: expected {channels}, as the model takes, found {info.in_chans}")
    embed = modules.get("patch_embed")
    built = getattr(embed, "img_size", None)
    if not isinstance(built, tuple):  # it takes any size
        return
    if min(getattr(embed, "grid_size", None) or (1,)) < 1:
        raise ValueError(f"patch_size: expected at most the image, {built}, found a larger one")
    size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    if getattr(embed, "strict_img_size", True):
        if size != built:
            raise ValueError(f"image_size: expected {built}, as the model takes, found {size}")
    elif any(side > _MAX_ENLARGEMENT * own for side, own in zip(size, built, strict=True)):
        raise ValueError(
            f"image_size: expected at most {_MAX_ENLARGEMENT} times {built}, for which it was built, found {size}"
        )


def fill(model: nn.Module, state: Mapping[str, Tensor], *, unsaved_limit: int) -> None:
    """Give a model built on the meta device its tensors; tied parameters stay tied.

    Args:
        unsaved_limit: bytes that the buffers may take which the model computes for itself.

    Raises:
        ValueError: if tied tensors differ, or the model holds tensors that neither ``state`` has nor it computes.
    """
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


def describe(tensor: Tensor) -> str:
    """dtype and shape."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
