"""A training run: everything that decides its future, and one optimizer step of it."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from experiments.config.reading import flatten, naming
from experiments.config.run_config import RunConfig
from experiments.data.create_data import Data
from experiments.evaluation.measuring import Measured, TokenUse, count_used, known_tokens, measure
from experiments.evaluation.precision import precision_context
from experiments.processes.data_parallel import averaging, in_parallel
from experiments.processes.processes import ALONE, Processes
from experiments.run_folder.random_states import random_states, resume_random_states, seed_everything, seed_process
from experiments.run_folder.same_settings import (
    check_same_checkpoint,
    check_same_data,
    check_same_order,
    check_same_run,
    check_same_settings,
)
from experiments.training.feed import Feed
from experiments.training.network import create_lr_schedule, create_network, create_optimizer
from experiments.training.numerical_trouble import Recording, explain
from experiments.training.objective import Objective, check_target
from experiments.training.outcome import StepResult, TrainingError
from experiments.training.plan import create_plan
from experiments.training.pretrained import create_teacher
from experiments.training.running_means import Running
from experiments.training.verdict import agree
from experiments.training.weight_step import WeightStep
from models.top_k_selector import TopKSelector
from sparse_trainer.agreement import DisagreementError
from sparse_trainer.budget import Budget
from sparse_trainer.flops import Count
from sparse_trainer.report import MaskUpdate
from sparse_trainer.scheduler import SparsityScheduler, prunable_weights


class Trainer:
    """Model, masks, optimizer, averages and random states, moved on by one optimizer step at a time.

    Args:
        config: resolved (:func:`experiments.config.run_config.resolve`).
        data: what to train on; its batches are pure in seed, epoch and batch.
        processes: those that train together, each with its share of every batch. All of them call the same methods
            in the same order.
        resuming: :meth:`load_state_dict` comes next, so the weights to start from need not be there any more.

    Raises:
        ConfigError: the parts of the configuration do not go together.
    """

    def __init__(self, config: RunConfig, data: Data, processes: Processes = ALONE, *, resuming: bool = False) -> None:
        self.config, self.data, self.processes = config, data, processes
        training = config.training
        self.device = torch.device(processes.device(training.device))
        self.plan = create_plan(config, data.steps_per_epoch())
        check_same_settings(config, processes)
        check_same_data(data, processes)
        seed_everything(training.seed)

        network = create_network(config, data, resuming=resuming)
        self.model_name, self.model_arguments = network.name, network.arguments
        self.model = network.model.to(self.device)
        self.model.train()
        self.autocast = precision_context(self.device, training.amp)
        self.feed = Feed(config, data, self.plan, self.device, processes)
        self.teacher = None
        if config.losses.distills:
            assert config.losses.teacher is not None
            self.teacher = create_teacher(
                config.losses.teacher,
                data,
                self.device,
                amp=config.losses.teacher_amp,
                compile=training.compile,
            )
        self.notes = network.notes
        self.sparsity: SparsityScheduler | None = None
        self.tokens: TokenUse | None = None  # of the last evaluation; None: all tokens, or none measured yet
        dense = {name: value for name, value in self.model.state_dict().items() if not name.startswith("selector.")}
        self.dense_bytes = sum(tensor.nbytes for tensor in dense.values())
        layers = self.count().layers
        #: MACs of one image in the network with all its heads, neurons and tokens, and without a selector.
        self.dense_macs = sum(layer.macs for name, layer in layers.items() if not name.startswith("selector."))
        self.tokens = known_tokens(self.model)
        self.objective = Objective(
            config,
            self.model,
            self.dense_macs,
            teacher=self.teacher,
            autocast=self.autocast,
            processes=processes,
        )
        selector = getattr(self.model, "selector", None)
        if isinstance(selector, TopKSelector):
            selector.share = (processes.rank, processes.size)
        if config.sparsity is not None:
            closure = self._first_losses() if config.sparsity.structured and config.sparsity.start == "score" else None
            with naming("sparsity"), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # Weights that were trained are as great as they should be.
                first = "drawn" if config.model.start is not None else config.sparsity.first_weights
                self.sparsity = SparsityScheduler(
                    self.model,
                    dataclasses.replace(config.sparsity, first_weights=first),
                    total_steps=self.plan.total_steps,
                    closure=closure,
                )
            self.notes += tuple(str(warning.message) for warning in caught)
            self.model.train()
        check_target(config, self.model, self.dense_macs)

        self.ema: ModelEmaV3 | None = None
        if training.ema_decay is not None:
            self.ema = ModelEmaV3(self.model, decay=training.ema_decay, use_warmup=training.ema_warmup)
        self.optimizer = create_optimizer(self.model, config.optimizer)
        if self.sparsity is not None:
            with naming("optimizer"):
                self.sparsity.attach(self.optimizer, ema=self.ema.module if self.ema is not None else None)
        self.lr_schedule = create_lr_schedule(self.optimizer, config.schedule, self.plan)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "float16")
        self.weight_step = WeightStep(self.model, self.optimizer, self.scaler, training.clip_grad)
        self.forward = self._make_forward()
        seed_process(training.seed, processes.rank)

        self.tried = 0  # optimizer steps tried: it alone decides which images come next
        self.step = 0  # optimizer steps that counted
        self.bad_in_a_row = 0
        self.running = Running()

    def _make_forward(self) -> nn.Module:
        """What a training step calls: the model, compiled and shared with other processes as was asked."""
        forward: nn.Module = torch.compile(self.model) if self.config.training.compile else self.model  # type: ignore[assignment]
        if self.processes.size > 1:
            image = (self.data.in_chans, self.data.image_size, self.data.image_size)
            forward = in_parallel(forward, self.model, image)
        return forward

    def _remake_forward(self) -> None:
        """Parameters have other shapes: what was built on the former ones is given up first."""
        del self.forward
        if self.config.training.compile:
            torch.compiler.reset()  # or this would count as one of the few compilations of the same code
        self.forward = self._make_forward()

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

    @property
    def target(self) -> int:
        """Live weights that the budget asks for."""
        return self.sparsity.target if self.sparsity is not None else self.budget.live

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

    def train_step(self, stop: bool = False) -> StepResult:
        """One optimizer step. Where loss or gradient is not finite, on one process or all, it is dropped: no weight,
        moment, average, mask or schedule moves; only the loss scale of float16 falls.

        Args:
            stop: whether this process was asked to end after the step; the result tells it to all.

        Raises:
            TrainingError: too many steps in a row were dropped, the data cannot be read any more, or the masks of
                the processes differ.
        """
        self.objective.progress = self.tried / self.plan.total_steps
        if hasattr(self.model, "set_progress"):
            cast(Any, self.model).set_progress(self.objective.progress)
        recording = Recording(self.model, self.device) if self._is_last_chance else None
        found, kept, last = self._collect_gradients(recording)
        norm, whole_norm = self.weight_step.norms()
        error = self.feed.error
        verdict = agree(found, kept, whole_norm, stop=stop, failed=error is not None, processes=self.processes)
        # An update of the masks looks at the gradient of its step, so near one it must be known what that is.
        due = self.sparsity is not None and self.sparsity.update_due
        near = due or (self.sparsity is not None and self.sparsity.collecting)
        known = near or recording is not None or not self.weight_step.may_wait
        if not known:
            self.weight_step.move_unless(verdict.drop, norm)
        bad, stops, failed = verdict.read()
        if failed:
            errors = self.processes.gather(error and str(error))
            raise TrainingError("; ".join(f"{error} (process {rank})" for rank, error in enumerate(errors) if error))
        reason = ""
        if bad and recording is not None:
            reason = explain(recording, self.objective, self.processes, self.scaler.scale)
        if known:
            self.weight_step.move(norm, bad, overflowed=whole_norm)
        update, notes = self._update_masks(*last, due=due, skipped=bad and not known)
        if update is not None and update.reshaped:
            self._remake_forward()
        self.optimizer.zero_grad(set_to_none=True)
        self.tried += 1
        if bad:
            self.bad_in_a_row += 1
        else:
            self.step += 1
            self.bad_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.model, step=self.step)
            self.lr_schedule.step_update(self.step)
            self.running.add({f"train/{name}": value for name, value in {**found, "grad_norm": norm}.items()}, kept)
        if reason:
            raise TrainingError(
                f"step {self.tried}: loss or gradient was not finite in {self.bad_in_a_row} steps in a row "
                f"(loss {float(found['loss']):g}, gradient norm {float(whole_norm):g}); {reason}; a lower "
                "optimizer.lr, training.clip_grad or another training.amp may help"
            )
        return StepResult(not bad, update, notes, stops)

    def _collect_gradients(
        self, recording: Recording | None
    ) -> tuple[dict[str, Tensor], Tensor | None, tuple[Tensor, Tensor]]:
        """Forward and backward passes of one step.

        Returns:
            the loss and its terms by name, scalars; the patches kept ``[stages]``, with a selector; both are means
            over this process's images. And the last batch.
        """
        accumulate = self.plan.accumulate
        found: dict[str, Tensor] = {}
        kept: Tensor | None = None
        for number in range(accumulate):
            images, targets = self.feed.next()
            if recording is not None:
                recording.batches.append((images, targets))
            with averaging(self.forward, number == accumulate - 1):
                terms, selection = self.objective.terms(self.forward, images, targets)
                loss = self.objective.weigh(terms)
                self.scaler.scale(loss / accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                part = value.detach().float() / accumulate
                found[name] = found[name] + part if name in found else part
            if selection is not None:
                share = selection.counts.float().mean(dim=0) / accumulate
                kept = share if kept is None else kept + share
        self.scaler.unscale_(self.optimizer)
        return found, kept, (images, targets)

    @property
    def _is_last_chance(self) -> bool:
        """Whether the run ends if the next step is dropped too."""
        return self.bad_in_a_row + 1 >= self.config.training.max_bad_steps

    def take_running(self) -> dict[str, float]:
        """Means since the last call by tag: loss and its terms (unweighted), gradient norm, patches kept per stage."""
        means, self.running = self.running.means(self.stages), Running()
        return means

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> Measured:
        """Accuracy in percent and loss of the model, and of the average of its weights as ``ema_*``.

        With a selector also the patches that :attr:`result_model` kept, ``tokens_kept/<block>``, and its mean MACs
        of one image, which hold until the next evaluation.

        Args:
            stop: asked before each batch whether this process was asked to end.

        Raises:
            MeasuringStopped: on all processes, if any was; nothing has changed then.
        """
        found = measure(self.model, self.data.eval, self.autocast, self.processes, stop)
        metrics = {name: found.metrics[name] for name in ("top1", "top5", "loss")}
        if self.ema is not None:
            found = measure(self.ema.module, self.data.eval, self.autocast, self.processes, stop)
            metrics |= {f"ema_{name}": found.metrics[name] for name in ("top1", "top5", "loss")}
        if found.tokens is not None:
            self.tokens = found.tokens
            metrics |= {"macs": self.count().live_macs, **found.tokens.metrics()}
        return Measured(metrics, found.tokens, found.kept)

    def unreadable_images(self) -> dict[str, str]:
        """Why, by name, of each image that any process could not read so far; called by all of them."""
        return {
            name: why for files in self.processes.gather(dict(self.data.corrupt_files)) for name, why in files.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the run; called by all processes, the same for each."""
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
            "order": list(self.data.train.order),
            "unreadable": self.unreadable_images(),
            "random": self.processes.gather(random_states(self.device)),
        }

    def take_shapes(self, state: Mapping[str, Any]) -> None:
        """Give heads and neurons the numbers of a saved state, which may have been others than those at the start."""
        if self.sparsity is not None and self.sparsity.take_shapes(state["sparsity"]):
            self._remake_forward()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was called; on the CPU in the same bits as if nothing had happened.

        With another number of processes the images, masks and schedules are the same all the same. What is drawn
        image by image (drop path, dropout) is drawn anew, and sums are rounded in another order.

        Raises:
            ConfigError: the state is of another configuration, or the images would come in another order.
        """
        check_same_run(state["config"], flatten(self.config))
        check_same_checkpoint([state["tried"], state["step"]], self.processes)
        if state["tried"] % self.plan.steps_per_epoch:
            check_same_order(state["order"], self.data.train.order)
        self.take_shapes(state)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsity is not None:
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
        self.feed.go_to(self.tried)
        self.data.corrupt_files.update(state["unreadable"])
        resume_random_states(
            state["random"],
            self.device,
            rank=self.processes.rank,
            size=self.processes.size,
            seed=self.config.training.seed,
            step=self.tried,
        )

    def _first_losses(self) -> Callable[[], Tensor]:
        """Of one batch after the other, as they will be trained on."""
        numbers = itertools.count()
        return lambda: self.objective.probe(*self.feed.early(next(numbers)))

    def _update_masks(
        self, images: Tensor, targets: Tensor, *, due: bool, skipped: bool
    ) -> tuple[MaskUpdate | None, tuple[str, ...]]:
        """Tell the scheduler of the step, whether it was taken or not; also what it warns of.

        Args:
            due: whether the step ends in an update, if it counts.
            skipped: the optimizer was called, and left the step out on the device.
        """
        if self.sparsity is None:
            return None, ()
        closure = None
        if self.sparsity.needs_closure:
            # The batch as it was trained on, mixed already: the probe draws nothing anew.
            def closure() -> Tensor:
                return self.objective.probe(images, targets)

        if not due:
            return self.sparsity.step(closure, skipped=skipped), ()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                update = self.sparsity.step(closure)
            except DisagreementError as error:
                raise TrainingError(f"{error}; go on from the last checkpoint") from error
        return update, tuple(str(warning.message) for warning in caught)
