"""A folder that ``timm.create_model("local-dir:PATH", pretrained=True)`` opens: the network in timm's dense layout.

What is not live is there as zeros, so it costs its full size and time, and everything made for timm models can be
done with it. timm has no token selectors: they are left out, and all tokens are kept. A network that was trained on
fewer tokens may be better or worse with all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from models import create_model, resolve
from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo
from sparse_trainer.units import compact

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = frozenset({CONFIG, WEIGHTS})

LEFT_OUT = (
    "timm has no token selectors: this is the network without its selector, and all tokens are kept. It was trained "
    "on fewer, so its accuracy may be another; measure it"
)


def without_selector(model: nn.Module, info: SparseInfo, *, compacted: bool) -> nn.Module:
    """The network as timm's own class, in eval mode.

    Args:
        model: of the checkpoint that ``info`` describes, with its selector if it has one.
        compacted: whether ``model`` holds its live units alone.
    """
    if info.selector is None:
        return model.eval()
    with torch.random.fork_rng(devices=[]):  # what is drawn for weights is replaced
        plain = create_model(info.model, **dict(info.model_args))
    if compacted and (info.live_heads or info.live_neurons):
        compact(plain, info.live_heads, info.live_neurons)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("selector.")}
    plain.load_state_dict(state)
    return plain.eval()


def timm_config(model: nn.Module, info: SparseInfo, *, interpolation: str, crop_pct: float) -> dict[str, Any]:
    """What timm, and other readers of its folders, need to know: the contents of ``config.json``.

    Args:
        model: dense, of timm's own class.
        interpolation, crop_pct: how images are brought to their size.
    """
    name, arguments = resolve(info.model, info.model_args)
    own: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    classes = int(getattr(model, "num_classes", 0))
    config: dict[str, Any] = {
        "architecture": name.partition(".")[0],
        "num_classes": classes,
        "num_features": getattr(model, "num_features", None),
        # In a convolutional network it is a layer, which says its kind.
        "global_pool": getattr(getattr(model, "global_pool", None), "pool_type", getattr(model, "global_pool", None)),
        # Classes and channels are said once, below.
        "model_args": {key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans")},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [info.in_chans, height, width],
            # timm hands the size to a network of a fixed one; a ConvNeXt would not take it.
            "fixed_input_size": own.get("fixed_input_size", True) and not arguments.get("dynamic_img_size", False),
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": classes,
            "pool_size": None,
            # Not every timm looks whether the first convolution fits as it is; what it then cannot adapt it
            # leaves at random.
            "first_conv": own.get("first_conv") if info.in_chans in (1, 3) else None,
            "classifier": own.get("classifier"),
        },
        "sparse_trainer": {
            "live_parameters": info.budget.live,
            "total_parameters": info.budget.total,
            "live_heads": {block: len(units) for block, units in info.live_heads.items()},
            "live_neurons": {block: len(units) for block, units in info.live_neurons.items()},
            "recipe": info.recipe,
            "step": info.step,
            "metrics": dict(info.metrics),
        },
    }
    if info.class_names is not None:
        config["label_names"] = list(info.class_names)
    if info.selector is not None:
        config["sparse_trainer"]["left_out"] = {"selector": dict(info.selector), "note": LEFT_OUT}
    return config


def write_dense(folder: Path, model: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Make the folder.

    Args:
        folder: does not exist yet.
        model: dense, of timm's own class.
        config: of :func:`timm_config`.
        dtype: of the floating tensors in the file.
    """
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    folder.mkdir()
    # Copies: the format stores no two names for one tensor, and no strides.
    weights = save({name: tensor.clone().contiguous() for name, tensor in state.items()}, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_dense(folder: Path) -> nn.Module:
    """What timm makes of the folder, in eval mode.

    Raises:
        CheckpointError: this release of timm cannot open it.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: timm {timm.__version__} cannot open it ({reason}); folders with safetensors need timm 1.0.26 "
            "or newer: pip install 'timm>=1.0.26'"
        ) from error
