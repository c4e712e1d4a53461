"""The scheduler owns every mask, follows the optimizer, and conducts the updates.

How many is in :mod:`~sparse_trainer.budget`, when in :mod:`~sparse_trainer.update_schedule`, which in
:mod:`~sparse_trainer.masks` and :mod:`~sparse_trainer.unit_swaps`; here is only who calls whom.
"""

from __future__ import annotations

import difflib
import fnmatch
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.agreement import check_agreement, mask_digest, on_any_process, order_digest, process_count
from sparse_trainer.budget import Budget, count_units
from sparse_trainer.optimizer_state import check_supported
from sparse_trainer.report import BlockUpdate, MaskUpdate
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.unit_swaps import Swap, UnitSwaps
from sparse_trainer.units import find_blocks
from sparse_trainer.update_schedule import UpdateSchedule
from sparse_trainer.weight_masks import WeightMasks

LossClosure = Callable[[], Tensor]


class SparsityScheduler:
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
        model: any module with ``Linear`` or ``Conv2d`` layers; a timm ``VisionTransformer`` for heads and neurons.
            A model may name parameters that are never pruned, by prefix, in a method ``no_sparsity() -> set[str]``.
        config: what to prune and how.
        total_steps: optimizer steps of the whole run.
        closure: the loss of one batch; only for ``config.start == "score"``.

    Raises:
        ValueError: if the configuration does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        *,
        total_steps: int,
        closure: LossClosure | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        self.model = model
        self.config = config
        self.schedule = UpdateSchedule(
            total_steps=total_steps,
            update_every=config.update_every,
            updates=config.updates,
            drop_fraction=config.drop_fraction,
            drop_fraction_end=config.drop_fraction_end,
            stop_at=config.stop_at,
        )
        if not self.schedule.update_steps and config.updates != 0:
            warnings.warn(
                f"no update fits into {total_steps:,} steps, so the first masks stay; set updates or update_every, or "
                "updates to 0 if that is meant",
                stacklevel=2,
            )
        dense_total = sum(p.numel() for p in prunable_weights(model, config.include, config.exclude).values())
        self._units: UnitSwaps | None = None
        if config.structured:
            self._units = self._make_compact(closure)
        prunable = prunable_weights(model, config.include, config.exclude)
        self._total = dense_total
        self._weights: WeightMasks | None = None
        if config.masks_weights:
            self._weights = WeightMasks(prunable, self._live_target(prunable), config)
        self._prunable = prunable
        self._optimizer: torch.optim.Optimizer | None = None
        self._ema: nn.Module | None = None
        self._enforce = False  # whether loaded states may have brought dead weights back
        self._handles: list[Any] = []
        self._step = 0
        self._stepped = 0
        self._passes = 0  # backward passes since the last optimizer step
        self._passes_per_step = 1
        self._last_update = 0
        self._skipped: Tensor | None = None  # counted on the device; read only when an update may be due

    def _make_compact(self, closure: LossClosure | None) -> UnitSwaps:
        blocks = find_blocks(self.model)
        roundings: set[str] = set()
        heads = {n: count_units(self.config.head_density, b.heads.count(), "head") for n, b in blocks.items()}
        neurons = {n: count_units(self.config.neuron_density, b.neurons.count(), "neuron") for n, b in blocks.items()}
        for block in blocks.values():
            for group, density, live in (
                (block.heads, self.config.head_density, heads[block.name]),
                (block.neurons, self.config.neuron_density, neurons[block.name]),
            ):
                share = live / group.count()
                # Heads are few, so any rounding is worth a word; of neurons only one that can be felt.
                if abs(share - density) > (1e-6 if group.kind == "head" else 0.01):
                    roundings.add(
                        f"{group.kind}_density: {density} of {group.count()} {group.kind}s "
                        f"is rounded to {live} ({share:.3f})"
                    )
        for rounding in sorted(roundings):
            warnings.warn(rounding, stacklevel=4)
        generator = torch.Generator().manual_seed(self.config.seed)
        return UnitSwaps(self.model, heads, neurons, self.config, generator=generator, closure=closure)

    def _live_target(self, prunable: Mapping[str, nn.Parameter]) -> int:
        """The budget in whole numbers; density counts against the *dense* network, units included."""
        available = sum(parameter.numel() for parameter in prunable.values())
        if self.config.live_parameters is not None:
            live, key = self.config.live_parameters, f"live_parameters: {self.config.live_parameters:,}"
            least = f"at least {len(prunable)} are needed"
        else:
            live, key = round((self.config.density or 0) * self._total), f"density: {self.config.density}"
            least = f"the least that can work is {len(prunable) / self._total:.2g}"
        if live < len(prunable):
            raise ValueError(
                f"{key} of {self._total:,} prunable weights leaves {live:,} live, fewer than one in each of the "
                f"{len(prunable)} layers; {least}"
            )
        if live > available == self._total:
            raise ValueError(f"{key} is more than the {self._total:,} prunable weights that the model has")
        if live > available:
            raise ValueError(
                f"{key} asks for {live:,} live weights, but head_density {self.config.head_density} and "
                f"neuron_density {self.config.neuron_density} leave {available:,} of {self._total:,} "
                f"({available / self._total:.4f}); lower density to that or less, or set it to null"
            )
        return live

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool masks of the (compact) weight tensors by parameter name; True is live."""
        return self._weights.masks if self._weights else {}

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
        """Live and total prunable weights, counted now."""
        if self._weights:
            return Budget(self._weights.live_count(), self._total)
        return Budget(sum(parameter.numel() for parameter in self._prunable.values()), self._total)

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

    def attach(self, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None) -> None:
        """Follow an optimizer: mask gradients from now on, count its steps, change its state at updates.

        Args:
            optimizer: holds every prunable parameter of the model; in a wrapper of Accelerate or Lightning too.
            ema: a model whose parameters average those of this one (timm's ``ModelEmaV3``,
                ``torch.optim.swa_utils.AveragedModel``, or any module of the same names); it is kept as sparse.

        Raises:
            ValueError: if the optimizer's state is not understood, it lacks prunable parameters, or the EMA's
                parameters are other than the model's.
        """
        if self._optimizer is not None:
            raise ValueError("the scheduler is attached to an optimizer already; call detach() first")
        while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = wrapped
        check_supported(optimizer)
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, parameter in self._prunable.items() if id(parameter) not in owned]
        if missing:
            raise ValueError(
                f"the optimizer lacks {len(missing)} prunable parameters, {missing[0]} among them; build it from "
                "the model's parameters after the scheduler, or exclude frozen layers"
            )
        frozen = [name for name, parameter in self._prunable.items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"{len(frozen)} prunable weights are frozen, {frozen[0]} among them; exclude them, such as "
                f"exclude=({frozen[0].removesuffix('.weight')!r},), or let them train"
            )
        self._ema = self._same_names(ema) if ema is not None else None
        if self._weights:
            self._weights.follow_device()
            self._weights.install()
        if self._units:
            parameters = dict(self.model.named_parameters())
            for group in self._units.groups:
                group.follow(parameters)
        self._optimizer = optimizer
        self._stepped = self._passes = 0
        self._enforce = True
        first = next(iter(self._prunable.values()))
        self._handles = [
            first.register_hook(self._count_pass),
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
            optimizer.register_load_state_dict_post_hook(self._something_was_loaded),
            self.model.register_load_state_dict_post_hook(self._something_was_loaded),
        ]
        self._arm()

    def _same_names(self, ema: nn.Module) -> nn.Module:
        """The module, of ``ema`` and what it wraps, whose parameters are called as the model's."""
        names = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for module in (ema, getattr(ema, "module", None)):
            if isinstance(module, nn.Module) and names == {n: p.shape for n, p in module.named_parameters()}:
                return module
        raise ValueError(
            "the EMA's parameters are other than the model's in name or shape; make it from the model after the "
            "scheduler"
        )

    def _averages(self) -> dict[str, Tensor]:
        """The EMA's tensors by name; looked up at each use, since the EMA may be moved. A shared one has two names."""
        if self._ema is None:
            return {}
        return {name: parameter.data for name, parameter in self._ema.named_parameters(remove_duplicate=False)}

    def detach(self) -> None:
        """Take all hooks away; masks and weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._weights:
            self._weights.remove()
        self._optimizer = None
        self._ema = None

    def step(self, closure: LossClosure | None = None) -> MaskUpdate | None:
        """Call after each ``optimizer.step()``. Runs an update if one is due.

        A step that AMP skipped does not count: nothing moves.

        Args:
            closure: returns the loss of one batch (a forward pass of the bare model, no backward). Needed for
                heads and neurons, and called at updates only.

        Returns:
            the report of the update, or None between updates.

        Raises:
            RuntimeError: if no optimizer is attached, or it stepped more than once since the last call.
            ValueError: if an update of heads or neurons is due and there is no closure.
            DisagreementError: on every process, if after an update they hold different masks.
        """
        if self._optimizer is None:
            raise RuntimeError("scheduler.step() before scheduler.attach(optimizer)")
        stepped, self._stepped = self._stepped, 0
        if stepped > 1:
            raise RuntimeError(
                f"the optimizer stepped {stepped} times since the last scheduler.step(); call it each time"
            )
        if stepped == 0:
            return None
        self._step += 1
        update = None
        due = self.schedule.next_update(self._last_update + 1)
        if due is not None and self._step >= due and self._exact_step() >= due:
            # An update may undo what had gone apart in the masks, but not in the weights under them.
            former = {f"former {what}": value for what, value in self._facts().items()}
            update = self._update(closure)
            self._last_update = self._step
            check_agreement({**former, **self._facts()}, self._device, f"after the update at step {self._step}")
        self._arm(together=True)
        return update

    def _update(self, closure: LossClosure | None) -> MaskUpdate | None:
        assert self._optimizer is not None
        if self._units and self._units.groups and closure is None:
            raise ValueError(
                "an update of heads and neurons needs the loss of one batch: "
                "scheduler.step(lambda: criterion(model(images), targets))"
            )
        self._synchronize()
        started = time.perf_counter()
        drop_fraction = self.schedule.fraction(self._step)
        swaps: dict[int, Swap] = {}
        notes: list[str] = []
        fresh: dict[str, Tensor] = {}
        averages = self._averages()
        if self._units and closure is not None:
            swaps, notes = self._units.update(
                closure,
                drop_fraction,
                optimizer=self._optimizer,
                ema=averages,
                masks=self.masks,
            )
            fresh = self._units.fresh(swaps, self.masks)
        ranked = self._weights is None or self.config.grow == "random" or self._weights.growth.holds_gradient
        layers = self._weights.update(drop_fraction, self._optimizer, averages, fresh) if self._weights else {}
        if not ranked:
            notes.append("no finite growth gradient was collected: the weight masks did not change")
        for note in notes:
            warnings.warn(note, stacklevel=3)
        self._synchronize()
        return MaskUpdate(
            step=self._step,
            drop_fraction=drop_fraction,
            budget=self.budget,
            seconds=time.perf_counter() - started,
            layers=layers,
            blocks=self._block_report(swaps),
            warnings=tuple(notes),
        )

    def _facts(self) -> dict[str, int]:
        """What all processes must hold alike, as numbers and digests by name; nothing for one process."""
        if process_count() == 1:
            return {}
        facts = {"step number": self._step, "number of live weights": self.budget.live}
        facts |= {f"mask of {name}": mask_digest(mask) for name, mask in self.masks.items()}
        facts |= {f"order of live heads in {name}": order_digest(units) for name, units in self.live_heads.items()}
        facts |= {f"order of live neurons in {name}": order_digest(units) for name, units in self.live_neurons.items()}
        return facts

    @property
    def _device(self) -> torch.device:
        return next(iter(self._prunable.values())).device

    def _block_report(self, swaps: Mapping[int, Swap]) -> dict[str, BlockUpdate]:
        if self._units is None:
            return {}
        nothing = Swap((), (), ())
        found: dict[tuple[str, str], tuple[Swap, int]] = {}
        for index, group in enumerate(self._units.groups):
            found[group.group.block, group.group.kind] = (swaps.get(index, nothing), len(group.explored))
        heads, neurons = self._units.totals("head"), self._units.totals("neuron")
        live_heads, live_neurons = self.live_heads, self.live_neurons
        report = {}
        for name in self._units.blocks:
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

    def _synchronize(self) -> None:
        """Wait for the device, so that the reported seconds are the update's own."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

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
        ahead = max(1, -(-most // self._passes_per_step))
        collecting = self._step + ahead >= due
        if together and most > 1:
            collecting = on_any_process(collecting, self._device)
        self._weights.collect(collecting)

    def _exact_step(self) -> int:
        """The step number less the steps that a fused optimizer skipped on the device; this reads the device."""
        if self._skipped is not None:
            self._step -= int(self._skipped)
            self._skipped = None
        return self._step

    def _count_pass(self, _: Tensor) -> None:
        if next(iter(self._prunable.values())).grad is None:
            self._passes = 0  # an optimizer step begins: passes of one that was dropped do not count
        self._passes += 1

    @torch.no_grad()
    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._enforce:
            return
        # Once, when all states are loaded in whatever order: before, the masks might be the wrong ones.
        self._enforce = False
        if self._weights:
            self._weights.enforce(optimizer)
            for name, tensor in self._averages().items():
                if name in self.masks:
                    tensor.mul_(self.masks[name].to(tensor.device))

    def _something_was_loaded(self, *_: Any) -> None:
        self._enforce = True

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped += 1
        if self._weights and self._weights.growth.collecting:
            self._weights.growth.finish_step(self._weights.parameters, self.masks)
        self._passes_per_step, self._passes = max(self._passes, 1), 0
        # GradScaler lets a fused optimizer skip the step by itself and leaves its verdict here, on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            skipped = found_inf.detach().reshape(()).clone()
            self._skipped = skipped if self._skipped is None else self._skipped + skipped

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides future masks, as tensors, numbers, strings, lists and dictionaries."""
        return {
            "step": self._exact_step(),
            "last_update": self._last_update,
            "passes_per_step": self._passes_per_step,
            "total_steps": self.schedule.total_steps,
            "weights": self._weights.state_dict() if self._weights else None,
            "units": self._units.state_dict() if self._units else None,
        }

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
        for what, own in (("weights", self._weights), ("units", self._units)):
            if (state[what] is None) != (own is None):
                raise ValueError(f"the saved state {'has no' if state[what] is None else 'has'} {what} masks")
        if self._units:
            self._units.load_state_dict(state["units"])
        if self._weights:
            self._weights.load_state_dict(state["weights"])
        self._step, self._last_update = int(state["step"]), int(state["last_update"])
        self._passes_per_step = int(state["passes_per_step"])
        self._skipped, self._stepped, self._passes = None, 0, 0
        self._arm()


def prunable_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights of ``Linear`` and ``Conv2d`` by name, in the model's order; a shared one under its first name.

    A pattern matches the parameter's name or its module's, as in a shell.

    Raises:
        ValueError: if a pattern matches nothing, listing close names; or nothing is left to prune.
    """
    never = set(getattr(model, "no_sparsity", set)())
    parameters: dict[str, Any] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        # Not a weight that is computed from others, as weight_norm's
        plain = isinstance(module, (nn.Linear, nn.Conv2d)) and isinstance(
            module._parameters.get("weight"), nn.Parameter
        )
        if isinstance(module, (nn.Linear, nn.Conv2d)) and plain and id(module.weight) not in seen:
            name = f"{module_name}.weight" if module_name else "weight"
            seen.add(id(module.weight))
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in never):
                parameters[name] = module.weight
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d weight to prune")

    def matching(key: str, patterns: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            hits = {
                name
                for name in parameters
                if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)
            }
            if not hits:
                names = [*parameters, *(name.removesuffix(".weight") for name in parameters)]
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(parameters)[:3]
                raise ValueError(f"{key}: {pattern!r} matches no prunable weight; close names: {', '.join(close)}")
            found |= hits
        return found

    chosen = matching("include", include) if include else set(parameters)
    chosen -= matching("exclude", exclude) if exclude else set()
    if not chosen:
        raise ValueError("include and exclude leave no weight to prune")
    return {name: parameter for name, parameter in parameters.items() if name in chosen}
