"""Trained networks that a run begins with, or learns from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from experiments.data.create_data import Data
from experiments.errors import ConfigError
from experiments.evaluation.precision import Autocast, narrow, precision_context
from experiments.run_folder.folder import RunFolder
from experiments.training.foreign_weights import find_foreign, load_foreign
from models import create_model, resolve
from sparse_trainer.files.checkpoint import CheckpointError, load_sparse, read_info, read_sparse


def find_checkpoint(where: str, key: str) -> Path:
    """The sparse checkpoint that a file name or a run folder means.

    Raises:
        ConfigError: there is none; it names ``key``.
    """
    path = Path(where)
    if path.is_dir():
        path = RunFolder(path).sparse
        if not path.is_file():
            raise ConfigError(
                f"{key}: {where} holds no {path.name}; give the folder of a finished run, or a sparse checkpoint"
            )
    if not os.path.lexists(path):  # what it is if no file, its reader says
        raise ConfigError(f"{key}: there is no {where}; give the folder of a finished run, or a sparse checkpoint")
    return path


def load_start(model: nn.Module, where: str, data: Data) -> list[str]:
    """Give a new model the weights of a dense run, or of a file of timm's, in place.

    A selector that the run had none of keeps its own.

    Args:
        model: dense, with a selector or without.
        where: a run folder or a checkpoint; or a file of weights in timm's names, or a folder that holds one.

    Returns:
        What was not taken as it is, for the user.

    Raises:
        ConfigError: it is no dense run, of another model, or of other classes.
    """
    key = "model.start"
    foreign = find_foreign(Path(where))
    if foreign is not None:
        return load_foreign(model, foreign)
    path = find_checkpoint(where, key)
    try:
        contents = read_sparse(path)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    info = contents.info
    if any(not bool(mask.all()) for mask in contents.masks.values()) or info.live_heads or info.live_neurons:
        raise ConfigError(
            f"{key}: {where} is a sparse network ({info.budget} prunable weights live); give a dense run, one with "
            "sparsity: null"
        )
    # The noise of a selector begins at selector.seed, not where another run's ended.
    given = {name: value for name, value in contents.tensors.items() if name != "selector._extra_state"}
    own = model.state_dict()
    problems = [
        f"{name} is {_shape(given.get(name))} there and {_shape(own.get(name))} here"
        for name in (*own, *(name for name in given if name not in own))
        if _shape(given.get(name)) != _shape(own.get(name)) and not (name.startswith("selector.") and name not in given)
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(
            f"{key}: {where} holds another model: {problems[0]}{more}; it was made as {info.model} with "
            f"{dict(info.model_args)}"
        )
    if info.class_names is not None and info.class_names != data.class_names:
        raise ConfigError(f"{key}: {where} knows other classes ({_some(info.class_names)}) than {_classes_of(data)}")
    model.load_state_dict(given, strict=False)
    return []


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _classes_of(data: Data) -> str:
    return f"the data ({_some(data.class_names)})"


@dataclass(frozen=True)
class Teacher:
    """A frozen network that says what it sees in the images of a run."""

    model: nn.Module
    scale: Tensor  #: ``[C, 1, 1]``: from the normalisation of the run's images to the teacher's own
    shift: Tensor  #: ``[C, 1, 1]``
    autocast: Autocast  #: its own precision, whatever that of the run
    forward: Callable[[Tensor], Tensor]  #: the model, or what torch.compile made of it

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images ``[B, C, S, S]``."""
        with torch.autocast(images.device.type, enabled=False), self.autocast():
            return self.forward(images * self.scale + self.shift)


@dataclass(frozen=True)
class _Wants:
    """What a teacher takes."""

    classes: int
    in_chans: int
    image_size: tuple[int, int] | None  #: None: any
    mean: tuple[float, ...]
    std: tuple[float, ...]


def create_teacher(
    where: str, data: Data, device: torch.device, *, amp: str = "float32", compile: bool = False
) -> Teacher:
    """The network called ``where``, in evaluation mode and without gradients.

    Args:
        where: a run folder or checkpoint of this project; or a timm name, then with its pretrained weights.
        amp: its precision, see :func:`experiments.evaluation.precision.precision_context`.
        compile: run it through ``torch.compile``.

    Raises:
        ConfigError: there is no such network, it cannot be read, or it takes other images or classes.
    """
    key = "losses.teacher"
    if Path(where).exists() or where.endswith(".safetensors") or ("/" in where and ":" not in where):
        path = find_checkpoint(where, key)
        try:
            info = read_info(path)
            size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
            model = load_sparse(path, create_model=create_model)
        except CheckpointError as error:
            raise ConfigError(f"{key}: {error}") from error
        wants = _Wants(int(model.num_classes), info.in_chans, size, info.mean, info.std)  # type: ignore[arg-type]
        _check(where, wants, data)
        if info.class_names is not None and info.class_names != data.class_names:
            raise ConfigError(
                f"{key}: {where} knows other classes ({_some(info.class_names)}) than {_classes_of(data)}; choose a "
                "teacher of this data"
            )
    else:
        model, wants = _create_timm(where, data)
    model = model.to(device).eval().requires_grad_(False)
    narrow(model, amp)
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for values in (data.mean, data.std, wants.mean, wants.std)
    )
    scale, shift = std / own_std, (mean - own_mean) / own_std
    forward = cast(Callable[[Tensor], Tensor], torch.compile(model) if compile else model)
    return Teacher(model, scale.float().to(device), shift.float().to(device), precision_context(device, amp), forward)


def _create_timm(name: str, data: Data) -> tuple[nn.Module, _Wants]:
    key = "losses.teacher"
    try:
        resolve(name, {"pretrained": True})
    except ValueError as error:
        raise ConfigError(f"{key}: there is no file or folder {name}, and as a timm name: {error}") from error
    config = None if ":" in name else get_pretrained_cfg(name)
    if ":" not in name and (config is None or not config.has_weights):
        raise ConfigError(f"{key}: timm has no pretrained weights of {name!r}; timm.list_pretrained() lists those")
    if config is not None:  # before anything is downloaded
        size = (config.input_size[1], config.input_size[2]) if config.fixed_input_size else None
        _check(name, _Wants(config.num_classes, config.input_size[0], size, config.mean, config.std), data)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn for weights that are then replaced
            model = create_model(name, pretrained=True)
    except Exception as error:  # of timm, or of a download
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {name} cannot be loaded: {reason}") from error
    own = getattr(model, "pretrained_cfg", {})
    size = tuple(own["input_size"][1:]) if own.get("fixed_input_size") else None  # type: ignore[assignment]
    wants = _Wants(int(model.num_classes), own["input_size"][0], size, own["mean"], own["std"])  # type: ignore[arg-type]
    _check(name, wants, data)
    return model, wants


def _check(where: str, wants: _Wants, data: Data) -> None:
    """Refuse a teacher that the run's images do not fit."""
    problems = []
    if wants.classes != data.num_classes:
        problems.append(f"knows {wants.classes} classes and the data has {data.num_classes}")
    if wants.in_chans != data.in_chans:
        problems.append(f"takes {wants.in_chans} channels and data.in_chans is {data.in_chans}")
    if wants.image_size not in (None, (data.image_size,) * 2):
        height, width = wants.image_size  # type: ignore[misc]
        problems.append(f"takes {height} x {width} pixels and data.image_size is {data.image_size}")
    if problems:
        raise ConfigError(f"losses.teacher: {where} {', '.join(problems)}; choose a teacher of this data")
