"""From scores to changed masks: which weights are pruned and which grow, in one layer or over all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_trainer.masks import MaskChange, count_live, largest_per_segment, prune_and_grow, too_few
from sparse_trainer.patterns import Pattern


def choose(
    pattern: Pattern,
    weight: Tensor,
    mask: Tensor,
    score: Tensor | None,
    drop_fraction: float,
    *,
    fewer: int = 0,
    regrow: bool,
    eligible: Tensor | None = None,
) -> MaskChange:
    """What changes in one layer; nothing is replaced where there is no score.

    Args:
        score: what ranks the dead elements.
        fewer: weights that are live no more afterwards; negative for more of them.
        eligible: bool mask of the elements that may change; None for all.
    """
    if score is None and not fewer:
        return MaskChange(mask.clone(), torch.zeros_like(mask), torch.zeros_like(mask), 0.0)
    if score is None:  # the budget falls all the same
        score, drop_fraction = torch.zeros_like(weight, dtype=torch.float32), 0.0
    return pattern.update(weight, mask, score, drop_fraction, fewer=fewer, regrow=regrow, eligible=eligible)


def choose_globally(
    pattern: Pattern,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor | None],
    floors: Mapping[str, float],
    drop_fraction: float,
    *,
    fewer: int = 0,
    regrow: bool,
    eligible: Mapping[str, Tensor],
) -> dict[str, MaskChange]:
    """One magnitude threshold and one gradient threshold over all layers of a pattern.

    Args:
        weights: of the layers that have the pattern; everything else by the same names.
        scores: as for :func:`choose`.
        floors: live elements below which no layer falls.
        fewer: weights that are live no more afterwards, over all these layers.
        eligible: bool masks of the elements that may change; all of a layer that is not named.
    """
    if pattern.live is not None:  # their budget is fixed group by group
        return {
            name: choose(
                pattern, weight, masks[name], scores[name], drop_fraction, regrow=regrow, eligible=eligible.get(name)
            )
            for name, weight in weights.items()
        }
    alive = {name: pattern.whole(masks[name]) for name in weights}
    magnitude = torch.cat([pattern.sums(weight.abs()).reshape(-1) for weight in weights.values()])
    live = torch.cat([mask.reshape(-1) for mask in alive.values()])
    score, inside = _ranked(pattern, masks, scores, alive, eligible)
    sizes = [mask.numel() for mask in alive.values()]
    # The strongest weights of each layer, up to its floor, are not up for pruning.
    safe = [min(max(1, int(floors[name] / pattern.size)), count_live(mask)) for name, mask in alive.items()]
    kept = largest_per_segment(magnitude, live, sizes, safe) & live
    fewer //= pattern.size
    if too_few(live, inside & ~kept, fewer):
        inside, drop_fraction = torch.ones_like(inside), 0.0
    inside = inside & ~kept
    count = max(
        0,
        min(
            round(drop_fraction * (count_live(live) - max(fewer, 0))),
            count_live(live & inside) - max(fewer, 0),
            count_live(inside & ~live) + min(fewer, 0),
        ),
    )
    change = prune_and_grow(magnitude, live, score, count, fewer=fewer, regrow=regrow, eligible=inside)
    parts = zip(
        alive,
        change.live.split(sizes),
        change.removed.split(sizes),
        change.added.split(sizes),
        strict=True,
    )
    result = {}
    for name, *changed in parts:
        shape, grid = masks[name].shape, alive[name].shape
        after, removed, added = (pattern.expand(mask.view(grid), shape) for mask in changed)
        result[name] = MaskChange(after, removed, added, change.threshold)
    return result


def _ranked(
    pattern: Pattern,
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor | None],
    alive: Mapping[str, Tensor],
    eligible: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The scores of all layers one after the other, and which elements may change: none of a layer without a score."""
    ranks, inside = [], []
    for name, live in alive.items():
        score = scores[name]
        if score is None:
            ranks.append(torch.zeros(live.numel(), device=live.device))
            inside.append(torch.zeros_like(live).reshape(-1))
        else:
            ranks.append(pattern.sums(score).reshape(-1))
            inside.append(pattern.whole(eligible.get(name, torch.ones_like(masks[name]))).reshape(-1))
    return torch.cat(ranks), torch.cat(inside)
