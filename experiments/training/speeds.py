"""How fast the trained network is beside the dense one, measured once, at the end of a run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

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
    accelerated: float | None  #: the trained one with kernels that skip dead weights; None where it has no masks


def measure_speeds(trainer: Trainer) -> Speeds:
    """On images of the evaluation, in the precision of the training. The dense network's weights do not matter."""
    images = next(iter(trainer.data.eval.batches()))[0][:IMAGES].to(trainer.device)
    dense = create_model(trainer.model_name, **trainer.model_arguments).to(trainer.device)
    models = [dense, trainer.result_model]
    if trainer.masks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no compiler
            dtype = getattr(torch, trainer.config.training.amp)
            models.append(accelerate(trainer.result_model, trainer.masks, dtype=dtype))
    found = images_per_second(models, images, trainer.autocast)
    return Speeds(found[0], found[1], found[2] if len(found) > 2 else None)
