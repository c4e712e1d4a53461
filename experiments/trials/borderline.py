"""What does it change that training leaves out what it dropped? ``python -m experiments.trials.borderline RUN...``.

A dropped patch that is far below its threshold is not computed in training, so the threshold does not learn from it.
For runs that were trained with thresholds this takes some batches of their own training. It compares the gradient of
the thresholds, of the loss of the run, with that of training that computes every patch of which they learn anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.timing import Figure, describe_machine, figures_content, show, write_json
from experiments.config.reading import load_config
from experiments.config.run_config import resolve
from experiments.data.create_data import create_data
from experiments.errors import ConfigError
from experiments.grids.speed import trainer_of
from models.threshold_selector import ThresholdSelector


def compare_gradients(folder: Path, batches: int, temperature: float | None = None) -> list[Figure]:
    """Of a run that has ended.

    Args:
        temperature: the slope at the thresholds, in place of the run's.

    Raises:
        ConfigError: it has no thresholds, or units that left.
    """
    config = resolve(load_config(folder / "config.yaml"))
    data = create_data(config.data, device=config.training.device, seed=config.training.seed)
    trainer = trainer_of(folder, config, data)
    model: Any = trainer.model
    selector = getattr(model, "selector", None)
    if not isinstance(selector, ThresholdSelector) or trainer.sparsity is not None:
        raise ConfigError(f"{folder} was not trained with thresholds alone; give a run such as as_vit_65 of a grid")
    trainer.objective.progress = 1.0
    if temperature is not None:
        selector.config = replace(selector.config, temperature=temperature)
    bound, rows = selector.config.borderline, 0

    def count_rows(_: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += inputs[0].flatten(0, -2).shape[0]

    for block in model.blocks:
        block.mlp.register_forward_pre_hook(count_rows)

    def gradient(images: Tensor, targets: Tensor, bound: float, seed: int) -> Tensor:
        selector.config = replace(selector.config, borderline=bound)
        torch.manual_seed(seed)  # drop path draws the same
        terms, _ = trainer.objective.terms(model, images, targets)
        return torch.autograd.grad(trainer.objective.weigh(terms), selector.thresholds)[0]

    sums, computed = {bound: torch.zeros(()), 0.0: torch.zeros(())}, {bound: 0, 0.0: 0}
    worst = 0.0
    for seed in range(batches):
        images, targets = trainer.feed.next()
        found = {}
        for which in sums:
            before = rows
            found[which] = gradient(images, targets, which, seed)
            sums[which] = sums[which] + found[which]
            computed[which] += rows - before
        worst = max(worst, _difference(found[bound], found[0.0]))
    every, name = computed[0.0], f"{folder.name}, slope {selector.config.temperature:g}: "
    return [
        Figure(f"{name}tokens that an MLP computes", computed[bound], "", every, computed[bound] / every),
        Figure(f"{name}difference of the thresholds' gradient", _difference(sums[bound], sums[0.0]), ""),
        Figure(f"{name}difference, greatest of {batches} batches", worst, ""),
    ]


def _difference(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m experiments.trials.borderline", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that were trained with thresholds")
    parser.add_argument("--batches", type=int, default=8, help="of the training of each")
    parser.add_argument("--temperatures", nargs="+", type=float, help="slopes at the thresholds, in place of the run's")
    parser.add_argument("--json", help="file for the figures, as well")
    options = parser.parse_args(argv)
    figures: list[Figure] = []
    try:
        for folder in options.runs:
            for temperature in options.temperatures or [None]:
                figures += compare_gradients(folder, options.batches, temperature)
    except (ConfigError, ValueError) as error:
        print(f"borderline: error: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(torch.device("cpu"))
    show(f"borderline: {options.batches} batches", figures, machine)
    if options.json is not None:
        settings = {"runs": [folder.name for folder in options.runs], "batches": options.batches}
        settings["temperatures"] = options.temperatures
        write_json(options.json, figures_content(figures, machine, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
