"""What torch has for sparse weights on a GPU: 2:4 in the tensor cores, and blocks in compressed sparse rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_trainer.kernels.layers import InferenceLinear

SIDES = (128, 64, 32)
"""Sides of square blocks that are worth trying."""
TILE_OF_2_TO_4 = 64
"""Rows and columns of a 2:4 matrix must be multiples of this; 16-bit types."""


def is_two_of_four(mask: Tensor) -> bool:
    """Whether of every four neighbouring inputs at most two are live.

    Args:
        mask: bool, ``[out, in]``.
    """
    return mask.shape[1] % 4 == 0 and bool((mask.view(mask.shape[0], -1, 4).sum(dim=2) <= 2).all())


def block_side(mask: Tensor) -> int | None:
    """The greatest of :data:`SIDES` of whose square blocks the mask consists; None if of none."""
    out, inputs = mask.shape
    for side in SIDES:
        if out % side == 0 and inputs % side == 0:
            blocks = mask.view(out // side, side, inputs // side, side)
            if bool((blocks == blocks[:, :1, :, :1]).all()):
                return side
    return None


class SemiStructured(InferenceLinear):
    """``x W^T + bias`` with a 2:4 weight; float16 or bfloat16 on a GPU with sparse tensor cores."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.matrix = torch.sparse.to_sparse_semi_structured(weight.detach().to(dtype))
        self.added = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def dense_weight(self) -> Tensor:
        return self.matrix.to_dense()

    def dense_bias(self) -> Tensor | None:
        return self.added

    def forward(self, x: Tensor) -> Tensor:
        self.check_no_gradient(x)
        return F.linear(x.to(self.dtype), self.matrix, self.added)


class BlockRows(InferenceLinear):
    """``x W^T + bias`` with a weight of square blocks, in block-compressed sparse rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, side: int, dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.matrix = weight.detach().to(dtype).to_sparse_bsr((side, side))
        self.added = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def dense_weight(self) -> Tensor:
        return self.matrix.to_dense()

    def dense_bias(self) -> Tensor | None:
        return self.added

    def forward(self, x: Tensor) -> Tensor:
        self.check_no_gradient(x)
        return F.linear(x.to(self.dtype), self.matrix, self.added)


def candidates(layer: nn.Linear, mask: Tensor, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Layers that compute the same on the layer's GPU, by name.

    Args:
        layer: with its dead weights 0.
        mask: bool, ``[out, in]``.
        dtype: that the product is computed in.
    """
    found: dict[str, nn.Module] = {}
    if dtype not in (torch.float16, torch.bfloat16):
        return found
    weight, bias = layer.weight, layer.bias
    if is_two_of_four(mask) and not weight.shape[0] % TILE_OF_2_TO_4 and not weight.shape[1] % TILE_OF_2_TO_4:
        found["2:4"] = SemiStructured(weight, bias, dtype)
    side = block_side(mask)
    if side is not None:
        found[f"bsr {side}x{side}"] = BlockRows(weight, bias, side, dtype)
    return found
