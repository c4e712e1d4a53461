"""Parameters and multiply-accumulates (MACs; the papers call them FLOPs) of one image, by stated formulas.

A block with ``n`` tokens, ``h`` live heads of ``d`` channels, ``m`` live neurons and width ``D`` takes

    qkv 3 n D h d  +  scores and mix 2 n^2 h d  +  proj n h d D  +  MLP 2 n D m   (3 n D m where it is gated)

the patch embedding and the classifier count once, and a selector's scorers for the patches that reach them. The
tensors are asked for their shapes, so a compact model counts what it is. A masked matrix counts its live share in
``live_macs``: a lower bound that no dense kernel reaches, so it is always shown beside ``macs``. Norms, biases,
activations and softmax are not counted, as usual; nor is the mean of fused patches (2 n D of a stage, 0.04 % of a
block of DeiT-S).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_trainer.units import BlockUnits, find_blocks
from sparse_trainer.wrappers import unwrapped

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
        ``[B]``, patch embedding, classifier and scorers included.
    """
    model = unwrapped(model)
    scored = _scored_patches(model, tokens.unbind(1))
    layers = count(model).layers
    one, two = (_pooling(model, {}, float(n)) for n in (1, 2))
    other = scored.keys() | one.keys()
    fixed = sum(layer.macs for name, layer in layers.items() if not name.startswith("blocks.") and name not in other)
    total = torch.full_like(tokens[:, 0], float(fixed))
    if one:
        first, second = (sum(layer.macs for layer in layers.values()) for layers in (one, two))
        total = total + first + (second - first) * (_pooled(model, tokens[:, -1]) - 1)
    for name, patches in scored.items():
        total = total + patches * layers[name].parameters
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
        ValueError: if a module is not a ``VisionTransformer`` and there is no ``input_size``; ``tokens`` does not name
            one number per block; or a mask is of no parameter.
    """
    model = unwrapped(model)
    masks = masks or {}
    unknown = masks.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    if unknown:
        raise ValueError(f"masks: {min(unknown)} is no parameter of {type(model).__name__}")
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
    try:
        blocks = find_blocks(model)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__}: its blocks are not those that the formula knows; give input_size=(C, H, W)"
        ) from error
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
    scored = _scored_patches(model, entering)
    for name, parameter in model.named_parameters():
        if name == "patch_embed.proj.weight":
            repeats[name] = patches
        elif name in ("head.weight", "head_dist.weight"):
            repeats[name] = 1
        elif name.startswith("selector.") and parameter.ndim > 1:
            repeats[name] = scored.get(name, patches)
    layers |= _stem(model, shares) | _pooling(model, shares, _pooled(model, entering[-1]))
    layers |= {
        name: _layer(parameter, repeats[name], shares.get(name, 1.0))
        for name, parameter in model.named_parameters()
        if name in repeats
    }
    return layers


def _scored_patches(model: nn.Module, tokens: Sequence[Any]) -> dict[str, Any]:
    """Patches that each scorer of a selector reads, by the name of its weight: those of the block before its stage.

    Tokens into which earlier stages fused patches have no score. A stage whose tokens do not fall is taken for one that
    fuses nothing: whoever drops a single patch and fuses it is counted with one patch too many from then on.

    Args:
        tokens: entering each block: numbers, or tensors of a batch.
    """
    selector: Any = getattr(model, "selector", None)
    if getattr(selector, "scorers", None) is None:
        return {}
    embed: Any = model.get_submodule("patch_embed")
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    scored: dict[str, Any] = {}
    fused: Any = 0
    for number, stage in enumerate(selector.stages):
        before = tokens[stage - 1] if stage else float(prefix + embed.num_patches)
        scored[f"selector.scorers.{number}.weight"] = before - prefix - fused
        if selector.config.dropped == "fused":
            fused = fused + (tokens[stage] < before)
    return scored


def _stem(model: nn.Module, shares: Mapping[str, float]) -> dict[str, LayerCount]:
    """What comes before the blocks, where it is more than one layer."""
    stem: Any = model.get_submodule("patch_embed")
    first = next((layer for layer in stem.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None or first is getattr(stem, "proj", None):
        return {}
    return _count_by_running(stem, shares, (first.in_channels, *stem.img_size), "patch_embed.")


def _pooled(model: nn.Module, tokens: Number) -> Number:
    """Tokens that a pooling by attention reads, of those that leave the last block."""
    return tokens - (0 if getattr(model, "pool_include_prefix", False) else int(getattr(model, "num_prefix_tokens", 0)))


def _pooling(model: nn.Module, shares: Mapping[str, float], tokens: float) -> dict[str, LayerCount]:
    """A pooling by attention over so many tokens, where there is one. Its MACs are a line in their number, so a mean
    number of tokens has the mean of the MACs."""
    pooling = getattr(model, "attn_pool", None)
    if pooling is None:
        return {}
    width: Any = model.embed_dim
    floor = max(math.floor(tokens), 1)
    low, high = (_count_by_running(pooling, shares, (n, int(width)), "attn_pool.") for n in (floor, floor + 1))
    above = tokens - floor
    return {
        name: LayerCount(
            layer.macs + above * (high[name].macs - layer.macs),
            layer.live_macs + above * (high[name].live_macs - layer.live_macs),
            layer.parameters,
            layer.live,
        )
        for name, layer in low.items()
    }


def _layer(weight: Tensor, repeats: float, share: float) -> LayerCount:
    macs = repeats * weight.numel()
    return LayerCount(macs, macs * share, weight.numel(), round(weight.numel() * share))


def _attention(block: BlockUnits, tokens: float) -> LayerCount:
    macs = 2 * tokens * tokens * block.heads.count() * block.heads.size
    return LayerCount(macs, macs)


def _weights(module: nn.Module, prefix: str) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if name.startswith(prefix) and name.endswith("weight")]


#: Products of a network that has no blocks as known here: attention, and whatever else multiplies without a weight.
OTHER_PRODUCTS = "other products"


CHANNEL: dict[Any, int] = {
    F.linear: -1,
    F.conv1d: 1,
    F.conv2d: 1,
    F.conv3d: 1,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 1,
    F.conv_transpose3d: 1,
}
"""Products whose weight is known, and the dimension that holds their channels."""
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _Watching(TorchFunctionMode):
    """Sees which weight each product uses. Attention runs as its two products, so that every torch counts them."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names  #: by the id of the tensor
        self.repeats: dict[str, float] = {}  #: how often each weight is applied

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, key, value = arguments[:3]
            return query @ key.transpose(-2, -1) @ value
        output = function(*arguments, **(options or {}))
        if function in CHANNEL:
            weight = arguments[1] if len(arguments) > 1 else (options or {})["weight"]
            name = self.names.get(id(weight))
            if name is not None:
                # A transposed convolution is applied at every point of its input, the others at those of the output.
                channel, at = CHANNEL[function], arguments[0] if function in TRANSPOSED else output
                self.repeats[name] = self.repeats.get(name, 0) + at.numel() / at.shape[channel]
        elif function is F.multi_head_attention_forward:
            self._add_attention(arguments, options or {})
        return output

    def _add_attention(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        """``nn.MultiheadAttention`` multiplies within one function, and by thirds of ``in_proj_weight``."""
        query, key, value = rows = [tensor.numel() / tensor.shape[-1] for tensor in arguments[:3]]
        applied = {
            id(arguments[5]): sum(rows) / 3,
            id(arguments[11]): query,
            id(options.get("q_proj_weight")): query,
            id(options.get("k_proj_weight")): key,
            id(options.get("v_proj_weight")): value,
        }
        for identity, repeats in applied.items():
            name = self.names.get(identity)
            if name is not None:
                self.repeats[name] = self.repeats.get(name, 0) + repeats


def _count_by_running(
    module: nn.Module, shares: Mapping[str, float], size: Sequence[int], prefix: str = ""
) -> dict[str, LayerCount]:
    """Apply a module to a batch of one of that size, without memory, and see how often each weight is used.

    Args:
        prefix: of the module's parameters in ``shares`` and in the result.
    """
    tensors: dict[str, Tensor] = {}
    watching = _Watching({})
    training = module.training
    with contextlib.ExitStack() as stack:
        stack.callback(module.train, training)
        by_id: dict[int, Tensor] = {}
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            tensors[name] = by_id[id(value)] = torch.empty_like(value, device="meta", requires_grad=False)
            watching.names[id(tensors[name])] = name
        # Each part once: torch's functional_call does not give back the weights of one that stands at two places.
        for part in module.modules():
            stores: list[dict[str, Any]] = [part._parameters, part._buffers]
            for store in stores:
                stack.callback(store.update, dict(store))
                store.update({leaf: by_id[id(value)] for leaf, value in store.items() if value is not None})
        module.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter, watching:
            module(torch.empty(1, *size, device="meta"))
    layers = {
        prefix + name: _layer(tensors[name], repeats, shares.get(prefix + name, 1.0))
        for name, repeats in watching.repeats.items()
    }
    rest = counter.get_total_flops() / 2 - sum(layer.macs for layer in layers.values())
    if rest > 0:
        layers[prefix + OTHER_PRODUCTS] = LayerCount(rest, rest)
    return layers
