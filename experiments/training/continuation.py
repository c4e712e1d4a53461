"""A new run that starts from the state of another: longer, or with another learning rate, batch size, augmentation ...

Its schedules (learning rate, updates of the masks, a selector's temperature) are those of its own settings, entered
where the other run stands: the run goes on as if it had had these settings from the start. Where epochs have another
number of steps now, the position in epochs is kept. What the other run had measured stays there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.config.reading import flatten
from experiments.config.run_config import RunConfig
from experiments.errors import ConfigError
from experiments.run_folder.folder import RunFolder
from experiments.run_folder.same_settings import check_same_run, differing
from experiments.training.plan import create_plan
from experiments.training.resume_bundle import check_bundle, read_newest
from experiments.training.running_means import Running
from experiments.training.trainer import Trainer
from sparse_trainer.files.checkpoint import CheckpointError

MAY_DIFFER = {
    "training.epochs", "training.steps", "training.accumulate", "training.amp", "training.clip_grad",
    "training.deterministic", "training.ema_decay", "training.ema_warmup",
    "optimizer.lr", "optimizer.base_lr", "optimizer.weight_decay", "optimizer.momentum", "optimizer.betas",
    "optimizer.eps",
    "schedule.name", "schedule.warmup_epochs", "schedule.warmup_lr", "schedule.min_lr",
    "losses.cross_entropy_weight", "losses.distillation_weight", "losses.macs_weight", "losses.macs_target",
    "losses.temperature",
    "data.batch_size", "data.crop_padding", "data.horizontal_flip", "data.color_jitter", "data.random_erasing",
    "data.erasing_mode", "data.repeated_augmentation", "data.mixup", "data.cutmix", "data.mixup_prob",
    "data.mixup_switch_prob", "data.label_smoothing",
    "sparsity.update_every", "sparsity.updates", "sparsity.stop_at", "sparsity.drop_fraction",
    "sparsity.drop_fraction_end", "sparsity.growth_batches",
}  # fmt: skip
"""Settings in which the new run may differ from the one that it starts from."""


def changes(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Old and new values, by key, of the settings that make another run.

    Raises:
        ConfigError: one of them cannot change under a state that is there; it names all of these.
    """
    old, new = flatten(before), flatten(now)
    found = {key: (old.get(key), new.get(key)) for key in differing(old, new)}
    odd = {key: values for key, values in found.items() if key not in MAY_DIFFER}
    if odd:
        text = "; ".join(f"{key}: {value!r} differs from {was!r}" for key, (was, value) in odd.items())
        raise ConfigError(
            f"{text}, which the run was started with, and its state is of that; leave it out to resume (length, "
            "learning rate, batch size, augmentation, loss weights and the timing of updates may change)"
        )
    return found


def describe_changes(found: Mapping[str, tuple[Any, Any]]) -> str:
    """``training.epochs 40 (was 20), optimizer.lr 0.001 (was 0.0005)``."""
    return ", ".join(f"{key} {_word(now)} (was {_word(was)})" for key, (was, now) in found.items())


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def start_from(trainer: Trainer, origin: RunFolder, before: RunConfig) -> list[str]:
    """Give a new trainer the newest good state of the run ``origin``; called by all processes.

    Args:
        before: the configuration of that run.

    Returns:
        What was found wrong with its checkpoints.

    Raises:
        CheckpointError: it has no good checkpoint.
        ConfigError: the new run would have no step left.
    """
    path, state, notes = read_newest(origin, trainer.processes)
    try:
        check_same_run(state["trainer"]["config"], flatten(before))
        old_plan = create_plan(before, trainer.data.train_size // before.data.batch_size)
        tried = round(state["trainer"]["tried"] * trainer.plan.steps_per_epoch / old_plan.steps_per_epoch)
        if tried >= trainer.plan.total_steps:
            raise ConfigError(
                f"training.epochs: {trainer.plan.total_steps / trainer.plan.steps_per_epoch:g} epochs are done after "
                f"{trainer.plan.total_steps:,} steps, and {origin.path} has come {tried:,} of these already; give more"
            )
        state = continued(state, before, trainer, tried)
        check_bundle(path, state, trainer, most_steps=max(trainer.plan.total_steps, old_plan.total_steps))
        trainer.load_state_dict(state["trainer"])
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: is not of this run or version: {error!r:.300}") from error
    return notes


def continued(state: Mapping[str, Any], before: RunConfig, trainer: Trainer, tried: int) -> dict[str, Any]:
    """A bundle of the run ``before`` as one of the trainer's own run after ``tried`` steps."""
    own, old = trainer.state_dict(), state["trainer"]
    step = min(tried, round(old["step"] * tried / max(old["tried"], 1)))
    changed: dict[str, Any] = {
        "config": flatten(trainer.config),
        "tried": tried,
        "step": step,
        "optimizer": {**old["optimizer"], "param_groups": _groups(old["optimizer"], own["optimizer"])},
        "running": dataclasses.asdict(Running()),
    }
    if before.training.amp != trainer.config.training.amp:
        changed["scaler"] = own["scaler"]
    if own["ema"] is None or old["ema"] is None:
        changed["ema"] = None if own["ema"] is None else dict(old["model"])
    if own["sparsity"] is not None:
        changed["sparsity"] = _scheduler(old["sparsity"], own["sparsity"], step, before, trainer.config)
    fresh: dict[str, Any] = {"history": [], "best": None, "seconds": 0.0, "seconds_since": 0.0, "images_since": 0}
    return {**state, **fresh, "metrics_size": 0, "metrics_line": {}, "trainer": {**old, **changed}}


def _groups(old: Mapping[str, Any], own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings are the new ones. What an optimizer counts beside them, as Lamb does its steps, stays as the moments
    do."""
    before = [*old["param_groups"], *[{}] * len(own["param_groups"])]
    return [{**had, **group} for had, group in zip(before, own["param_groups"], strict=False)]


def _scheduler(
    old: Mapping[str, Any], own: Mapping[str, Any], step: int, before: RunConfig, now: RunConfig
) -> dict[str, Any]:
    """The scheduler's state, with the masks as they are, and the schedule of the new run after ``step`` steps.

    Updates that this schedule would have made before are not made up for, and a growth gradient that was collected for
    an update of the old one is given up.
    """
    changed: dict[str, Any] = {"step": step, "last_update": step, "total_steps": own["total_steps"]}
    if before.training.accumulate != now.training.accumulate:
        changed["passes_per_step"] = own["passes_per_step"]
    if old["weights"] is not None:
        changed["weights"] = {**old["weights"], "growth": {"mean": {}, "steps": 0}}
    return {**old, **changed}
