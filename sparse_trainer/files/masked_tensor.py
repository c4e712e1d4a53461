"""A masked tensor as a sparse checkpoint stores it: its live values, and a mask of one bit per block.

A block is what lives and dies together. Where a mask came from a pattern (:mod:`sparse_trainer.patterns`), it is found
again in the mask itself: the greatest ``R`` and ``C``, up to 32 each, such that all masks over ``R`` rows by ``C``
columns are equal. A worked example, blocks of ``2x1``::

    mask    1 0 1 0        bits of the blocks    1 0 1 0 | 0 0 1 1
            1 0 1 0
            0 0 1 1        -> one byte, 4 + 1 + 64 + 128 = 197, beside "blocks": [2, 1]
            0 0 1 1
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparse_trainer.files.rebuild import describe
from sparse_trainer.files.tensor_file import CheckpointError, fault, quote
from sparse_trainer.masks import count_live, pack_bits, unpack_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIDE = 32
"""Rows or columns of a block, so that a small file cannot claim a tensor beyond all measure."""

Block = tuple[int, int]


def block_of(mask: Tensor) -> Block:
    """The greatest block of which a mask is made: its rows and columns.

    Args:
        mask: bool; the first dimension are its rows, all others its columns.
    """
    live = count_live(mask.detach())
    if not mask.ndim or live in (0, mask.numel()):  # nothing dies here, or nothing lives: that is no pattern
        return 1, 1
    matrix = mask.detach().cpu().contiguous().reshape(mask.shape[0], -1).numpy()
    return _common_run(matrix), _common_run(matrix.T)


def _common_run(matrix: np.ndarray) -> int:
    """How many equal rows always follow one another."""
    changes = (matrix[1:] != matrix[:-1]).any(axis=1).nonzero()[0] + 1
    run = math.gcd(len(matrix), *changes.tolist())
    return next(side for side in range(min(run, MAX_SIDE), 0, -1) if run % side == 0)


def pack(name: str, tensor: Tensor, mask: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Block]:
    """A masked tensor as it is stored: values, the bits of its blocks, and what a block is.

    Raises:
        ValueError: a dead element is not exactly 0, or a value is not finite in its dtype.
    """
    values = _gather(tensor, mask)
    lost = _count_nonzero(tensor) - _count_nonzero(values)
    if lost:
        raise ValueError(f"{name}: {lost:,} dead elements are not exactly 0 and would be lost")
    rows, columns = block = block_of(mask)
    if block != (1, 1):
        mask = mask.reshape(mask.shape[0], -1)[::rows, ::columns].contiguous()
    return convert(name, values, dtype), pack_bits(mask), block


def convert(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is stored: of ``dtype``, if that is given and it is floating, and finite."""
    if not tensor.is_floating_point():
        return tensor
    converted = tensor if dtype is None else tensor.to(dtype)
    if converted.dtype not in DTYPES:
        raise ValueError(f"{name}: is {tensor.dtype}; give a dtype among {', '.join(map(str, DTYPES))}")
    if not _is_finite(converted):
        raise ValueError(f"{name}: holds NaN or infinity in {converted.dtype}, so it cannot be deployed")
    return converted


def unpack(
    path: str | os.PathLike[str], name: str, values: Tensor, packed: Tensor, shape: Sequence[int], block: Block = (1, 1)
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`: tensor and mask.

    Raises:
        CheckpointError: if the parts do not agree.
    """
    rows, columns = block
    if block != (1, 1) and not (shape and shape[0] % rows == 0 and math.prod(shape[1:]) % columns == 0):
        raise fault(path, f"the blocks of {quote(name)}", expected=f"sides that divide {shape}", found=f"{block}")
    numel = math.prod(shape) // (rows * columns)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != ((numel + 7) // 8,):
        expected = f"{(numel + 7) // 8:,} bytes for shape {tuple(shape)}"
        raise fault(path, f"{quote(name)}.mask", expected=expected, found=describe(packed))
    try:
        mask = unpack_bits(packed, numel)
    except ValueError as error:
        raise CheckpointError(f"{path}: {quote(name)}.mask: {error}") from error
    live = count_live(mask) * rows * columns
    if not values.is_floating_point() or tuple(values.shape) != (live,):
        expected = f"{live:,} values, one for each live element of its mask"
        raise fault(path, f"{quote(name)}.values", expected=expected, found=describe(values))
    check_values(path, name, values)
    if block != (1, 1):
        grid = mask.view(shape[0] // rows, -1)
        mask = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1).reshape(-1)
    return _scatter(values, mask).view(tuple(shape)), mask.view(tuple(shape))


# NumPy finds and moves the live elements about five times faster than torch's boolean indexing on a CPU.
# It has no bfloat16, whose bits travel as integers.


def _gather(tensor: Tensor, mask: Tensor) -> Tensor:
    """The elements of ``tensor`` where ``mask`` is True, in row-major order."""
    flat = tensor.contiguous().view(-1)
    live = np.flatnonzero(mask.detach().cpu().contiguous().numpy())
    return torch.from_numpy(_as_array(flat).take(live)).view(flat.dtype)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of :func:`_gather` for a flat mask: zeros where it is False."""
    dense = torch.zeros(mask.numel(), dtype=values.dtype)
    _as_array(dense)[np.flatnonzero(mask.numpy())] = _as_array(values)
    return dense


def _count_nonzero(tensor: Tensor) -> int:
    array = _as_array(tensor.contiguous())
    # The first bit is the sign of a 16-bit number: -0.0 is zero too.
    return int(np.count_nonzero(array << 1 if array.dtype == np.int16 else array != 0))


def _as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor; 16-bit numbers as integers, in which NumPy is also faster."""
    return (tensor.view(torch.int16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def _is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity in it; both show in the extremes."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_values(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    """A stored tensor is of a dtype that is deployed, and finite.

    Raises:
        CheckpointError: it is not.
    """
    if tensor.is_floating_point() and tensor.dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES))
        raise fault(path, f"the dtype of {quote(name)}", expected=allowed, found=tensor.dtype)
    if not _is_finite(tensor):
        raise fault(path, f"the values of {quote(name)}", expected="finite numbers", found="NaN or infinity")
