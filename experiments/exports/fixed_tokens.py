"""A threshold selector whose counts are fixed: every image keeps the same number of patches, its best ones.

A graph that runs on batches of any size cannot give each image its own number of tokens; this one it can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.blocks import attend_scored, run_block
from models.choosing import gather_tokens, top_k_indices
from models.fusing import fuse
from models.threshold_selector import ThresholdSelector


class FixedTokens(nn.Module):
    """The evaluation path of a model with a threshold selector, with the thresholds put aside.

    Where an image's thresholds keep as many patches as ``counts`` say, its logits are those of the model.

    Args:
        model: with a threshold selector; shared, not copied.
        counts: patches kept at each stage.

    Raises:
        ValueError: the counts do not fit the model.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.counts = tuple(counts)
        selector = cast(Any, model).selector
        assert isinstance(selector, ThresholdSelector)
        self.stages = selector.stages
        patches = int(cast(Any, model).patch_embed.num_patches)
        if len(self.counts) != len(self.stages):
            blocks = ", ".join(map(str, self.stages))
            raise ValueError(
                f"{len(self.counts)} given and {len(self.stages)} needed, one for each stage (before block {blocks})"
            )
        if (
            list(self.counts) != sorted(self.counts, reverse=True)
            or not 1 <= self.counts[-1] <= self.counts[0] <= patches
        ):
            raise ValueError(f"{list(self.counts)} do not fall from at most {patches}, the patches, to at least 1")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        vit = cast(Any, self.model)
        prefix = int(vit.num_prefix_tokens)
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        patches = x.shape[1] - prefix
        for number, block in enumerate(vit.blocks):
            if number + 1 not in self.stages:
                x = block(x)
                continue
            x, scores = run_block(block, x, partial(attend_scored, block.attn, prefix=prefix))
            assert scores is not None
            scores = scores[:, :patches]  # fused tokens come last
            indices = top_k_indices(scores, self.counts[self.stages.index(number + 1)])
            first, live, fused = x.split([prefix, patches, x.shape[1] - prefix - patches], dim=1)
            parts = [first, gather_tokens(live, indices), fused]
            if vit.selector.config.dropped == "fused" and indices.shape[1] < patches:
                parts.append(fuse(live, scores, torch.zeros_like(scores).scatter(1, indices, 1.0)))
            x, patches = torch.cat(parts, dim=1), indices.shape[1]
        logits: Tensor = vit.forward_head(vit.norm(x))
        return logits
