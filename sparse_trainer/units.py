"""Heads and neurons as slices of timm's tensors. The only file that knows the qkv / proj / fc1 / fc2 layout.

A unit is what enters and leaves a block as one: an attention head (its q, k, v rows and its proj columns) or an
MLP neuron (its fc1 row and bias and its fc2 column). The *input* side is what a unit reads with, the *output* side
what it writes with; a unit whose output side is 0 does not change the network's function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn


@dataclass(frozen=True)
class UnitSlice:
    """Where the units of a block lie in one tensor.

    Along ``dim`` the tensor is laid out as ``[groups, units, size]``: three groups (q, k, v) of ``head_dim`` rows
    in qkv, two groups of one row in a packed gated MLP, one group elsewhere.
    """

    name: str  #: full parameter name, such as ``blocks.0.attn.qkv.weight``
    dim: int
    groups: int = 1
    size: int = 1

    def units(self, tensor: Tensor) -> Tensor:
        """A view ``[units, ...]`` of a contiguous tensor of this layout; writing to it writes to the tensor."""
        return tensor.unflatten(self.dim, (self.groups, -1, self.size)).movedim(self.dim + 1, 0)

    def take(self, tensor: Tensor, units: Sequence[int] | Tensor) -> Tensor:
        """A copy with only the given units, in that order, in the same layout."""
        index = torch.as_tensor(units, dtype=torch.long, device=tensor.device)
        split = tensor.unflatten(self.dim, (self.groups, -1, self.size))
        return split.index_select(self.dim + 1, index).flatten(self.dim, self.dim + 2).contiguous()

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """The units of ``first`` followed by those of ``second``, in the same layout."""
        parts = [tensor.unflatten(self.dim, (self.groups, -1, self.size)) for tensor in (first, second)]
        return torch.cat(parts, dim=self.dim + 1).flatten(self.dim, self.dim + 2).contiguous()


@dataclass(frozen=True)
class UnitGroup:
    """All heads, or all neurons, of one block."""

    kind: str  #: ``head`` or ``neuron``
    block: str  #: such as ``blocks.0``
    inputs: tuple[UnitSlice, ...]
    outputs: tuple[UnitSlice, ...]
    value_bias: str | None  #: bias whose effect is constant over tokens: v of qkv, or fc1's where its row is 0
    output_bias: str | None  #: bias that takes the constant when a unit is removed
    writer: nn.Linear  #: the Linear that reads the units' activations (proj or fc2)
    owner: nn.Module  #: the Attention or Mlp module

    @property
    def slices(self) -> tuple[UnitSlice, ...]:
        return self.inputs + self.outputs

    @property
    def size(self) -> int:
        """Activations of one unit at the writer's input."""
        return self.outputs[0].size

    def count(self) -> int:
        """Units that the block holds now."""
        return self.writer.weight.shape[1] // self.size

    def set_count(self, units: int) -> None:
        """Bring the modules' own numbers in line with tensors that hold ``units`` units."""
        self.writer.in_features = units * self.size
        if self.kind == "head":
            self.owner.num_heads = units  # type: ignore[assignment]
            self.owner.attn_dim = units * self.size  # type: ignore[assignment]
            readers = ["qkv", "gate"]
        else:
            readers = ["fc1", "fc1_g", "fc1_x"]
        for reader in readers:
            linear = getattr(self.owner, reader, None)
            if isinstance(linear, nn.Linear):
                linear.out_features = linear.weight.shape[0]


@dataclass(frozen=True)
class BlockUnits:
    """The heads and neurons of one transformer block."""

    name: str
    heads: UnitGroup
    neurons: UnitGroup

    @property
    def groups(self) -> tuple[UnitGroup, UnitGroup]:
        return self.heads, self.neurons


def find_blocks(model: nn.Module) -> dict[str, BlockUnits]:
    """The blocks of a timm ``VisionTransformer`` by name, in order.

    Raises:
        ValueError: if the model has no such blocks, or one whose heads or neurons are not laid out as known here;
            it names the block and the module.
    """
    blocks = {}
    for name, module in model.named_modules():
        # Its own parts: a wrapper, such as torch.compile's, hands out those of the block that it holds.
        if isinstance(module._modules.get("attn"), nn.Module) and isinstance(module._modules.get("mlp"), nn.Module):
            blocks[name] = BlockUnits(
                name, _heads(name, module.get_submodule("attn")), _neurons(name, module.get_submodule("mlp"))
            )
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no transformer blocks with an attn and an mlp; {_WHAT_WORKS}")
    if getattr(model, "rope_mixed", False):
        raise ValueError(f"{type(model).__name__} rotates every head by angles of its own (rope_mixed); {_WHAT_WORKS}")
    return blocks


_WHAT_WORKS = (
    "head_density and neuron_density work with the blocks of timm's VisionTransformer (DeiT, ViT, DINOv2, ...). Weight "
    "masks work with this model: set head_density and neuron_density to 1"
)


def _unsupported(block: str, module: nn.Module, what: str) -> ValueError:
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return ValueError(
            f"{block}: {type(module).__name__} wraps {type(module._orig_mod).__name__}, so its heads or neurons "
            "cannot be taken out; compile the block, or compile the layer in place, by layer.compile()"
        )
    return ValueError(f"{block}: {type(module).__module__}.{type(module).__name__} {what}; {_WHAT_WORKS}")


def _heads(block: str, attention: nn.Module) -> UnitGroup:
    qkv, proj = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    # Exactly these classes: their forward reads num_heads and attn_dim, so it runs with fewer heads as it is.
    if type(attention) not in (Attention, AttentionRope):
        raise _unsupported(block, attention, "is of a kind whose heads cannot be taken out")
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        raise _unsupported(block, attention, "has no qkv and proj Linear")
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise _unsupported(block, attention, "normalises over all heads (scale_norm)")
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    prefix = f"{block}.attn" if block else "attn"
    inputs = [UnitSlice(f"{prefix}.qkv.weight", 0, 3, head_dim)]
    if qkv.bias is not None:
        inputs.append(UnitSlice(f"{prefix}.qkv.bias", 0, 3, head_dim))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        inputs.append(UnitSlice(f"{prefix}.gate.weight", 0, 1, head_dim))
        if gate.bias is not None:
            inputs.append(UnitSlice(f"{prefix}.gate.bias", 0, 1, head_dim))
    constant = qkv.bias is not None and gate is None and proj.bias is not None
    return UnitGroup(
        kind="head",
        block=block,
        inputs=tuple(inputs),
        outputs=(UnitSlice(f"{prefix}.proj.weight", 1, 1, head_dim),),
        value_bias=f"{prefix}.qkv.bias" if constant else None,
        output_bias=f"{prefix}.proj.bias" if constant else None,
        writer=proj,
        owner=attention,
    )


READERS: dict[type[nn.Module], tuple[tuple[str, int], ...]] = {
    Mlp: (("fc1", 1),),
    GluMlp: (("fc1", 2),),
    SwiGLU: (("fc1_g", 1), ("fc1_x", 1)),
}
"""The layers whose rows are neurons, by kind of MLP, and how many groups of rows each has."""


def _neurons(block: str, mlp: nn.Module) -> UnitGroup:
    prefix = f"{block}.mlp" if block else "mlp"
    fc2 = getattr(mlp, "fc2", None)
    # Exactly these classes: between the layers of another one may lie what mixes neurons.
    if not isinstance(fc2, nn.Linear) or type(mlp) not in READERS:
        raise _unsupported(block, mlp, "is of a kind whose neurons cannot be taken out")
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise _unsupported(block, mlp, "normalises over all neurons (scale_mlp_norm)")
    inputs = []
    for reader, groups in READERS[type(mlp)]:
        linear = getattr(mlp, reader)
        inputs.append(UnitSlice(f"{prefix}.{reader}.weight", 0, groups))
        if linear.bias is not None:
            inputs.append(UnitSlice(f"{prefix}.{reader}.bias", 0, groups))
    constant = type(mlp) is Mlp and mlp.get_submodule("fc1").bias is not None and fc2.bias is not None
    return UnitGroup(
        kind="neuron",
        block=block,
        inputs=tuple(inputs),
        outputs=(UnitSlice(f"{prefix}.fc2.weight", 1),),
        value_bias=f"{prefix}.fc1.bias" if constant else None,
        output_bias=f"{prefix}.fc2.bias" if constant else None,
        writer=fc2,
        owner=mlp,
    )


def constant_output(group: UnitGroup, tensors: Mapping[str, Tensor], units: Sequence[int] | Tensor) -> Tensor | None:
    """What the given units add to the block's output whatever the input is: ``[width]``, or None if unknown.

    The rows of an attention matrix sum to 1, so a head's value bias ``b_v`` reaches the output as the constant
    ``W_proj b_v``. A neuron is constant only where its fc1 row is 0; then it adds ``W_fc2 act(b)``.

    Args:
        tensors: parameters by full name, with as many units as the group holds now.
    """
    if group.value_bias is None:
        return None
    index = torch.as_tensor(units, dtype=torch.long)
    bias_slice = next(part for part in group.inputs if part.name == group.value_bias)
    columns = group.outputs[0].units(tensors[group.outputs[0].name])[index]  # [k, width, 1, size]
    bias = bias_slice.units(tensors[group.value_bias])[index]  # [k, groups, size]
    if group.kind == "head":
        value = bias[:, 2]
    else:
        row = group.inputs[0].units(tensors[group.inputs[0].name])[index].flatten(1)
        activation: nn.Module = group.owner.get_submodule("act")
        value = activation(bias[:, 0]) * (row == 0).all(dim=1, keepdim=True)
    return torch.einsum("kwgs,ks->w", columns, value)


@torch.no_grad()
def compact(
    model: nn.Module,
    live_heads: Mapping[str, Sequence[int]],
    live_neurons: Mapping[str, Sequence[int]],
    *,
    fold_biases: bool = False,
) -> None:
    """Remove every unit that is not named, in place; blocks that are not named stay as they are.

    qkv becomes ``[3 * h * head_dim, C]``, proj ``[C, h * head_dim]``, fc1 ``[m, C]`` and fc2 ``[C, m]`` for ``h``
    live heads and ``m`` live neurons, and timm's own forward runs on them as it is.

    Args:
        fold_biases: add the constant that a removed unit contributed to the output bias, as is right for units
            of a trained model.

    Raises:
        ValueError: if a block does not exist, or a unit is out of range, twice, or none is left.
    """
    blocks = find_blocks(model)
    for live, kind in ((live_heads, "heads"), (live_neurons, "neurons")):
        unknown = sorted(set(live) - set(blocks))
        if unknown:
            raise ValueError(f"live {kind}: the model has no block {unknown[0]!r}; it has {', '.join(blocks)}")
        for name, units in live.items():
            keep(model, getattr(blocks[name], kind), units, fold_biases=fold_biases)


@torch.no_grad()
def keep(model: nn.Module, group: UnitGroup, units: Sequence[int], *, fold_biases: bool = False) -> None:
    """Keep only ``units`` of one group, in place; slot ``i`` then holds unit ``units[i]``. See :func:`compact`."""
    total = group.count()
    chosen = list(units)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= total:
        raise ValueError(
            f"{group.block}: live {group.kind}s {chosen[:8]} are not distinct numbers from 0 to {total - 1}"
        )
    if len(chosen) == total and chosen == list(range(total)):
        return
    parameters = dict(model.named_parameters())
    if fold_biases:
        gone = sorted(set(range(total)) - set(chosen))
        constant = constant_output(group, parameters, gone)
        if constant is not None and group.output_bias is not None:
            parameters[group.output_bias].add_(constant)
    for part in group.slices:
        replace_parameter(model, part.name, part.take(parameters[part.name].detach(), chosen))
    group.set_count(len(chosen))


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a new ``nn.Parameter`` of another shape in the place of the one called ``name``."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def expand_state_dict(
    model: nn.Module,
    live_heads: Mapping[str, Sequence[int]],
    live_neurons: Mapping[str, Sequence[int]],
    heads: int | Mapping[str, int],
    neurons: int | Mapping[str, int],
) -> dict[str, Tensor]:
    """The state of a compact model in timm's dense layout; what belongs to a dormant unit is 0.

    Args:
        heads, neurons: units per block of the dense model (one number, or by block).
    """
    state = dict(model.state_dict())
    for name, block in find_blocks(model).items():
        for group, live, dense in ((block.heads, live_heads, heads), (block.neurons, live_neurons, neurons)):
            if name not in live:
                continue
            total = dense if isinstance(dense, int) else dense[name]
            for part in group.slices:
                compacted = state[part.name]
                shape = list(compacted.shape)
                shape[part.dim] = part.groups * total * part.size
                full = compacted.new_zeros(shape)
                part.units(full)[torch.as_tensor(live[name])] = part.units(compacted)
                state[part.name] = full
    return state
