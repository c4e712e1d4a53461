"""``sparse-trainer train``: one run from a configuration to a sparse checkpoint."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.commands.conclusion import conclude
from experiments.commands.train_help import HELP, help_text, topic_of
from experiments.commands.train_request import Request, origin_of
from experiments.config.reading import load_config, to_yaml
from experiments.config.records import naming
from experiments.config.run_config import RunConfig
from experiments.data.create_data import Data, create_data
from experiments.errors import ConfigError
from experiments.processes.processes import ALONE, Processes, join_processes
from experiments.processes.shared_failure import FailedElsewhere, speaks, together
from experiments.processes.signals import StoppedAtOnce, StopRequest, exit_code, stop_on_signals
from experiments.run_folder.folder import RunFolder, create_run_folder
from experiments.run_folder.lock import RunLock
from experiments.run_folder.random_states import deterministic_algorithms
from experiments.terminal import FAILED, WRONG, Display, create_console, run_command
from experiments.training.continuation import describe_changes, start_from
from experiments.training.loop import Loop, Stopped, describe
from experiments.training.trainer import Trainer, TrainingError
from sparse_trainer.files.checkpoint import CheckpointError
from sparse_trainer.files.whole_file import write_atomically

LOST = re.compile("gloo|NCCL|[Cc]onnection (closed|reset|refused)|TCPStore")
"""In the message of an error: another process is gone."""
ALONE_NOW = "another process has ended, and this one cannot go on without it; if it says nothing itself, it was killed"


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if set(HELP) & set(arguments):
        return run_command("train", partial(_help, arguments))
    with stop_on_signals() as stop:
        try:
            request = Request(arguments)
            with join_processes(request.device) as processes:
                return _run(request, processes, stop)
        except ConfigError as error:  # of the meeting itself
            return _say(error, WRONG, ALONE)
        except StoppedAtOnce as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"sparse-trainer train: {stopped}{stopped.hint}", file=sys.stderr)
            return exit_code(stopped.number)


def _help(arguments: Sequence[str]) -> int:
    print(help_text(topic_of(arguments)))
    return 0


def _run(request: Request, processes: Processes, stop: StopRequest) -> int:
    """Train, with every error turned into one line and an exit code."""
    try:
        code = train(request, processes, stop)
        processes.part()
        return code
    except FailedElsewhere:
        return FAILED
    except (ConfigError, CheckpointError) as error:
        return _say(error, WRONG, processes)
    except (TrainingError, OSError) as error:
        return _say(error, FAILED, processes)
    except torch.OutOfMemoryError as error:
        advice = "a smaller data.batch_size needs less memory; a greater training.accumulate makes up for it"
        return _say(f"{str(error).splitlines()[0]} {advice}", FAILED, processes)
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            return _say(f"training.deterministic: {str(error).splitlines()[0]}", FAILED, processes)
        if not _is_lost(error, processes):
            raise
        return _say(ALONE_NOW, FAILED, processes)


def _is_lost(error: RuntimeError, processes: Processes) -> bool:
    """Whether ``error`` means that another process is gone."""
    return processes.size > 1 and LOST.search(str(error)) is not None


def _say(error: object, code: int, processes: Processes) -> int:
    """Print one line; what all processes met only the first one says."""
    if processes.is_main or speaks(processes):
        who = "" if processes.is_main else f"process {processes.rank} of {processes.size}: "
        print(f"sparse-trainer train: error: {who}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if processes.is_main:
        speaks(processes)  # they wait to hear whether it does
    processes.part()
    return code


def train(request: Request, processes: Processes, stop: StopRequest) -> int:
    """Train from the beginning, or from the newest checkpoint of the run to go on with."""
    config, found = request.agree(processes)
    with deterministic_algorithms(config.training.deterministic), RunLock() as lock:
        with together(processes):
            origin, changed = origin_of(config, found, request.explicit)
        return _train(config, found, origin, changed, processes, stop, lock)


def _train(
    config: RunConfig,
    found: RunFolder | None,
    origin: RunFolder | None,
    changed: Mapping[str, tuple[Any, Any]],
    processes: Processes,
    stop: StopRequest,
    lock: RunLock,
) -> int:
    console = create_console() if processes.is_main else Console(quiet=True, force_terminal=False)
    if found is not None and found is not origin:
        _take(lock, found, processes, console)
    # What fails from here to the loop fails on all processes, or ends this one and with it the others.
    data = _open_data(config, processes)
    resuming = processes.share(origin is None and found is not None and bool(found.bundles()))
    trainer = Trainer(config, data, processes, resuming=resuming or origin is not None)
    with naming("model"):
        describe(trainer, {})  # what no checkpoint can hold is refused now, not after the training
    notes = start_from(trainer, origin, load_config(origin.config)) if origin is not None else []
    loop = _open_run(config, trainer, None if found is origin else found, resuming, origin, changed)
    loop.notes += notes
    folder = loop.folder
    _take(lock, folder, processes, console)
    if resuming:
        console.print(f"resuming {folder.path} at step {trainer.tried:,}", soft_wrap=True, markup=False)
    elif origin is not None:
        console.print(
            f"going on from {origin.path} at step {trainer.tried:,} in a new run: {describe_changes(changed)}",
            soft_wrap=True,
            markup=False,
        )
    elif found is not None:
        console.print(f"{folder.path} ended before its first step; it begins anew", soft_wrap=True, markup=False)
    if loop.complete:
        console.print("the run is complete", soft_wrap=True)
        conclude(loop, console)
        return 0
    _introduce(trainer, folder, console)
    try:
        with Display(console, trainer.plan.total_steps, trainer.tried) as display:
            loop.run(display, stop)
    except Stopped as stopped:
        console.print(
            f"stopped by {stopped} after step {trainer.tried:,} of {trainer.plan.total_steps:,}; everything is saved. "
            f"Go on with:\n  {resume_command(folder, processes)}",
            soft_wrap=True,
            markup=False,
        )
        return exit_code(stopped.number)
    except StoppedAtOnce as stopped:
        stopped.hint = _saved(loop)
        raise
    except RuntimeError as error:
        lost = not isinstance(error, TrainingError) and _is_lost(error, processes)
        if lost or isinstance(error, TrainingError):
            raise TrainingError(f"{ALONE_NOW if lost else error}{_saved(loop)}") from error
        raise
    conclude(loop, console)
    return 0


def _open_run(
    config: RunConfig,
    trainer: Trainer,
    found: RunFolder | None,
    resuming: bool,
    origin: RunFolder | None,
    changed: Mapping[str, Any],
) -> Loop:
    """The loop over a new run, or over the one that was found, with its state.

    Args:
        origin: the run whose state the trainer has, beside which the new one lies and after which it is called, unless
            there is a name for it.
    """
    processes = trainer.processes
    folder = found
    with together(processes):
        if processes.is_main and not resuming:
            folder = found or create_run_folder(config.output, config.recipe if origin is None else origin.path.name)
            if origin is not None:  # first, so that a run that is killed here knows it when it begins once more
                folder.write_origin(origin, changed)
            write_atomically(folder.config, [to_yaml(_unnamed(config)).encode()])
    loop = Loop(trainer, RunFolder(Path(processes.share(str(folder.path) if folder is not None else None))))
    if resuming:
        loop.resume()
    return loop


def _take(lock: RunLock, folder: RunFolder, processes: Processes, console: Console) -> None:
    """The first process has the folder for all of them.

    Raises:
        ConfigError: another run has it.
    """
    with together(processes):
        note = lock.take(folder.path) if processes.is_main else ""
    if note:
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def _saved(loop: Loop) -> str:
    """What a run that ends early leaves, for the end of a sentence."""
    if loop.saved is None:
        return ""
    return f"; go on from step {loop.saved:,} with {resume_command(loop.folder, loop.processes)}"


def resume_command(folder: RunFolder, processes: Processes) -> str:
    """The command line that goes on with a run."""
    path = shlex.quote(str(folder.path))
    if processes.size == 1:
        return f"sparse-trainer train --resume {path}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.size))
    machines = f"--nnodes {processes.size // here} --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
    return (
        f"torchrun {machines if here < processes.size else ''}--nproc-per-node {here} -m experiments train "
        f"--resume {path}"
    )


def _open_data(config: RunConfig, processes: Processes) -> Data:
    with naming("data"):
        try:
            return create_data(
                config.data,
                device=processes.device(config.training.device),
                seed=config.training.seed,
                rank=processes.rank,
                world_size=processes.size,
            )
        except OSError as error:
            raise ValueError(f"cannot be read: {error}") from error


def _unnamed(config: RunConfig) -> RunConfig:
    """The same run for another folder: a name would be taken when the file is used again."""
    return dataclasses.replace(config, output=dataclasses.replace(config.output, name=None))


def _introduce(trainer: Trainer, folder: RunFolder, console: Console) -> None:
    config, data, count = trainer.config, trainer.data, trainer.count()
    budget = f"{trainer.budget} prunable weights live" if trainer.sparsity is not None else "dense"
    for line in (
        f"model     {config.model.name}, {count.parameters:,} parameters; {budget}",
        f"data      {config.data.dataset}: {data.train_size:,} images to train on, {data.eval_size:,} to evaluate, "
        f"{data.num_classes} classes, {data.image_size} x {data.image_size} x {data.in_chans}; {data.path}",
        f"classes   {data.summary[0]}",
        f"pictures  {data.summary[1]}",
        f"training  {trainer.plan.total_steps:,} steps ({trainer.plan.total_steps / trainer.plan.steps_per_epoch:g} "
        f"epochs) of {config.step_images} images, {config.training.amp} on {trainer.device}",
        *([f"start     {config.model.start}"] if config.model.start is not None else []),
        *([f"teacher   {config.losses.teacher}"] if trainer.teacher is not None else []),
        f"folder    {folder.path}",
    ):
        console.print(line, soft_wrap=True, markup=False)
