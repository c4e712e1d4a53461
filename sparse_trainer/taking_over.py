"""What is there and goes on: units and masks of another scheduler or a sparse file, and the averages of an EMA."""

from __future__ import annotations

import torch
from torch import nn

from sparse_trainer.construction import LiveNetwork, Plan
from sparse_trainer.prunable import prunable_weights
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.unit_swaps import UnitSwaps
from sparse_trainer.weight_masks import WeightMasks


def take_over(
    model: nn.Module, config: SparsityConfig, given: LiveNetwork, planned: Plan
) -> tuple[UnitSwaps | None, WeightMasks | None]:
    """Units and masks as they are live already.

    Raises:
        ValueError: they do not fit the model, or the configuration asks for others.
    """
    prunable = prunable_weights(model, config.include, config.exclude)
    odd = sorted(set(given.masks) - set(prunable))
    if odd:
        raise ValueError(f"resume_from: there is a mask of {odd[0]}, which is no prunable weight of this model")
    if bool(given.masks) != config.masks_weights:
        raise ValueError(
            f"resume_from: it {'has' if given.masks else 'has no'} weight masks; set density to "
            f"{'its share of live weights' if given.masks else 'null'}"
        )
    units = None
    total = planned.total
    if given.live_heads or given.live_neurons:
        generator = torch.Generator().manual_seed(config.seed)
        units = UnitSwaps.of_compact(model, given, config, generator=generator, falls=planned.unit_falls)
    weights = None
    if given.masks:
        weights = WeightMasks.of_masks(prunable, given.masks, config, planned.patterns)
        live = weights.live_count()
        wanted = config.live_parameters or round((config.density or 0) * total)
        same = all(prunable[name].shape == mask.shape for name, mask in given.masks.items())
        if same and not config.falls and abs(wanted - live) > 0.005 * total:
            raise ValueError(
                f"resume_from: {live:,} of {total:,} weights are live ({live / total:.4f}), and the configuration "
                f"asks for {wanted:,}; give density={live / total:.4f}: the budget stays as it is"
            )
    return units, weights


def averages_of(model: nn.Module, ema: nn.Module) -> nn.Module:
    """The module, of ``ema`` and what it wraps, whose parameters are called as the model's.

    Raises:
        ValueError: there is none.
    """
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    for module in (ema, getattr(ema, "module", None)):
        if isinstance(module, nn.Module) and names == {n: p.shape for n, p in module.named_parameters()}:
            return module
    raise ValueError(
        "the EMA's parameters are other than the model's in name or shape; make it from the model after the scheduler"
    )
