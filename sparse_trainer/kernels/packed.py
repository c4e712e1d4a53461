"""A sparse weight as a kernel reads it: the live weights and their places, and the product of a sheet with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_trainer.kernels.library import Library

ROWS = (32, 16, 8, 4)
"""Heights of blocks that have a kernel."""
TILES = (14, 13, 12, 10, 8, 6, 4)
"""Tokens that a kernel for blocks may hold in registers."""
OVERHEAD = 1.2
"""What a tile costs beside its tokens, in tokens: the load of the weights, once for all of them."""
VECTORS = {1: 0.87, 2: 1.0, 4: 1.75}
"""Vector registers of tokens that a kernel for any mask may work on, and the time that a tile of them takes, over that
of two: with one the processor waits for the last sum, and with four a weight is loaded for more of them."""
LINE = 16
"""Inputs that lie side by side in the tile of a kernel for blocks, and tokens between them and the next."""
BLOCKS_CHUNK, ANY_CHUNK = 384, 192
"""Inputs that a kernel works on at a time, at most, so that its tile stays in the nearest cache."""
ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Packed:
    """The live weights of ``[out, in]``, by chunks of neighbouring inputs.

    With ``rows`` of 1, output ``o`` has in chunk ``c`` the weights ``values[starts[n]:starts[n + 1]]``,
    ``n = c * out + o``, at ``places`` of the same range: their inputs, counted from the chunk's first. With more, ``o``
    is a block of ``rows`` outputs, ``values`` are ``[n, rows]``, and a place is where the input lies in the kernel's
    tile (:func:`place_in_tile`).
    """

    values: Tensor  #: float32
    places: Tensor  #: int32
    starts: Tensor  #: int64
    bias: Tensor | None  #: float32, padded to whole blocks
    rows: int
    outputs: int
    inputs: int
    chunk: int  #: inputs

    @property
    def blocks(self) -> int:
        """Of outputs."""
        return -(-self.outputs // self.rows)

    @property
    def density(self) -> float:
        """Stored over all weights; those of a block that reach over the last output are not counted."""
        return self.values.numel() / (self.inputs * self.blocks * self.rows)


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
    values, live = torch.zeros(blocks * rows, inputs, device="cpu"), mask.new_zeros(blocks * rows, inputs)
    values[:outputs] = weight.detach().float() * mask
    live[:outputs] = mask
    any_row = live.view(blocks, rows, inputs).any(dim=1)
    chunk = chunk_of(inputs, BLOCKS_CHUNK if rows > 1 else ANY_CHUNK)
    firsts = range(0, inputs, chunk)
    found = [any_row[:, first : first + chunk].nonzero(as_tuple=True) for first in firsts]
    block = torch.cat([rows_of for rows_of, _ in found])
    within = torch.cat([columns for _, columns in found])
    column = torch.cat([columns + first for first, (_, columns) in zip(firsts, found, strict=True)])
    counts = torch.cat([any_row[:, first : first + chunk].sum(dim=1) for first in firsts])
    starts = counts.new_zeros(len(counts) + 1)
    starts[1:] = counts.cumsum(0)
    padded = None
    if bias is not None:
        padded = values.new_zeros(blocks * rows)
        padded[:outputs] = bias.detach().float()
    taken = values.view(blocks, rows, inputs)[block, :, column].contiguous()
    places = (place_in_tile(within) if rows > 1 else within).int().contiguous()
    return Packed(taken, places, starts, padded, rows, outputs, inputs, chunk)


def chunk_of(inputs: int, most: int) -> int:
    """Inputs of a chunk: even parts of at most so many, in whole lines."""
    parts = max(1, math.ceil(inputs / most))
    return max(LINE, math.ceil(inputs / parts / LINE) * LINE)


def place_in_tile(column: Tensor) -> Tensor:
    """Where an input of the first token lies in ``[in / LINE, LINE tokens, LINE]``."""
    return column // LINE * LINE**2 + column % LINE


def unpack(packed: Packed) -> Tensor:
    """The dense matrix ``[out, in]``, float32: the inverse of :func:`pack`."""
    blocks, chunks = packed.blocks, (len(packed.starts) - 1) // packed.blocks
    dense = packed.values.new_zeros(blocks, packed.rows, packed.inputs)
    every = torch.arange(blocks * chunks, device=packed.starts.device)
    part = torch.repeat_interleave(every, packed.starts.diff())
    column = packed.places.long()
    if packed.rows > 1:
        column = column // LINE**2 * LINE + column % LINE
    dense[part % blocks, :, column + part // blocks * packed.chunk] = packed.values.view(-1, packed.rows)
    return dense.view(-1, packed.inputs)[: packed.outputs].contiguous()


@lru_cache(maxsize=4096)
def tile_of(tokens: int, threads: int, most: int = TILES[0]) -> int:
    """Tokens of a tile, so that threads end together and few places stay empty. Results do not depend on it.

    Args:
        most: tokens that fit the registers.
    """

    def cost(tile: int) -> float:
        tiles = -(-tokens // tile)
        return -(-tiles // threads) * (tile + OVERHEAD)

    return min((tile for tile in TILES if tile <= most), key=cost)


@lru_cache(maxsize=4096)
def vectors_of(tokens: int, threads: int, lanes: int) -> int:
    """Vector registers of tokens for a kernel for any mask, likewise: a key of :data:`VECTORS`.

    Args:
        lanes: numbers in a register.
    """

    def cost(vectors: int) -> float:
        tiles = -(-tokens // (vectors * lanes))
        return -(-tiles // threads) * VECTORS[vectors]

    return min(VECTORS, key=cost)


def check_on_cpu(x: Tensor) -> None:
    """Raises RuntimeError for a tensor that a kernel of the CPU cannot read, or where somebody only looks on."""
    if torch.jit.is_tracing():
        raise RuntimeError("an accelerated model cannot be traced; trace the model that accelerate() was given")
    if x.device.type != "cpu":
        raise RuntimeError(
            f"this model was accelerated on the CPU and cannot run on {x.device}; call accelerate() or "
            "load_sparse(path, kernels=...) for the device that it is to run on"
        )
    if x.numel() and not x.data_ptr():
        raise RuntimeError("an accelerated model cannot run on fake tensors; give them to the model it was made of")


@torch.compiler.disable
def product(library: Library, x: Tensor, packed: Packed, activation: str = "none") -> Tensor:
    """``activation(x W^T + bias)`` for a sheet of tokens.

    Args:
        x: ``[S, in]`` on the CPU, float32 or bfloat16, with neighbouring inputs side by side.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``[S, out]`` in the type of ``x``; sums are in float32.

    Raises:
        RuntimeError: ``x`` is on another device.
    """
    check_on_cpu(x)
    assert x.ndim == 2
    assert x.shape[1] == packed.inputs
    assert x.dtype in DTYPES
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens = x.shape[0]
    y = torch.empty(tokens, packed.outputs, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    threads = torch.get_num_threads()
    shared = (
        x.data_ptr(),
        x.stride(0),
        packed.values.data_ptr(),
        packed.places.data_ptr(),
        packed.starts.data_ptr(),
        packed.bias.data_ptr() if packed.bias is not None else None,
        y.data_ptr(),
        y.stride(0),
        tokens,
        packed.inputs,
        packed.outputs,
        packed.chunk,
    )
    last = (int(x.dtype == torch.bfloat16), ACTIVATIONS[activation], library.parallel, threads)
    if packed.rows == 1:
        failed = library.functions.sparse_any(*shared, vectors_of(tokens, threads, library.lanes), *last)
    else:
        tile = tile_of(tokens, threads, library.tokens)
        failed = library.functions.sparse_blocks(*shared, packed.rows, tile, *last)
    assert not failed, f"no kernel for blocks of {packed.rows} rows"
    return y
