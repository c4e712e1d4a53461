"""Weights of a file that others made, in timm's names, for a model of other classes, channels and image size."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from experiments.errors import ConfigError

PICKLED = (".pth", ".pt", ".bin")
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "model.pth")
"""What timm and Hugging Face call the weights in a folder."""
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Under which of its keys a file may hold the weights, the average first, as timm takes them."""
NAMED = 4


def find_foreign(path: Path) -> Path | None:
    """The file of weights that is meant, if it is none of this project's: itself, or the one in a folder of timm's."""
    if path.is_dir():
        return next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
    if path.suffix.lower() in PICKLED:
        return path
    if path.suffix.lower() == ".safetensors" and path.is_file() and is_plain(path):
        return path
    return None


def is_plain(path: Path) -> bool:
    """Whether it is a safetensors file that says nothing of this project."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError):  # the reader of this project's own says what is wrong
        return False
    return set(metadata) <= {"format"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; of a pickle nothing else is opened.

    Raises:
        ConfigError: it cannot be read, or holds other things.
    """
    key = "model.start"
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the settings beside DeiT's own weights
                content = torch.load(path, map_location="cpu", weights_only=True)
    # An unpickler meets anything in a file that is none.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{key}: {path} cannot be read as weights alone ({reason}); give a .safetensors file, or a .pth file that "
            "torch.load opens with weights_only=True"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ConfigError(f"{key}: {path} holds {type(content).__name__}, and no tensors by name")
    tensors = {str(name).removeprefix("module."): v for name, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ConfigError(f"{key}: {path} holds no tensors by name")
    return tensors


def load_foreign(model: nn.Module, path: Path) -> list[str]:
    """Give a new model the weights of a file in timm's names, in place, by timm's own conversion for its family.

    Embeddings of positions and patches are resampled to the model's sizes, the first layer to its channels, and a
    classifier of other classes stays as it is.

    Returns:
        What was not taken as it is, for the user.

    Raises:
        ConfigError: the file cannot be read, or is of another model.
    """
    key, given = "model.start", read_weights(path)
    own = model.state_dict()
    heads = _classifiers(model)
    try:
        fitted = _filter_of(model)(dict(given), model)
        fitted = _with_channels(fitted, own)
    except Exception as error:  # timm's asserts, and what else a strange shape does
        raise ConfigError(
            f"{key}: {path} is of another model: {' '.join(str(error).split()) or repr(error)}"
        ) from error
    notes = [
        f"{name} resampled from {_shape(given[name])} to {_shape(fitted[name])}"
        for name in fitted
        if name in given and given[name].shape != fitted[name].shape
    ]
    new_head = [
        name
        for name in own
        if name.rpartition(".")[0] in heads and (name not in fitted or fitted[name].shape != own[name].shape)
    ]
    problems = [
        f"{name} is {_shape(fitted.get(name))} there and {_shape(own[name])} here"
        for name in own
        if name not in new_head
        and not name.startswith("selector.")
        and (name not in fitted or fitted[name].shape != own[name].shape)
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(f"{key}: {path} is of another model: {problems[0]}{more}; is model.name that of the file?")
    if new_head:
        was = next((len(fitted[name]) for name in new_head if name in fitted), None)
        there = f"{was} classes there, {len(own[new_head[0]])} here" if was is not None else "there is none there"
        notes.append(f"the classifier begins anew ({there})")
    left = [name for name in fitted if name not in own]
    if left:
        notes.append(f"left out {len(left)} tensors ({', '.join(left[:NAMED])}{', ...' if len(left) > NAMED else ''})")
    model.load_state_dict({k: v for k, v in fitted.items() if k in own and k not in new_head}, strict=False)
    return [f"start: {note}" for note in notes]


def _classifiers(model: nn.Module) -> set[str]:
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ("head", "head_dist")
    return {named} if isinstance(named, str) else set(named)


def _filter_of(model: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """timm's conversion of files for models of this family."""
    for kind in type(model).__mro__:
        found = getattr(sys.modules[kind.__module__], "checkpoint_filter_fn", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return lambda state, _: state


def _with_channels(fitted: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kernels of the first layer for other channels: colours are summed for grey, and grey is shared out."""
    result = dict(fitted)
    for name, value in fitted.items():
        wanted = own.get(name)
        if wanted is None or value.ndim != 4 or value.shape[1] == wanted.shape[1]:
            continue
        if value.shape[1] == 1:
            result[name] = value.expand(-1, wanted.shape[1], -1, -1) / wanted.shape[1]
        elif value.shape[1] == 3:
            result[name] = adapt_input_conv(wanted.shape[1], value)
    return result


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
