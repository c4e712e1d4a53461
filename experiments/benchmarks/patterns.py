"""A whole network whose dead weights are skipped, beside dense PyTorch and dense onnxruntime, all in one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from experiments.benchmarks.inference import calibrate
from experiments.benchmarks.onnx import CPU, REST, WARMUP, session_for
from experiments.benchmarks.setting import (
    Setting,
    Structure,
    Weights,
    classifier,
    inference,
    make_model,
    make_scheduler,
    make_small,
    textured_images,
    threshold_selector,
)
from experiments.benchmarks.timing import Figure, alternate, summarize
from experiments.config.records import naming
from experiments.errors import ConfigError
from experiments.exports.onnx import require_onnx, run_onnx
from models import tokens_per_block
from sparse_trainer import accelerate, flops
from sparse_trainer.kernels.accelerate import KERNELS, describe_choices
from sparse_trainer.patterns import read_pattern
from sparse_trainer.units import find_blocks


@dataclass(frozen=True)
class Patterns:
    """Which networks are timed."""

    patterns: tuple[str, ...] = ("16x1", "1x1")
    """Which weights live and die together."""
    densities: tuple[float, ...] = (0.5, 0.3, 0.1)
    """Shares of live weights."""
    batches: tuple[int, ...] = (16, 1)
    """Images that are classified at once."""
    kernels: str = "auto"
    """Products: auto takes the fastest of each layer, sparse ours everywhere, dense none."""

    def __post_init__(self) -> None:
        problems = [f"densities: {value} is not in (0, 1]" for value in self.densities if not 0 < value <= 1]
        problems += [f"batches: {value} is not positive" for value in self.batches if value < 1]
        if self.kernels not in KERNELS:
            problems.append(f"kernels: {self.kernels!r} is not one of {', '.join(KERNELS)}")
        for text in self.patterns:
            try:
                read_pattern(text)
            except ValueError as error:
                problems.append(f"patterns: {error}")
        if problems:
            raise ConfigError("; ".join(problems))


def benchmark_patterns(setting: Setting, patterns: Patterns, kept: Structure) -> list[Figure]:
    """A network that skips its dead weights, beside dense PyTorch and dense onnxruntime, in turns in one run.

    The masks are drawn, since which weights live does not matter to the time. Ideal is what MACs of live weights and
    kept tokens would give.

    Args:
        setting: model, size, precision and number of rounds.
        patterns: masks, batches and kernels.
        kept: heads, neurons and tokens beside the masks.

    Raises:
        ConfigError: there is no such model, a density that a pattern cannot meet, or onnxruntime is missing.
    """
    require_onnx("patterns")
    dense = make_model(setting).eval()
    dense_macs = flops.count(dense).macs
    figures = []
    images = textured_images(max(patterns.batches), setting.image_size, CPU)
    session = session_for(dense, images)
    for pattern, density in _variants(patterns):
        name = f"{pattern} at {density:g}"
        model, masks = _masked(setting, kept, pattern, density, images)
        started = time.perf_counter()
        fast = accelerate(
            model,
            masks,
            kernels=patterns.kernels,
            rows=max(patterns.batches) * _tokens(model),
            dtype=torch.bfloat16 if setting.amp == "bfloat16" else torch.float32,
        )
        opened = time.perf_counter() - started
        macs = _live_macs(model, masks, images, setting)
        for batch in patterns.batches:
            some = images[:batch]
            rounds = alternate(
                inference(dense, some, setting),
                partial(run_onnx, session, some),
                inference(fast, some, setting),
                device=CPU,
                pairs=WARMUP + setting.pairs,
                rest=REST,
            )[WARMUP:]
            for title, column in (("PyTorch", 0), ("onnxruntime", 1)):
                found = summarize([(row[column], row[2]) for row in rounds])
                figures.append(
                    Figure(
                        f"{name}, batch {batch}: over dense {title}",
                        batch / found.second,
                        "images/s",
                        batch / found.first,
                        1 / found.ratio,
                        dense_macs / macs,
                    )
                )
        figures.append(Figure(f"{name}: choosing kernels ({describe_choices(fast)})", opened, "s"))
    return figures


def _variants(patterns: Patterns) -> Iterator[tuple[str, float]]:
    for pattern in patterns.patterns:
        for density in patterns.densities:
            yield pattern, density


def _tokens(model: nn.Module) -> int:
    """Tokens of an image that enter the first block."""
    embed = cast(nn.Module, model.patch_embed)
    return int(cast(int, embed.num_patches)) + int(cast(int, model.num_prefix_tokens))


def _masked(
    setting: Setting, kept: Structure, pattern: str, density: float, images: Tensor
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network in evaluation mode, and its masks: the density is that of the weights that heads and neurons leave."""
    selector = None
    if kept.tokens < 1:
        selector = threshold_selector(make_model(setting))
    model = make_small(setting, kept, selector).eval()
    masks: dict[str, Tensor] = {}
    if density < 1:
        with naming("densities"):
            masks = make_scheduler(model, Weights(density, pattern), total_steps=1, updates=0).masks
    if selector is not None:
        calibrate(model, images, kept.tokens, classifier(model, replace(setting, compile=False)))
    return model, masks


def _live_macs(model: nn.Module, masks: dict[str, Tensor], images: Tensor, setting: Setting) -> float:
    """MACs of live weights, mean of an image."""
    if getattr(model, "selector", None) is None:
        return float(flops.count(model, masks).live_macs)
    with torch.inference_mode():
        selection = classifier(model, replace(setting, compile=False))(images, return_selection=True)[1]
    tokens = tokens_per_block(selection, len(find_blocks(model))).float().cpu()
    rows = [flops.count(model, masks, tokens=row.tolist()).live_macs for row in tokens]
    return float(sum(rows) / len(rows))
