"""What a selector chose: which patches each stage kept, and how many tokens that leaves to each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What the selector chose for a batch of B images with N patches each."""

    stages: tuple[int, ...]  #: block before which each choice was made
    #: per stage ``[B, N]`` over the original patch grid, row-major: 1 kept, 0 dropped (here or before).
    #: In training it carries the straight-through gradient; of a top-k selector that of kept patches alone.
    masks: tuple[Tensor, ...]
    num_prefix_tokens: int
    removes: bool = True  #: dropped patches leave the computation (False: they are zeroed and carried along)
    fuses: bool = False  #: a stage that drops patches of an image leaves one token in their place

    @property
    def counts(self) -> Tensor:
        """Kept patches ``[B, stages]``, whole numbers."""
        return torch.stack([(mask > 0.5).sum(dim=1) for mask in self.masks], dim=1)

    def kept(self, stage: int) -> list[Tensor]:
        """Per image, the ascending positions on the patch grid that stage number ``stage`` kept."""
        return [row.nonzero().flatten() for row in self.masks[stage] > 0.5]


def tokens_per_block(selection: Selection, depth: int) -> Tensor:
    """Tokens that enter each block, prefix and fused tokens included: ``[B, depth]``.

    Differentiable in the masks, so that a MACs formula over it can train the thresholds.
    """
    first = selection.masks[0]
    every = first.new_full((first.shape[0],), selection.num_prefix_tokens + first.shape[1])
    columns = []
    tokens = every
    fused = torch.zeros_like(every)
    before = torch.ones_like(first, dtype=torch.bool)
    for block in range(depth):
        if selection.removes and block in selection.stages:
            mask = selection.masks[selection.stages.index(block)]
            if selection.fuses:
                kept = mask.detach() > 0.5
                fused = fused + (before & ~kept).any(dim=1).to(fused.dtype)
                before = kept
            tokens = selection.num_prefix_tokens + mask.sum(dim=1) + fused
        columns.append(tokens)
    return torch.stack(columns, dim=1)
