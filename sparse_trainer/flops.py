"""Parameters and multiply-accumulates (MACs; the papers call them FLOPs) of one image, by stated formulas.

A block with ``n`` tokens, ``h`` live heads of ``d`` channels, ``m`` live neurons and width ``D`` takes

    qkv 3 n D h d  +  scores and mix 2 n^2 h d  +  proj n h d D  +  MLP 2 n D m   (3 n D m where it is gated)

and the patch embedding and the classifier count once. The tensors are asked for their shapes, so a compact model
counts what it is. A masked matrix counts its live share in ``live_macs``: a lower bound that no dense kernel
reaches, so it is always shown beside ``macs``. Norms, biases, activations and softmax are not counted, as usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparse_trainer.units import BlockUnits, find_blocks

Number = TypeVar("Number", int, float, Tensor)


@dataclass(frozen=True)
class LayerCount:
    """One weight tensor, or the attention product of one block (then without parameters)."""

    macs: float  #: of the tensor as it is
    live_macs: float  #: of its live share
    parameters: int = 0
    live: int = 0


@dataclass(frozen=True)
class Count:
    """Cost of one image. MACs of the model as it is; ``live_`` counts only what the masks leave."""

    macs: float
    live_macs: float
    parameters: int  #: all parameters of the model: weights, biases, norms, embeddings
    live_parameters: int  #: less those that masks hold at 0
    layers: Mapping[str, LayerCount] = field(repr=False, default_factory=dict)


def block_macs(tokens: Number, width: int, heads: int, head_dim: int, neurons: int, mlp_matrices: int = 2) -> Number:
    """MACs of one transformer block by the formula above; differentiable where ``tokens`` is a tensor.

    Args:
        tokens: tokens entering the block, prefix tokens included; a number or a tensor of any shape.
        mlp_matrices: weight matrices of the MLP: 2, or 3 where it is gated.
    """
    attention = heads * head_dim
    linear = 4 * width * attention + mlp_matrices * width * neurons
    return tokens * linear + 2 * tokens * tokens * attention


def model_macs(model: nn.Module, tokens: Tensor) -> Tensor:
    """MACs of each image of a batch, given its tokens: differentiable, for a loss on the budget.

    Args:
        model: a timm ``VisionTransformer``, dense or compact, with or without selectors.
        tokens: ``[B, depth]``, tokens entering each block.

    Returns:
        ``[B]``, patch embedding and classifier included.
    """
    fixed = sum(layer.macs for name, layer in count(model).layers.items() if not name.startswith("blocks."))
    total = torch.full_like(tokens[:, 0], float(fixed))
    for index, block in enumerate(find_blocks(model).values()):
        width = block.heads.writer.out_features
        reader = sum(parameter.shape[0] for parameter in _weights(block.neurons.owner, "fc1"))
        neurons = block.neurons.count()
        total = total + block_macs(
            tokens[:, index],
            width,
            block.heads.count(),
            block.heads.size,
            neurons,
            mlp_matrices=1 + reader // neurons,
        )
    return total


def count(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    tokens: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Count:
    """Parameters and MACs of one image.

    Args:
        model: a timm ``VisionTransformer``, dense or compact; or any module, then with ``input_size``.
        masks: bool masks by parameter name (:attr:`SparsityScheduler.masks`).
        tokens: mean tokens entering each block, where a selector drops some; all of them by default.
        input_size: ``(channels, height, width)``; runs a forward pass without memory to see how often each layer
            is applied. Needed for other modules than a ``VisionTransformer``.

    Raises:
        ValueError: if a module is not a ``VisionTransformer`` and there is no ``input_size``; or ``tokens`` does
            not name one number per block.
    """
    masks = masks or {}
    shares = {name: float(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}
    layers = _count_vit(model, shares, tokens) if input_size is None else _count_by_running(model, shares, input_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dead = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
    return Count(
        macs=sum(layer.macs for layer in layers.values()),
        live_macs=sum(layer.live_macs for layer in layers.values()),
        parameters=parameters,
        live_parameters=parameters - dead,
        layers=layers,
    )


def _count_vit(model: nn.Module, shares: Mapping[str, float], tokens: Sequence[float] | None) -> dict[str, LayerCount]:
    patch_embed = getattr(model, "patch_embed", None)
    patches = getattr(patch_embed, "num_patches", None)
    if not isinstance(patches, int):
        raise ValueError(f"{type(model).__name__} is not a timm VisionTransformer: give input_size=(C, H, W)")
    blocks = find_blocks(model)
    everything = patches + int(getattr(model, "num_prefix_tokens", 1))
    entering = list(tokens) if tokens is not None else [float(everything)] * len(blocks)
    if len(entering) != len(blocks):
        raise ValueError(f"tokens: {len(entering)} numbers were given for {len(blocks)} blocks")
    repeats: dict[str, float] = {}
    layers: dict[str, LayerCount] = {}
    for n, (name, block) in zip(entering, blocks.items(), strict=True):
        for module_name, module in model.get_submodule(name).named_modules():
            if isinstance(module, nn.Linear):
                repeats[f"{name}.{module_name}.weight"] = n
        layers[f"{name}.attn"] = _attention(block, n)
    for name, parameter in model.named_parameters():
        if name.startswith("patch_embed.") and parameter.ndim > 1:
            repeats[name] = patches
        elif name in ("head.weight", "head_dist.weight"):
            repeats[name] = 1
        elif name.startswith("selector.") and parameter.ndim > 1:
            repeats[name] = patches
    layers |= {
        name: _layer(parameter, repeats[name], shares.get(name, 1.0))
        for name, parameter in model.named_parameters()
        if name in repeats
    }
    return layers


def _layer(weight: Tensor, repeats: float, share: float) -> LayerCount:
    macs = repeats * weight.numel()
    return LayerCount(macs, macs * share, weight.numel(), round(weight.numel() * share))


def _attention(block: BlockUnits, tokens: float) -> LayerCount:
    macs = 2 * tokens * tokens * block.heads.count() * block.heads.size
    return LayerCount(macs, macs)


def _weights(module: nn.Module, prefix: str) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if name.startswith(prefix) and name.endswith("weight")]


def _count_by_running(
    model: nn.Module, shares: Mapping[str, float], input_size: tuple[int, int, int]
) -> dict[str, LayerCount]:
    """Apply the model to a batch of one without memory, and see how often each weight is used."""
    layers: dict[str, LayerCount] = {}

    def watch(name: str, layer: nn.Linear | nn.Conv2d) -> None:
        def hook(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            channel = 1 if isinstance(module, nn.Conv2d) else -1
            repeats = output.numel() / output.shape[channel]
            before = layers.get(name, LayerCount(0.0, 0.0))
            added = _layer(layer.weight, repeats, shares.get(name, 1.0))
            layers[name] = LayerCount(
                before.macs + added.macs, before.live_macs + added.live_macs, added.parameters, added.live
            )

        handles.append(layer.register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    training = model.training
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            watch(f"{name}.weight" if name else "weight", module)
    try:
        empty = {
            name: torch.empty_like(value, device="meta")
            for name, value in (*model.named_parameters(), *model.named_buffers())
        }
        with torch.no_grad():
            model.eval()
            torch.func.functional_call(model, empty, (torch.empty(1, *input_size, device="meta"),))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return layers
