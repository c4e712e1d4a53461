"""What fewer heads, neurons and tokens save when images are classified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.benchmarks.setting import (
    Setting,
    Structure,
    classifier,
    inference,
    make_model,
    make_small,
    textured_images,
    threshold_selector,
)
from experiments.benchmarks.timing import Figure, paired, percentiles
from models import Selection, tokens_per_block
from sparse_trainer import flops
from sparse_trainer.units import find_blocks


def calibrate(model: nn.Module, images: Tensor, keep: float, run: Callable[..., Any] | None = None) -> Selection:
    """Set the thresholds so that each stage keeps ``keep`` of what reaches it on average; what they then keep.

    An untrained network scores almost all patches alike, so the scores of the given images decide; how far the
    images differ from one another is theirs.

    Args:
        run: the model in the precision that is measured, as a function of images; None for the model itself.
    """
    run = run or model
    selector = cast(Any, model).selector
    with torch.inference_mode():
        for stage in range(len(selector.stages)):
            seen: list[Tensor] = []

            def choose(scores: Tensor, live: Tensor, at: int, stage: int = stage, seen: list[Tensor] = seen) -> Tensor:
                if at == stage:
                    seen.append(scores[live])
                kept: Tensor = type(selector).choose(selector, scores, live, at)
                return kept

            selector.choose = choose
            try:
                run(images, return_selection=True)
            finally:
                del selector.choose
            scores = torch.cat(seen).sort(descending=True).values
            most = max(1, round(keep * len(scores)))
            selector.thresholds.data[stage] = scores[most - 1 : most + 1].mean()
        selection: Selection = run(images, return_selection=True)[1]
    return selection


def benchmark_inference(setting: Setting, structure: Structure) -> list[Figure]:
    """Throughput of the dense network against fewer units, fewer tokens per image, and both; latency at batch 1.

    Args:
        setting: model, size, precision and number of pairs.
        structure: what is live; tokens is the mean keep ratio at each of three stages.
    """
    device = setting.on
    dense = make_model(setting)
    images = textured_images(setting.batch_size, setting.image_size, device)
    dense_macs = flops.count(dense).macs
    run_dense = inference(dense, images, setting)
    figures = []
    latency = {"dense": percentiles(inference(dense, images[:1], setting), device, 15)}
    depth = len(find_blocks(dense))
    full = Structure(heads=1.0, neurons=1.0)
    variants: list[tuple[str, Structure, bool]] = [("fewer heads and neurons", structure, False)]
    if structure.tokens < 1:
        variants += [("fewer tokens, image by image", full, True), ("both", structure, True)]
    for name, units, tokens in variants:
        model = make_small(setting, units, threshold_selector(dense) if tokens else None)
        mean_tokens = None
        if tokens:
            run = classifier(model, replace(setting, compile=False))
            selection = calibrate(model, images, structure.tokens, run)
            macs = float(flops.model_macs(model, tokens_per_block(selection, depth).float().cpu()).mean())
            mean_tokens = selection.counts.float()
        else:
            macs = flops.count(model).macs
        times = paired(run_dense, inference(model, images, setting), device=device, pairs=setting.pairs)
        speed, ideal = 1 / times.ratio, dense_macs / macs
        figures.append(
            Figure(
                f"{name}: throughput",
                setting.batch_size / times.second,
                "images/s",
                reference=setting.batch_size / times.first,
                ratio=speed,
                ideal=ideal,
            )
        )
        figures.append(Figure(f"{name}: achieved over ideal", speed / ideal, "", ideal=1.0))
        if mean_tokens is not None:
            for stage, column in enumerate(mean_tokens.T):
                figures.append(
                    Figure(
                        f"{name}: patches after stage {stage + 1}, mean ({int(column.min())} to {int(column.max())})",
                        float(column.mean()),
                        "",
                    )
                )
        latency[name] = percentiles(inference(model, images[:1], setting), device, 15)
    for name, values in latency.items():
        for percentile, seconds in values.items():
            figures.append(
                Figure(
                    f"{name}: latency at batch 1, p{percentile}",
                    seconds * 1000,
                    "ms",
                    latency["dense"][percentile] * 1000,
                )
            )
    return figures
