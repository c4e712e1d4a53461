"""What fewer heads, neurons and tokens save in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch

from experiments.benchmarks.inference import calibrate
from experiments.benchmarks.setting import (
    Setting,
    Step,
    Structure,
    classifier,
    macs_of,
    make_model,
    make_small,
    textured_images,
    threshold_selector,
    training_step,
)
from experiments.benchmarks.timing import Figure, alternate, paired, peak_memory, summarize
from experiments.errors import ConfigError
from models import tokens_per_block
from sparse_trainer import flops
from sparse_trainer.units import find_blocks


@dataclass(frozen=True)
class Selection:
    """How tokens are selected."""

    selector: Literal["top_k", "threshold"] = "top_k"
    """top_k: tokens of every image, at the input. threshold: tokens on the mean at each of three stages, alone and with
    a dense teacher."""


def dense_step(setting: Setting) -> Step:
    """A training step of the dense model (importable, so that it can run in a process of its own)."""
    return training_step(make_model(setting), setting)


def small_step(setting: Setting, structure: Structure) -> Step:
    """A training step of the small model."""
    return training_step(make_small(setting, structure, structure.top_k).train(), setting)


def adaptive_step(setting: Setting, structure: Structure, thresholds: tuple[float, ...], taught: bool) -> Step:
    """A training step of the model with these thresholds, with the dense model as its teacher if ``taught``."""
    model = make_small(setting, structure, threshold_selector(make_model(setting))).train()
    cast(Any, model).selector.thresholds.data.copy_(torch.tensor(thresholds))
    images = textured_images(setting.batch_size, setting.image_size, setting.on)
    return training_step(model, setting, images=images, teacher=make_model(setting) if taught else None)


def benchmark_train(setting: Setting, structure: Structure, selection: Selection) -> list[Figure]:
    """A training step of the compact network against the dense one, beside its share of MACs; peak memory.

    Args:
        setting: model, size, precision and number of pairs.
        structure: what is live.
        selection: how tokens are selected.
    """
    if selection.selector == "threshold":
        return _adaptive(setting, structure)
    device = setting.on
    dense, small = make_model(setting).train(), make_small(setting, structure, structure.top_k).train()
    macs, dense_macs = macs_of(small, structure), flops.count(dense).macs
    share = macs / dense_macs
    times = paired(training_step(dense, setting), training_step(small, setting), device=device, pairs=setting.pairs)
    del dense, small
    peak = peak_memory(small_step, setting, structure, device=device) / 2**20
    dense_peak = peak_memory(dense_step, setting, device=device) / 2**20
    return [
        Figure("MACs of one image", macs, "", reference=dense_macs, ratio=share),
        Figure("training step", times.second, "s", reference=times.first, ratio=times.ratio, ideal=share),
        Figure("training step over its share of MACs", times.ratio / share, "", ideal=1.0),
        Figure("peak memory of a training step", peak, "MiB", dense_peak, peak / dense_peak),
    ]


def _adaptive(setting: Setting, structure: Structure) -> list[Figure]:
    """Thresholds in place of top-k: alone, and with a teacher, whose forward pass is a third of a dense step's MACs."""
    if structure.tokens == 1:
        raise ConfigError("tokens: 1.0 keeps all patches; give the share that each of three stages keeps, such as 0.7")
    device, dense = setting.on, make_model(setting)
    model = make_small(setting, structure, threshold_selector(dense))
    images = textured_images(setting.batch_size, setting.image_size, device)
    chosen = calibrate(model, images, structure.tokens, classifier(model, replace(setting, compile=False)))
    tokens = tokens_per_block(chosen, len(find_blocks(dense))).double().cpu()
    macs, dense_macs = float(flops.model_macs(model, tokens).mean()), flops.count(dense).macs
    share, thresholds = macs / dense_macs, tuple(cast(Any, model).selector.thresholds.tolist())
    step = training_step(dense.train(), setting, images=images)
    teacher = make_model(setting)
    student = training_step(model.train(), setting, images=images)
    taught = training_step(model, setting, images=images, teacher=teacher)
    rounds = alternate(step, student, taught, device=device, pairs=1 + setting.pairs)[1:]
    alone, both = (summarize([(times[0], times[which]) for times in rounds]) for which in (1, 2))
    del dense, model, teacher, step, student, taught
    dense_peak = peak_memory(dense_step, setting, device=device) / 2**20
    figures = [
        Figure("MACs of one image", macs, "", reference=dense_macs, ratio=share),
        Figure("training step", alone.second, "s", reference=alone.first, ratio=alone.ratio, ideal=share),
        Figure(
            "training step with a teacher",
            both.second,
            "s",
            reference=both.first,
            ratio=both.ratio,
            ideal=share + 1 / 3,
        ),
    ]
    for name, with_teacher in (("peak memory of a training step", False), ("peak memory with a teacher", True)):
        peak = peak_memory(adaptive_step, setting, structure, thresholds, with_teacher, device=device) / 2**20
        figures.append(Figure(name, peak, "MiB", dense_peak, peak / dense_peak))
    return figures
