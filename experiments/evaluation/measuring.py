"""What a model achieves on images it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data.batches import EvalBatches
from experiments.evaluation.precision import Autocast
from experiments.processes.processes import ALONE, Processes
from models import tokens_per_block
from models.choosing import kept_count
from models.top_k_selector import TopKSelector
from sparse_trainer.flops import Count, count
from sparse_trainer.units import find_blocks


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Images, summed loss, right at the first guess, right within five: float64 ``[4]`` on the logits' device.

    Args:
        logits: ``[B, K]``; with fewer than five classes all of them are guesses.
        targets: class numbers ``[B]``.
    """
    logits = logits.float()
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    guesses = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
    counts = (torch.full_like(loss, len(targets)), loss, guesses[:, 0].sum(), guesses.sum())
    return torch.stack([count.double() for count in counts])


@dataclass(frozen=True)
class TokenUse:
    """How many tokens the images of a set kept."""

    stages: tuple[int, ...]  #: block before which each choice is made
    patches: int  #: of an image
    kept: tuple[float, ...]  #: mean patches kept, per stage
    mean: tuple[float, ...]  #: mean tokens entering each block, prefix tokens included
    mean_square: tuple[float, ...]  #: mean of their squares: attention costs the square of every image's own number

    def metrics(self) -> dict[str, float]:
        """The means by name: ``tokens_kept/<block>``."""
        return {f"tokens_kept/{stage}": kept for stage, kept in zip(self.stages, self.kept, strict=True)}


def known_tokens(model: nn.Module, *, training: bool = False) -> TokenUse | None:
    """What a top-k selector keeps of every image, whatever it shows; None for other models.

    Args:
        training: at this moment in training, which differs from evaluation on a ramp.
    """
    selector = getattr(model, "selector", None)
    if not isinstance(selector, TopKSelector):
        return None
    ratio = selector.keep_ratio if training else selector.config.keep_ratio
    vit = cast(Any, model)
    prefix, patches = int(vit.num_prefix_tokens), int(vit.patch_embed.num_patches)
    kept: list[int] = []
    entering: list[float] = []
    tokens, fused = patches, 0
    for block in range(len(vit.blocks)):
        if block in selector.stages:
            kept.append(kept_count(ratio, tokens))
            fused += selector.config.dropped == "fused" and kept[-1] < tokens
            tokens = patches if selector.config.zeroing else kept[-1]
        entering.append(float(prefix + tokens + fused))
    squares = tuple(count**2 for count in entering)
    return TokenUse(selector.stages, patches, tuple(map(float, kept)), tuple(entering), squares)


def describe_tokens(tokens: TokenUse) -> str:
    """For a table: what each stage leaves of an image, on the mean."""
    return ", ".join(
        f"{kept:.1f} of {tokens.patches} ({kept / tokens.patches:.0%}) before block {stage}"
        for stage, kept in zip(tokens.stages, tokens.kept, strict=True)
    )


#: Evaluation may compute a few points more than was asked of training images, whose black borders are dropped first.
NEAR = 0.08


def missed_target(computed: float, target: float, tokens: TokenUse) -> str | None:
    """What to try where thresholds ended far from their target; None where they are near.

    Args:
        computed: share of the dense MACs that evaluation computes.
        target: ``losses.macs_target``.
        tokens: what the images keep.
    """
    if abs(computed - target) <= NEAR:
        return None
    before = (float(tokens.patches), *tokens.kept)
    if computed > target:
        where, way, idle, start = "above", "raise losses.macs_weight, or train for longer", "drop nothing", "greater"
        stuck = [
            s for s, former, kept in zip(tokens.stages, before, tokens.kept, strict=False) if kept > 0.999 * former
        ]
    else:
        where, way, idle, start = "below", "lower optimizer.threshold_lr_scale", "keep one patch", "smaller"
        stuck = [s for s, kept in zip(tokens.stages, tokens.kept, strict=True) if kept < 1.001]
    if stuck:
        way += (
            f"; the thresholds before block {', '.join(map(str, stuck))} {idle}, where they hardly learn: start with "
            f"{start} selector.thresholds"
        )
    return f"{computed:.1%} of the dense MACs are computed, far {where} losses.macs_target ({target:.1%}): {way}"


@dataclass(frozen=True)
class Measured:
    """What a model achieved on a set of images."""

    metrics: dict[str, float]  #: ``top1`` and ``top5`` in percent, ``loss``, ``images``; ``tokens_kept/<block>``
    tokens: TokenUse | None  #: None without a selector
    kept: Tensor | None  #: patches kept ``[N, stages]`` of each image, whichever process saw it


def count_used(
    model: nn.Module, masks: Mapping[str, Tensor], tokens: TokenUse | None, input_size: tuple[int, int, int]
) -> Count:
    """Parameters, and mean MACs of one image with the tokens that images keep.

    Args:
        tokens: measured; None counts all tokens.
        input_size: ``(C, H, W)``, for a model that is not one of timm's VisionTransformers.
    """
    if tokens is None:
        try:
            return count(model, masks)
        except ValueError:  # counted on a run without memory
            return count(model, masks, input_size=input_size)
    found = count(model, masks, tokens=tokens.mean)
    layers = dict(found.layers)
    for name, mean, square in zip(find_blocks(model), tokens.mean, tokens.mean_square, strict=True):
        # It was counted with the square of the mean, and images differ.
        attention, ratio = layers[f"{name}.attn"], square / mean**2
        layers[f"{name}.attn"] = replace(attention, macs=attention.macs * ratio, live_macs=attention.live_macs * ratio)
    return replace(
        found,
        macs=sum(layer.macs for layer in layers.values()),
        live_macs=sum(layer.live_macs for layer in layers.values()),
        layers=layers,
    )


class MeasuringStopped(Exception):
    """Someone asked to end before all images were seen."""


@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: EvalBatches,
    autocast: Autocast,
    processes: Processes = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Accuracy, loss and kept tokens over all images, each counted once over all processes.

    Every process ends with the same numbers, one that has no image too.

    Args:
        stop: asked before each batch whether to leave it at that.

    Raises:
        MeasuringStopped: on all processes, if ``stop`` said so on any.
        ValueError: there was no image.
    """
    was_training = model.training
    model.eval()
    selector = cast(Any, getattr(model, "selector", None))
    depth = len(find_blocks(model)) if selector is not None else 0
    stages: tuple[int, ...] = selector.stages if selector is not None else ()
    total: Tensor | None = None
    kept: list[Tensor] = []
    stopped = False
    for images, targets in batches.batches():
        if stop():
            stopped = True
            break
        with autocast():
            logits, selection = model(images, return_selection=True) if selector is not None else (model(images), None)
        sums = [count_correct(logits, targets)]
        if selection is not None:
            kept.append(selection.counts)
            tokens = tokens_per_block(selection, depth).double()
            sums += [kept[-1].sum(dim=0).double(), tokens.sum(dim=0), tokens.square().sum(dim=0)]
        total = torch.cat(sums) if total is None else total + torch.cat(sums)
    model.train(was_training)
    if total is None:
        size = 4 + len(stages) + 2 * depth
        total = torch.zeros(size, dtype=torch.float64, device=next(model.parameters()).device)
    stops, images_seen, *sums_seen = processes.sum(torch.cat([total.new_full((1,), stopped), total])).tolist()
    if stops:
        raise MeasuringStopped
    if images_seen == 0:
        raise ValueError("data.eval_split: there is no image to evaluate on")
    loss, top1, top5, *token_sums = sums_seen
    metrics = {
        "top1": 100 * top1 / images_seen,
        "top5": 100 * top5 / images_seen,
        "loss": loss / images_seen,
        "images": int(images_seen),
    }
    if selector is None:
        return Measured(metrics, None, None)
    means = [value / images_seen for value in token_sums]
    use = TokenUse(
        stages=stages,
        patches=int(cast(Any, model).patch_embed.num_patches),
        kept=tuple(means[: len(stages)]),
        mean=tuple(means[len(stages) : len(stages) + depth]),
        mean_square=tuple(means[len(stages) + depth :]),
    )
    own = torch.cat(kept) if kept else torch.empty(0, len(stages), dtype=torch.int64, device=total.device)
    return Measured({**metrics, **use.metrics()}, use, processes.rows(own))
