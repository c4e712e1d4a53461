"""Layers for inference that skip dead weights, in the place of ``nn.Linear`` and of a patch embedding's convolution."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from sparse_trainer.kernels.library import Library
from sparse_trainer.kernels.packed import DTYPES, Packed, product, unpack

FOR_INFERENCE = (
    "this model was accelerated for inference, and its layers have no weights that can train or be saved; train and "
    "save the model that accelerate() was given, or that load_sparse(path, kernels='dense') gives"
)


def is_looked_at(module: nn.Module) -> bool:
    """Whether hooks see, and may change, what goes into a module or comes out of it: its own, or those of all."""
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)


def is_just(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes what one of these classes does and nothing else: another may stand in its place."""
    return type(module) in kinds and "forward" not in vars(module) and not is_looked_at(module)


class InferenceOnly(nn.Module):
    """A layer that cannot train, and says so."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(FOR_INFERENCE)
        return super().train(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise RuntimeError(FOR_INFERENCE)

    @staticmethod
    def check_no_gradient(x: Tensor) -> None:
        """Raises RuntimeError where somebody would wait for a gradient."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"no gradient passes here: {FOR_INFERENCE}")


class InferenceLinear(InferenceOnly, nn.Linear):
    """A ``Linear`` to those who look at a model, without parameters. Its matrix is built when somebody asks for it."""

    given: torch.dtype = torch.float32
    """Type of the layer that it stands for, in which those who ask for matrix and bias expect them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.training = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.given = fn(torch.empty(0, dtype=self.given)).dtype  # model.to(torch.bfloat16) holds for these too
        return super()._apply(fn, recurse)

    def dense_weight(self) -> Tensor:
        """The dense matrix ``[out, in]``."""
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """The bias ``[out]``, if there is one."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dense_weight().to(self.given)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.dense_bias()
        return None if bias is None else bias.to(self.given)


def as_computed(x: Tensor) -> Tensor:
    """The type that autocast asks for; float32 for what has no kernel."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x if x.dtype in DTYPES else x.float()


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """An output in the type of its input, such as float16; under autocast, which casts as it needs, as it is."""
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


class SparseLinear(InferenceLinear):
    """``activation(x W^T + bias)`` over ``[..., in]`` by a kernel that reads live weights alone.

    Args:
        activation: none, gelu or relu.
    """

    def __init__(self, library: Library, packed: Packed, activation: str = "none") -> None:
        super().__init__(packed.inputs, packed.outputs)
        self.library, self.packed, self.activation = library, packed, activation

    def dense_weight(self) -> Tensor:
        return unpack(self.packed)

    def dense_bias(self) -> Tensor | None:
        return None if self.packed.bias is None else self.packed.bias[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        self.check_no_gradient(x)
        sheet = as_computed(x).reshape(-1, self.in_features)
        y = product(self.library, sheet, self.packed, self.activation).view(*x.shape[:-1], self.out_features)
        return as_given(y, x)

    def extra_repr(self) -> str:
        pattern = f"{self.packed.rows}x1" if self.packed.rows > 1 else "1x1"
        return f"{self.in_features}, {self.out_features}, density={self.packed.density:.3f}, kernel={pattern}"


class SparsePatches(InferenceOnly):
    """A convolution whose kernel is its stride, as the product of flattened patches.

    Args:
        linear: over ``channels * height * width`` of a patch.
        kernel: height and width of a patch.
    """

    def __init__(self, linear: Any, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.linear = linear
        self.kernel_size = self.stride = kernel
        self.training = False

    @property
    def weight(self) -> Tensor:
        """The dense kernel ``[out, C, height, width]``, built when somebody asks for it."""
        weight: Tensor = self.linear.weight
        return weight.unflatten(1, (-1, *self.kernel_size))

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, if there is one."""
        bias: Tensor | None = self.linear.bias
        return bias

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, out, H / height, W / width]``; what is left over at the edges is not read.

        One image ``[C, H, W]`` too, as the convolution takes it.
        """
        if images.ndim == 3:
            return self.forward(images[None])[0]
        height, width = self.kernel_size
        rows, columns = images.shape[2] // height, images.shape[3] // width
        images = images[:, :, : rows * height, : columns * width]
        patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # [B, C, rows, h, columns, w]
        sheet = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, rows, columns, C * h * w]
        return self.linear(sheet).permute(0, 3, 1, 2)


class CompressedRows(InferenceLinear):
    """``x W^T + bias`` by torch's own product of compressed sparse rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.matrix = weight.detach().float().to_sparse_csr()
        self.added = None if bias is None else bias.detach().float()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedRows:
        memo[id(self.matrix)] = self.matrix.clone()  # torch's deepcopy knows no matrix of compressed rows
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def dense_weight(self) -> Tensor:
        return self.matrix.to_dense()

    def dense_bias(self) -> Tensor | None:
        return self.added

    def forward(self, x: Tensor) -> Tensor:
        self.check_no_gradient(x)
        sheet = x.float().reshape(-1, self.in_features)
        y = (self.matrix @ sheet.t()).t()
        y = y if self.added is None else y + self.added
        return as_given(y.to(as_computed(x).dtype), x).view(*x.shape[:-1], self.out_features)
