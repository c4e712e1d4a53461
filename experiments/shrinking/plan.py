"""What of a trained network goes, so that a target is met: heads and neurons, tokens, single weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.inference import calibrate
from experiments.benchmarks.setting import keep_first_units
from experiments.errors import ConfigError
from models import SelectorConfig
from models.sparse_deit import add_selector
from sparse_trainer import SparsityConfig, flops
from sparse_trainer.units import find_blocks

LEAST_SHARE = 0.1
"""Of the heads and of the neurons that stay, in any plan."""
STAGES = (4, 7, 10)
"""Of 12 blocks, those before which tokens are dropped (AS-ViT)."""
POWERS = (0.5, 0.75)
"""Of the target, that units meet where tokens do the rest; the first that works."""
LEAST_KEPT = 0.3
"""Of the patches that reach a stage."""
PUBLISHED_GMACS, PUBLISHED_WEIGHT = 4.6, 2.0
"""Of the network for which AS-ViT weighs its loss on the MACs, and that weight."""


UPDATES = 20
"""Of the masks, in a run that makes a network small."""
STOP_AT = SparsityConfig().stop_at


@dataclass(frozen=True)
class Target:
    """What is asked for: shares of the dense network's, each in (0, 1); None is not asked for."""

    macs: float | None = None
    density: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {"macs": self.macs, "density": self.density, "latency": self.latency}
        for key, value in given.items():
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"--{key}: {value:g} is not a share of the dense network's, between 0 and 1, as 0.5")
        if all(value is None for value in given.values()):
            raise ConfigError(
                "say what to shrink to: --macs 0.5 (multiply-accumulates), --latency 0.5, or --density 0.5 (live "
                "weights, which makes the file smaller and saves no time)"
            )
        if self.macs is not None and self.latency is not None:
            raise ConfigError("--macs and --latency: give one of them")


@dataclass(frozen=True)
class Plan:
    """Shares of the dense network that stay."""

    head_density: float = 1.0
    neuron_density: float = 1.0
    units_macs: float = 1.0  #: of the network with these heads and neurons and all tokens
    macs_target: float | None = None  #: with the tokens that are dropped too; None drops none
    stages: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()  #: that are about right for the target, by the dense network
    density: float | None = None
    macs_weight: float = PUBLISHED_WEIGHT

    def sections(self, total_steps: int) -> dict[str, Any]:
        """The sections of a run's configuration that say so, as plain values.

        Weights come down to their density over the first half of the run, heads and neurons go at once: what each was
        worth is in ``experiments/results/shrink.md``.

        Args:
            total_steps: optimizer steps of the run.
        """
        structured = self.head_density < 1 or self.neuron_density < 1
        sparsity: dict[str, Any] | None = None
        if structured or self.density is not None:
            sparsity = {"density": self.density, "start": "score"}
            if structured:
                sparsity |= {"head_density": self.head_density, "neuron_density": self.neuron_density}
                sparsity |= {"unit_distribution": "by_score"}
            updates = min(UPDATES, int(STOP_AT * total_steps) - 1)
            if self.density is not None and updates > 0:
                sparsity |= {"initial_density": 1.0, "updates": updates}
            else:
                # The best by score go on from the first step; to swap them costs what they have learned.
                sparsity |= {"updates": 0}
        selector: dict[str, Any] | None = None
        if self.macs_target is not None:
            selector = {"kind": "threshold", "stages": list(self.stages), "thresholds": list(self.thresholds)}
        losses = {"macs_target": self.macs_target}
        if self.macs_target is not None:
            losses |= {"macs_weight": self.macs_weight}
        return {"sparsity": sparsity, "selector": selector, "losses": losses}


@dataclass(frozen=True)
class Shares:
    """How a network's multiply-accumulates divide, as shares of all."""

    fixed: float
    heads: float
    neurons: float
    head_count: int  #: of a block, the least

    def least(self) -> float:
        """With as few units as a plan may leave."""
        heads = math.ceil(LEAST_SHARE * self.head_count - 1e-9) / self.head_count
        return self.fixed + self.heads * heads + self.neurons * LEAST_SHARE


def shares_of(model: nn.Module) -> Shares:
    """Of a dense network.

    Raises:
        ConfigError: its heads and neurons are laid out in another way than is known here.
    """
    try:
        blocks = find_blocks(model)
    except ValueError as error:
        raise ConfigError(f"its heads and neurons cannot be removed: {error}; --density alone works") from error
    layers = flops.count(model).layers
    total = sum(layer.macs for layer in layers.values())
    heads = sum(layer.macs for name, layer in layers.items() if ".attn" in name)
    neurons = sum(layer.macs for name, layer in layers.items() if ".mlp." in name)
    count = min(block.heads.count() for block in blocks.values())
    return Shares((total - heads - neurons) / total, heads / total, neurons / total, count)


def choose_units(shares: Shares, target: float) -> tuple[float, float]:
    """Head and neuron density that leave ``target`` of the MACs, as alike as whole heads allow.

    Raises:
        ConfigError: no number of units does.
    """
    found: list[tuple[float, float, float]] = []
    for live in range(1, shares.head_count + 1):
        heads = live / shares.head_count
        neurons = (target - shares.fixed - shares.heads * heads) / shares.neurons
        if heads >= LEAST_SHARE and LEAST_SHARE <= neurons <= 1:
            found.append((abs(heads - neurons), heads, neurons))
    if not found:
        raise ConfigError(
            f"{target:.3f} of the MACs cannot be met: with a tenth of the heads and neurons {shares.least():.3f} are "
            "left; ask for more than that"
        )
    _, heads, neurons = min(found)
    # Rounded down: the target is a limit. Whole heads keep their share exactly.
    return heads, max(int(neurons * 1000) / 1000, LEAST_SHARE)


def stages_of(model: nn.Module) -> tuple[int, ...]:
    """Blocks before which thresholds may drop tokens; none where the network cannot hold a selector."""
    depth = len(find_blocks(model))
    stages = tuple(sorted({max(1, round(stage * depth / 12)) for stage in STAGES if round(stage * depth / 12) < depth}))
    before = type(model)
    try:
        add_selector(model, SelectorConfig(kind="threshold", stages=stages))
    except ValueError:
        return ()
    del model.selector
    model.__class__ = before
    return stages


def make_plan(
    model: nn.Module, target: Target, latency_of: Callable[[float, float], float], images: Callable[[], Tensor]
) -> Plan:
    """What stays, so that the target is met.

    Multiply-accumulates are saved half by units and half by tokens, that is each to the root of the target, where the
    network can drop tokens; else all by units, as with so few patches that tokens would not do. A latency is met by
    units alone, as it is measured here.

    Args:
        model: dense, trained, on the CPU.
        latency_of: of the network with these head and neuron densities, over that of the dense one.
        images: a batch of them ``[B, C, S, S]``, for the first thresholds.

    Raises:
        ConfigError: it cannot be met.
    """
    if target.macs is None and target.latency is None:
        return Plan(density=target.density)
    shares = shares_of(model)
    if target.latency is not None:
        return _with_units(shares, meet_latency(shares, target.latency, latency_of), target, "--latency")
    assert target.macs is not None
    stages = stages_of(model)
    for power in POWERS if stages else ():
        units = target.macs**power
        if units <= shares.least():
            continue
        plan = _with_units(shares, units, target, "--macs")
        keep = keep_ratio(model, plan, stages, target.macs)
        if keep is not None:
            macs = flops.count(model).macs
            return replace(
                plan,
                macs_target=target.macs,
                stages=stages,
                thresholds=first_thresholds(model, stages, keep, images()),
                macs_weight=round(PUBLISHED_WEIGHT * max(1.0, PUBLISHED_GMACS * 1e9 / macs), 3),
            )
    return _with_units(shares, target.macs, target, "--macs")


def _with_units(shares: Shares, share: float, target: Target, key: str) -> Plan:
    """With heads and neurons that leave this share of the MACs."""
    try:
        heads, neurons = choose_units(shares, share)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    left = shares.fixed + shares.heads * heads + shares.neurons * neurons
    return Plan(head_density=heads, neuron_density=neurons, units_macs=left, density=target.density)


def make_compact(model: nn.Module, heads: float, neurons: float) -> nn.Module:
    """A copy with these shares of the heads and neurons of each block, the first ones: for what they cost."""
    small = copy.deepcopy(model)
    keep_first_units(small, heads, neurons)
    return small


def keep_ratio(model: nn.Module, plan: Plan, stages: tuple[int, ...], target: float) -> float | None:
    """Share of the patches that reach a stage which it keeps, so that ``target`` of the dense MACs are left; None where
    that is less than :data:`LEAST_KEPT`."""
    small: Any = make_compact(model, plan.head_density, plan.neuron_density)
    dense = flops.count(model).macs
    prefix, patches = small.num_prefix_tokens, small.patch_embed.num_patches
    passed = torch.tensor([sum(stage <= block for stage in stages) for block in range(len(small.blocks))])

    def share(keep: float) -> float:
        tokens = prefix + patches * torch.full((1, len(passed)), keep, dtype=torch.float64) ** passed
        return float(flops.model_macs(small, tokens)) / dense

    low, high = LEAST_KEPT, 1.0
    if share(low) > target:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= target else (low, middle)
    return low


def first_thresholds(model: nn.Module, stages: tuple[int, ...], keep: float, images: Tensor) -> tuple[float, ...]:
    """Thresholds by which the dense network keeps ``keep`` of these images' patches at each stage."""
    chooser: Any = add_selector(copy.deepcopy(model), SelectorConfig(kind="threshold", stages=stages)).eval()
    calibrate(chooser, images, keep)
    return tuple(float(f"{value:.3g}") for value in chooser.selector.thresholds.tolist())


def meet_latency(shares: Shares, target: float, latency_of: Callable[[float, float], float]) -> float:
    """The greatest share of the MACs, by halving, whose units take at most ``target`` of the dense latency.

    Raises:
        ConfigError: the smallest network takes longer.
    """
    low, high = shares.least() + 1e-3, 1.0
    least = latency_of(*choose_units(shares, low))
    if least > target:
        raise ConfigError(
            f"--latency: {target:g} cannot be met on this machine: with a tenth of the heads and neurons an image "
            f"takes {least:.2f} of the dense latency"
        )
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if latency_of(*choose_units(shares, middle)) <= target else (low, middle)
    return low
