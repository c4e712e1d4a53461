"""The trained network that is to be shrunk: where its weights are, and how it wants its images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of
from experiments.run_folder.folder import RunFolder
from experiments.training.foreign_weights import find_foreign
from models import resolve
from sparse_trainer.files.checkpoint import CheckpointError, read_info

FROM_THE_DATA = ("img_size", "in_chans", "num_classes")
"""Arguments of a model that the data decides."""


@dataclass(frozen=True)
class Source:
    """A trained network."""

    name: str  #: timm's, or an alias of this project
    start: str | None  #: file or folder of the weights; None: timm downloads them
    kwargs: Mapping[str, Any] = field(default_factory=dict)  #: of the model, beside those that the data decides
    image_size: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    #: Of :class:`DataConfig`: mean, std, interpolation, crop_pct, in_chans, as far as they are known.
    images: Mapping[str, Any] = field(default_factory=dict)


def find_source(where: str, name: str | None) -> Source:
    """What ``MODEL`` on the command line means: a run or checkpoint of this project, a folder of timm's, a file of
    weights, or a name of timm's.

    Args:
        name: of the model, for a file that holds weights alone.

    Raises:
        ConfigError: there is no such network, or no weights of it.
    """
    path = Path(where).expanduser()
    foreign = find_foreign(path)
    if foreign is None and (path.exists() or path.suffix == ".safetensors"):
        return _own(path)
    if path.is_dir():
        return _folder(path)
    if foreign is not None:
        if not path.is_file():
            raise ConfigError(f"there is no file {where}; give a file of weights, a folder, or a name of timm's")
        if name is None:
            raise ConfigError(
                f"{where} holds weights and not what they are of; add --model.name with timm's name, such as "
                "--model.name vit_small_patch14_dinov2"
            )
        return _named(name, start=where)
    return _timm(where)


def _own(path: Path) -> Source:
    checkpoint = RunFolder(path).sparse if path.is_dir() else path
    if not checkpoint.is_file():
        raise ConfigError(
            f"{path} holds no network: neither {checkpoint.name} of a finished run, nor model.safetensors of a folder "
            "of timm's"
            if path.is_dir()
            else f"there is no file {path}; give a file of weights, a folder, or a name of timm's"
        )
    try:
        info = read_info(checkpoint)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if info.budget.live < info.budget.total:
        raise ConfigError(f"{checkpoint} is sparse already ({info.budget}); give the dense network that it came from")
    data = data_of(checkpoint, info)
    size = info.image_size[0] if isinstance(info.image_size, tuple) else info.image_size
    return Source(
        name=info.model,
        start=str(checkpoint),
        kwargs={key: value for key, value in info.model_args.items() if key not in FROM_THE_DATA},
        image_size=size,
        num_classes=info.model_args.get("num_classes"),
        class_names=info.class_names,
        images={
            "mean": info.mean,
            "std": info.std,
            "in_chans": info.in_chans,
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
        },
    )


def _folder(path: Path) -> Source:
    """As timm saves it, or a download from the Hugging Face Hub."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{path / 'config.json'} cannot be read; a folder of timm's has one beside the weights"
        ) from error
    name = config.get("architecture")
    if not isinstance(name, str):
        kind = config.get("model_type")
        raise ConfigError(
            f"{path / 'config.json'} names no architecture of timm's"
            + (f" (it is of transformers, model_type {kind!r})" if kind else "")
            + "; give a folder that timm can open, or its weights in timm's names"
        )
    own = config.get("pretrained_cfg") or {}
    found = _named(name, start=str(path), own={**own, "num_classes": config.get("num_classes", own.get("num_classes"))})
    kwargs = {key: value for key, value in (config.get("model_args") or {}).items() if key not in FROM_THE_DATA}
    labels = config.get("label_names") or own.get("label_names")
    return Source(
        found.name,
        found.start,
        kwargs,
        found.image_size,
        found.num_classes,
        tuple(map(str, labels)) if isinstance(labels, list) else None,
        found.images,
    )


def _timm(name: str) -> Source:
    try:
        resolve(name, {"pretrained": True})
    except ValueError as error:
        raise ConfigError(f"there is no file or folder {name}, and as a timm name: {error}") from error
    if ":" in name:
        raise ConfigError(f"{name}: download it, and give the folder")
    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ConfigError(f"timm has no pretrained weights of {name!r}; timm.list_pretrained() lists those")
    return _named(name, start=None)


def _named(name: str, *, start: str | None, own: Mapping[str, Any] | None = None) -> Source:
    """By timm's name; what timm knows of it, and before that what stands beside the weights."""
    try:
        resolve(name)
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from error
    default = get_pretrained_cfg(name)
    known: dict[str, Any] = {**(default.to_dict() if default is not None else {}), **(own or {})}
    size = known.get("input_size")
    images = {key: known[key] for key in ("interpolation", "crop_pct") if known.get(key) is not None}
    images |= {key: tuple(known[key]) for key in ("mean", "std") if known.get(key) is not None}
    if size is not None:
        images["in_chans"] = size[0]
    if images.get("interpolation") == "random" or not math.isfinite(images.get("crop_pct", 1.0)):
        del images["interpolation"]
    return Source(
        name=name,
        start=start,
        image_size=size[-1] if size is not None else None,
        num_classes=known.get("num_classes") if own is not None or start is None else None,
        images=images,
    )
