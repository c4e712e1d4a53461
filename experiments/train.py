"""``sparse-trainer train``: one run from a configuration to a sparse checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from experiments.config import ConfigError, RunConfig, create_parser, naming, parse, resolve, to_yaml
from experiments.console import Display, create_console, print_table
from experiments.data import Data, create_data
from experiments.loop import Loop, Stopped, describe, stop_on_interrupt
from experiments.metrics import describe_tokens
from experiments.run_folder import RunFolder, create_run_folder, find_run, write_text
from experiments.training import Trainer, TrainingError
from sparse_trainer.checkpoint import CheckpointError

FAILED, WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes: the run could not go on; what was asked for cannot be done; ended by Ctrl-C."""


def add_arguments(parser: ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument(
        "--resume",
        type=str,
        default=None,
        help="run folder to go on with, or auto: the run called output.name, else the newest (of the recipe named by "
        "--config, if there is one); with auto and none to go on with, a new run starts",
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    try:
        config, folder = read_command_line(arguments)
        return train(config, folder, create_console())
    except (ConfigError, CheckpointError) as error:
        return _say(error, WRONG)
    except (TrainingError, OSError) as error:
        return _say(error, FAILED)
    except torch.OutOfMemoryError as error:
        advice = "a smaller data.batch_size needs less memory; a greater training.accumulate makes up for it"
        return _say(f"{str(error).splitlines()[0]} {advice}", FAILED)
    except KeyboardInterrupt:
        return _say("stopped at once", INTERRUPTED)


def _say(error: object, code: int) -> int:
    print(f"sparse-trainer train: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def read_command_line(arguments: Sequence[str]) -> tuple[RunConfig, RunFolder | None]:
    """The resolved configuration, and the run to go on with, if any.

    Raises:
        ConfigError: in one line.
    """
    parser = create_parser("train")
    add_arguments(parser)
    config, parsed = parse(parser, arguments)
    folder = None
    if parsed.resume is not None:
        named = any(argument == "--config" or argument.startswith("--config=") for argument in arguments)
        folder = find_run(parsed.resume, config.output, config.recipe if named else None)
        if folder is not None and not named:
            config, _ = parse(parser, arguments, base=folder.config)
    return resolve(config), folder


def train(config: RunConfig, resumed: RunFolder | None, console: Console) -> int:
    """Train from the beginning, or from the last checkpoint of ``resumed``."""
    data = _open_data(config)
    trainer = Trainer(config, data, resuming=resumed is not None)
    with naming("model"):
        describe(trainer, {})  # what no checkpoint can hold is refused now, not after the training
    folder = resumed or create_run_folder(config.output, config.recipe)
    loop = Loop(trainer, folder)
    if resumed is not None:
        loop.resume()
        console.print(f"resuming {folder.path} at step {trainer.tried:,}", soft_wrap=True)
    else:
        write_text(folder.config, to_yaml(_unnamed(config)))
    if trainer.finished and folder.sparse.is_file():
        console.print("the run is complete", soft_wrap=True)
        _conclude(loop, console)
        return 0
    _introduce(trainer, folder, console)
    try:
        with stop_on_interrupt() as stop, Display(console, trainer.plan.total_steps, trainer.tried) as display:
            loop.run(display, stop)
    except Stopped:
        console.print(
            f"stopped after step {trainer.tried:,} of {trainer.plan.total_steps:,}; everything is saved. Go on with:\n"
            f"  sparse-trainer train --resume {folder.path}",
            soft_wrap=True,
        )
        return INTERRUPTED
    _conclude(loop, console)
    return 0


def _open_data(config: RunConfig) -> Data:
    with naming("data"):
        try:
            return create_data(config.data, device=config.training.device, seed=config.training.seed)
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
        f"training  {trainer.plan.total_steps:,} steps ({trainer.plan.total_steps / trainer.plan.steps_per_epoch:g} "
        f"epochs) of {config.step_images} images, {config.training.amp} on {trainer.device}",
        *([f"start     {config.model.start}"] if config.model.start is not None else []),
        *([f"teacher   {config.losses.teacher}"] if trainer.teacher is not None else []),
        f"folder    {folder.path}",
    ):
        console.print(line, soft_wrap=True, markup=False)


def _conclude(loop: Loop, console: Console) -> None:
    """The table at the end: every number measured on the tensors and files as they are."""
    trainer, folder, history = loop.trainer, loop.folder, loop.history
    assert history.best is not None
    last, best, count = history.evaluations[-1], history.best, trainer.count()
    prefix = "ema_" if trainer.ema is not None else ""
    sparse_bytes = folder.sparse.stat().st_size
    minutes, seconds = divmod(round(loop.clock.seconds), 60)
    rows = [
        ("accuracy", f"top-1 {last[prefix + 'top1']:.2f} %   top-5 {last[prefix + 'top5']:.2f} %"),
        ("best top-1", f"{best[loop.score]:.2f} % at step {int(best['step']):,}"),
        ("live parameters", f"{trainer.budget}; budget {loop.budget.live:,}"),
        (
            "MACs per image",
            f"{count.live_macs / 1e6:,.1f} M live, {count.macs / 1e6:,.1f} M as computed; dense "
            f"{trainer.dense_macs / 1e6:,.1f} M",
        ),
        (
            "sparse file",
            f"{sparse_bytes / 1e6:,.3f} MB, {sparse_bytes / trainer.dense_bytes:.1%} of the dense weights "
            f"({trainer.dense_bytes / 1e6:,.3f} MB)",
        ),
        ("training time", f"{minutes} min {seconds:02d} s, evaluation and saving not counted"),
        ("saved weights", "average over the training (EMA)" if trainer.ema is not None else "of the last step"),
        ("written to", str(folder.path)),
    ]
    if trainer.tokens is not None:
        rows.insert(4, ("patches kept", describe_tokens(trainer.tokens)))
    if trainer.bad_steps:
        rows.insert(-1, ("dropped steps", f"{trainer.bad_steps} with a loss or gradient that was not finite"))
    if trainer.data.corrupt_files:
        rows.insert(-1, ("unreadable images", f"{len(trainer.data.corrupt_files)}"))
    print_table(console, f"{trainer.config.recipe}: done", rows)
    console.print(
        f"next:\n  sparse-trainer evaluate {folder.sparse}\n  tensorboard --logdir {folder.path.parent}", soft_wrap=True
    )
