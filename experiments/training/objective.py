"""What a run minimises: the weighted terms of the loss over one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.config.run_config import LossConfig, RunConfig
from experiments.errors import ConfigError
from experiments.evaluation.precision import Autocast
from experiments.processes.processes import Processes
from experiments.training.losses import create_loss, distillation_loss, macs_loss
from models import Selection
from models.choosing import on_ramp
from sparse_trainer.flops import model_macs


class Objective:
    """The loss of a run.

    Args:
        config: of the run.
        model: the bare network, whose heads and neurons are counted for the MACs.
        dense_macs: of one image in the dense network.
        teacher: gives the logits to learn from, if any.
        autocast: makes the context in which the networks run.
        processes: those that each have a share of the batch.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        dense_macs: float,
        *,
        teacher: Callable[[Tensor], Tensor] | None,
        autocast: Autocast,
        processes: Processes,
    ) -> None:
        self.config: LossConfig = config.losses
        self.loss: nn.Module = create_loss(config.data)
        self.selects = config.selector is not None
        self.model, self.dense_macs, self.teacher = model, dense_macs, teacher
        self.autocast, self.processes = autocast, processes
        self.progress = 0.0  #: share of the run that is done

    def terms(self, network: nn.Module, images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Selection | None]:
        """The terms of the loss that are on, each before its weight; and what the selector kept.

        Args:
            network: the model, or what wraps it.
            images: this process's share of a batch, ``[B, C, S, S]``.
            targets: class numbers ``[B]``, or soft targets ``[B, K]``.
        """
        config = self.config
        terms: dict[str, Tensor] = {}
        selection: Selection | None = None
        # Before the network, so that what it needs is gone when the network's activations are there.
        taught = self.teacher(images) if self.teacher is not None else None
        with self.autocast():
            if self.selects:
                logits, selection = network(images, return_selection=True)
            else:
                logits = network(images)
            if config.cross_entropy_weight:
                terms["loss_ce"] = self.loss(logits, targets)
            if taught is not None:
                terms["loss_distillation"] = distillation_loss(logits, taught, config.temperature)
        if config.macs_target is not None and config.bounds_macs:
            assert selection is not None
            target = config.macs_target
            if self.progress < config.macs_ramp:
                start = float(model_macs(self.model, _tokens(self.model, 0)[1])) / self.dense_macs
                target = on_ramp(target, config.macs_ramp, self.progress, start=start)
            terms["loss_macs"] = macs_loss(selection, self.model, target, self.dense_macs, self.processes.mean)
        return terms, selection

    def weigh(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms under their weights, a scalar."""
        weights = {
            "loss_ce": self.config.cross_entropy_weight,
            "loss_distillation": self.config.distillation_weight,
            "loss_macs": self.config.macs_weight,
        }
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def probe(self, images: Tensor, targets: Tensor) -> Tensor:
        """What a head or neuron is worth, it is worth for the predictions.

        The MACs are left out: no swap changes how many units there are, and the probe itself runs with more.
        """
        terms, _ = self.terms(self.model, images, targets)
        return self.weigh({name: value for name, value in terms.items() if name != "loss_macs"})


def check_target(config: RunConfig, network: nn.Module, dense_macs: float) -> None:
    """Refuse a budget of MACs that no number of tokens meets.

    Args:
        network: compact already, with its selector.
        dense_macs: of one image in the dense network.

    Raises:
        ConfigError: naming the shares between which it can lie.
    """
    target, selector = config.losses.macs_target, config.selector
    if target is None or not config.losses.bounds_macs:
        return
    assert selector is not None
    assert selector.stages is not None
    low, high = (float(model_macs(network, tokens)) / dense_macs for tokens in _tokens(network, selector.stages[0]))
    if not low <= target <= high + 1e-6:
        raise ConfigError(
            f"losses.macs_target: {target} of the dense MACs cannot be reached; with selector.stages "
            f"{list(selector.stages)} and the heads and neurons that are live it is between {low:.3f} and {high:.3f}"
        )


def _tokens(network: nn.Module, first_stage: int) -> tuple[Tensor, Tensor]:
    """The fewest tokens that can enter each block, and the most: ``[1, depth]``."""
    model = cast(Any, network)
    prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
    most = torch.full((1, len(model.blocks)), prefix + patches, dtype=torch.float64)
    least = most.clone()
    least[:, first_stage:] = prefix + 1 + (model.selector.config.dropped == "fused")
    return least, most
