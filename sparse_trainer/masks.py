"""Prune by magnitude, grow by score, at exact counts. Tensors in, masks out. START HERE.

This file is the whole idea of dynamic sparse training (SET, Mocanu et al. 2018; RigL, Evci et al. 2020;
SViTE, Chen et al. 2021): every so often the live elements of least magnitude are pruned and as many dead
elements of greatest gradient are grown, so the number of live elements never changes. *How many* is decided
in :mod:`sparse_trainer.budget`, *when* in :mod:`sparse_trainer.update_schedule`; here it is *which*.

A worked example, one layer of six weights, three live, one third of them to be replaced::

    weight        0.5   -0.1    0.9    0      0      0
    live          yes   yes     yes    no     no     no
    |gradient|    .       .       .    0.2    0.7    0.3

    prune 1       0.5   -0.1    0.9    0      0      0      the least magnitude among the live is 0.1
                  yes    no     yes    no     no     no
    grow 1        0.5    0      0.9    0      0      0      the greatest gradient among the dead is 0.7
                  yes    no     yes    no    yes     no     three are live, as before; a grown weight starts at 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class MaskChange:
    """The outcome of one prune-and-grow of one mask."""

    live: Tensor  #: bool, the mask after the update; as many True as before, unless the budget falls
    removed: Tensor  #: bool, live before and dead now
    added: Tensor  #: bool, dead before and live now
    threshold: float  #: greatest magnitude among the pruned (also of one that grew back); 0 if none was


def random_mask(shape: Sequence[int], live: int, generator: torch.Generator) -> Tensor:
    """A bool mask of ``shape`` with exactly ``live`` True, drawn uniformly.

    A Bernoulli draw would miss the budget by about ``sqrt(live)``; a permutation meets it exactly. It is drawn
    on the CPU, so that a seed means the same mask on every device.

    Raises:
        ValueError: if ``live`` is negative or greater than the number of elements.
    """
    total = int(np.prod(shape))
    if not 0 <= live <= total:
        raise ValueError(f"a mask of {total:,} elements cannot have {live:,} live ones")
    mask = torch.zeros(total, dtype=torch.bool)
    mask[torch.randperm(total, generator=generator)[:live]] = True
    return mask.view(*shape)


def prune_and_grow(
    weight: Tensor,
    live: Tensor,
    growth_score: Tensor,
    count: int,
    *,
    fewer: int = 0,
    regrow: bool = True,
    eligible: Tensor | None = None,
) -> MaskChange:
    """Prune the ``count`` live elements of least magnitude, grow the ``count`` dead ones of greatest score.

    Args:
        weight: any shape.
        live: bool, same shape: the mask before the update.
        growth_score: same shape, finite; magnitude of the mean gradient (RigL) or a random draw (SET).
        count: how many to replace; at most :func:`replaceable`.
        fewer: how many elements fewer are live afterwards, where the budget falls: so many more are pruned. If it is
            negative so many more grow.
        regrow: whether an element that this update prunes may grow again in it. It then keeps its value and
            has not changed sides, so it appears neither in ``removed`` nor in ``added``.
        eligible: bool, same shape: only these elements may be pruned or grown. All, if None.
    """
    prunable = live if eligible is None else live & eligible
    magnitude = weight.detach().abs().float()
    pruned, threshold = select_smallest(magnitude, prunable, count + max(fewer, 0))
    candidates = ~live if eligible is None else eligible & ~live
    if regrow:
        candidates = candidates | pruned
    grown, _ = select_largest(growth_score, candidates, count + max(-fewer, 0))
    after = (live & ~pruned) | grown
    threshold = threshold if math.isfinite(threshold) else 0.0
    return MaskChange(live=after, removed=live & ~after, added=after & ~live, threshold=threshold)


def replaceable(live: Tensor, drop_fraction: float, eligible: Tensor | None = None, fewer: int = 0) -> int:
    """How many elements one update replaces: ``round(drop_fraction * live)``, bounded by the dead ones.

    The bound keeps the count exact where there are fewer dead elements than the drop fraction asks for.

    Args:
        fewer: how many elements fewer are live afterwards; negative for more. The share is of what then is live.
    """
    if eligible is None:
        alive = count_live(live)
        dead = live.numel() - alive
    else:
        alive = count_live(live & eligible)
        dead = count_live(eligible) - alive
    return max(0, min(round(drop_fraction * (alive - max(fewer, 0))), dead + min(fewer, 0)))


def too_few(live: Tensor, eligible: Tensor, fewer: int) -> bool:
    """Whether the budget asks for more changes than ``eligible`` elements can make.

    It comes first: all may change then, but nothing beyond what it asks for.

    Args:
        fewer: how many elements fewer are live afterwards; negative for more.
    """
    return fewer > count_live(live & eligible) or -fewer > count_live(eligible & ~live)


def select_smallest(score: Tensor, among: Tensor, count: int) -> tuple[Tensor, float]:
    """The ``count`` elements of least ``score`` within ``among``: a bool mask, and the greatest score taken.

    Of equal scores the one with the lower row-major index is taken. ``score < threshold`` alone would take too
    few and ``score <= threshold`` too many whenever scores tie, as gradients that are exactly 0 do, and the
    budget would drift; and without a fixed order two processes could choose differently.

    Raises:
        ValueError: if fewer than ``count`` elements are within ``among``.
    """
    if count == 0:
        return torch.zeros_like(among), float("-inf")
    if score.device.type == "cpu":
        selected, threshold = _smallest_on_host(score, among, count)
    else:
        selected, threshold = _smallest_on_device(score, among, count)
    if threshold >= OUT_OF_REACH:
        raise ValueError(f"cannot select {count:,} of {count_live(among):,} finite elements")
    return selected.view(among.shape), threshold


def taken_out(score: Tensor, among: Tensor) -> Tensor:
    """A score, out of reach where ``among`` is False; NumPy's products are several times faster on a CPU."""
    if score.device.type != "cpu":
        return torch.where(among, score, OUT_OF_REACH)
    keyed = np.multiply(~among.numpy(), OUT_OF_REACH, dtype=np.float32)
    keyed += score.numpy()
    return torch.from_numpy(keyed)


def _smallest_on_host(score: Tensor, among: Tensor, count: int) -> tuple[Tensor, float]:
    """In NumPy, whose partition, comparisons and products use vector instructions: several times faster."""
    keyed = taken_out(score.reshape(-1), among.reshape(-1)).numpy()
    threshold = np.partition(keyed, count - 1)[count - 1]
    selected = keyed < threshold
    ties = np.flatnonzero(keyed == threshold)
    selected[ties[: count - np.count_nonzero(selected)]] = True
    return torch.from_numpy(selected), float(threshold)


def _smallest_on_device(score: Tensor, among: Tensor, count: int) -> tuple[Tensor, float]:
    keyed = taken_out(score, among).reshape(-1)
    # On a GPU kthvalue works with one block of threads, topk with all of them; and nothing here makes the host wait but
    # the threshold itself.
    threshold = keyed.topk(count, largest=False, sorted=False).values.amax()
    selected = keyed < threshold
    ties = keyed == threshold
    missing = count - selected.count_nonzero()
    return selected | (ties & (ties.cumsum(0) <= missing)), float(threshold)


def select_largest(score: Tensor, among: Tensor, count: int) -> tuple[Tensor, float]:
    """Like :func:`select_smallest`, for the greatest scores; of equal ones again the lower index."""
    selected, threshold = select_smallest(-score, among, count)
    return selected, -threshold


def largest_per_segment(score: Tensor, among: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The ``counts[i]`` greatest elements of the i-th of consecutive segments of a flat tensor, as a bool mask."""
    parts = zip(score.split(list(sizes)), among.split(list(sizes)), counts, strict=True)
    return torch.cat([select_largest(segment, inside, count)[0] for segment, inside, count in parts])


def count_live(mask: Tensor) -> int:
    """How many elements of a bool mask are True (NumPy's count is the faster one on a CPU)."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def count_dead_nonzero(tensor: Tensor, live: Tensor) -> int | Tensor:
    """How many elements of ``tensor`` are not 0 where ``live`` is False; on a device a scalar nobody waits for."""
    if tensor.device.type == "cpu":
        values = tensor.detach()
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()  # NumPy has no bfloat16
        return int(np.count_nonzero(np.greater(values.numpy() != 0, live.numpy())))
    return ((tensor.detach() != 0) & ~live).count_nonzero()


@torch.no_grad()
def kill_dead(weight: Tensor, live: Tensor) -> None:
    """Set ``weight`` to exactly +0 where ``live`` is False, in place, whatever it was: -1, NaN, infinity.

    A product of floats would leave -0 and NaN. One of the bits, read as integers, does not, and is eight times faster
    than ``masked_fill_`` on a CPU.
    """
    weight.detach().view(_BITS[weight.element_size()]).mul_(live)


def zero_dead(tensor: Tensor, live: Tensor) -> None:
    """Set ``tensor`` to 0 where ``live`` is False, in place.

    NumPy multiplies a float by a bool two to three times faster than torch does on a CPU. It does so behind
    autograd's back, so this is for gradients, moments and averages, not for what a graph may still hold.
    """
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous():
        values = tensor.detach().numpy()
        with np.errstate(invalid="ignore"):  # an overflow stays visible as NaN, to GradScaler above all
            np.multiply(values, live.numpy(), out=values)
    else:
        tensor.mul_(live)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask of any shape as bytes on the CPU: uint8 ``[ceil(numel / 8)]``.

    Element ``i`` in row-major order is bit ``i % 8`` of byte ``i // 8``, least significant first; the bits after
    the last element are 0.
    """
    flat = mask.detach().reshape(-1)
    if flat.device.type != "cpu":
        return _packed_on_device(flat).cpu()
    return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def _packed_on_device(flat: Tensor) -> Tensor:
    """Where the mask is, so that an eighth of it travels."""
    bits = F.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    worth = 2 ** torch.arange(8, device=flat.device)
    return (bits * worth.to(torch.uint8)).sum(dim=1, dtype=torch.int32).to(torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: a flat bool mask ``[numel]`` on the CPU.

    Raises:
        ValueError: if the number of bytes does not go with ``numel``, or a bit after the last element is set.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != (numel + 7) // 8:
        raise ValueError(
            f"a mask of {numel:,} elements takes {(numel + 7) // 8:,} bytes, got {packed.dtype} {tuple(packed.shape)}"
        )
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if bits[numel:].any():
        raise ValueError(f"bits are set after the last of {numel:,} mask elements")
    return torch.from_numpy(bits[:numel]).view(torch.bool)


def count_bits(packed: Tensor) -> int:
    """How many bits are set in a uint8 tensor on the CPU."""
    return int(_BITS_IN_BYTE[packed.numpy()].sum(dtype=np.int64))


OUT_OF_REACH = float(np.float32(1e38))
"""Scores are far below: added to one, it takes the element out."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)
