"""What a training step calls in place of the model, where it is compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config as symbolic_shapes
from torch import nn

from sparse_trainer import SparsityConfig

#: Shapes of parameters and numbers that a module holds, such as its heads, may change.
OF_ANY_SIZE = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
    "allow_unspec_int_on_nn_module": True,
}


def compiled(model: nn.Module, sparsity: SparsityConfig | None = None) -> nn.Module:
    """The model through ``torch.compile``; block by block where these will change their size during training."""
    changes = sparsity is not None and (sparsity.unit_distribution == "global" or sparsity.unit_falls > 0)
    if changes and not hasattr(model, "selector"):  # which runs the parts of a block itself
        return InBlocks(model)
    return torch.compile(model)  # type: ignore[return-value]


class InBlocks(nn.Module):
    """The model with each block compiled by itself: once as it is at first, and once more for blocks of any size.

    torch takes shapes of parameters, numbers of heads, and sizes that happen to be equal for constants, so it would
    compile the whole model again at every change. Here what has changed once is no constant any more. Sizes that never
    change stay constants: code for any batch and any width is a third slower on a CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Of what the compiler itself looks at.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        # The model's own parameters, hooks and parts, but for the blocks. In a tuple, it is no part of this module.
        view: Any = copy.copy(model)
        blocks: list[Any] = [torch.compile(block) for block in view.blocks]
        view._modules = {**view._modules, "blocks": nn.Sequential(*blocks)}
        self._view = (view,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (view,) = self._view
        view.training = self.model.training
        config: Any = torch._dynamo.config
        with config.patch(**OF_ANY_SIZE), symbolic_shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return view(*args, **kwargs)
