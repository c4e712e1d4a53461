"""The dense network before anything goes: its checkpoint, which is start and teacher of what follows, and its speed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.timing import paired
from experiments.config.run_config import ModelConfig, RunConfig
from experiments.data.create_data import Data
from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from experiments.evaluation.precision import precision_context
from experiments.shrinking.plan import make_compact
from experiments.shrinking.source import Source
from experiments.training.network import Network, create_network
from models import create_model
from sparse_trainer import flops
from sparse_trainer.budget import Budget
from sparse_trainer.files.checkpoint import SparseInfo, save_sparse
from sparse_trainer.prunable import prunable_weights

PAIRS = 7
NEW_CLASSIFIER = "the classifier begins anew"
"""How :func:`experiments.training.foreign_weights.load_foreign` says that the file has none for these classes."""


def images_for(source: Source, config: DataConfig, given: Sequence[str]) -> DataConfig:
    """The data, with its images brought to their size and scale as the network was trained on them.

    Args:
        given: keys that the user has set, which stay.
    """
    known = {**source.images, "image_size": source.image_size}
    return dataclasses.replace(config, **{k: v for k, v in known.items() if v is not None and k not in given})


def open_dense(source: Source, config: RunConfig, data: Data) -> Network:
    """The network with its weights.

    Raises:
        ConfigError: the file has none, or of another model or of other classes.
    """
    if source.num_classes not in (None, 0, data.num_classes):
        raise ConfigError(
            f"the network knows {source.num_classes} classes and the data has {data.num_classes}; train it on them "
            "first (sparse-trainer train --model.start MODEL --sparsity null), and shrink that run"
        )
    if source.class_names is not None and set(source.class_names) != set(data.class_names):
        odd = sorted(set(data.class_names) - set(source.class_names))
        raise ConfigError(
            f"the network knows other classes than the data, which has {', '.join(map(repr, odd[:3]))}; choose the "
            "data that it was trained on, or train it on this data first"
        )
    network = create_network(dataclasses.replace(config, model=model_config(source, config.model), selector=None), data)
    if any(NEW_CLASSIFIER in note for note in network.notes):
        raise ConfigError(
            f"{source.start} has no classifier of the data's {data.num_classes} classes, so there is no accuracy to "
            "keep; train one first (sparse-trainer train --model.start MODEL --sparsity null), and shrink that run"
        )
    return network


def model_config(source: Source, given: ModelConfig) -> ModelConfig:
    """Of the dense network; arguments that the user gives win."""
    kwargs = {**source.kwargs, **given.kwargs}
    return dataclasses.replace(
        given, name=source.name, kwargs=kwargs, start=source.start, pretrained=source.start is None
    )


def save_dense(path: Path, network: Network, data: Data, config: DataConfig, recipe: str) -> None:
    """Write it as a checkpoint of this project."""
    total = sum(weight.numel() for weight in prunable_weights(network.model).values())
    size = (data.in_chans, data.image_size, data.image_size)
    info = SparseInfo(
        model=network.name,
        model_args=network.arguments,
        budget=Budget(total, total),
        macs=round(_macs(network.model, size)),
        image_size=data.image_size,
        in_chans=data.in_chans,
        mean=data.mean,
        std=data.std,
        preparation=config.preparation,
        class_names=data.class_names,
        recipe=recipe,
    )
    save_sparse(path, network.model, masks={}, info=info, create_model=create_model)


def _macs(model: nn.Module, size: tuple[int, int, int]) -> float:
    try:
        return float(flops.count(model).macs)
    except ValueError:  # counted on a run without memory
        return float(flops.count(model, input_size=size).macs)


def latency_share(network: Network, data: Data, device: torch.device, amp: str) -> Callable[[float, float], float]:
    """A function that measures the latency of one image with fewer heads and neurons, over that of all of them."""
    autocast = precision_context(device, amp)
    images = torch.zeros(1, data.in_chans, data.image_size, data.image_size, device=device)
    dense = copy.deepcopy(network.model).to(device).eval()

    @torch.inference_mode()
    def classify(model: nn.Module) -> Any:
        with autocast():
            return model(images)

    def measure(heads: float, neurons: float) -> float:
        small = make_compact(network.model, heads, neurons).to(device).eval()
        return paired(partial(classify, dense), partial(classify, small), device=device, pairs=PAIRS, warmup=2).ratio

    return measure
