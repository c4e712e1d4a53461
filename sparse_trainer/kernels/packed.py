"""A sparse weight as a kernel reads it: the live weights and their places, and the product of a sheet with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_trainer.kernels.library import Library

ROWS = (32, 16, 8, 4)
"""Heights of blocks that have a kernel."""
TILES = (14, 13, 12, 10, 8, 6, 4)
"""Tokens that a kernel for blocks may hold in registers."""
OVERHEAD = 1.2
"""What a tile costs beside its tokens, in tokens: the load of the weights, once for all of them."""
REGISTERS_OF_TOKENS = 2
"""Vector registers of tokens that the kernel for any mask works on."""
ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Packed:
    """The live weights of ``[out, in]``.

    With ``rows`` of 1, output ``o`` has the weights ``values[starts[o]:starts[o + 1]]`` at ``columns`` of the same
    range. With more, ``o`` is a block of ``rows`` outputs, and ``values`` are ``[n, rows]``.
    """

    values: Tensor  #: float32
    columns: Tensor  #: int32
    starts: Tensor  #: int64
    bias: Tensor | None  #: float32, padded to whole blocks
    rows: int
    outputs: int
    inputs: int

    @property
    def density(self) -> float:
        """Stored over all weights; those of a block that reach over the last output are not counted."""
        return self.values.numel() / (self.inputs * (len(self.starts) - 1) * self.rows)


def block_rows(mask: Tensor) -> int:
    """The greatest height of blocks that the mask consists of: neighbouring outputs with the same live inputs.

    Args:
        mask: bool, ``[out, in]``.

    Returns:
        a number of :data:`ROWS`, or 1.
    """
    for rows in ROWS:
        if mask.shape[0] % rows == 0 and mask.shape[0] >= rows:
            blocks = mask.view(-1, rows, mask.shape[1])
            if bool((blocks == blocks[:, :1]).all()):
                return rows
    return 1


def pack(weight: Tensor, mask: Tensor, bias: Tensor | None = None, rows: int | None = None) -> Packed:
    """Take the live weights of a matrix.

    Args:
        weight: ``[out, in]``, on the CPU.
        mask: bool, the same shape.
        rows: height of the blocks; found out from the mask if None. Where a block is live in part, its dead weights are
            stored as the 0 that they are.
    """
    outputs, inputs = weight.shape
    rows = block_rows(mask) if rows is None else rows
    blocks = -(-outputs // rows)
    values, live = torch.zeros(blocks * rows, inputs), torch.zeros(blocks * rows, inputs, dtype=torch.bool)
    values[:outputs] = weight.detach().float() * mask
    live[:outputs] = mask
    any_row = live.view(blocks, rows, inputs).any(dim=1)
    starts = torch.zeros(blocks + 1, dtype=torch.int64)
    starts[1:] = any_row.sum(dim=1).cumsum(0)
    block, column = any_row.nonzero(as_tuple=True)
    padded = None
    if bias is not None:
        padded = torch.zeros(blocks * rows)
        padded[:outputs] = bias.detach().float()
    taken = values.view(blocks, rows, inputs)[block, :, column].contiguous()
    return Packed(taken, column.int().contiguous(), starts, padded, rows, outputs, inputs)


def unpack(packed: Packed) -> Tensor:
    """The dense matrix ``[out, in]``, float32: the inverse of :func:`pack`."""
    blocks = len(packed.starts) - 1
    dense = torch.zeros(blocks, packed.rows, packed.inputs)
    block = torch.repeat_interleave(torch.arange(blocks), packed.starts.diff())
    dense[block, :, packed.columns.long()] = packed.values.view(-1, packed.rows)
    return dense.view(-1, packed.inputs)[: packed.outputs].contiguous()


def tile_of(tokens: int, threads: int) -> int:
    """Tokens of a tile, so that threads end together and few places stay empty. Results do not depend on it."""

    def cost(tile: int) -> float:
        tiles = -(-tokens // tile)
        return -(-tiles // threads) * (tile + OVERHEAD)

    return min(TILES, key=cost)


@torch.compiler.disable
def product(library: Library, x: Tensor, packed: Packed, activation: str = "none") -> Tensor:
    """``activation(x W^T + bias)`` for a sheet of tokens.

    Args:
        x: ``[S, in]`` on the CPU, float32 or bfloat16, with neighbouring inputs side by side.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``[S, out]`` in the type of ``x``; sums are in float32.
    """
    assert x.ndim == 2
    assert x.shape[1] == packed.inputs
    assert x.dtype in DTYPES
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens = x.shape[0]
    y = torch.empty(tokens, packed.outputs, dtype=x.dtype)
    if tokens == 0:
        return y
    threads = torch.get_num_threads()
    shared = (
        x.data_ptr(),
        x.stride(0),
        packed.values.data_ptr(),
        packed.columns.data_ptr(),
        packed.starts.data_ptr(),
        packed.bias.data_ptr() if packed.bias is not None else None,
        y.data_ptr(),
        y.stride(0),
        tokens,
        packed.inputs,
        packed.outputs,
    )
    last = (int(x.dtype == torch.bfloat16), ACTIVATIONS[activation], library.parallel, threads)
    if packed.rows == 1:
        failed = library.functions.sparse_any(*shared, REGISTERS_OF_TOKENS, *last)
    else:
        failed = library.functions.sparse_blocks(*shared, packed.rows, tile_of(tokens, threads), *last)
    assert not failed, f"no kernel for blocks of {packed.rows} rows"
    return y
