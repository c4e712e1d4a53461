"""What is live in a model: its heads, neurons and masks, the exact budget, and one update of them all.

Here is nothing of a schedule or a training loop: *when* anything is done, the scheduler says.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.agreement import mask_digest, order_digest, process_count
from sparse_trainer.budget import Budget
from sparse_trainer.construction import LiveNetwork
from sparse_trainer.enforcement import Enforcement
from sparse_trainer.following import Following
from sparse_trainer.live_units import Swap
from sparse_trainer.prunable import Standing, prunable_places, prunable_weights
from sparse_trainer.report import LayerUpdate, MaskUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.unit_reshaping import nothing_else
from sparse_trainer.unit_swaps import UnitSwaps
from sparse_trainer.weight_masks import WeightMasks

LossClosure = Callable[[], Tensor]


class MaskOwner:
    """Owns the masks and units of a model, and changes them when it is told to.

    Args:
        model: in which nothing dormant is left, and every dead weight is 0.
        config: what to prune and how.
        units: heads and neurons that come and go; None where all stay.
        weights: the masks of single weights; None where all live.
        total: prunable weights of the dense network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        units: UnitSwaps | None,
        weights: WeightMasks | None,
        total: int,
    ) -> None:
        self.model = model
        self.config = config
        self._units = units
        self._weights = weights
        self._total = total
        places = prunable_places(model, config.include, config.exclude)
        self._standing = Standing(model, places)
        self._prunable = {name: place.parameter for name, place in places.items()}
        self._enforcement = self._enforce_masks()
        self._following: Following | None = None  # only while a training loop is followed; likewise the EMA
        self._ema: nn.Module | None = None

    def _enforce_masks(self) -> Enforcement:
        masks = self.masks
        return Enforcement({name: p for name, p in self._prunable.items() if name in masks}, masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool masks of the (compact) weight tensors by parameter name; True is live."""
        return self._weights.masks if self._weights else {}

    @property
    def live_network(self) -> LiveNetwork:
        """Everything that is live, for a scheduler that goes on from here."""
        return LiveNetwork(
            {name: mask.clone() for name, mask in self.masks.items()},
            self.live_heads,
            self.live_neurons,
            self.dense_heads,
            self.dense_neurons,
        )

    @property
    def live_heads(self) -> dict[str, tuple[int, ...]]:
        """By block, the head (of the dense network) in each slot; empty for an unstructured run."""
        return self._units.live("head") if self._units else {}

    @property
    def live_neurons(self) -> dict[str, tuple[int, ...]]:
        """By block, the neuron (of the dense network) in each slot; empty for an unstructured run."""
        return self._units.live("neuron") if self._units else {}

    @property
    def dense_heads(self) -> dict[str, int]:
        """By block, how many heads the dense network has; empty for an unstructured run."""
        return self._units.totals("head") if self._units else {}

    @property
    def dense_neurons(self) -> dict[str, int]:
        """By block, how many neurons the dense network has; empty for an unstructured run."""
        return self._units.totals("neuron") if self._units else {}

    @property
    def budget(self) -> Budget:
        """Live and total prunable weights, counted now, in the tensors.

        A dead weight that something else has written to is put right first, or would be counted.
        """
        if self._weights:
            if self._following is not None:
                self._enforcement.look(everywhere=True)  # after which no dead weight is other than 0
                return Budget(self._weights.live_count(), self._total)
            return Budget(self._weights.live_count() + self._enforcement.count_revived(), self._total)
        return Budget(self._available, self._total)

    def _check_places(self) -> None:
        """Raises RuntimeError where a layer was replaced or wrapped: its weights would be in no budget."""
        gone = self._standing.replaced()
        if gone is not None:
            raise RuntimeError(gone)

    def _averages(self) -> dict[str, Tensor]:
        """The EMA's tensors by name; looked up at each use, since the EMA may be moved. A shared one has two names."""
        if self._ema is None:
            return {}
        return {name: parameter.data for name, parameter in self._ema.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def enforce(self) -> None:
        """Set whatever is dead to 0: in weights, gradients, moments and the EMA.

        Dead weights are held at 0 around every optimizer step. Call this where you write to weights on purpose and use
        them before the next step: after averaging, loading or perturbing them.
        """
        if self._weights is None:
            return
        self._weights.follow_device()
        self._enforcement.enforce(self._following.optimizers if self._following is not None else None)

    def _update(
        self, closure: LossClosure | None, *, step: int, drop_fraction: float, live: int | None = None
    ) -> MaskUpdate:
        """One update of units, then of weights, with all that hangs on them.

        Args:
            step: optimizer steps done.
            drop_fraction: share of the live units and weights to replace.
            live: the budget of weights from now on, where it falls.

        Raises:
            ValueError: units may move, and there is no closure.
        """
        assert self._following is not None
        optimizers = self._following.optimizers
        if self._units and self._units.groups and closure is None:
            raise ValueError(
                "an update of heads and neurons needs the loss of one batch: "
                "scheduler.step(lambda: criterion(model(images), targets))"
            )
        self._synchronize()
        started = time.perf_counter()
        self._enforcement.look(everywhere=True)
        swaps: dict[int, Swap] = {}
        left: dict[int, Swap] = {}
        notes: list[str] = []
        fresh: dict[str, Tensor] = {}
        if self._units and closure is not None:
            reshape = self._weights.reshape if self._weights else nothing_else
            left = self._units.fall(step, closure, optimizer=optimizers, ema=self._ema, others=reshape)
            if not left:
                swaps, notes = self._units.update(
                    closure,
                    drop_fraction,
                    optimizer=optimizers,
                    ema=self._ema,
                    masks=self.masks,
                    others=reshape,
                )
                fresh = self._units.fresh(swaps, self.masks)
        ranked = self._weights is None or self.config.grow == "random" or self._weights.growth.holds_gradient
        layers: dict[str, LayerUpdate] = {}
        if self._weights:
            with self._weights.naming_divergence():
                most = self._at_most_all(live)
                layers = self._weights.update(drop_fraction, optimizers, self._averages(), fresh, most)
        if not ranked:
            notes.append("no finite growth gradient was collected: the weight masks did not change")
        revived = self._enforcement.note()
        if revived is not None:
            notes.append(revived)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        self._enforcement.remember()
        self._synchronize()
        return MaskUpdate(
            step=step,
            drop_fraction=drop_fraction,
            budget=self.budget,
            seconds=time.perf_counter() - started,
            layers=layers,
            blocks=self._units.report(swaps | left) if self._units is not None else {},
            warnings=tuple(notes),
            reshaped=any(len(swap.removed) != len(swap.added) for swap in (swaps | left).values()),
        )

    def _at_most_all(self, live: int | None) -> int | None:
        """A budget, or all weights that there are, where heads and neurons have not left so many."""
        return min(live, self._available) if live is not None else None

    @property
    def _available(self) -> int:
        """Prunable weights of the network as it is, live and dead."""
        return sum(parameter.numel() for parameter in self._prunable.values())

    def _facts(self, step: int) -> dict[str, int]:
        """What all processes must hold alike, as numbers and digests by name; nothing for one process."""
        if process_count() == 1:
            return {}
        facts = {"step number": step, "number of live weights": self.budget.live}
        facts |= {f"mask of {name}": mask_digest(mask) for name, mask in self.masks.items()}
        facts |= {f"order of live heads in {name}": order_digest(units) for name, units in self.live_heads.items()}
        facts |= {f"order of live neurons in {name}": order_digest(units) for name, units in self.live_neurons.items()}
        return facts

    @property
    def _device(self) -> torch.device:
        return next(iter(self._prunable.values())).device

    def _synchronize(self) -> None:
        """Wait for the device, so that the reported seconds are the update's own."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _live_state(self) -> dict[str, Any]:
        """Units and masks, to be saved."""
        if self._weights and self._following is not None:
            self._enforcement.look(everywhere=True)
        return {
            "weights": self._weights.state_dict() if self._weights else None,
            "units": self._units.state_dict() if self._units else None,
            "enforcement": self._enforcement.state_dict(),
        }

    def _load_live_state(self, state: Mapping[str, Any], live: int | None) -> None:
        """Restore units and masks.

        Args:
            live: the budget of weights at the time of the state, where it falls.

        Raises:
            ValueError: if the state belongs to another configuration.
        """
        for what, own in (("weights", self._weights), ("units", self._units)):
            if (state[what] is None) != (own is None):
                raise ValueError(f"the saved state {'has no' if state[what] is None else 'has'} {what} masks")
        if self._weights:
            self._weights.check_state(state["weights"], live)  # before anything changes
        if self._units:
            self._units.load_state_dict(state["units"])
        if self._weights:
            self._weights.load_state_dict(state["weights"], live)
        if "enforcement" in state:  # older states do not say
            self._enforcement.load_state_dict(state["enforcement"])
        self._enforcement.remember()

    def _take_unit_shapes(self, units: Mapping[str, Any]) -> list[str]:
        """Give heads and neurons the numbers of a saved state, and draw masks of as many weights anew.

        Returns:
            names of the parameters whose shapes changed.
        """
        assert self._units is not None
        changed = self._units.take_shapes(units, self._ema)
        if changed:
            if self._weights is not None:
                live = self._at_most_all(self._weights.live_count())
                assert live is not None
                self._weights.remove()
                prunable = prunable_weights(self.model, self.config.include, self.config.exclude)
                varies = self.config.unit_falls or self.config.unit_distribution == "global"
                patterns = self._weights.patterns if varies else None
                self._weights = WeightMasks(prunable, live, self.config, patterns=patterns)
            self._enforcement = self._enforce_masks()
        return changed
