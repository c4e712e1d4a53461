"""What a command line of ``sparse-trainer train`` asks for: a configuration, and the run to go on with, if any."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from experiments.config.reading import create_parser, last_option, load_config, parse, read_output
from experiments.config.run_config import OutputConfig, RunConfig, resolve
from experiments.errors import ConfigError
from experiments.processes.processes import Processes
from experiments.processes.shared_failure import together
from experiments.run_folder.folder import RunFolder, find_run
from experiments.training.continuation import changes

EXIT_CODES = """\
exit codes: 0 the run is complete; 1 it could not go on (full disk, no finite loss, ...); 2 what was asked for cannot
be done; 130 ended by Ctrl-C (SIGINT), 143 by SIGTERM, 138 by SIGUSR1. A signal lets the step end and everything be
saved; a second Ctrl-C ends the run at once. Go on with --resume."""
AUTO = "auto"


def add_arguments(parser: ArgumentParser) -> None:
    """Options beside the configuration."""
    parser.add_argument(
        "--resume",
        type=str,
        default=None,
        help="run folder to go on with, or auto: the run called output.name, else the newest (of the recipe named by "
        "--config, if there is one); with auto and none to go on with, a new run starts. Beside the folder of a run, "
        "other settings of the training (training.epochs, optimizer.lr, data.batch_size, ...) begin a new run, which "
        "starts from the state of that one",
    )
    parser.epilog = EXIT_CODES


class Request:
    """What the command line asks for. What is wrong with it is kept until all processes have met."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = arguments
        self.error: ConfigError | None = None
        self.device = "cpu"
        self.explicit = last_option(arguments, "resume") not in (None, AUTO)
        try:
            self.config, self.folder = read_command_line(arguments)
            self.device = self.config.training.device
        except ConfigError as error:
            self.error = error

    def agree(self, processes: Processes) -> tuple[RunConfig, RunFolder | None]:
        """The configuration, and the run to go on with, which is the one that the first process found.

        Raises:
            ConfigError: in one line.
        """
        with together(processes):
            if self.error is not None:
                raise self.error
        path = processes.share(str(self.folder.path) if self.folder is not None else None)
        with together(processes):
            if path != (str(self.folder.path) if self.folder is not None else None):
                self.folder = RunFolder(Path(path)) if path is not None else None
                self.config = configure(self.arguments, self.folder)
        return self.config, self.folder


def read_command_line(arguments: Sequence[str]) -> tuple[RunConfig, RunFolder | None]:
    """The resolved configuration, and the run to go on with, if any.

    Raises:
        ConfigError: in one line.
    """
    resume = last_option(arguments, "resume")
    if resume is None:
        return configure(arguments, None), None
    if resume != AUTO:
        folder = find_run(resume, OutputConfig(), None)
    else:
        output, recipe = read_output(arguments)
        folder = find_run(resume, output, recipe)
    return configure(arguments, folder), folder


def configure(arguments: Sequence[str], folder: RunFolder | None) -> RunConfig:
    """The resolved configuration: that of the run to go on with, unless the command line names another.

    Raises:
        ConfigError: in one line.
    """
    parser = create_parser("train")
    add_arguments(parser)
    own = folder is not None and folder.config.is_file() and not _names_config(arguments)
    config, _ = parse(parser, arguments, base=folder.config if folder is not None and own else None)
    if own:
        assert folder is not None
        config = _chosen_anew(config, folder, arguments)
    return resolve(config)


def _chosen_anew(config: RunConfig, folder: RunFolder, arguments: Sequence[str]) -> RunConfig:
    """The settings of a run without what an option of the line puts out of force.

    The file of a run has everything that was chosen for it, a learning rate where only ``base_lr`` was given; and a run
    may have been moved.
    """

    def given(key: str) -> bool:
        return last_option(arguments, key) is not None

    if given("optimizer.base_lr") and not given("optimizer.lr"):
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=None))
    if given("training.epochs") and not given("training.steps"):
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=None))
    if not given("output.runs") and not given("output"):
        runs = str(folder.path.parent)
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, runs=runs))
    return config


def _names_config(arguments: Sequence[str]) -> bool:
    return any(argument == "--config" or argument.startswith("--config=") for argument in arguments)


def origin_of(
    config: RunConfig, found: RunFolder | None, explicit: bool
) -> tuple[RunFolder | None, dict[str, tuple[Any, Any]]]:
    """The run whose state a new one is to start from, and what changes; None where nothing does.

    Raises:
        ConfigError: something changes that cannot.
    """
    if found is None:
        return None, {}
    if not found.bundles():  # it may be a new run that was killed before it had saved that state itself
        origin = found.read_origin()
        return origin, {} if origin is None else changes(load_config(origin.config), config)
    if not explicit or not found.config.is_file():
        return None, {}
    changed = changes(load_config(found.config), config)
    return (found if changed else None), changed
