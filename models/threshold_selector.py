"""Patches whose score exceeds a learned threshold: every image keeps its own number (AS-ViT, arXiv 2209.13802)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.choosing import above_threshold, as_many_at_random, straight_through
from models.selector_config import SelectorConfig


class ThresholdSelector(nn.Module):
    """Keeps, per image, the patches whose score exceeds the learned threshold of the stage."""

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__()
        assert config.kind == "threshold"
        assert config.stages is not None
        self.config = config
        self.stages = config.stages
        self.thresholds = nn.Parameter(torch.tensor(config.thresholds, dtype=torch.get_default_dtype()))
        #: In evaluation: as :attr:`TopKSelector.chance`, as many patches as lie above the threshold.
        self.chance: torch.Generator | None = None

    def set_progress(self, fraction: float) -> None:
        """Nothing here depends on the progress of training."""

    def choose(self, scores: Tensor, live: Tensor, stage: int) -> Tensor:
        """The patches ``[B, N]`` (bool) that stage number ``stage`` keeps among the live ones."""
        keep = above_threshold(scores, self.thresholds[stage], live)
        if self.chance is not None and not self.training:
            keep = as_many_at_random(keep, live, self.chance)
        return keep

    def still_learns(self, scores: Tensor, stage: int) -> Tensor:
        """Whether each patch ``[B, N]`` is so close to the threshold that its mask's gradient counts (bool)."""
        soft = ((scores.detach() - self.thresholds[stage].detach()) * self.config.temperature).sigmoid()
        return soft * (1 - soft) > self.config.borderline

    def forward(self, scores: Tensor, previous: Tensor | None, stage: int) -> Tensor:
        """The mask ``[B, N]`` after stage number ``stage``, with its straight-through gradient.

        Args:
            scores: ``[B, N]``.
            previous: mask of the stage before; what it dropped stays dropped.
            stage: counted from 0.
        """
        live = torch.ones_like(scores, dtype=torch.bool) if previous is None else previous > 0.5
        hard = self.choose(scores, live, stage).to(scores.dtype)
        soft = ((scores - self.thresholds[stage]) * self.config.temperature).sigmoid()
        mask = straight_through(hard, soft)
        return mask if previous is None else mask * previous
