"""How fast the trained network is beside the dense one, measured once, at the end of a run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from experiments.evaluation.speed import images_per_second
from experiments.training.trainer import Trainer
from models import create_model
from sparse_trainer import accelerate

IMAGES = 256
"""Of the batch that is timed, at most."""


@dataclass(frozen=True)
class Speeds:
    """Images per second, of networks that took turns."""

    dense: float
    trained: float
    accelerated: float | None  #: the trained one with the fastest kernels for it; None where those are torch's


def measure_speeds(trainer: Trainer) -> Speeds:
    """On images of the evaluation, in the precision of the training. The dense network's weights do not matter."""
    images = next(iter(trainer.data.eval.batches()))[0][:IMAGES].to(trainer.device)
    dense = create_model(trainer.model_name, **trainer.model_arguments).to(trainer.device)
    models = [dense, trainer.result_model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no compiler
        fast: Any = accelerate(trainer.result_model, trainer.masks, dtype=getattr(torch, trainer.config.training.amp))
    if any(choice.kernel != "dense" for choice in fast.kernel_choices):
        models.append(fast)
    found = images_per_second(models, images, trainer.autocast)
    return Speeds(found[0], found[1], found[2] if len(found) > 2 else None)
