"""Heads and neurons that come and go: the groups of a model, their first units, and the updates.

The live network is compact: a block holds only its live units (:mod:`~sparse_trainer.live_units`). At an update these
and the candidates are scored (:mod:`~sparse_trainer.unit_scores`), some of them chosen
(:mod:`~sparse_trainer.unit_choice`), and exchanged (:mod:`~sparse_trainer.unit_exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.budget import count_units
from sparse_trainer.falling import FallingBudget
from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.optimizer_state import Optimizers
from sparse_trainer.report import BlockUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.unit_choice import choose, spread_by_score
from sparse_trainer.unit_exchange import exchange
from sparse_trainer.unit_moves import choose_moves, move
from sparse_trainer.unit_reshaping import Reshape, exchange_data, nothing_else, set_count, shrink
from sparse_trainer.unit_scores import LossClosure, Scores, gate_scores, probing
from sparse_trainer.units import UnitGroup, find_blocks, keep


class UnitSwaps:
    """All groups of a model that have dormant units.

    Construction makes the model compact in place.

    Args:
        model: a timm ``VisionTransformer``, dense.
        heads, neurons: live units per block (see :func:`sparse_trainer.budget.count_units`).
        generator: draws the first live units.
        config: how units start, come back and are counted. With ``start: score`` the first are the best by the gate
            gradient of ``closure`` on the dense model, and what is removed then is folded into the output biases.
        closure: the loss of one batch; needed by ``score``.
        falls: by block and kind, how many there are during the training, where they do not leave at once.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, int],
        neurons: Mapping[str, int],
        config: SparsityConfig,
        *,
        generator: torch.Generator,
        closure: LossClosure | None = None,
        falls: Mapping[tuple[str, str], FallingBudget] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.falls = dict(falls or {})
        self.blocks = find_blocks(model)
        wanted = [
            (group, count[name])
            for name, block in self.blocks.items()
            for group, count in ((block.heads, heads), (block.neurons, neurons))
            if count[name] < group.count()
        ]
        #: Units of each group in the dense network, by block and kind.
        self.dense = {(g.block, g.kind): g.count() for b in self.blocks.values() for g in (b.heads, b.neurons)}
        scores: list[Tensor] = []
        self.groups: list[LiveUnits] = []
        if falls:
            self.groups = [
                LiveUnits(model, group, range(group.count()), remember_first=config.candidates == "first")
                for group, _ in wanted
            ]
            return
        by_score = config.start == "score"
        if by_score:
            if closure is None:
                raise ValueError(
                    'start: "score" needs the loss of a batch: SparsityScheduler(..., closure=lambda: loss)'
                )
            groups = [group for group, _ in wanted]
            for _ in range(config.score_batches):
                with probing(model, [(group, {}) for group in groups]) as gates:
                    found = [score.size for score in gate_scores(closure, gates)]
                scores = [a + b for a, b in zip(scores, found, strict=True)] if scores else found
        best = _spread(wanted, scores, config) if by_score else []
        for index, (group, count) in enumerate(wanted):
            live = (
                best[index] if by_score else sorted(torch.randperm(group.count(), generator=generator)[:count].tolist())
            )
            if len(live) == group.count():
                continue
            units = LiveUnits(model, group, live, remember_first=config.candidates == "first")
            if by_score:
                units.tried.update(units.dormant)
            self.groups.append(units)
            keep(model, group, live, fold_biases=by_score)

    @classmethod
    def of_compact(
        cls,
        model: nn.Module,
        given: Any,
        config: SparsityConfig,
        *,
        generator: torch.Generator,
        falls: Mapping[tuple[str, str], FallingBudget] | None = None,
    ) -> UnitSwaps:
        """Go on with the live units of a compact model; candidates are drawn anew, with the spread of the live ones.

        Args:
            given: ``live_heads``, ``live_neurons``, ``dense_heads``, ``dense_neurons`` by block.

        Raises:
            ValueError: the numbers do not fit the model, or the configuration asks for other shares.
        """
        made = cls.__new__(cls)
        made.model, made.config, made.blocks = model, config, find_blocks(model)
        made.falls = dict(falls or {})
        made.groups, made.dense = [], {}
        asked: dict[str, list[tuple[int, int]]] = {"head": [], "neuron": []}
        for name, block in made.blocks.items():
            for group, live, totals, density in (
                (block.heads, given.live_heads, given.dense_heads, config.head_density),
                (block.neurons, given.live_neurons, given.dense_neurons, config.neuron_density),
            ):
                here, total = tuple(live.get(name, range(group.count()))), totals.get(name, group.count())
                if len(here) != group.count() or not set(here) <= set(range(total)):
                    raise ValueError(
                        f"resume_from: {name} has {group.count()} {group.kind}s, and {len(here)} of {total} are live"
                    )
                made.dense[name, group.kind] = total
                if (name, group.kind) in made.falls:
                    asked[group.kind].append((len(here), len(here)))
                else:
                    asked[group.kind].append((count_units(density, total, group.kind), len(here)))
                if config.unit_distribution == "uniform" and asked[group.kind][-1][0] != len(here):
                    raise ValueError(
                        f"resume_from: {len(here)} of {total} {group.kind}s of {name} are live, and the configuration "
                        f"asks for {density} of them; give {group.kind}_density={len(here) / total:.4g}"
                    )
                if len(here) < total or (name, group.kind) in made.falls:
                    remember = config.candidates == "first"
                    units = LiveUnits(model, group, here, remember_first=False, total=total, generator=generator)
                    if remember:
                        units.remember_first(dict(model.named_parameters()))
                    made.groups.append(units)
        for kind, pairs in asked.items():
            wanted, here_in_all = (sum(column) for column in zip(*pairs, strict=True))
            if wanted != here_in_all:
                raise ValueError(
                    f"resume_from: {here_in_all} {kind}s are live in all, and {kind}_density asks for {wanted}"
                )
        return made

    def take_shapes(self, state: Mapping[str, Any], ema: nn.Module | None) -> list[str]:
        """Give each block as many units as it has in a saved state; what they hold is then loaded.

        Parameters stay the same objects with other data, so an optimizer goes on with them.

        Args:
            state: of :meth:`state_dict`.
            ema: average of the model, by the same names.

        Returns:
            names of the parameters that changed their shape.
        """
        averages = dict(ema.named_parameters(remove_duplicate=False)) if ema is not None else {}
        parameters, changed = dict(self.model.named_parameters()), []
        for name, block in self.blocks.items():
            for group in (block.heads, block.neurons):
                total, key = self.dense[name, group.kind], f"{name}.{group.kind}"
                count = len(state[key]["live"]) if key in state else total
                if not 0 < count <= total:
                    raise ValueError(f"{name}: the saved state has {count} live {group.kind}s, and there are {total}")
                if count == group.count():
                    continue
                for part in group.slices:
                    changed.append(part.name)
                    for tensors in (parameters, averages):
                        if part.name in tensors:
                            shape = list(tensors[part.name].shape)
                            shape[part.dim] = part.groups * count * part.size
                            exchange_data(tensors[part.name], tensors[part.name].data.new_zeros(shape))
                set_count(group, count, ema)
        if changed:
            self.groups = []
            for name, block in self.blocks.items():
                for group in (block.heads, block.neurons):
                    total = self.dense[name, group.kind]
                    if f"{name}.{group.kind}" in state:
                        units = LiveUnits(
                            self.model, group, range(group.count()), total=total, generator=torch.Generator()
                        )
                        if self.config.candidates == "first":
                            units.remember_first(parameters)
                        self.groups.append(units)
        return changed

    def report(self, swaps: Mapping[int, Swap]) -> dict[str, BlockUpdate]:
        """What an update did, by block.

        Args:
            swaps: of :meth:`update`.
        """
        nothing = Swap((), (), ())
        found: dict[tuple[str, str], tuple[Swap, int]] = {}
        for index, units in enumerate(self.groups):
            found[units.group.block, units.group.kind] = (swaps.get(index, nothing), len(units.explored))
        heads, neurons = self.totals("head"), self.totals("neuron")
        live_heads, live_neurons = self.live("head"), self.live("neuron")
        report = {}
        for name in self.blocks:
            head_swap, explored_heads = found.get((name, "head"), (nothing, heads[name]))
            neuron_swap, explored_neurons = found.get((name, "neuron"), (nothing, neurons[name]))
            report[name] = BlockUpdate(
                heads_removed=head_swap.removed,
                heads_added=head_swap.added,
                neurons_removed=neuron_swap.removed,
                neurons_added=neuron_swap.added,
                live_heads=tuple(sorted(live_heads[name])),
                heads=heads[name],
                live_neurons=len(live_neurons[name]),
                neurons=neurons[name],
                explored_heads=explored_heads,
                explored_neurons=explored_neurons,
            )
        return report

    def live(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Live units by block, in slot order, of ``head`` or ``neuron``; all of them where none is dormant."""
        dense = {
            name: tuple(range((block.heads if kind == "head" else block.neurons).count()))
            for name, block in self.blocks.items()
        }
        return dense | {g.group.block: tuple(g.live) for g in self.groups if g.group.kind == kind}

    def totals(self, kind: str) -> dict[str, int]:
        """Units of each block in the dense network."""
        counts = {name: len(units) for name, units in self.live(kind).items()}
        return counts | {g.group.block: g.total for g in self.groups if g.group.kind == kind}

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
            for index, units in enumerate(self.groups)
            if (key := (units.group.block, units.group.kind)) in self.falls
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
        for (index, _), slots in zip(due.items(), _spread(wanted, scores, self.config), strict=True):
            units = self.groups[index]
            if len(slots) < len(units.live):
                gone = shrink(units, slots, parameters, optimizer=optimizer, ema=ema, others=others)
                left[index] = Swap((), gone, ())
        return left

    @property
    def falling(self) -> bool:
        """Whether heads or neurons are still to leave for good."""
        here = {(units.group.block, units.group.kind): len(units.live) for units in self.groups}
        return sum(here[key] for key in self.falls) > sum(fall.last for fall in self.falls.values())

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
        before = dict(self.model.named_parameters())
        frozen = [not all(before[part.name].requires_grad for part in units.group.slices) for units in self.groups]
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
            if set(swap.added) == set(known[index].removed) and set(swap.removed) == set(known[index].added)
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
            swap = choose(units, score, count, parameters, self.config.swap, self.config.probation)
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
            floors = [1 if kind == "head" else math.ceil(self.config.floor * units.total) or 1 for units in groups]
            moves = choose_moves(
                groups,
                [by_index[index] for index in mine],
                sum(counts[index] for index in mine),
                floors,
                self.config.swap,
                self.config.probation,
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

    def state_dict(self) -> dict[str, Any]:
        return {f"{g.group.block}.{g.group.kind}": g.state_dict() for g in self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; the model's tensors are restored by the model's own state dict."""
        expected = {f"{g.group.block}.{g.group.kind}": g for g in self.groups}
        if set(state) != set(expected):
            odd = sorted(set(state) ^ set(expected))
            raise ValueError(f"the saved units are of other blocks than the model's: {', '.join(odd[:4])}")
        for name, group in expected.items():
            group.load_state_dict(state[name])


def _spread(
    wanted: Sequence[tuple[UnitGroup, int]], scores: Sequence[Tensor], config: SparsityConfig
) -> list[list[int]]:
    """The best units of each group by score: so many of each, or so many in all."""
    if config.unit_distribution == "uniform":
        return [sorted(score.topk(count).indices.tolist()) for (_, count), score in zip(wanted, scores, strict=True)]
    best: list[list[int]] = [[] for _ in wanted]
    for kind in ("head", "neuron"):
        mine = [index for index, (group, _) in enumerate(wanted) if group.kind == kind]
        least = [1 if kind == "head" else math.ceil(config.floor * wanted[i][1]) or 1 for i in mine]
        counts = [wanted[i][1] for i in mine]
        for index, units in zip(mine, spread_by_score([scores[i] for i in mine], counts, least), strict=True):
            best[index] = units
    return best
