"""A training run: everything that decides its future, and one optimizer step of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from experiments.config import ConfigError, OptimizerConfig, RunConfig, ScheduleConfig, flatten, naming
from experiments.data import Data, create_mixup
from experiments.losses import create_loss, distillation_loss, macs_loss
from experiments.metrics import Measured, TokenUse, count_used, known_tokens, measure, precision_context
from experiments.pretrained import create_teacher, load_start
from models import Selection, create_model, resolve
from sparse_trainer.budget import Budget
from sparse_trainer.flops import Count, model_macs
from sparse_trainer.report import MaskUpdate
from sparse_trainer.scheduler import SparsityScheduler, prunable_weights

MAY_CHANGE = (
    "output.",
    "recipe",
    "data.root",
    "data.download",
    "data.workers",
    "data.eval_batch_size",
    "data.memory_limit",
    "training.device",
    "training.compile",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.max_bad_steps",
)
"""Settings, or sections of them, that a resumed run may have otherwise."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Plan:
    """How a run is cut: everything counted in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every: int
    checkpoint_every: int
    accumulate: int

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch, and first batch in it, of the step after ``step`` steps."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.accumulate

    def evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.total_steps


def create_plan(config: RunConfig, batches_per_epoch: int) -> Plan:
    """Cut a run of ``config`` over so many batches an epoch; those that fill no whole step are left out.

    Raises:
        ConfigError: an epoch has less than one step, or the warm-up takes the whole run.
    """
    training = config.training
    steps_per_epoch = batches_per_epoch // training.accumulate
    if steps_per_epoch == 0:
        raise ConfigError(
            f"training.accumulate: {training.accumulate} is more than the {batches_per_epoch} batches of an epoch"
        )
    total = training.steps if training.steps is not None else training.epochs * steps_per_epoch
    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise ConfigError(
            f"schedule.warmup_epochs: {config.schedule.warmup_epochs} ({warmup} steps) does not end before the run "
            f"({total} steps); less than {total / steps_per_epoch:g} works"
        )
    eval_every = max(1, round(training.eval_every * steps_per_epoch))
    checkpoint_every = eval_every
    if training.checkpoint_every is not None:
        checkpoint_every = max(1, round(training.checkpoint_every * steps_per_epoch))
    return Plan(steps_per_epoch, total, warmup, eval_every, checkpoint_every, training.accumulate)


@dataclass(frozen=True)
class Network:
    """A model and the arguments that build it again."""

    model: nn.Module
    name: str  #: timm's
    arguments: dict[str, Any]  #: all that ``timm.create_model`` needs beside the name and ``pretrained``


def create_network(config: RunConfig, data: Data, *, resuming: bool = False) -> Network:
    """The dense model that fits the data, with a selector if there is one.

    Args:
        resuming: its weights will be loaded, so those to start from are not looked for.

    Raises:
        ConfigError: the name is unknown, its arguments and the data do not go together, or there are no such weights
            to start from.
    """
    given = config.model.kwargs
    for key, own, source in (
        ("img_size", data.image_size, "data.image_size"),
        ("in_chans", data.in_chans, "data.in_chans"),
        ("num_classes", data.num_classes, "the data's number of classes"),
    ):
        if given.get(key, own) != own:
            raise ConfigError(
                f"model.kwargs.{key}: {given[key]!r} does not match {source} ({own}); leave it out, or change the data"
            )
    wanted = {**given, "img_size": data.image_size, "in_chans": data.in_chans, "num_classes": data.num_classes}
    if config.model.drop_path:
        wanted["drop_path_rate"] = config.model.drop_path
    with naming("model"):
        name, arguments = resolve(config.model.name, wanted)
        try:
            pretrained = config.model.pretrained and not resuming
            model = create_model(name, selector=config.selector, pretrained=pretrained, **arguments)
        except ValueError:
            raise
        except Exception as error:  # of timm, of a download, of whatever an argument reaches
            raise ValueError(f"{name} cannot be made with {arguments}: {error or type(error).__name__}") from error
    if config.model.start is not None and not resuming:
        load_start(model, config.model.start, data)
    return Network(model, name, arguments)


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """timm's optimizer of that name; biases, norms and the like do not decay.

    Raises:
        ConfigError: there is none of that name, or it does not take the settings.
    """
    extra: dict[str, Any] = {}
    if config.betas is not None:
        extra["betas"] = config.betas
    if config.eps is not None:
        extra["eps"] = config.eps
    known = list_optimizers()
    if config.name.lower() not in known:
        close = (
            ", ".join(difflib.get_close_matches(config.name.lower(), map(str, known), n=3)) or "adamw, sgd, lamb, lion"
        )
        raise ConfigError(f"optimizer.name: {config.name!r} is no optimizer of timm; close names: {close}")
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **extra,
        )
    except Exception as error:  # whatever the optimizer's own check raises
        raise ConfigError(f"optimizer: {config.name} cannot be made: {error or type(error).__name__}") from error
    for key, value in extra.items():  # timm drops what an optimizer does not know
        if key not in optimizer.defaults:
            raise ConfigError(f"optimizer.{key}: {value!r} is given, but {config.name} has none; set it to null")
    return optimizer


def create_lr_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, plan: Plan) -> Scheduler:
    """timm's schedule in optimizer steps: call ``step_update(steps done)`` after each.

    Raises:
        ConfigError: the learning rate would rise where it should fall.
    """
    lr = max(group["lr"] for group in optimizer.param_groups)
    if config.name != "constant" and config.min_lr > lr:
        raise ConfigError(f"schedule.min_lr: {config.min_lr} is above optimizer.lr ({lr:g})")
    shapes: dict[str, dict[str, Any]] = {
        "cosine": {"sched": "cosine"},
        "linear": {"sched": "poly", "decay_rate": 1.0},
        "constant": {"sched": "step", "decay_epochs": plan.total_steps + 1, "decay_rate": 1.0},
    }
    schedule, _ = create_scheduler_v2(
        optimizer,
        num_epochs=plan.total_steps,
        warmup_epochs=plan.warmup_steps,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
        **shapes[config.name],
    )
    assert schedule is not None
    schedule.step_update(0)
    return schedule


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all global generators, as tensors and numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


@dataclass
class Running:
    """Sums since the last record, on the device: reading them every step would make the host wait."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by tag."""
    kept: Tensor | None = None
    """Mean patches kept ``[stages]``."""
    steps: int = 0

    def add(self, values: Mapping[str, Tensor], kept: Tensor | None) -> None:
        """One step that counted."""
        for tag, value in values.items():
            self.sums[tag] = self.sums[tag] + value if tag in self.sums else value
        if kept is not None:
            self.kept = kept if self.kept is None else self.kept + kept
        self.steps += 1

    def means(self, stages: tuple[int, ...]) -> dict[str, float]:
        """Means over the steps by tag; a loss and gradient norm that are NaN if there was none."""
        if not self.steps:
            return {"train/loss": math.nan, "train/grad_norm": math.nan}
        tags = [*self.sums, *(f"tokens/kept/{stage}" for stage in stages if self.kept is not None)]
        sums = torch.stack(list(self.sums.values()))
        values = sums if self.kept is None else torch.cat([sums, self.kept])
        return {tag: value / self.steps for tag, value in zip(tags, values.tolist(), strict=True)}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    counted: bool  #: False: loss or gradient was not finite, nothing moved
    update: MaskUpdate | None = None
    warnings: tuple[str, ...] = ()


class Trainer:
    """Model, masks, optimizer, averages and random states, moved on by one optimizer step at a time.

    Args:
        config: resolved (:func:`experiments.config.resolve`).
        data: what to train on; its batches are pure in seed, epoch and batch.
        rank, world_size: this process and their number.
        resuming: :meth:`load_state_dict` comes next, so the weights to start from need not be there any more.

    Raises:
        ConfigError: the parts of the configuration do not go together.
    """

    def __init__(
        self, config: RunConfig, data: Data, *, rank: int = 0, world_size: int = 1, resuming: bool = False
    ) -> None:
        self.config, self.data, self.rank, self.world_size = config, data, rank, world_size
        training = config.training
        self.device = torch.device(training.device)
        self.plan = create_plan(config, data.steps_per_epoch())
        seed_everything(training.seed)

        network = create_network(config, data, resuming=resuming)
        self.model_name, self.model_arguments = network.name, network.arguments
        self.model = network.model.to(self.device)
        self.model.train()
        self.autocast = precision_context(self.device, training.amp)
        self.loss = create_loss(config.data)
        self.mixing = create_mixup(config.data, data.num_classes, seed=training.seed)
        self.teacher = None
        if config.losses.distills:
            assert config.losses.teacher is not None
            self.teacher = create_teacher(config.losses.teacher, data, self.device)
        self.notes: tuple[str, ...] = ()
        self.sparsity: SparsityScheduler | None = None
        self.tokens: TokenUse | None = None  # of the last evaluation; None: all tokens, or none measured yet
        dense = {name: value for name, value in self.model.state_dict().items() if not name.startswith("selector.")}
        self.dense_bytes = sum(tensor.nbytes for tensor in dense.values())
        layers = self.count().layers
        #: MACs of one image in the network with all its heads, neurons and tokens, and without a selector.
        self.dense_macs = sum(layer.macs for name, layer in layers.items() if not name.startswith("selector."))
        self.tokens = known_tokens(self.model)
        if config.sparsity is not None:
            closure = self._first_loss if config.sparsity.structured and config.sparsity.start == "score" else None
            with naming("sparsity"), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.sparsity = SparsityScheduler(
                    self.model, config.sparsity, total_steps=self.plan.total_steps, closure=closure
                )
            self.notes = tuple(str(warning.message) for warning in caught)
            self.model.train()
        self._check_target()

        self.ema: ModelEmaV3 | None = None
        if training.ema_decay is not None:
            self.ema = ModelEmaV3(self.model, decay=training.ema_decay, use_warmup=training.ema_warmup)
        self.optimizer = create_optimizer(self.model, config.optimizer)
        if self.sparsity is not None:
            with naming("optimizer"):
                self.sparsity.attach(self.optimizer, ema=self.ema.module if self.ema is not None else None)
        self.lr_schedule = create_lr_schedule(self.optimizer, config.schedule, self.plan)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "float16")
        self.forward: nn.Module = torch.compile(self.model) if training.compile else self.model  # type: ignore[assignment]

        self.tried = 0  # optimizer steps tried: it alone decides which images come next
        self.step = 0  # optimizer steps that counted
        self.bad_in_a_row = 0
        self.running = Running()
        self._batches: Iterator[tuple[int, int, Tensor, Tensor]] = self._read_batches()

    @property
    def bad_steps(self) -> int:
        """Steps that were dropped."""
        return self.tried - self.step

    @property
    def epoch(self) -> float:
        """Passes over the training images done."""
        return self.tried / self.plan.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.tried >= self.plan.total_steps

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def result_model(self) -> nn.Module:
        """The model that is evaluated last and saved: the average of the weights where there is one."""
        return self.ema.module if self.ema is not None else self.model

    @property
    def masks(self) -> dict[str, Tensor]:
        return self.sparsity.masks if self.sparsity is not None else {}

    @property
    def budget(self) -> Budget:
        """Live and total prunable weights, counted now; of a dense run all of them."""
        if self.sparsity is not None:
            return self.sparsity.budget
        total = sum(weight.numel() for weight in prunable_weights(self.model).values())
        return Budget(total, total)

    def count(self) -> Count:
        """Parameters and mean multiply-accumulates of an image, counted now, with the tokens that were kept at the
        last evaluation."""
        size = (self.data.in_chans, self.data.image_size, self.data.image_size)
        return count_used(self.model, self.masks, self.tokens, size)

    @property
    def stages(self) -> tuple[int, ...]:
        """Blocks before which tokens are dropped."""
        selector = self.config.selector
        return () if selector is None or selector.stages is None else selector.stages

    def thresholds(self) -> dict[str, float]:
        """What a threshold selector compares with, in units of 197 tokens, by tag."""
        if self.config.selector is None or self.config.selector.kind != "threshold":
            return {}
        values = cast(Any, self.model).selector.thresholds.tolist()
        return {f"tokens/threshold/{stage}": value for stage, value in zip(self.stages, values, strict=True)}

    def train_step(self) -> StepResult:
        """One optimizer step. Where loss or gradient is not finite it is dropped: no weight, moment, mask or
        schedule moves.

        Raises:
            TrainingError: too many steps in a row were dropped.
        """
        accumulate = self.plan.accumulate
        if hasattr(self.model, "set_progress"):
            cast(Any, self.model).set_progress(self.tried / self.plan.total_steps)
        found: dict[str, Tensor] = {}
        kept: Tensor | None = None
        for _ in range(accumulate):
            epoch, batch, images, targets = next(self._batches)
            if self.mixing is not None:
                images, targets = self.mixing(images, targets, epoch=epoch, batch=batch)
            terms, selection = self._terms(self.forward, images, targets)
            loss = self._weigh(terms)
            self.scaler.scale(loss / accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                part = value.detach().float() / accumulate
                found[name] = found[name] + part if name in found else part
            if selection is not None:
                share = selection.counts.float().mean(dim=0) / accumulate
                kept = share if kept is None else kept + share
        total_loss = found["loss"]
        self.scaler.unscale_(self.optimizer)
        norm = self._clip_gradient()
        # The one number that the host reads in a step: it decides whether the optimizer moves.
        counted = bool((total_loss + norm).isfinite())
        if counted:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        update, notes = self._update_masks(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.tried += 1
        if counted:
            self.step += 1
            self.bad_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.model, step=self.step)
            self.lr_schedule.step_update(self.step)
            self.running.add({f"train/{name}": value for name, value in {**found, "grad_norm": norm}.items()}, kept)
        else:
            self.bad_in_a_row += 1
            if self.bad_in_a_row >= self.config.training.max_bad_steps:
                raise TrainingError(
                    f"step {self.tried}: loss or gradient was not finite in {self.bad_in_a_row} steps in a row "
                    f"(loss {float(total_loss):g}, gradient norm {float(norm):g}); a lower optimizer.lr, "
                    "training.clip_grad or another training.amp may help"
                )
        return StepResult(counted, update, notes)

    def take_running(self) -> dict[str, float]:
        """Means since the last call by tag: loss and its terms (unweighted), gradient norm, patches kept per stage."""
        means, self.running = self.running.means(self.stages), Running()
        return means

    def evaluate(self) -> Measured:
        """Accuracy in percent and loss of the model, and of the average of its weights as ``ema_*``.

        With a selector also the patches that :attr:`result_model` kept, ``tokens_kept/<block>``, and its mean MACs
        of one image, which hold until the next evaluation.
        """
        found = measure(self.model, self.data.eval, self.autocast)
        metrics = {name: found.metrics[name] for name in ("top1", "top5", "loss")}
        if self.ema is not None:
            found = measure(self.ema.module, self.data.eval, self.autocast)
            metrics |= {f"ema_{name}": found.metrics[name] for name in ("top1", "top5", "loss")}
        if found.tokens is not None:
            self.tokens = found.tokens
            metrics |= {"macs": self.count().live_macs, **found.tokens.metrics()}
        return Measured(metrics, found.tokens, found.kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the run."""
        return {
            "config": flatten(self.config),
            "tried": self.tried,
            "step": self.step,
            "bad_in_a_row": self.bad_in_a_row,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "sparsity": self.sparsity.state_dict() if self.sparsity is not None else None,
            "ema": dict(self.ema.module.state_dict()) if self.ema is not None else None,
            "scaler": self.scaler.state_dict(),
            "running": dataclasses.asdict(self.running),
            "tokens": dataclasses.asdict(self.tokens) if self.tokens is not None else None,
            "random": random_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called; on the CPU in the same bits as if nothing had happened.

        Raises:
            ConfigError: the state is of another configuration.
        """
        check_same_run(state["config"], flatten(self.config))
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsity is not None:
            with naming("sparsity"):
                self.sparsity.load_state_dict(state["sparsity"])
        self.scaler.load_state_dict(state["scaler"])
        self.tried, self.step = state["tried"], state["step"]
        self.bad_in_a_row = state["bad_in_a_row"]
        self.lr_schedule.step_update(self.step)
        running = state["running"]
        self.running = Running(
            sums={tag: value.to(self.device) for tag, value in running["sums"].items()},
            kept=running["kept"].to(self.device) if running["kept"] is not None else None,
            steps=running["steps"],
        )
        self.tokens = TokenUse(**state["tokens"]) if state["tokens"] is not None else None
        self._batches = self._read_batches()
        restore_random_states(state["random"])

    def _terms(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Selection | None]:
        """The terms of the loss that are on, each before its weight; and what the selector kept."""
        losses = self.config.losses
        terms: dict[str, Tensor] = {}
        selection: Selection | None = None
        with self.autocast():
            if self.config.selector is not None:
                logits, selection = model(images, return_selection=True)
            else:
                logits = model(images)
            if losses.cross_entropy_weight:
                terms["loss_ce"] = self.loss(logits, targets)
            if self.teacher is not None:
                terms["loss_distillation"] = distillation_loss(logits, self.teacher(images), losses.temperature)
        if losses.macs_target is not None and losses.bounds_macs:
            assert selection is not None
            terms["loss_macs"] = macs_loss(selection, self.model, losses.macs_target, self.dense_macs)
        return terms, selection

    def _weigh(self, terms: Mapping[str, Tensor]) -> Tensor:
        losses = self.config.losses
        weights = {
            "loss_ce": losses.cross_entropy_weight,
            "loss_distillation": losses.distillation_weight,
            "loss_macs": losses.macs_weight,
        }
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def _probe_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """What a head or neuron is worth, it is worth for the predictions.

        The MACs are left out: no swap changes how many units there are, and the probe itself runs with more.
        """
        terms, _ = self._terms(self.model, images, targets)
        return self._weigh({name: value for name, value in terms.items() if name != "loss_macs"})

    def _first_loss(self) -> Tensor:
        """Of the first batch as it will be trained on."""
        images, targets = next(iter(self.data.train.batches(0, 0)))
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, epoch=0, batch=0)
        return self._probe_loss(images, targets)

    def _check_target(self) -> None:
        """Refuse a budget of MACs that no number of tokens meets.

        Raises:
            ConfigError: naming the shares between which it can lie.
        """
        target = self.config.losses.macs_target
        if target is None or not self.config.losses.bounds_macs:
            return
        model = cast(Any, self.model)
        prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
        most = torch.full((1, len(model.blocks)), prefix + patches, dtype=torch.float64)
        least = most.clone()
        least[:, self.stages[0] :] = prefix + 1
        low, high = (float(model_macs(self.model, tokens)) / self.dense_macs for tokens in (least, most))
        if not low <= target <= high + 1e-6:
            raise ConfigError(
                f"losses.macs_target: {target} of the dense MACs cannot be reached; with selector.stages "
                f"{list(self.stages)} and the heads and neurons that are live it is between {low:.3f} and {high:.3f}"
            )

    def _clip_gradient(self) -> Tensor:
        """The norm of the gradient, which is clipped where that is asked for."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        limit = self.config.training.clip_grad
        if limit is not None:
            return torch.nn.utils.clip_grad_norm_(parameters, limit)
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _update_masks(self, images: Tensor, targets: Tensor) -> tuple[MaskUpdate | None, tuple[str, ...]]:
        """Tell the scheduler of the step, whether it was taken or not; also what it warns of."""
        if self.sparsity is None:
            return None, ()
        closure = None
        if self.sparsity.needs_closure:
            # The batch as it was trained on, mixed already: the probe draws nothing anew.
            def closure() -> Tensor:
                return self._probe_loss(images, targets)

        if not self.sparsity.update_due:
            return self.sparsity.step(closure), ()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            update = self.sparsity.step(closure)
        return update, tuple(str(warning.message) for warning in caught)

    def _read_batches(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Epoch, batch number, images and targets from where the run stands, without end."""
        epoch, start = self.plan.locate(self.tried)
        stop = self.plan.steps_per_epoch * self.plan.accumulate
        try:
            while True:
                batches = self.data.train.batches(epoch, start)
                for batch, (images, targets) in zip(range(start, stop), batches, strict=False):
                    yield epoch, batch, images, targets
                epoch, start = epoch + 1, 0
        except ValueError as error:  # of a worker process it brings the whole trace, the message last
            raise TrainingError(f"data: {str(error).strip().splitlines()[-1]}") from error


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with settings that would make another run of it.

    Raises:
        ConfigError: naming every such setting.
    """
    odd = [
        f"{key}: {now.get(key)!r} differs from {saved.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if odd:
        raise ConfigError(f"{'; '.join(odd)}, which the run was started with; leave it out to resume")
