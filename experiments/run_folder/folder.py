"""Where a run writes: its folder, its checkpoints, and how to find them again.

A process may be killed between any two system calls. So every file is written whole under another name and then
renamed, and what is newest is told by the step in its name: no second file has to agree with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config.reading import load_config
from experiments.config.run_config import OutputConfig
from experiments.errors import ConfigError
from sparse_trainer.files.whole_file import sync_folder, write_atomically

_BUNDLE_NAME = re.compile(r"step_(\d{8,})\.resume")
_OLD_BUNDLE = "last.resume"
"""What version 0.1.0 called its only one."""
_TEMPORARY = ".*.tmp"
_OWN = {"config.yaml", "checkpoints", "masks", "metrics.jsonl", "tensorboard", ".lock", "origin.json"}
"""What a run has before it saves for the first time."""


@dataclass(frozen=True)
class RunFolder:
    """``runs/<name>/`` and what lies in it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Sparse checkpoint of the best evaluation."""
        return self.checkpoints / "best.safetensors"

    @property
    def sparse(self) -> Path:
        """Sparse checkpoint of the finished run."""
        return self.path / "sparse.safetensors"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def origin_file(self) -> Path:
        """What says from which run's state this one starts, if from any."""
        return self.path / "origin.json"

    def write_origin(self, origin: RunFolder, changed: Mapping[str, Any]) -> None:
        """Note the run that this one starts from, and what was changed."""
        content = {"run": os.path.abspath(origin.path), "changed": dict(changed)}
        write_atomically(self.origin_file, [json.dumps(content, indent=2).encode() + b"\n"])

    def read_origin(self) -> RunFolder | None:
        """The run that this one starts from.

        Raises:
            ConfigError: the file that says it cannot be read.
        """
        try:
            return RunFolder(Path(str(json.loads(self.origin_file.read_text(encoding="utf-8"))["run"])))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--resume: {self.origin_file} cannot be read: {error!r:.200}") from error

    def bundle(self, step: int) -> Path:
        """Resume bundle of the state after ``step`` steps."""
        return self.checkpoints / f"step_{step:08d}.resume"

    def bundles(self) -> list[Path]:
        """The resume bundles that are there, the newest first."""
        return [path for _, path in sorted(self._numbered(), reverse=True)]

    def _numbered(self) -> Iterator[tuple[int, Path]]:
        try:
            names = os.listdir(self.checkpoints)
        except OSError:
            return
        for name in names:
            match = _BUNDLE_NAME.fullmatch(name)
            if match is not None:
                yield int(match[1]), self.checkpoints / name
            elif name == _OLD_BUNDLE:
                yield -1, self.checkpoints / name

    def prune_bundles(self, keep: int) -> None:
        """Delete all but the newest ``keep`` resume bundles."""
        for path in self.bundles()[keep:]:
            path.unlink(missing_ok=True)

    def set_aside_bundles(self, after: int) -> None:
        """Rename the bundles of later steps than ``after``: damaged ones, which the run is about to write again."""
        for step, path in self._numbered():
            if step > after:
                path.replace(path.with_name(f"{path.name}.damaged"))

    def sync(self) -> None:
        """Make durable what was made in the folder, and the folder itself."""
        sync_folder(self.path)
        sync_folder(self.path.parent)

    def clean(self) -> None:
        """Delete what a killed process left half-written."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(_TEMPORARY):
                path.unlink(missing_ok=True)

    @property
    def begins(self) -> bool:
        """Whether here is a run that ended before it saved anything, and nothing else; then it begins once more."""
        try:
            here = {path.name for path in self.path.iterdir() if not path.match(_TEMPORARY)}
        except OSError:
            return False
        return here <= _OWN and not self.bundles() and not self.best.exists()


def create_run_folder(output: OutputConfig, recipe: str) -> RunFolder:
    """A new folder, called after its recipe where it has no name of its own (and ``-2``, ``-3``, ... if taken).

    Raises:
        ConfigError: the folder exists, or cannot be made.
    """
    name = output.name or recipe
    for attempt in range(1, 1000):
        path = Path(output.runs) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if output.name is None and path.is_dir():
                continue
            raise ConfigError(
                f"output.name: {path} exists; choose another name, or go on with it: --resume {shlex.quote(str(path))}"
            ) from error
        except OSError as error:
            raise ConfigError(f"output.runs: cannot make {path}: {error.strerror or error}") from error
        return RunFolder(path)
    raise ConfigError(f"output.runs: {output.runs} has too many runs called {name}; set output.name")


def find_run(where: str, output: OutputConfig, recipe: str | None) -> RunFolder | None:
    """The run that ``--resume`` means.

    Args:
        where: a run folder, one of its resume bundles, or "auto": the run called ``output.name``, else the newest one
            of that recipe (of any, if it is None) that has a bundle.

    Returns:
        None if it is "auto" and there is none. The run may have no bundle yet (:attr:`RunFolder.begins`).

    Raises:
        ConfigError: there is nothing to go on with.
    """
    if where != "auto":
        path = Path(where)
        folder = RunFolder(path.parent.parent if path.is_file() else path)
        bundles = folder.bundles()
        if not bundles and not (folder.begins and folder.config.is_file()):
            raise ConfigError(
                f"--resume: {where} holds no checkpoints/step_*.resume; give the folder of a run, or auto"
            )
        if path.is_file() and path.resolve() != bundles[0].resolve():
            raise ConfigError(
                f"--resume: {where} is not the newest of its run, which is {bundles[0]}; give the folder {folder.path} "
                "to go on from that"
            )
        return folder
    if output.name is not None:
        folder = RunFolder(Path(output.runs) / output.name)
        return folder if folder.bundles() or folder.begins else None
    newest: dict[Path, float] = {}
    for bundle in Path(output.runs).glob("*/checkpoints/*.resume"):
        with contextlib.suppress(OSError):
            folder_path = bundle.parent.parent
            newest[folder_path] = max(newest.get(folder_path, 0.0), bundle.stat().st_mtime)
    for folder_path in sorted(newest, key=newest.__getitem__, reverse=True):
        folder = RunFolder(folder_path)
        if folder.bundles() and (recipe is None or _recipe_of(folder) == recipe):
            return folder
    return None


def _recipe_of(folder: RunFolder) -> str | None:
    try:
        return load_config(folder.config).recipe
    except ConfigError:
        return None
