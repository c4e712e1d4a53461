"""Which weights live and die together: single ones, blocks of them, or n of every m neighbours.

A pattern sees a weight as a matrix ``[out, the rest]``. ``RxC``: R neighbouring outputs by C neighbouring inputs are
one block, of which a single weight (``1x1``) is the smallest. A block is scored by the sum over its weights, and pruned
and grown as one (:func:`sparse_trainer.masks.prune_and_grow`). A worked example, blocks of ``2x1``, one of three to be
replaced::

    magnitude   1  5  2       sums   4  7  9     the least of the live blocks (1 and 2) is 4
                3  2  7       live   yes yes no  -> it goes, and the third, with the greatest gradient, comes

``n:m``: of every m neighbouring inputs of an output exactly n live, so a swap stays within its group of m.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_trainer.budget import largest_remainder
from sparse_trainer.masks import (
    OUT_OF_REACH,
    MaskChange,
    count_live,
    prune_and_grow,
    random_mask,
    replaceable,
    select_largest,
    select_smallest,
    taken_out,
    too_few,
)

_BLOCK = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")
_GROUP = re.compile(r"([1-9]\d?):([1-9]\d?)")


@dataclass(frozen=True)
class Pattern:
    """``RxC``, or ``n:m`` where :attr:`live` is given."""

    rows: int = 1
    columns: int = 1  #: of a block; or m
    live: int | None = None  #: n

    @property
    def size(self) -> int:
        """Weights that live and die together."""
        return 1 if self.live is not None else self.rows * self.columns

    @property
    def single(self) -> bool:
        """Whether every weight is on its own."""
        return self.live is None and self.size == 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}" if self.live is None else f"{self.live}:{self.columns}"

    def divides(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape falls into whole blocks or groups."""
        return shape[0] % self.rows == 0 and math.prod(shape[1:]) % self.columns == 0

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the blocks of a weight: ``[out / R, rest / C]``, float32."""
        flat = values.reshape(values.shape[0], -1)
        if self.size == 1:
            return flat.float()
        blocks = flat.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        return blocks.sum(dim=(1, 3), dtype=torch.float32)

    def whole(self, mask: Tensor) -> Tensor:
        """Which blocks are True in all their weights: bool, ``[out / R, rest / C]``."""
        flat = mask.reshape(mask.shape[0], -1)
        if self.size == 1:
            return flat
        return flat.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows)).all(dim=3).all(dim=1)

    def touched(self, mask: Tensor) -> Tensor:
        """Which blocks are True in any of their weights: bool, ``[out / R, rest / C]``."""
        return ~self.whole(~mask)

    def expand(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """A mask over blocks as one over the weights of ``shape``."""
        if self.size > 1:
            blocks = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return blocks.reshape(tuple(shape))

    def fits(self, mask: Tensor) -> bool:
        """Whether a mask is made of whole blocks, or has exactly n of every m."""
        if self.live is not None:
            return bool((mask.reshape(mask.shape[0], -1, self.columns).sum(dim=2) == self.live).all())
        return self.size == 1 or torch.equal(self.expand(self.whole(mask), mask.shape), mask)

    def first_mask(self, weight: Tensor, live: int, generator: torch.Generator | None) -> Tensor:
        """A mask with exactly ``live`` weights: drawn, or the greatest without a generator.

        Args:
            live: a multiple of :attr:`size`; for ``n:m`` what the pattern gives.
        """
        shape = tuple(weight.shape)
        if self.live is not None:
            score = (
                torch.rand(shape, generator=generator).to(weight.device)
                if generator is not None
                else weight.detach().abs().float()
            )
            groups = score.reshape(shape[0], -1, self.columns)
            kept = groups.argsort(dim=2, descending=True, stable=True)[..., : self.live]
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True).reshape(shape)
        if generator is not None:
            grid = (shape[0] // self.rows, math.prod(shape[1:]) // self.columns)
            return self.expand(random_mask(grid, live // self.size, generator), shape).to(weight.device)
        sums = self.sums(weight.detach().abs()).contiguous()
        return self.expand(select_largest(sums, torch.ones_like(sums, dtype=torch.bool), live // self.size)[0], shape)

    def update(
        self,
        weight: Tensor,
        live: Tensor,
        growth_score: Tensor,
        drop_fraction: float,
        *,
        fewer: int = 0,
        regrow: bool,
        eligible: Tensor | None,
    ) -> MaskChange:
        """One prune-and-grow of one layer: as :func:`~sparse_trainer.masks.prune_and_grow`, block by block.

        Args:
            fewer: weights that are live no more afterwards, whole blocks of them; 0 for ``n:m``.
        """
        if self.live is not None:
            return self._within_groups(weight, live, growth_score, drop_fraction, eligible)
        if self.size == 1:
            if eligible is not None and too_few(live, eligible, fewer):
                eligible, drop_fraction = None, 0.0
            count = replaceable(live, drop_fraction, eligible, fewer)
            return prune_and_grow(weight, live, growth_score, count, fewer=fewer, regrow=regrow, eligible=eligible)
        alive = self.whole(live)
        free = self.whole(eligible) if eligible is not None else None
        fewer //= self.size
        if free is not None and too_few(alive, free, fewer):
            free, drop_fraction = None, 0.0
        change = prune_and_grow(
            self.sums(weight.detach().abs()),
            alive,
            self.sums(growth_score),
            replaceable(alive, drop_fraction, free, fewer),
            fewer=fewer,
            regrow=regrow,
            eligible=free,
        )
        shape = live.shape
        after, removed, added = (self.expand(mask, shape) for mask in (change.live, change.removed, change.added))
        return MaskChange(after, removed, added, change.threshold)

    def _within_groups(
        self, weight: Tensor, live: Tensor, growth_score: Tensor, drop_fraction: float, eligible: Tensor | None
    ) -> MaskChange:
        """In each group the weakest live weight may give way to the dead one of greatest score; in the groups whose
        weakest weights are the weakest of all, they do."""

        def members(values: Tensor) -> Tensor:
            """One row for each place in a group, so that a group is a column: ``[m, groups]``."""
            return values.reshape(-1, self.columns).t().contiguous()

        def least(score: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
            """The least score of each group, and where it is first."""
            keyed = taken_out(score, among)
            smallest = keyed.amin(dim=0)
            return smallest, first_of(keyed == smallest)

        alive = members(live)
        dead = ~alive
        if eligible is not None:
            free = members(eligible)
            alive, dead = alive & free, dead & free
        magnitude, leaving = least(members(weight.detach().abs().float()), alive)
        score, coming = least(members(-growth_score.float()), dead)
        possible = (magnitude < OUT_OF_REACH) & (score < OUT_OF_REACH)
        count = min(round(drop_fraction * count_live(live)), count_live(possible))
        chosen, threshold = select_smallest(magnitude, possible, count)
        removed, added = ((where & chosen).t().reshape(live.shape) for where in (leaving, coming))
        return MaskChange((live & ~removed) | added, removed, added, threshold if count else 0.0)


def first_of(hits: Tensor) -> Tensor:
    """Of a bool ``[m, groups]`` the first True of each column alone."""
    first, seen = torch.zeros_like(hits), torch.zeros_like(hits[0])
    for row, hit in zip(first, hits, strict=True):
        torch.logical_and(hit, ~seen, out=row)
        seen |= hit
    return first


SINGLE = Pattern()


def read_pattern(text: str) -> Pattern:
    """``1x1``, ``16x1``, ``2:4``, ...

    Raises:
        ValueError: it is none.
    """
    block, group = _BLOCK.fullmatch(text), _GROUP.fullmatch(text)
    if block is not None:
        return Pattern(int(block[1]), int(block[2]))
    if group is not None and int(group[1]) < int(group[2]):
        return Pattern(1, int(group[2]), int(group[1]))
    raise ValueError(f"{text!r} is no pattern; such as 1x1, 16x1, 32x32 or 2:4")


def patterns_of(shapes: Mapping[str, Sequence[int]], pattern: Pattern) -> dict[str, Pattern]:
    """The pattern of each layer: single weights where it does not divide the shape."""
    return {name: pattern if pattern.divides(shape) else SINGLE for name, shape in shapes.items()}


class PatternBudgetError(ValueError):
    """A budget of live weights that a pattern cannot meet, and between which numbers it can."""

    def __init__(self, live: int, pattern: Pattern, least: int, most: int) -> None:
        super().__init__(
            f"pattern: a budget of {live:,} live weights cannot be met with {pattern}, which leaves {least:,} to "
            f"{most:,}"
        )
        self.least, self.most = least, most

    def of(self, total: int, available: int) -> ValueError:
        """The same for a user, who gives a share of the dense network.

        Args:
            total: prunable weights of the dense network.
            available: those that are left where heads and neurons are dormant.
        """
        middle = (self.least + self.most) / 2 / total
        rounded = (f"{middle:.{digits}g}" for digits in range(2, 18))
        works = next(density for density in rounded if self.least <= round(float(density) * total) <= self.most)
        dormant = f"; without dormant heads and neurons, which leave {available:,}, it would be more"
        return ValueError(f"{self} of {total:,}; give density={works}{dormant if available < total else ''}")


def whole_blocks(
    counts: Mapping[str, int], sizes: Mapping[str, int], patterns: dict[str, Pattern]
) -> tuple[dict[str, int], list[str]]:
    """Counts that are whole blocks, with the same sum; layers of single weights take up what is left.

    Args:
        counts: live weights by layer, as they were allocated.
        sizes: all weights by layer.
        patterns: by layer. Where all have blocks and the sum is no multiple of them, the smallest layer becomes one of
            single weights.

    Returns:
        the counts, and notes for the user.

    Raises:
        ValueError: the sum cannot be met.
    """
    notes = []
    total = sum(counts.values())
    if not any(p.single for p in patterns.values()) and not all(p.single for p in patterns.values()):
        blocks = {name: _to_blocks(counts[name], sizes[name], patterns[name]) for name in counts}
        if sum(blocks.values()) != total:
            smallest = min(sizes, key=lambda name: sizes[name])
            notes.append(f"pattern: {smallest} has single weights, so that the budget is met exactly")
            patterns[smallest] = SINGLE
    odd = [name for name, p in patterns.items() if p.single]
    if len(odd) == len(patterns):
        return dict(counts), notes
    result = {name: _to_blocks(counts[name], sizes[name], patterns[name]) for name in counts if name not in odd}
    pattern = next(p for p in patterns.values() if not p.single)
    least, most = len(odd), sum(sizes[name] for name in odd)

    def apart(singles: int) -> int:
        """Weights by which the layers of single weights would miss what they can take."""
        return max(least - singles, singles - most, 0)

    # Block by block, whole blocks come or go, the greatest layers first, until single weights can take the rest.
    while (gap := apart(total - sum(result.values()))) and pattern.live is None:
        grow = total - sum(result.values()) > most
        step = pattern.size if grow else -pattern.size
        movable = [n for n in result if (result[n] < sizes[n] if grow else result[n] > pattern.size)]
        if not movable or apart(total - sum(result.values()) - step) >= gap:
            break
        result[max(movable, key=lambda name: sizes[name] - result[name] if grow else result[name])] += step
    singles = total - sum(result.values())
    if apart(singles):
        raise PatternBudgetError(total, pattern, total - singles + least, total - singles + most)
    if not odd:
        return {name: result[name] for name in counts}, notes
    wanted = {name: counts[name] - 1 for name in odd}
    if not sum(wanted.values()):
        wanted = {name: sizes[name] for name in odd}
    share = (singles - least) / sum(wanted.values())
    ideal = {name: min(1 + share * wanted[name], float(sizes[name])) for name in odd}
    taken = largest_remainder(ideal, singles, {name: sizes[name] for name in odd})
    return {name: taken[name] if name in taken else result[name] for name in counts}, notes


def _to_blocks(count: int, size: int, pattern: Pattern) -> int:
    if pattern.live is not None:
        return size // pattern.columns * pattern.live
    return max(1, min(size // pattern.size, round(count / pattern.size))) * pattern.size
