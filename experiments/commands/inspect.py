"""``sparse-trainer inspect``: what is in a sparse checkpoint or a run, how two of them differ, and pictures of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console

from experiments.config.explaining import explain
from experiments.errors import ConfigError
from experiments.inspection import compare, contents, run, tables
from experiments.inspection.pictures import MOST_IMAGES, draw_images
from experiments.inspection.run import checkpoint_of, find_run, read_run
from experiments.run_folder.folder import RunFolder
from experiments.terminal import create_console, print_table, run_command
from sparse_trainer.files.checkpoint import load_resume


def add_arguments(parser: ArgumentParser) -> None:
    """All options."""
    parser.add_argument("path", nargs="?", help="a run folder, finished or not, or a sparse checkpoint")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=str,
        default=None,
        metavar="PATH",
        help="two runs or checkpoints (or one, beside the path): what their masks share, accuracy, MACs, size",
    )
    parser.add_argument(
        "--plot",
        type=str,
        default=None,
        metavar="FILE",
        help="draw how a run went (.png, .svg or .pdf): accuracy, densities, churn, exploration, tokens, heads; with "
        "--compare two runs side by side. Needs the extra 'plot'",
    )
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        metavar="FILE",
        help="draw what the token selector looks at, such as overlay.png: dropped patches dimmed, by stage",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=str,
        default=None,
        help=f"for --output: image files or folders, the first {MOST_IMAGES}; without it some of the evaluation images",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON, every number in full")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("inspect", lambda: _inspect(arguments))


@dataclass(frozen=True)
class Subject:
    """What a path on the command line means: a run, and the sparse checkpoint in it, or a checkpoint alone."""

    path: Path
    run: RunFolder | None
    checkpoint: Path | None  #: None for a run that has saved none yet

    def checkpoint_for(self, option: str) -> Path:
        """The checkpoint, where one is needed.

        Raises:
            ConfigError: the run has none yet.
        """
        if self.checkpoint is None:
            raise ConfigError(
                f"{option}: {self.path} has no sparse checkpoint yet; the first comes with its evaluation"
            )
        return self.checkpoint


def find_subject(where: str) -> Subject:
    """The run or checkpoint that ``where`` means; a resume bundle stands for the run that it lies in.

    Raises:
        ConfigError: there is none.
        CheckpointError: a resume bundle is damaged.
    """
    path = Path(where)
    if not os.path.lexists(where):  # unlike Path.exists() it bears names that no file can have
        raise ConfigError(f"there is no {where}; give a run folder such as runs/<name>, or a sparse checkpoint")
    if not path.is_dir():  # what it is if no file, its reader says
        around = Path(os.path.realpath(path)).parent.parent
        if path.suffix != ".resume" or not RunFolder(around).config.is_file():
            return Subject(path, None, path)
        load_resume(path)  # checked in whole, as going on with it would
        path = around
    folder = find_run(path)
    return Subject(path, folder, checkpoint_of(folder))


def report_of(subject: Subject) -> dict[str, Any]:
    """Everything that can be said of it, as JSON values.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    report: dict[str, Any] = {"kind": "checkpoint" if subject.run is None else "run"}
    report["run"] = None if subject.run is None else run.to_json(read_run(subject.run))
    if subject.checkpoint is None:
        return {**report, "checkpoint": None}
    return {**report, **contents.to_json(contents.read_contents(subject.checkpoint))}


def _inspect(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    paths = _paths(options)
    console = create_console()
    if options.plot is not None:
        return _plot([find_subject(path) for path in paths], Path(options.plot), options.json, console)
    if len(paths) == 2:
        return _compare(find_subject(paths[0]), find_subject(paths[1]), options.json, console)
    subject = find_subject(paths[0])
    if options.output is not None:
        checkpoint = subject.checkpoint_for("--output")
        return _draw(checkpoint, options.images, options.output, options.json, console)
    if options.json:
        print(_dump(report_of(subject)))
        return 0
    if subject.checkpoint is not None:
        tables.print_contents(console, contents.read_contents(subject.checkpoint))
    if subject.run is not None:
        tables.print_run(console, run.to_json(read_run(subject.run)))
    return 0


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="sparse-trainer inspect",
        description="What is in a sparse checkpoint or a run; with --compare what two of them share; with --plot and "
        "--output pictures.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        return parser.parse_args(list(arguments))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, arguments, sections=())) from error


def _paths(options: Namespace) -> list[str]:
    """What to inspect: one path, or two to compare."""
    paths = [*([options.path] if options.path is not None else []), *(options.compare or [])]
    if not paths:
        raise ConfigError("give a run folder such as runs/<name>, or a sparse checkpoint")
    if options.compare is not None and len(paths) != 2:
        raise ConfigError(f"--compare: takes two runs or checkpoints, {len(paths)} given")
    if options.images is not None and options.output is None:
        raise ConfigError("--images: needs --output, the picture to write, such as overlay.png")
    for other in ("plot", "compare"):
        if options.output is not None and options[other] is not None:
            raise ConfigError(f"--output: goes without --{other}; ask for one at a time")
    return paths


def _compare(a: Subject, b: Subject, as_json: bool, console: Console) -> int:
    found = compare.compare(
        contents.read_contents(a.checkpoint_for("--compare")), contents.read_contents(b.checkpoint_for("--compare"))
    )
    if as_json:
        print(_dump({"kind": "comparison", **compare.to_json(found)}))
    else:
        tables.print_comparison(console, found)
    return 0


def _shared(subjects: Sequence[Subject]) -> compare.Comparison | None:
    """What two runs have in common, where both have a checkpoint and their dense networks are the same."""
    checkpoints = [subject.checkpoint for subject in subjects if subject.checkpoint is not None]
    if len(checkpoints) != 2:
        return None
    a, b = map(contents.read_contents, checkpoints)
    with contextlib.suppress(ConfigError):  # they differ in shape: there is nothing to lay over each other
        return compare.compare(a, b)
    return None


def _plot(subjects: Sequence[Subject], file: Path, as_json: bool, console: Console) -> int:
    runs = []
    for subject in subjects:
        if subject.run is None:
            raise ConfigError(f"--plot: {subject.path} is a checkpoint, which has no history; give the folder of a run")
        runs.append(read_run(subject.run))
    try:
        from experiments.inspection import plot
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ConfigError("--plot: needs matplotlib: pip install 'sparse-trainer[plot]'") from error
    panels = plot.save(runs, file, _shared(subjects))
    if as_json:
        print(_dump({"kind": "plot", "plot": str(file), "panels": panels, "runs": [run.to_json(r) for r in runs]}))
    else:
        console.print(f"{file}: {', '.join(panels)}", soft_wrap=True, markup=False)
    return 0


def _draw(checkpoint: Path, images: Sequence[str] | None, output: str, as_json: bool, console: Console) -> int:
    names, selection = draw_images(checkpoint, images, Path(output))
    patches, counts = selection.masks[0].shape[1], selection.counts.tolist()
    if as_json:
        found = [{"image": name, "kept": kept} for name, kept in zip(names, counts, strict=True)]
        print(_dump({"output": output, "stages": selection.stages, "patches": patches, "images": found}))
        return 0
    stages = ", ".join(f"block {stage}" for stage in selection.stages)
    rows = [(name, ", ".join(map(str, kept))) for name, kept in zip(names, counts, strict=True)]
    print_table(console, "patches kept", rows)
    console.print(
        f"{output}: a row per image; the image itself, then what is left of its {patches} patches before {stages}",
        soft_wrap=True,
        markup=False,
    )
    return 0


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False)
