"""Everything that decides the future of a training run: how it is made, what is saved of it, and how it goes on."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from experiments.config.reading import flatten
from experiments.config.records import naming
from experiments.config.run_config import RunConfig
from experiments.data.create_data import Data
from experiments.evaluation.measuring import TokenUse, count_used, known_tokens
from experiments.evaluation.precision import precision_context
from experiments.processes.data_parallel import in_parallel
from experiments.processes.processes import ALONE, Processes
from experiments.run_folder.random_states import random_states, resume_random_states, seed_everything, seed_process
from experiments.run_folder.same_settings import (
    check_same_checkpoint,
    check_same_data,
    check_same_order,
    check_same_run,
    check_same_settings,
)
from experiments.training.compiling import InBlocks, compiled
from experiments.training.feed import Feed
from experiments.training.network import create_lr_schedule, create_network, create_optimizer
from experiments.training.objective import Objective, check_target
from experiments.training.plan import create_plan
from experiments.training.pretrained import create_teacher
from experiments.training.running_means import Running
from experiments.training.weight_step import WeightStep
from models.top_k_selector import TopKSelector
from sparse_trainer.budget import Budget
from sparse_trainer.flops import Count
from sparse_trainer.scheduler import SparsityScheduler, prunable_weights


class RunState:
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
        self._compiled: nn.Module | None = None
        self.forward = self._make_forward()
        seed_process(training.seed, processes.rank)

        self.tried = 0  # optimizer steps tried: it alone decides which images come next
        self.step = 0  # optimizer steps that counted
        self.bad_in_a_row = 0
        self.running = Running()

    def _make_forward(self) -> nn.Module:
        """What a training step calls: the model, compiled and shared with other processes as was asked."""
        forward = self.model
        if self.config.training.compile:
            if self._compiled is None:
                self._compiled = compiled(self.model, self.config.sparsity)
            forward = self._compiled
        if self.processes.size > 1:
            image = (self.data.in_chans, self.data.image_size, self.data.image_size)
            forward = in_parallel(forward, self.model, image)
        return forward

    def _remake_forward(self) -> None:
        """Parameters have other shapes: what was built on the former ones is given up first."""
        del self.forward
        if self._compiled is not None and not isinstance(self._compiled, InBlocks):
            self._compiled = None
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
        return self._count(self.tokens)

    def training_macs(self) -> dict[str, float]:
        """``train/macs``, those of an image in training now, where a top-k selector does not keep its share yet."""
        selector = self.config.selector
        if selector is None or selector.kind != "top_k" or not selector.ramp:
            return {}
        return {"train/macs": self._count(known_tokens(self.model, training=True)).live_macs}

    def _count(self, tokens: TokenUse | None) -> Count:
        size = (self.data.in_chans, self.data.image_size, self.data.image_size)
        return count_used(self.model, self.masks, tokens, size)

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
