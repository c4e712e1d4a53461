"""What a resume bundle must be before a run goes on from it: built like the run's own state, and sound.

The checksums of the file say that nothing was damaged on the way; who wrote it they do not say. A tensor of another
shape could make a fused optimizer write where it must not, and a number of another type would fail in the midst of the
training. So everything is compared with the state that the new run begins with, before any of it is used.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config.reading import flatten
from experiments.evaluation.measuring import TokenUse
from experiments.processes.processes import Processes
from experiments.processes.shared_failure import together
from experiments.run_folder.folder import RunFolder
from experiments.run_folder.same_settings import check_same_run
from experiments.training.trainer import Trainer
from sparse_trainer.files.checkpoint import CheckpointError, load_resume
from sparse_trainer.files.tensor_file import fault, quote

NAMED = 3
"""Differences that an error lists."""
FIXED = ("betas", "eps", "momentum")
"""Settings of an optimizer that its configuration fixes for the whole run."""
VARIES = ("config", "optimizer", "order", "random", "running", "tokens", "unreadable")
"""Parts of a trainer's state that depend on how far it is, or that it compares itself."""


def read_newest(folder: RunFolder, processes: Processes) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest resume bundle of a run that can be read, its content, and what is wrong with newer ones; called by all
    processes.

    Raises:
        CheckpointError: there is none.
    """
    name, state, notes = "", dict[str, Any](), list[str]()
    with together(processes):
        if processes.is_main:
            name, state, notes = _newest_good(folder)
    path = folder.checkpoints / processes.share(name)
    with together(processes):
        if not processes.is_main:
            state = load_resume(path)
    return path, state, notes


def _newest_good(folder: RunFolder) -> tuple[str, dict[str, Any], list[str]]:
    faults: list[CheckpointError] = []
    for path in folder.bundles():
        try:
            state = load_resume(path)
        except CheckpointError as error:
            faults.append(error)
            continue
        notes = [f"damaged: {fault}; going on from {path.name}, the one before" for fault in faults]
        return path.name, state, notes
    if not faults:
        raise CheckpointError(f"{folder.checkpoints}: there is no resume bundle")
    older = f"; the {len(faults) - 1} before it cannot be read either" if len(faults) > 1 else ""
    raise CheckpointError(f"{faults[0]}{older}")


def check_bundle(path: Path, state: Mapping[str, Any], trainer: Trainer, most_steps: int | None = None) -> None:
    """Compare what a bundle holds with a trainer of the same configuration; called by all processes.

    Args:
        most_steps: that an optimizer may have counted; None for the steps of the run.

    Raises:
        CheckpointError: the bundle is of another network or another version, or holds what no run can have saved.
        ConfigError: it is of another configuration.
    """
    problems = list(_outer_problems(state))
    if not problems:
        check_same_run(state["trainer"]["config"], flatten(trainer.config))
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # what is odd is named below
            trainer.take_shapes(state["trainer"])
        most_steps = most_steps if most_steps is not None else trainer.plan.total_steps
        problems = list(_trainer_problems(state["trainer"], trainer.state_dict(), trainer, most_steps))
    if problems:
        more = f", and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise CheckpointError(f"{path}: is not of this run or version: {'; '.join(problems[:NAMED])}{more}")
    for part in ("model", "ema"):
        for name, tensor in (state["trainer"][part] or {}).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise fault(path, f"the values of {part}.{name}", expected="finite numbers", found="NaN or infinity")


def differences(found: Any, own: Any, place: str) -> Iterator[str]:
    """Where nested states are not built alike: the types of values, the keys, the shapes and types of tensors.

    What ``own`` does not have yet (None, or nothing in a dictionary or list) may be anything.
    """
    if own is None:
        return
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or (found.dtype, found.shape) != (own.dtype, own.shape):
            yield f"{place}: expected {_describe(own)}, found {_describe(found)}"
    elif isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            yield f"{place}: expected a dictionary, found {_describe(found)}"
        elif own:
            odd = [key for key in [*own, *found] if (key in own) != (key in found)]
            if odd:
                missing = "lacks" if odd[0] in own else "holds"
                yield f"{place}: {missing} {quote(odd[0])}"
            for key in own.keys() & found.keys():
                yield from differences(found[key], own[key], f"{place}.{key}")
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple):
            yield f"{place}: expected a list, found {_describe(found)}"
        elif own:
            examples = own if len(own) == len(found) else [own[0]] * len(found)
            for number, (item, example) in enumerate(zip(found, examples, strict=True)):
                yield from differences(item, example, f"{place}.{number}")
    elif type(found) is not type(own) and not (type(found) in (int, float) and type(own) in (int, float)):
        yield f"{place}: expected {type(own).__name__}, found {_describe(found)}"


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else quote(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and _is_number(v) for key, v in value.items())


def _is_config(trainer: Any) -> bool:
    """Whether there are settings whose names can be compared and shown."""
    config = trainer.get("config") if isinstance(trainer, Mapping) else None
    return isinstance(config, Mapping) and all(isinstance(key, str) and key.isprintable() for key in config)


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for item in value.items() for text in item)


def _is_count(value: Any, most: int = 1 << 62) -> bool:
    return type(value) is int and 0 <= value <= most


def _outer_problems(state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with all but the trainer's state."""
    history, best = state.get("history"), state.get("best")
    rules = {
        "trainer": isinstance(state.get("trainer"), Mapping),
        "config": _is_config(state.get("trainer")),
        "history": isinstance(history, list) and all(_are_numbers(item) and "step" in item for item in history),
        "best": best is None or (_are_numbers(best) and "step" in best),
        "seconds": _is_number(state.get("seconds")) and 0 <= state["seconds"] < math.inf,
        "seconds_since": _is_number(state.get("seconds_since")),
        "images_since": _is_count(state.get("images_since")),
        "metrics_size": _is_count(state.get("metrics_size")),
        "metrics_line": _are_numbers(state.get("metrics_line", {})),
    }
    for name, holds in rules.items():
        if not holds:
            yield f"{name}: found {quote(state.get(name))}"


def _trainer_problems(
    found: Mapping[str, Any], own: Mapping[str, Any], trainer: Trainer, most_steps: int
) -> Iterator[str]:
    if found.keys() != own.keys():
        yield from differences(dict.fromkeys(found), dict.fromkeys(own), "trainer")
        return
    most = trainer.plan.total_steps
    steps = found["tried"], found["step"], found["bad_in_a_row"]
    if not all(_is_count(step, most) for step in steps) or found["step"] > found["tried"]:
        yield f"steps: expected at most {most:,}, found {quote(steps)}"
    for part in own.keys() - set(VARIES):
        if own[part] is None and found[part] is not None:
            yield f"{part}: expected nothing, found {type(found[part]).__name__}"
        yield from differences(found[part], own[part], part)
    yield from _optimizer_problems(found["optimizer"], own["optimizer"], trainer, most_steps)
    if not _are_texts(found["unreadable"]):
        yield f"unreadable: found {quote(found['unreadable'])}"
    yield from _running_problems(found["running"], found["tokens"])
    parameters = dict(trainer.model.named_parameters())
    growth = ((found["sparsity"] or {}).get("weights") or {}).get("growth", {})
    yield from _tensor_problems(growth.get("mean", {}), parameters, "sparsity.weights.growth.mean")


def _optimizer_problems(found: Any, own: Mapping[str, Any], trainer: Trainer, most_steps: int) -> Iterator[str]:
    """Settings are those of the run, and moments built as this optimizer's: fused kernels go over them by element."""
    stepped = _after_a_step(trainer.optimizer)
    # Some keep a count of their steps beside the settings, from the first step on.
    every = zip(stepped["param_groups"], own["param_groups"], strict=True)
    counts = [later.keys() - group.keys() for later, group in every]
    groups: Any = found.get("param_groups") if isinstance(found, Mapping) else None
    problems = []
    if not isinstance(groups, list) or len(groups) != len(counts) or not all(isinstance(g, Mapping) for g in groups):
        problems = [f"optimizer: expected {len(counts)} groups of settings, found {quote(groups)}"]
    else:
        settings = [{k: v for k, v in group.items() if k not in new} for group, new in zip(groups, counts, strict=True)]
        problems += differences({**found, "param_groups": settings}, {**own, "state": {}}, "optimizer")
    yield from problems
    if problems:
        return
    for number, (group, own_group, new) in enumerate(zip(groups, own["param_groups"], counts, strict=True)):
        for name in {*FIXED} & own_group.keys():
            if group[name] != own_group[name]:
                yield f"optimizer: expected {name} {own_group[name]}, found {quote(group[name])}"
        if not all(0 <= float(group[name]) < math.inf for name in ("lr", "weight_decay") if name in own_group):
            yield f"optimizer: found lr {quote(group['lr'])} and weight decay {quote(group.get('weight_decay'))}"
        for name in new & group.keys():
            yield from _count_problems(group[name], most_steps, f"optimizer.param_groups.{number}.{name}")
    parameters = sum(len(group["params"]) for group in own["param_groups"])
    for index, moments in found["state"].items():
        place = f"optimizer.state.{index}"
        if not _is_count(index, parameters - 1) or not isinstance(moments, Mapping):
            yield f"{place}: expected moments of one of {parameters} parameters, found {_describe(moments)}"
            continue
        usual = stepped["state"].get(index, {})
        if usual.keys() != moments.keys():
            yield f"{place}: expected {quote(sorted(usual))}, found {quote(list(moments))}"
            continue
        yield from differences(moments, usual, place)
        if "step" in moments:
            yield from _count_problems(moments["step"], most_steps, f"{place}.step")


def _count_problems(step: Any, most: int, place: str) -> Iterator[str]:
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not _is_number(step) or not 0 <= step <= most:
        yield f"{place}: expected at most {most:,}, found {_describe(step)}"


def _after_a_step(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer's state looks like once it has stepped: a copy takes a step, with gradients of 0."""
    copied = copy.deepcopy(optimizer)
    devices = {parameter.device for group in copied.param_groups for parameter in group["params"]}
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]), torch.no_grad():
        for group in copied.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        copied.step()
    return copied.state_dict()


def _tensor_problems(found: Any, parameters: Mapping[str, nn.Parameter], place: str) -> Iterator[str]:
    """Tensors of the shapes of some parameters."""
    if not isinstance(found, Mapping):
        yield f"{place}: expected a dictionary, found {_describe(found)}"
        return
    for name, value in found.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            yield f"{place}.{name}: expected the shape {shape}, found {_describe(value)}"


def _running_problems(running: Any, tokens: Any) -> Iterator[str]:
    """Sums since the last record are scalars; of tokens there are none yet, or all numbers."""
    sums, kept, steps = (running.get(key) for key in ("sums", "kept", "steps")) if _has(running, 3) else (None,) * 3
    scalars = isinstance(sums, Mapping) and all(isinstance(v, Tensor) and v.ndim == 0 for v in sums.values())
    if not scalars or not _is_count(steps) or not (kept is None or (isinstance(kept, Tensor) and kept.ndim == 1)):
        yield f"running: found {quote(running)}"
    if tokens is None:
        return
    names = {field.name for field in dataclasses.fields(TokenUse)}
    values = tokens.values() if _has(tokens, len(names)) and set(tokens) == names else [None]
    if not all(_is_number(v) or (isinstance(v, tuple) and all(map(_is_number, v))) for v in values):
        yield f"tokens: found {quote(tokens)}"


def _has(value: Any, length: int) -> bool:
    return isinstance(value, Mapping) and len(value) == length
