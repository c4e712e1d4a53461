"""Where a run writes: its folder, and one writer for TensorBoard and ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from experiments.config import ConfigError, OutputConfig, load_config


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
    def last(self) -> Path:
        """Resume bundle of the last step that was saved."""
        return self.checkpoints / "last.resume"

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
                f"output.name: {path} exists; choose another name, or go on with it: --resume {path}"
            ) from error
        except OSError as error:
            raise ConfigError(f"output.runs: cannot make {path}: {error.strerror or error}") from error
        folder = RunFolder(path)
        folder.checkpoints.mkdir()
        return folder
    raise ConfigError(f"output.runs: {output.runs} has too many runs called {name}; set output.name")


def find_run(where: str, output: OutputConfig, recipe: str | None) -> RunFolder | None:
    """The run that ``--resume`` means.

    Args:
        where: a run folder, its ``last.resume``, or "auto": the run called ``output.name``, else the newest one of
            that recipe (of any, if it is None) that has a checkpoint.

    Returns:
        None if it is "auto" and there is none.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if where != "auto":
        path = Path(where)
        folder = RunFolder(path.parent.parent if path.is_file() else path)
        if not folder.last.is_file() or (path.is_file() and path.resolve() != folder.last.resolve()):
            raise ConfigError(f"--resume: {where} holds no checkpoints/last.resume; give the folder of a run, or auto")
        return folder
    if output.name is not None:
        folder = RunFolder(Path(output.runs) / output.name)
        return folder if folder.last.is_file() else None
    checkpoints = Path(output.runs).glob("*/checkpoints/last.resume")
    for checkpoint in sorted(checkpoints, key=lambda path: path.stat().st_mtime, reverse=True):
        folder = RunFolder(checkpoint.parent.parent)
        if recipe is None or _recipe_of(folder) == recipe:
            return folder
    return None


def _recipe_of(folder: RunFolder) -> str | None:
    try:
        return load_config(folder.config).recipe
    except ConfigError:
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class MetricsWriter(SummaryWriter):
    """A TensorBoard writer that also keeps every scalar in ``metrics.jsonl``.

    Numbers of one step make one line, ``{"step": 50, "train/loss": 1.9, ...}``. Images and histograms go to
    TensorBoard alone.

    Args:
        folder: the run.
        step: where the run goes on; what TensorBoard knows of later steps is hidden.
        size: bytes of ``metrics.jsonl`` that are kept; later lines belong to steps that are run again.
    """

    def __init__(self, folder: RunFolder, *, step: int = 0, size: int = 0) -> None:
        super().__init__(str(folder.tensorboard), purge_step=step + 1 if step else None)
        self._metrics = open(folder.metrics, "ab")  # noqa: SIM115
        self._metrics.truncate(min(size, self._metrics.tell()))
        self._step = step
        self._line: dict[str, float] = {}

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, *args: Any, **kwargs: Any) -> None:
        """One number. NaN and infinity, which JSON cannot hold, are null in ``metrics.jsonl``."""
        if global_step != self._step:
            self._end_line()
            self._step = global_step
        number = float(scalar_value)
        super().add_scalar(tag, number, global_step, *args, **kwargs)
        self._line[tag] = int(number) if number.is_integer() else number

    def add_numbers(self, values: Mapping[str, float], step: int) -> None:
        """Several numbers of one step, by tag."""
        for tag, value in values.items():
            self.add_scalar(tag, value, step)

    def add_settings(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The run's settings for TensorBoard's HPARAMS page; beside them it shows the last value of each metric.

        Args:
            metrics: by the tags under which they were added.
        """
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        for summary in hparams(plain, dict(metrics)):
            self._get_file_writer().add_summary(summary)

    def sync(self) -> int:
        """Bring everything to the disk; returns the bytes of ``metrics.jsonl``."""
        self._end_line()
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        self.flush()
        return self._metrics.tell()

    def close(self) -> None:
        self.sync()
        self._metrics.close()
        super().close()

    def _end_line(self) -> None:
        if self._line:
            values = {tag: value if math.isfinite(value) else None for tag, value in self._line.items()}
            self._metrics.write(json.dumps({"step": self._step, **values}).encode() + b"\n")
            self._line = {}
