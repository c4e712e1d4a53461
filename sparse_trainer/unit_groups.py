"""All groups of heads and neurons of a model: the first units, how many there are, and what is saved of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparse_trainer.budget import count_neurons, count_units, neurons_together
from sparse_trainer.falling import FallingBudget
from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.report import BlockUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.unit_choice import spread_by_score
from sparse_trainer.unit_reshaping import exchange_data, set_count
from sparse_trainer.unit_scores import LossClosure, gate_scores, probing
from sparse_trainer.units import UnitGroup, find_blocks, keep


class UnitGroups:
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
        check: given the heads and the neurons of every block that were chosen by score, raises ValueError if they do
            not fit; nothing was changed then.
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
        check: Callable[[Mapping[str, int], Mapping[str, int]], None] | None = None,
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
        by_score = config.start == "score" and bool(wanted)  # with all units live there is nothing to compare
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
        best = spread(wanted, scores, config) if by_score else []
        if best and check is not None:
            chosen = {(g.block, g.kind): len(units) for (g, _), units in zip(wanted, best, strict=True)}
            check(
                *({n: chosen.get((n, kind), self.dense[n, kind]) for n in self.blocks} for kind in ("head", "neuron"))
            )
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
    ) -> Self:
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
        asked: dict[str, list[tuple[int, int, int]]] = {"head": [], "neuron": []}  # to the unit, rounded, here
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
                exact = rounded = len(here)
                if (name, group.kind) not in made.falls:
                    exact = rounded = count_units(density, total, group.kind)
                    if group.kind == "neuron":  # of older files they were not rounded
                        rounded = count_neurons(density, total, config.pattern_rows)
                asked[group.kind].append((exact, rounded, len(here)))
                if config.unit_distribution == "uniform" and len(here) not in (exact, rounded):
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
        for kind, numbers in asked.items():
            exact, rounded, here_in_all = (sum(column) for column in zip(*numbers, strict=True))
            if config.unit_distribution != "uniform" and here_in_all not in (exact, rounded):
                raise ValueError(
                    f"resume_from: {here_in_all} {kind}s are live in all, and {kind}_density asks for {rounded}"
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


def spread(
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
        alike = [neurons_together(wanted[i][0].count(), config.pattern_rows) if kind == "neuron" else 1 for i in mine]
        together = alike[0] if len(set(alike)) == 1 else 1
        for index, units in zip(mine, spread_by_score([scores[i] for i in mine], counts, least, together), strict=True):
            best[index] = units
    return best
