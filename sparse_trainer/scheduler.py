"""The scheduler owns every mask, follows the optimizer, and conducts the updates.

*How many* is decided in :mod:`~sparse_trainer.budget`, *when* in :mod:`~sparse_trainer.update_schedule`, *which* in
:mod:`~sparse_trainer.masks` and :mod:`~sparse_trainer.unit_choice`. What construction does is worked out in
:mod:`~sparse_trainer.construction`; what is live then, and an update of it, is in :mod:`~sparse_trainer.mask_owner`.
The training loop is followed by :mod:`~sparse_trainer.following`, and :mod:`~sparse_trainer.enforcement` keeps dead
weights at 0. This file calls them in the right order.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sparse_trainer.agreement import check_agreement, on_any_process
from sparse_trainer.construction import LiveNetwork, check_chosen, check_trainable, plan
from sparse_trainer.following import Following, check_optimizers, unwrap
from sparse_trainer.mask_owner import LossClosure, MaskOwner
from sparse_trainer.ownership import check_free, claim
from sparse_trainer.ownership import release as release_model
from sparse_trainer.prunable import prunable_weights
from sparse_trainer.report import MaskUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.taking_over import averages_of, take_over
from sparse_trainer.unit_swaps import UnitSwaps
from sparse_trainer.weight_masks import WeightMasks
from sparse_trainer.wrappers import unwrapped

__all__ = ["LiveNetwork", "SparsityScheduler", "prunable_weights"]


class SparsityScheduler(MaskOwner):
    """Trains ``model`` under one exact parameter budget.

    Construction changes the model in place: dormant heads and neurons are taken out, dead weights are set to 0.
    So it comes before the optimizer. Then two lines go into any training loop::

        scheduler = SparsityScheduler(model, SparsityConfig(density=0.5), total_steps=100_000)
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler.attach(optimizer)
        ...
            loss.backward()
            optimizer.step()
            update = scheduler.step()
            optimizer.zero_grad()

    Args:
        model: any module with layers that multiply (:mod:`sparse_trainer.prunable`); a timm ``VisionTransformer`` for
            heads and neurons. A model may name parameters that are never pruned, by prefix, in a method
            ``no_sparsity() -> set[str]``.
        config: what to prune and how.
        total_steps: optimizer steps of the whole run. With gradient accumulation that is fewer than batches.
        closure: the loss of one batch; only for ``config.start == "score"``.
        resume_from: what is live already: the model's former scheduler, which it takes the place of, or what
            :func:`sparse_trainer.live_network` read from a sparse file. Masks, heads and neurons stay as they are.

    Raises:
        ValueError: if the configuration does not fit the model, or the model has a scheduler already. Nothing was
            changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        *,
        total_steps: int,
        closure: LossClosure | None = None,
        resume_from: SparsityScheduler | LiveNetwork | None = None,
    ) -> None:
        model = unwrapped(model)
        former = resume_from if isinstance(resume_from, SparsityScheduler) else None
        check_free(model, successor_of=former)
        given = resume_from.live_network if isinstance(resume_from, SparsityScheduler) else resume_from
        self.schedule = config.schedule(total_steps)
        planned = plan(model, config, self.schedule, given)
        notes = list(planned.notes)
        if not self.schedule.update_steps and config.updates != 0:
            notes.append(
                f"no update fits into {total_steps:,} steps, so the first masks stay; set updates or update_every, or "
                "updates to 0 if that is meant"
            )
        units: UnitSwaps | None = None
        weights: WeightMasks | None = None
        if given is not None:
            units, weights = take_over(model, config, given, planned)
        else:
            if config.structured:
                generator = torch.Generator().manual_seed(config.seed)
                units = UnitSwaps(
                    model,
                    planned.heads,
                    planned.neurons,
                    config,
                    generator=generator,
                    closure=closure,
                    falls=planned.unit_falls,
                    check=partial(check_chosen, model, config, planned),
                )
            if planned.live is not None:
                prunable = prunable_weights(model, config.include, config.exclude)
                weights = WeightMasks(prunable, planned.live, config, patterns=planned.patterns)
        if former is not None:
            former.detach(release=True)
        claim(model, self)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        super().__init__(model, config, units, weights, planned.total)
        self._fall = planned.fall
        self._live = planned.live if planned.fall is not None else None  # the budget now, where it falls
        self._loaded = False  # whether loaded states may have brought dead weights back
        self._step = 0
        self._passes_per_step = 1
        self._last_update = 0
        self._updates = 0

    @property
    def step_number(self) -> int:
        """Optimizer steps that counted: those that AMP skipped did not."""
        return self._exact_step()

    @property
    def needs_closure(self) -> bool:
        """Whether :meth:`step` needs the loss of a batch on an update step."""
        return self._units is not None and bool(self._units.groups)

    @property
    def update_due(self) -> bool:
        """Whether the next optimizer step, if it counts, ends in an update."""
        return self.schedule.is_update(self._exact_step() + 1)

    @property
    def target(self) -> int:
        """Live weights that the budget asks for now; it is what :attr:`budget` counts, after every step."""
        if self._live is not None:
            return min(self._live, self._available)
        return self._weights.target if self._weights is not None else self._available

    @property
    def falling(self) -> bool:
        """Whether there is still more live than in the end: the budget, or heads and neurons, have not come down."""
        weights = self._fall is not None and self._live is not None and self._live > self._fall.last
        return weights or (self._units is not None and self._units.falling)

    @property
    def collecting(self) -> bool:
        """Whether the gradient of the next optimizer step will rank what grows."""
        return self._weights is not None and self._weights.growth.collecting

    def attach(
        self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], ema: nn.Module | None = None
    ) -> None:
        """Follow an optimizer: mask gradients from now on, count its steps, change its state at updates.

        Args:
            optimizer: one, or several in a list, that together hold every prunable parameter of the model; in a
                wrapper of Accelerate or Lightning too. Several count as one step when each has stepped once.
            ema: a model whose parameters average those of this one (timm's ``ModelEmaV3``,
                ``torch.optim.swa_utils.AveragedModel``, or any module of the same names); it is kept as sparse.

        Raises:
            ValueError: if an optimizer's state is not understood, they lack prunable parameters, or the EMA's
                parameters are other than the model's.
        """
        if self._following is not None:
            raise ValueError("the scheduler is attached to an optimizer already; call detach() first")
        self._check_places()
        optimizers = unwrap(optimizer)
        check_optimizers(optimizers, self._prunable)
        check_trainable(self._prunable)
        self._ema = averages_of(self.model, ema) if ema is not None else None
        self._follow(optimizers)
        self._loaded = True

    def _follow(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Install all hooks."""
        if self._weights:
            self._weights.follow_device()
            self._weights.install(self._enforcement.gradient_arrived)
        if self._units:
            parameters = dict(self.model.named_parameters())
            for group in self._units.groups:
                group.follow(parameters)
        self._following = Following(
            optimizers,
            self.model,
            next(iter(self._prunable.values())),
            before=self._before_optimizer_step,
            after=self._after_optimizer_step,
            loaded=self._something_was_loaded,
        )
        self._following.passes_per_step = self._passes_per_step
        self._enforcement.prepare(self._following.optimizers, self._averages)
        self._enforcement.remember()
        self._arm()

    def detach(self, *, release: bool = False) -> None:
        """Take all hooks away; masks and weights stay as they are.

        Where the schedule was not reached, it says so: ``total_steps`` counts optimizer steps, not batches.

        Args:
            release: give the model free, so that another scheduler may be built on it.
        """
        if self._following is not None:
            self._exact_step()
            self._passes_per_step = self._following.passes_per_step
            self._following.remove()
            self._following = None
            if self._step and self.schedule.next_update(self._step + 1) is not None:
                warnings.warn(
                    f"the schedule was not reached: {self._step:,} of {self.schedule.total_steps:,} optimizer steps "
                    f"and {self._updates} of {len(self.schedule.update_steps)} updates came; total_steps counts steps "
                    "of the optimizer, which gradient accumulation makes fewer than batches",
                    stacklevel=2,
                )
        if self._weights:
            self._weights.remove()
        self._ema = None
        if release:
            release_model(self.model)

    def step(self, closure: LossClosure | None = None, *, skipped: bool | None = None) -> MaskUpdate | None:
        """Call after each ``optimizer.step()``. Runs an update if one is due.

        A step that AMP skipped does not count: nothing moves.

        Args:
            closure: returns the loss of one batch (a forward pass of the bare model, no backward). Needed for
                heads and neurons, and called at updates only.
            skipped: whether a fused optimizer left out its step on the device, where the caller knows; else the device
                is asked when an update may be due.

        Returns:
            the report of the update, or None between updates.

        Raises:
            RuntimeError: if no optimizer is attached, or it stepped more than once since the last call.
            ValueError: if an update of heads or neurons is due and there is no closure.
            DisagreementError: on every process, if after an update they hold different masks.
            FloatingPointError: weights are NaN or infinite, so that an update cannot rank them.
        """
        if self._following is None:
            raise RuntimeError("scheduler.step() before scheduler.attach(optimizer)")
        self._check_places()
        stepped = self._following.take_steps()
        if stepped > 1:
            raise RuntimeError(
                f"the optimizer stepped {stepped} times since the last scheduler.step(); call it each time"
            )
        if stepped == 0:
            if self._following.passes and self._enforcement.written_by_others():
                raise RuntimeError(
                    "all weights were written, but not by the optimizer that the scheduler is attached to; a new "
                    "optimizer needs scheduler.detach() and scheduler.attach(optimizer)"
                )
            return None
        self._enforcement.look(everywhere=False)
        if skipped is not None:
            self._following.forget_skipped()
        if skipped:
            self._enforcement.uncount(1)
            return None
        self._step += 1
        update = None
        due = self.schedule.next_update(self._last_update + 1)
        if due is not None and self._step >= due and self._exact_step() >= due:
            # An update may undo what had gone apart in the masks, but not in the weights under them.
            former = {f"former {what}": value for what, value in self._facts(self._step).items()}
            fraction = self.schedule.fraction(self._step)
            if self._fall is not None and self._live is not None:
                self._live = min(self._live, self._fall.at(self._step))  # a run that was made longer does not rise
            update = self._update(closure, step=self._step, drop_fraction=fraction, live=self._live)
            self._last_update = self._step
            self._updates += 1
            facts = {**former, **self._facts(self._step)}
            check_agreement(facts, self._device, f"after the update at step {self._step}")
        self._arm(together=True)
        return update

    def _arm(self, *, together: bool = False) -> None:
        """Collect the growth gradient during the next optimizer step if an update is near.

        Args:
            together: all processes are here, and agree on it. Each counts its own backward passes, and what one
                collects alone, it would wait for in vain at the end of the step.
        """
        if self._weights is None or self.config.grow != "gradient":
            return
        due = self.schedule.next_update(self._last_update + 1)
        most = self.config.growth_batches  # steps, if each had one backward pass: the same on all processes
        if due is None or self._step + most < due or self._exact_step() + most < due:
            self._weights.collect(False)
            return
        ahead = max(1, -(-most // self._passes()))
        collecting = self._step + ahead >= due
        if together and most > 1:
            collecting = on_any_process(collecting, self._device)
        self._weights.collect(collecting)

    def _exact_step(self) -> int:
        """The step number less the steps that a fused optimizer skipped on the device; this reads the device."""
        if self._following is not None:
            skipped = self._following.take_skipped()
            self._step -= skipped
            self._enforcement.uncount(skipped)
        return self._step

    def _before_optimizer_step(self) -> None:
        if self._weights is None:
            return
        if self._loaded:
            # Once, when all states are loaded in whatever order: before, the masks might be the wrong ones.
            self._loaded = False
            self.enforce()
        if self._weights.growth.collecting:
            self._weights.take_assigned_gradients(self._enforcement.is_clean)
        self._enforcement.before_step()

    def _something_was_loaded(self, *_: Any) -> None:
        self._loaded = True

    @torch.no_grad()
    def _after_optimizer_step(self) -> None:
        if self._weights is None:
            return
        if self._weights.growth.collecting:
            self._weights.growth.finish_step(self._weights.parameters, self.masks)
        self._enforcement.after_step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides future masks, as tensors, numbers, strings, lists and dictionaries."""
        step = self._exact_step()  # before what is live: it may tell of steps that did not count
        live = self._live_state()
        return {
            "step": step,
            "last_update": self._last_update,
            "passes_per_step": self._passes(),
            "total_steps": self.schedule.total_steps,
            "live": self._live,
            **live,
        }

    def take_shapes(self, state: Mapping[str, Any]) -> bool:
        """Give heads and neurons the numbers of a saved state; comes before the model's own state is loaded.

        Only where blocks may differ (``unit_distribution: by_score``) is there anything to do. Parameters stay the same
        objects with other data: optimizers, which have not stepped yet, go on with them. A
        ``DistributedDataParallel`` around the model must be made again.

        Returns:
            whether shapes changed.
        """
        if self._units is None or state["units"] is None:
            return False
        changed = self._take_unit_shapes(state["units"])
        if not changed:
            return False
        if self._following is not None:
            members = self._following.optimizers.members
            self._following.remove()
            parameters = dict(self.model.named_parameters())
            for optimizer in members:
                for name in changed:
                    optimizer.state.pop(parameters[name], None)
            self._follow(members)
        return True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. The model's own state dict is loaded by the caller, before this.

        Raises:
            ValueError: if the state belongs to another configuration.
        """
        if state["total_steps"] != self.schedule.total_steps:
            raise ValueError(
                f"the saved schedule is over {state['total_steps']:,} steps, this one over "
                f"{self.schedule.total_steps:,}"
            )
        live = state.get("live")  # older states do not say
        if (self._fall is None) != (live is None):
            raise ValueError(
                f"the saved budget {'falls' if self._fall is None else 'does not fall'}, and the configuration's "
                f"{'does not' if self._fall is None else 'does'}; set initial_density as it was"
            )
        if self._fall is not None and live is not None and not self._fall.last <= live:
            raise ValueError(f"the saved budget is {live:,}, and the configuration's ends at {self._fall.last:,}")
        self._load_live_state(state, self._at_most_all(live))
        self._live = live
        self._step, self._last_update = int(state["step"]), int(state["last_update"])
        self._passes_per_step = int(state["passes_per_step"])
        self._updates = sum(step <= self._last_update for step in self.schedule.update_steps)
        if self._following is not None:
            self._following.reset(self._passes_per_step)
        self._arm()

    def _passes(self) -> int:
        """Backward passes of an optimizer step."""
        return self._following.passes_per_step if self._following is not None else self._passes_per_step

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: all but the hooks, which the copy installs on its own optimizer."""
        following = self._following
        state = {**self.__dict__, "_following": None, "_passes_per_step": self._passes()}
        state["_attached"] = list(following.optimizers.members) if following is not None else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        self.__dict__.update(state)
        claim(self.model, self)
        if attached is not None:
            self._follow(attached)
