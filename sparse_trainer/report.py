"""What one mask update did. Every number here is measured on the tensors, never copied from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparse_trainer.budget import Budget


@dataclass(frozen=True)
class LayerUpdate:
    """One prunable weight tensor before and after an update."""

    pruned: int  #: elements that were live before and are dead now
    grown: int  #: elements that were dead before and are live now
    live: int  #: live elements now
    total: int  #: all elements
    explored: int  #: elements that were live at any time so far
    threshold: float  #: greatest magnitude that was pruned (also of an element that grew back); 0 if none was

    @property
    def churn(self) -> float:
        """Elements that changed sides over live elements."""
        return (self.pruned + self.grown) / self.live

    @property
    def density(self) -> float:
        return self.live / self.total

    @property
    def exploration_rate(self) -> float:
        """Share of elements that were ever live (in-time over-parameterization; Liu et al. 2021)."""
        return self.explored / self.total


@dataclass(frozen=True)
class BlockUpdate:
    """One transformer block before and after an update: which units left, which came.

    ``heads_removed[i]`` was replaced by ``heads_added[i]``; likewise for neurons. Where their number falls
    (``unit_falls``) units are removed and none are added. Numbers are the unit's index in the dense block.
    """

    heads_removed: tuple[int, ...] = ()
    heads_added: tuple[int, ...] = ()
    neurons_removed: tuple[int, ...] = ()
    neurons_added: tuple[int, ...] = ()
    live_heads: tuple[int, ...] = ()  #: all live heads now, ascending
    heads: int = 0  #: heads of the dense block
    live_neurons: int = 0
    neurons: int = 0
    explored_heads: int = 0  #: heads that were live at any time so far
    explored_neurons: int = 0


@dataclass(frozen=True)
class MaskUpdate:
    """The report of one update, as :meth:`SparsityScheduler.step` returns it."""

    step: int  #: optimizer steps done when the update ran
    drop_fraction: float
    budget: Budget  #: live and total parameters, counted after the update
    seconds: float  #: wall-clock time of the update
    layers: Mapping[str, LayerUpdate] = field(default_factory=dict)  #: by parameter name
    blocks: Mapping[str, BlockUpdate] = field(default_factory=dict)  #: by block name, structured runs only
    warnings: tuple[str, ...] = ()
    reshaped: bool = False  #: whether parameters have other shapes now: a DistributedDataParallel must be made again

    @property
    def churn(self) -> float:
        """Elements that changed sides over live elements, over all layers; 0 without weight masks."""
        live = sum(layer.live for layer in self.layers.values())
        return sum(layer.pruned + layer.grown for layer in self.layers.values()) / live if live else 0.0

    @property
    def exploration_rate(self) -> float:
        """Share of all prunable elements that were ever live; 1 without weight masks."""
        total = sum(layer.total for layer in self.layers.values())
        return sum(layer.explored for layer in self.layers.values()) / total if total else 1.0
