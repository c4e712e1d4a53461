"""Heads and neurons that come and go: the updates.

The live network is compact: a block holds only its live units (:mod:`~sparse_trainer.live_units`). At an update these
and the candidates are scored (:mod:`~sparse_trainer.unit_scores`), some of them chosen
(:mod:`~sparse_trainer.unit_choice`), and exchanged (:mod:`~sparse_trainer.unit_exchange`), moved to other blocks
(:mod:`~sparse_trainer.unit_moves`), or taken out for good (:mod:`~sparse_trainer.unit_reshaping`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_trainer.budget import neurons_together
from sparse_trainer.live_units import Swap
from sparse_trainer.optimizer_state import Optimizers
from sparse_trainer.unit_choice import choose
from sparse_trainer.unit_exchange import exchange
from sparse_trainer.unit_groups import UnitGroups, spread
from sparse_trainer.unit_moves import choose_moves, move
from sparse_trainer.unit_reshaping import Reshape, nothing_else, shrink
from sparse_trainer.unit_scores import LossClosure, Scores, gate_scores, probing


class UnitSwaps(UnitGroups):
    """The groups of a model, and what an update does to them."""

    @property
    def falling(self) -> bool:
        """Whether heads or neurons are still to leave for good."""
        here = {(units.group.block, units.group.kind): len(units.live) for units in self.groups}
        return sum(here[key] for key in self.falls) > sum(fall.last for fall in self.falls.values())

    def fall(
        self,
        step: int,
        closure: LossClosure,
        *,
        optimizer: Optimizers,
        ema: nn.Module | None,
        others: Reshape,
    ) -> dict[int, Swap]:
        """Take out as many units as are too many after this step: those whose loss would be felt least.

        Args:
            step: optimizer steps done.
            others: reshapes what else is kept in the shape of a parameter.

        Returns:
            who left, by index into :attr:`groups`; empty where the numbers stay.
        """
        due = {
            index: self.falls[key].at(step)
            for index, (units, still) in enumerate(zip(self.groups, self._frozen(), strict=True))
            if (key := (units.group.block, units.group.kind)) in self.falls and not still
        }
        due = self._never_more(due)
        if sum(due.values()) == sum(len(self.groups[index].live) for index in due):
            return {}
        with probing(self.model, [(self.groups[index].group, {}) for index in due]) as gates:
            scores = [score.size for score in gate_scores(closure, gates)]
        if not all(bool(score.isfinite().all()) for score in scores):
            # The budget comes first: without scores the later slots leave.
            scores = [-torch.arange(score.numel(), dtype=torch.float32) for score in scores]
        wanted = [(self.groups[index].group, count) for index, count in due.items()]
        parameters = dict(self.model.named_parameters())
        left = {}
        for (index, _), slots in zip(due.items(), spread(wanted, scores, self.config), strict=True):
            units = self.groups[index]
            if len(slots) < len(units.live):
                gone = shrink(units, slots, parameters, optimizer=optimizer, ema=ema, others=others)
                left[index] = Swap((), gone, ())
        return left

    def _frozen(self) -> list[bool]:
        """Of each group whether it is left alone, since something of it does not train now."""
        parameters = dict(self.model.named_parameters())
        return [not all(parameters[part.name].requires_grad for part in units.group.slices) for units in self.groups]

    def _never_more(self, due: Mapping[int, int]) -> dict[int, int]:
        """Numbers by group that are not above what there is: the schedule of a run may have been made longer."""
        here = {index: len(self.groups[index].live) for index in due}
        if self.config.unit_distribution == "uniform":
            return {index: min(count, here[index]) for index, count in due.items()}
        result = dict(due)
        for kind in ("head", "neuron"):
            mine = [index for index in due if self.groups[index].group.kind == kind]
            if sum(due[index] for index in mine) > sum(here[index] for index in mine):
                result |= {index: here[index] for index in mine}
        return result

    def update(
        self,
        closure: LossClosure,
        drop_fraction: float,
        *,
        optimizer: Optimizers,
        ema: nn.Module | None,
        masks: Mapping[str, Tensor],
        others: Reshape = nothing_else,
    ) -> tuple[dict[int, Swap], list[str]]:
        """Probe, choose, swap. Weights, gradients, moments, EMA and biases change together.

        Args:
            closure: the loss of one batch, a forward pass without backward.
            masks: weight masks on the compact tensors; a slot keeps its mask, so the budget does not move.
            others: reshapes what else is kept in the shape of a parameter, where blocks change their size.

        Returns:
            the swaps by index into :attr:`groups`, and warnings.
        """
        moving = self.config.unit_distribution == "global"
        round_up = self.config.unit_counts == "round_up"
        frozen = self._frozen()
        due = [
            (0, units.credit) if still else units.due(drop_fraction, round_up=round_up)
            for units, still in zip(self.groups, frozen, strict=True)
        ]
        probed = [index for index, (count, _) in enumerate(due) if count or (moving and not frozen[index])]
        if not any(count for count, _ in due):
            probed = []
        scores = []
        if probed:
            candidates = [(self.groups[i].group, self.groups[i].masked_candidates(masks)) for i in probed]
            with probing(self.model, candidates) as gates:
                scores = gate_scores(closure, gates)
        for units, (_, credit) in zip(self.groups, due, strict=True):  # only now: the closure may have failed
            units.credit = credit
            units.updates += 1
        if not all(score.isfinite() for score in scores):
            return {}, ["a probe batch gave scores that are not finite: no unit was swapped"]
        counts = {index: due[index][0] for index in probed}
        known = {index: self.groups[index].last for index in probed}
        exchanging = self._move if moving else self._exchange
        swaps = exchanging(counts, scores, optimizer=optimizer, ema=ema, masks=masks, others=others)
        undone = [
            f"{self.groups[index].group.block} ({self.groups[index].group.kind}s)"
            for index, swap in swaps.items()
            if self.config.swap_of(self.groups[index].group.kind) != "explore"  # which takes back only what is better
            and set(swap.added) == set(known[index].removed)
            and set(swap.removed) == set(known[index].added)
        ]
        warnings = []
        if undone:
            warnings.append(
                f"what came back in {', '.join(undone)} is what was removed last; growth changes nothing there. A "
                "greater probation, or fewer updates, gives units the time to learn"
            )
        return swaps, warnings

    def _exchange(
        self,
        counts: Mapping[int, int],
        scores: Sequence[Scores],
        *,
        optimizer: Optimizers,
        ema: nn.Module | None,
        masks: Mapping[str, Tensor],
        others: Reshape,
    ) -> dict[int, Swap]:
        """Exchange units within each block, as many of a group as ``counts`` says."""
        parameters = dict(self.model.named_parameters())
        averages = {n: p.data for n, p in ema.named_parameters(remove_duplicate=False)} if ema is not None else {}
        swaps = {}
        for (index, count), score in zip(counts.items(), scores, strict=True):
            units = self.groups[index]
            rule = self.config.swap_of(units.group.kind)
            swap = choose(units, score, count, parameters, rule, self.config.probation)
            if swap.slots:
                seed = self.config.unit_moments == "mean"
                exchange(units, swap, parameters, optimizer=optimizer, ema=averages, masks=masks, seed_moments=seed)
                swaps[index] = swap
        return swaps

    def _move(
        self,
        counts: Mapping[int, int],
        scores: Sequence[Scores],
        *,
        optimizer: Optimizers,
        ema: nn.Module | None,
        masks: Mapping[str, Tensor],
        others: Reshape,
    ) -> dict[int, Swap]:
        """Let units move between blocks, as many of a kind as ``counts`` says in all."""
        parameters = dict(self.model.named_parameters())
        by_index = dict(zip(counts, scores, strict=True))
        swaps = {}
        for kind in ("head", "neuron"):
            mine = [index for index in counts if self.groups[index].group.kind == kind]
            groups = [self.groups[index] for index in mine]
            alike = {neurons_together(units.total, self.config.pattern_rows) for units in groups}
            floors = [1 if kind == "head" else math.ceil(self.config.floor * units.total) or 1 for units in groups]
            moves = choose_moves(
                groups,
                [by_index[index] for index in mine],
                sum(counts[index] for index in mine),
                floors,
                self.config.swap_of(kind),
                self.config.probation,
                alike.pop() if kind == "neuron" and len(alike) == 1 else 1,
            )
            for index, units, what in zip(mine, groups, moves, strict=True):
                if what.slots or what.places:
                    swaps[index] = move(
                        units,
                        what,
                        parameters,
                        optimizer=optimizer,
                        ema=ema,
                        masks=masks,
                        others=others,
                        seed_moments=self.config.unit_moments == "mean",
                    )
        return swaps

    def fresh(self, swaps: Mapping[int, Swap], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bool masks over the elements of units that have just come, by parameter name."""
        fresh: dict[str, Tensor] = {}
        for index, swap in swaps.items():
            for part in self.groups[index].group.slices:
                if part.name in masks:
                    mask = torch.zeros_like(masks[part.name])
                    part.units(mask)[torch.tensor(swap.slots, dtype=torch.long)] = True
                    fresh[part.name] = mask
        return fresh
