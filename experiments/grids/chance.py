"""What the choice of a selector is worth: the accuracy of its network with as many patches drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from experiments.config.reading import load_config
from experiments.config.run_config import resolve
from experiments.evaluation.evaluate_checkpoint import evaluate
from sparse_trainer.files.checkpoint import read_info


def measure_chance(folders: Mapping[str, Mapping[int, Path]]) -> dict[str, dict[str, float]]:
    """Top-1 in percent by entry and seed (as text, for JSON), of entries whose network has a selector.

    Args:
        folders: of finished runs, by entry and seed.

    Raises:
        ConfigError: the configuration of a run is not understood.
        CheckpointError: its checkpoint is damaged.
    """
    found: dict[str, dict[str, float]] = {}
    for entry, runs in folders.items():
        for seed, folder in runs.items():
            path = folder / "sparse.safetensors"
            if read_info(path).selector is None:
                continue
            config = resolve(load_config(folder / "config.yaml"))
            device, amp = torch.device(config.training.device), config.training.amp
            drawn = evaluate(path, config.data, device=device, amp=amp, at_random=True)
            found.setdefault(entry, {})[str(seed)] = float(drawn.measured.metrics["top1"])
    return found
