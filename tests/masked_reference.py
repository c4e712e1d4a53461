"""Masked training as the formulas of AS-ViT say it: every token computed, every matrix of attention in memory.

Slow, plain, and differentiable in the mask at any value of it: what training on a sheet is compared with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models import Selection
from models.blocks import attend_scored, run_block
from models.scores import at_least_float32, head_weighted_scores


def masked_attention_weights(logits: Tensor, mask: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Attention that looks only at the kept tokens (and a token at itself), differentiable in the mask.

    ``(exp(a_ij - max) G_ij + eps / N) / (sum_k exp(a_ik - max) G_ik + eps)`` with ``G_ij = M_j`` and
    ``G_ii = 1`` (AS-ViT). For a hard mask it equals, up to ``eps``, the softmax over the kept tokens.

    Args:
        logits: scaled scores ``[B, H, N, N]``.
        mask: ``[B, N]``, 1 kept and 0 dropped.

    Returns:
        ``[B, H, N, N]``, in at least float32.
    """
    logits = at_least_float32(logits)
    tokens = logits.shape[-1]
    itself = torch.eye(tokens, dtype=torch.bool, device=logits.device)
    gate = torch.where(itself, 1.0, mask[:, None, None, :].to(logits.dtype))
    # The maximum over what is kept: a large dropped score must not push the kept ones down to eps. What a
    # dropped token would weigh is bounded by 1 / eps, and with it the gradient that its mask receives.
    greatest = logits.detach().masked_fill(gate <= 0.5, -torch.inf).amax(dim=-1, keepdim=True)
    weights = (logits - greatest).clamp(max=-math.log(epsilon)).exp() * gate
    return (weights + epsilon / tokens) / (weights.sum(dim=-1, keepdim=True) + epsilon)


def masked_training(model: Any, images: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Selection]:
    """Logits ``[B, classes]`` and the selection of a model with a threshold selector."""
    selector, prefix = model.selector, model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    patches = x.shape[1] - prefix
    masks: list[Tensor] = []
    fused = x.new_ones(len(x), 0)  # which images have the fused token of each stage
    for number, block in enumerate(model.blocks):
        scored = number + 1 in selector.stages
        if not masks and not scored:
            x = block(x)
            continue
        mask = torch.cat([x.new_ones(len(x), prefix), masks[-1], fused], dim=1) if masks else None

        def attend_to(
            query: Tensor, key: Tensor, value: Tensor, block: Any = block, mask: Tensor | None = mask
        ) -> tuple[Tensor, Tensor | None]:
            if mask is None:
                return attend_scored(block.attn, query, key, value, prefix=prefix)
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            logits = q @ k.transpose(-2, -1) * query.shape[-1] ** -0.5
            weights = masked_attention_weights(logits, mask, epsilon)
            context = (weights.to(value.dtype) @ v).transpose(1, 2)
            class_row = weights[:, :, 0].transpose(1, 2)
            return context, head_weighted_scores(class_row[:, prefix:], context[:, prefix:], prefix + patches)

        x, scores = run_block(block, x, attend_to)
        if scored:
            assert scores is not None
            scores = scores[:, :patches]
            live = masks[-1] > 0.5 if masks else torch.ones_like(scores, dtype=torch.bool)
            masks.append(selector(scores, masks[-1] if masks else None, len(masks)))
            if selector.config.dropped == "fused":
                token, any_dropped = fused_token(x[:, prefix : prefix + patches], scores, masks[-1], live)
                x = torch.cat([x, token], dim=1)
                fused = torch.cat([fused, any_dropped.to(x.dtype)], dim=1)
    logits = model.forward_head(model.norm(x[:, :prefix]))
    return logits, Selection(selector.stages, tuple(masks), prefix, fuses=selector.config.dropped == "fused")


def fused_token(x: Tensor, scores: Tensor, mask: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """The token of a stage ``[B, 1, C]``, and whether an image has one ``[B, 1]``. To the mask of a kept patch it tells
    how the token would change if the patch were dropped, by doing it; to that of a dropped one its share of the token.
    """

    def mean(kept: Tensor) -> Tensor:
        weights = torch.where(live & (kept <= 0.5), scores + 1e-8, 0.0)
        total = weights.sum(dim=1, keepdim=True)
        return ((weights / torch.where(total == 0, 1.0, total))[:, :, None] * x).sum(dim=1)

    token, hard = mean(mask), (mask > 0.5).to(mask.dtype)
    dropped = live & (hard <= 0.5)
    share = torch.where(dropped, scores + 1e-8, 0.0)
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-30)
    for patch in range(mask.shape[1]):
        without = hard.clone()
        without[:, patch] = 0.0
        moved = torch.where(
            dropped[:, patch, None], share[:, patch, None] * (x[:, patch] - token), mean(without) - token
        ).detach()
        slope = torch.where(live[:, patch, None], moved, 0.0)
        token = token - (mask[:, patch] - hard[:, patch])[:, None] * slope
    return token[:, None], dropped.any(dim=1, keepdim=True)
