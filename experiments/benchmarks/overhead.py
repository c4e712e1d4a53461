"""What the scheduler costs: time of a step, time of an update, memory of the masks."""

from __future__ import annotations

import statistics
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.setting import (
    Setting,
    Structure,
    Weights,
    make_batch,
    make_model,
    make_scheduler,
    training_step,
)
from experiments.benchmarks.timing import Figure, summarize, timed
from experiments.evaluation.precision import precision_context
from experiments.training.trainer import SCORED_WHERE_UNITS_MOVE
from sparse_trainer import MaskUpdate, SparsityConfig, SparsityScheduler
from sparse_trainer.flops import count
from sparse_trainer.kernels.masking import mask_gradient, masking_library

EVERY, RESHAPED = 4, 5
"""Steps from one update of heads and neurons to the next, and how many of them are timed."""


def benchmark_overhead(setting: Setting, weights: Weights) -> list[Figure]:
    """A training step under the scheduler against the same step without it; an update; one that moves heads and neurons
    between blocks, in training steps; the memory of the masks.

    Args:
        setting: model, size, precision and number of pairs.
        weights: density of the masks.
    """
    device = setting.on
    model = make_model(setting).train()
    scheduler = make_scheduler(model, weights, total_steps=10**7, updates=0)
    # One model, one optimizer and one batch for both: the only difference is whether the scheduler is attached.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    attached: list[bool] = []
    step = training_step(model, setting, lambda: scheduler.step() if attached else None, optimizer)

    def time_step(under_scheduler: bool) -> float:
        if under_scheduler:
            scheduler.attach(optimizer)
            attached.append(True)
        step()  # the first step after attach() brings weights and moments in line once, which is no step's cost
        seconds = timed(step, device)
        if under_scheduler:
            scheduler.detach()
            attached.clear()
        return seconds

    times = []
    for index in range(1 + setting.pairs):
        first = index % 2 == 1
        seconds = {under: time_step(under) for under in (first, not first)}
        times.append((seconds[False], seconds[True]))
    steps = summarize(times[1:])
    masks = scheduler.masks
    library = masking_library(sum(mask.numel() for mask in masks.values()), device)
    gradients = [torch.randn_like(parameter) for name, parameter in model.named_parameters() if name in masks]

    def mask_all() -> None:
        for gradient, mask in zip(gradients, masks.values(), strict=True):
            mask_gradient(gradient, mask, library)

    own = statistics.median(timed(mask_all, device) for _ in range(9))
    gradients.clear()
    prunable = scheduler.budget.total
    held = sum(mask.nbytes for mask in masks.values())
    explored = sum(bits.nbytes for bits in scheduler.state_dict()["weights"]["ever_live"].values())
    return [
        Figure("training step", steps.second, "s", reference=steps.first, ratio=steps.ratio, ideal=1.0),
        Figure("masking all gradients", own, "s", reference=steps.first, ratio=own / steps.first),
        Figure("update", _update_seconds(setting, weights), "s"),
        _reshaping_update(setting),
        Figure("prunable weights", prunable, ""),
        Figure("masks, per prunable weight", held / prunable, "bytes", ideal=1.0),
        Figure("exploration record, per prunable weight", explored / prunable, "bytes", ideal=0.125),
    ]


def _update_seconds(setting: Setting, weights: Weights) -> float:
    """Median time of one update: every step updates."""
    model = make_model(setting).train()
    scheduler = make_scheduler(model, weights, total_steps=1000, update_every=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler.attach(optimizer)
    images, targets = make_batch(replace(setting, batch_size=2))
    seconds = []
    for _ in range(max(setting.pairs, 3) + 1):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        update = scheduler.step()
        optimizer.zero_grad()
        assert update is not None
        seconds.append(update.seconds)
    return statistics.median(seconds[1:])


def _reshaping_update(setting: Setting) -> Figure:
    """What a step takes longer, together with the next one, when its update gives blocks other numbers of heads and
    neurons: in seconds, and as a ratio to a step."""
    model = make_model(setting).train()
    probe = macs_of_passes(model, of_weights=False)
    kept = Structure()
    config = SparsityConfig(
        density=None,
        head_density=kept.heads,
        neuron_density=kept.neurons,
        unit_distribution="global",
        swap="explore",
        update_every=EVERY,
        stop_at=1.0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "head_density: .* is rounded")  # which share it is matters little here
        scheduler = SparsityScheduler(model, config, total_steps=EVERY * (RESHAPED + 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler.attach(optimizer)
    updates: list[MaskUpdate | None] = []
    images, targets = make_batch(setting)
    autocast = precision_context(setting.on, setting.amp)

    def loss() -> Tensor:  # of the images that score units in `train`
        with autocast():
            scored = slice(None, None, SCORED_WHERE_UNITS_MOVE)
            return F.cross_entropy(model(images[scored]).float(), targets[scored])

    step = training_step(model, setting, lambda: updates.append(scheduler.step(loss)), optimizer, sparsity=config)
    seconds = [timed(step, setting.on) for _ in range(EVERY * (RESHAPED + 1))]
    changed = [number for number, update in enumerate(updates) if update is not None and update.reshaped]
    near = {number + after for number in changed for after in (0, 1)}
    usual = statistics.median(time for number, time in enumerate(seconds) if number >= 2 and number not in near)
    costs = [sum(seconds[number : number + 2]) - 2 * usual for number in changed]
    cost = statistics.median(costs) if costs else 0.0
    ideal = probe / SCORED_WHERE_UNITS_MOVE / macs_of_passes(model, of_weights=True)
    return Figure("update that moves heads and neurons", cost, "s", reference=usual, ratio=cost / usual, ideal=ideal)


def macs_of_passes(model: nn.Module, *, of_weights: bool) -> float:
    """MACs of a forward and a backward pass of one image.

    Each is as much again for the gradient of what a product takes, and for that of its weight. Attention multiplies two
    things that are computed, so both gradients are always there.

    Args:
        of_weights: whether weights get gradients; a probe needs those of activations alone.
    """
    layers = count(model).layers.values()
    return sum(layer.macs * (3 if of_weights or not layer.parameters else 2) for layer in layers)
