"""How much two sparse networks share: their masks and units, laid over each other in the dense network.

Compact networks of the same shape may hold other heads and neurons in the same slot, so masks are first spread to the
dense layout: an element is live there iff its weight is on and its unit is live. Two of four heads, one weight each::

    a: heads 0 and 2, mask [1, 1]   ->  dense [1, 0, 1, 0]
    b: heads 0 and 3, mask [1, 0]   ->  dense [1, 0, 0, 0]
    both 1, either 2: IoU 1/2, Hamming distance 1; two random masks of 2 and 1 of 4 would share 2 * 1 / 4 = 0.5

"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.errors import ConfigError
from experiments.inspection.contents import Contents, create_dense
from sparse_trainer.files.checkpoint import SparseFile, SparseInfo
from sparse_trainer.scheduler import prunable_weights
from sparse_trainer.units import UnitSlice, find_blocks


@dataclass(frozen=True)
class Overlap:
    """Two subsets of the same elements, and what two random ones of these sizes would share on the mean."""

    total: int  #: elements there are
    a: int  #: of them in the first subset
    b: int  #: in the second
    both: int
    random_both: float  #: expected of independent random subsets

    @property
    def iou(self) -> float:
        """Intersection over union (Jaccard); 1 for two empty sets."""
        return _ratio(self.both, self.a + self.b - self.both)

    @property
    def random_iou(self) -> float:
        """The same of the expected intersection and union."""
        return _ratio(self.random_both, self.a + self.b - self.random_both)

    @property
    def hamming(self) -> int:
        """Elements that are in one subset alone."""
        return self.a + self.b - 2 * self.both

    @property
    def random_hamming(self) -> float:
        return self.a + self.b - 2 * self.random_both

    @property
    def share_of_a(self) -> float:
        """Of the first subset, the share that is in the second too."""
        return _ratio(self.both, self.a)

    @property
    def share_of_b(self) -> float:
        return _ratio(self.both, self.b)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def overlap(a: Tensor, b: Tensor) -> Overlap:
    """Of two bool masks of the same shape."""
    assert a.shape == b.shape
    return _overlap(a.numel(), int(a.count_nonzero()), int(b.count_nonzero()), int((a & b).count_nonzero()))


def overlap_of_units(total: int, a: Sequence[int], b: Sequence[int]) -> Overlap:
    """Of two sets of unit numbers of a dense block with ``total`` units."""
    return _overlap(total, len(set(a)), len(set(b)), len(set(a) & set(b)))


def _overlap(total: int, a: int, b: int, both: int) -> Overlap:
    return Overlap(total, a, b, both, a * b / total)


def add(overlaps: Iterable[Overlap]) -> Overlap:
    """Of all layers together; random masks keep the density of each layer."""
    found = list(overlaps)
    return Overlap(
        total=sum(item.total for item in found),
        a=sum(item.a for item in found),
        b=sum(item.b for item in found),
        both=sum(item.both for item in found),
        random_both=sum(item.random_both for item in found),
    )


@dataclass(frozen=True)
class BlockOverlap:
    """Units of one block that are live in both networks."""

    heads: Overlap
    neurons: Overlap


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints beside each other."""

    a: Contents
    b: Contents
    layers: Mapping[str, Overlap]  #: by the name of the weight, prunable ones only
    blocks: Mapping[str, BlockOverlap]  #: empty for networks without blocks that are known
    total: Overlap


def compare(a: Contents, b: Contents) -> Comparison:
    """Lay two networks over each other.

    Raises:
        ConfigError: their dense networks differ in shape.
    """
    dense = create_dense(a.info)
    _check_same(a, dense, b, create_dense(b.info))
    masks_a, masks_b = dense_masks(a.file, dense), dense_masks(b.file, dense)
    layers = {name: overlap(mask, masks_b[name]) for name, mask in masks_a.items()}
    blocks = {}
    for part in a.parts:
        if part.heads is not None and part.neurons is not None:
            heads, neurons = part.heads[1], part.neurons[1]
            blocks[part.name] = BlockOverlap(
                *(
                    overlap_of_units(total, *(_units(live, part.name, total) for live in (live_a, live_b)))
                    for total, live_a, live_b in (
                        (heads, a.info.live_heads, b.info.live_heads),
                        (neurons, a.info.live_neurons, b.info.live_neurons),
                    )
                )
            )
    return Comparison(a, b, layers, blocks, add(layers.values()))


def dense_masks(file: SparseFile, dense: nn.Module) -> dict[str, Tensor]:
    """What is live of every prunable weight, as bool masks of the dense network's shapes.

    Args:
        dense: the dense network, with or without memory (:func:`experiments.inspection.contents.create_dense`).
    """
    places = _unit_slices(dense, file.info)
    masks = {}
    for name, weight in prunable_weights(dense).items():
        live = file.masks.get(name)
        if live is None:
            live = torch.ones(file.tensors[name].shape, dtype=torch.bool)
        if name in places:
            part, units = places[name]
            full = torch.zeros(weight.shape, dtype=torch.bool)
            part.units(full)[torch.as_tensor(units)] = part.units(live)
            live = full
        masks[name] = live
    return masks


def _unit_slices(dense: nn.Module, info: SparseInfo) -> dict[str, tuple[UnitSlice, tuple[int, ...]]]:
    """By weight that holds only some units: where they lie in it, and which are live in which slot."""
    if not (info.live_heads or info.live_neurons):
        return {}
    return {
        part.name: (part, live[name])
        for name, block in find_blocks(dense).items()
        for group, live in ((block.heads, info.live_heads), (block.neurons, info.live_neurons))
        if name in live
        for part in group.slices
    }


def _units(live: Mapping[str, tuple[int, ...]], block: str, total: int) -> Sequence[int]:
    return live.get(block, range(total))


def _check_same(a: Contents, dense_a: nn.Module, b: Contents, dense_b: nn.Module) -> None:
    shapes_a, shapes_b = (
        {name: tuple(weight.shape) for name, weight in prunable_weights(dense).items()} for dense in (dense_a, dense_b)
    )
    names = [name for name in {**shapes_a, **shapes_b} if shapes_a.get(name) != shapes_b.get(name)]
    if not names:
        return
    first, more = names[0], f", and {len(names) - 1:,} more weights differ" if len(names) > 1 else ""
    raise ConfigError(
        f"--compare: {a.path} ({a.info.model}) and {b.path} ({b.info.model}) differ in shape: {first} is "
        f"{_shape(shapes_a.get(first))} and {_shape(shapes_b.get(first))}{more}; compare networks that are the same "
        "when dense"
    )


def _shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was found, as JSON values."""
    return {
        "a": _side(comparison.a),
        "b": _side(comparison.b),
        "layers": [{"name": name, **_overlap_json(found)} for name, found in comparison.layers.items()],
        "blocks": [
            {"name": name, "heads": _overlap_json(found.heads), "neurons": _overlap_json(found.neurons)}
            for name, found in comparison.blocks.items()
        ],
        "total": _overlap_json(comparison.total),
    }


def _overlap_json(found: Overlap) -> dict[str, Any]:
    return {
        "total": found.total,
        "a": found.a,
        "b": found.b,
        "both": found.both,
        "random_both": found.random_both,
        "iou": found.iou,
        "random_iou": found.random_iou,
        "share_of_a": found.share_of_a,
        "share_of_b": found.share_of_b,
        "hamming": found.hamming,
        "random_hamming": found.random_hamming,
    }


def accuracy_of(info: SparseInfo) -> float | None:
    """Top-1 in percent of the weights in a checkpoint: the average's where one was kept."""
    return info.metrics.get("ema_top1", info.metrics.get("top1"))


def _side(contents: Contents) -> dict[str, Any]:
    info = contents.info
    return {
        "checkpoint": str(contents.path),
        "model": info.model,
        "recipe": info.recipe,
        "step": info.step,
        "top1": accuracy_of(info),
        "metrics": dict(info.metrics),
        "live_parameters": info.budget.live,
        "total_parameters": info.budget.total,
        "density": info.budget.density,
        "parameters": contents.compact.live_parameters,
        "compact_parameters": contents.compact.parameters,
        "macs": info.macs,
        "counted_macs": contents.compact.live_macs,
        "compact_macs": contents.compact.macs,
        "dense_macs": contents.dense.macs,
        "bytes": contents.bytes,
        "dense_bytes": contents.dense_bytes,
        "selector": None if info.selector is None else dict(info.selector),
    }
