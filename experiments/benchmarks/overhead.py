"""What the scheduler costs: time of a step, time of an update, memory of the masks."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch.nn import functional as F

from experiments.benchmarks.setting import Setting, Weights, make_batch, make_model, make_scheduler, training_step
from experiments.benchmarks.timing import Figure, summarize, timed
from sparse_trainer.kernels.masking import mask_gradient, masking_library


def benchmark_overhead(setting: Setting, weights: Weights) -> list[Figure]:
    """A training step under the scheduler against the same step without it; an update; the memory of the masks.

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
