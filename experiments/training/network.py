"""What is trained and what moves it: model, optimizer and learning-rate schedule, from the configuration."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from experiments.config.records import naming
from experiments.config.run_config import OptimizerConfig, RunConfig, ScheduleConfig
from experiments.data.create_data import Data
from experiments.errors import ConfigError
from experiments.training.plan import Plan
from experiments.training.pretrained import load_start
from models import create_model, resolve
from models.threshold_selector import ThresholdSelector
from sparse_trainer import flops

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers of torch that step through all weights in one kernel, several times faster. On a CPU its other kernels
take ten times as long for the root of a second moment that is 0, as those of dead weights are."""


@dataclass(frozen=True)
class Network:
    """A model and the arguments that build it again."""

    model: nn.Module
    name: str  #: timm's
    arguments: dict[str, Any]  #: all that ``timm.create_model`` needs beside the name and ``pretrained``
    notes: tuple[str, ...] = ()  #: what the user should know of its weights


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
            try:
                model = create_model(name, selector=config.selector, pretrained=pretrained, **arguments)
            except TypeError as error:
                # ConvNeXt and its like have no size of their own: they take images of any.
                if "'img_size'" not in str(error) or "img_size" in given:
                    raise
                del arguments["img_size"]
                model = create_model(name, selector=config.selector, pretrained=pretrained, **arguments)
        except ValueError:
            raise
        except Exception as error:  # of timm, of a download, of whatever an argument reaches
            raise ValueError(f"{name} cannot be made with {arguments}: {str(error) or type(error).__name__}") from error
    if config.selector is not None:
        try:
            flops.count(model)
        except ValueError as error:
            raise ConfigError(
                f"selector: the MACs of {name} with fewer tokens cannot be counted, since its blocks are not those of "
                "timm's VisionTransformer as known here; set selector to null, or take another model"
            ) from error
    notes = []
    if config.model.start is not None and not resuming:
        notes = load_start(model, config.model.start, data)
    return Network(model, name, arguments, tuple(notes))


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
    given = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum, **extra}
    try:
        optimizer = create_optimizer_v2(model, opt=config.name, **given)
        if type(optimizer) in FUSED:
            optimizer = create_optimizer_v2(model, opt=config.name, fused=True, **given)
    except Exception as error:  # whatever the optimizer's own check raises
        if config.momentum == 0 and "momentum" in str(error):
            raise ConfigError(
                f"optimizer.momentum: 0 does not go with {config.name} ({error}); take momentum, which is SGD without "
                "Nesterov's step, or a momentum above 0"
            ) from error
        raise ConfigError(f"optimizer: {config.name} cannot be made: {str(error) or type(error).__name__}") from error
    if hasattr(optimizer, "set_hessian"):
        raise ConfigError(
            f"optimizer.name: {config.name} needs second derivatives, which no step here computes; take adamw"
        )
    for key, value in extra.items():  # timm drops what an optimizer does not know
        if key not in optimizer.defaults:
            raise ConfigError(f"optimizer.{key}: {value!r} is given, but {config.name} has none; set it to null")
    _scale_thresholds(optimizer, model, config.threshold_lr_scale)
    return optimizer


def _scale_thresholds(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Give a selector's thresholds a parameter group with ``lr_scale``, as timm's schedules understand it."""
    selector = getattr(model, "selector", None)
    if scale == 1 or not isinstance(selector, ThresholdSelector):
        return
    thresholds = selector.thresholds
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not thresholds]
    optimizer.add_param_group({"params": [thresholds], "weight_decay": 0.0, "lr_scale": scale})


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
