"""A run as its folder tells it: finished, going on, or killed in the middle of a line."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.config.reading import load_config
from experiments.config.run_config import RunConfig
from experiments.errors import ConfigError
from experiments.run_folder.folder import RunFolder
from sparse_trainer.files.checkpoint import CheckpointError
from sparse_trainer.files.tensor_file import fault, parse_json, quote
from sparse_trainer.mask_log import MaskRecord, read_timeline
from sparse_trainer.report import MaskUpdate

MOST_UNITS = 1 << 17
"""Heads or neurons of a block in a report that is believed."""
MOST_STEPS = 1 << 26
"""Steps of a run whose updates are counted."""
Series = Mapping[str, list[tuple[int, float]]]
"""By tag, (optimizer step, value) in the order of the file; values that were not finite are left out."""


@dataclass(frozen=True)
class Run:
    """What lies in a run folder, the weights left aside."""

    folder: RunFolder
    config: RunConfig | None  #: None where there is no config.yaml
    series: Series
    timeline: tuple[MaskRecord, ...]  #: empty for a dense run
    notes: tuple[str, ...]  #: what was odd and could be passed over

    @property
    def finished(self) -> bool:
        return self.folder.sparse.is_file()

    @property
    def step(self) -> int:
        """The last optimizer step that anything was written of."""
        steps = [points[-1][0] for points in self.series.values()]
        return max([*steps, *(record.step for record in self.timeline)], default=0)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None until it can be known."""
        if self.config is None:
            return None
        if self.config.training.steps is not None:
            return self.config.training.steps
        step, epoch = next(((s, e) for s, e in reversed(self.series.get("train/epoch", [])) if e > 0), (0, 0.0))
        return self.config.training.epochs * round(step / epoch) if epoch else None

    @property
    def score(self) -> str:
        """The tag of the accuracy that decides which checkpoint is best."""
        return "eval/ema_top1" if self.series.get("eval/ema_top1") else "eval/top1"

    @property
    def planned_updates(self) -> int | None:
        """Mask updates of the whole run; None where that is not known, as its length may not be."""
        if self.config is None or self.total_steps is None or self.total_steps > MOST_STEPS:
            return None
        sparsity = self.config.sparsity
        if sparsity is None:
            return 0
        try:
            schedule = sparsity.schedule(self.total_steps)
        except ValueError:  # the configuration has been edited since
            return None
        return len(schedule.update_steps)


def find_run(path: Path) -> RunFolder:
    """The run in a folder.

    Raises:
        ConfigError: it holds none.
    """
    folder = RunFolder(path)
    try:
        if any(part.exists() for part in (folder.config, folder.metrics, folder.sparse, path / "masks")):
            return folder
        inside = sorted(item.name for item in path.iterdir())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not inside:
        raise ConfigError(f"{path} is an empty folder; give a run folder such as runs/<name>, or a sparse checkpoint")
    runs = [name for name in inside if RunFolder(path / name).config.is_file()]
    if runs:
        shown = ", ".join(str(path / name) for name in runs[:3]) + (", ..." if len(runs) > 3 else "")
        raise ConfigError(f"{path} holds runs but is none; give one of them: {shown}")
    raise ConfigError(
        f"{path} is no run folder: it holds no config.yaml, metrics.jsonl, masks or sparse.safetensors; give a run "
        "folder such as runs/<name>, or a sparse checkpoint"
    )


def checkpoint_of(folder: RunFolder) -> Path | None:
    """The sparse checkpoint of a run: of its end, else of the best evaluation so far."""
    return next((path for path in (folder.sparse, folder.best) if path.is_file()), None)


def read_run(folder: RunFolder) -> Run:
    """Read all of a run but its weights and masks.

    Raises:
        ConfigError: its configuration cannot be read.
        CheckpointError: its metrics or timeline are damaged.
    """
    config = None
    if folder.config.is_file():
        try:
            config = load_config(folder.config)
        except ConfigError as error:
            reason = str(error).removeprefix(f"--config: {folder.config} ").removeprefix("--config: ")
            raise ConfigError(f"{folder.config}: {reason}") from error
    series, notes = read_metrics(folder.metrics)
    timeline = tuple(read_timeline(folder.path)) if (folder.path / "masks").is_dir() else ()
    for record in timeline:
        if record.update is not None and not _adds_up(record.update):
            raise fault(record.path, "the report", expected="counts that go together", found="others")
    return Run(folder, config, series, timeline, tuple(notes))


def _adds_up(update: MaskUpdate) -> bool:
    """Whether the counts of a report are such that shares can be made of them: the file may be a stranger's."""

    def ascend(*counts: float) -> bool:
        return list(counts) == sorted(counts)

    return (
        ascend(0, update.drop_fraction, 1)
        and all(
            ascend(1, layer.live, layer.explored, layer.total)
            and ascend(0, layer.pruned, layer.total)
            and ascend(0, layer.grown, layer.total)
            for layer in update.layers.values()
        )
        and all(
            ascend(1, len(block.live_heads), block.explored_heads, block.heads, MOST_UNITS)
            and ascend(1, block.live_neurons, block.explored_neurons, block.neurons, MOST_UNITS)
            for block in update.blocks.values()
        )
    )


def read_metrics(path: Path) -> tuple[Series, list[str]]:
    """The numbers in ``metrics.jsonl`` by tag, and what was odd in it.

    A last line that is cut off, as a kill or a look in the middle of writing leaves it, is passed over and noted.

    Raises:
        CheckpointError: another line is no record; it says which.
    """
    if not path.is_file():
        return {}, []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    whole, rest = lines[:-1], lines[-1]
    series: dict[str, list[tuple[int, float]]] = {}
    notes = []
    for number, line in enumerate([*whole, rest] if rest.strip(b"\0 \r") else whole, start=1):
        try:
            record = parse_json(line.decode("utf-8"))
            step = record["step"]
            if type(step) is not int or not 0 <= step < 1 << 53:
                raise ValueError(f"the step {quote(step)}")
            if any(not isinstance(value, int | float | None) or abs(value or 0) > 1e300 for value in record.values()):
                raise ValueError("values that are no finite numbers")
        except (ValueError, TypeError, KeyError) as error:
            if number > len(whole):
                notes.append(
                    f"the last line of {path.name} is cut off, as if it was just being written; it is left out"
                )
                break
            raise fault(
                path, f"line {number:,}", expected="a JSON object of numbers with a step", found=quote(line)
            ) from error
        for tag, value in record.items():
            if tag != "step" and value is not None:
                series.setdefault(tag, []).append((step, value))
    return series, notes


def to_json(run: Run) -> dict[str, Any]:
    """How far a run is and what it achieved, as JSON values."""
    evaluations = evaluations_of(run.series)
    curve = run.series.get(run.score, [])
    best = max(curve, key=lambda point: point[1], default=None)
    updates = [record for record in run.timeline if record.update is not None]
    written = last_written(run.folder)
    training = run.config.training if run.config is not None else None
    checkpoint, bundles = checkpoint_of(run.folder), run.folder.bundles()
    return {
        "folder": str(run.folder.path),
        "recipe": run.config.recipe if run.config is not None else None,
        "finished": run.finished,
        "step": run.step,
        "total_steps": run.total_steps,
        "epochs": training.epochs if training is not None and training.steps is None else None,
        "score": run.score.removeprefix("eval/"),
        "last": evaluations[-1] if evaluations else None,
        "best": None if best is None else {"step": best[0], "value": best[1]},
        "evaluations": evaluations,
        "updates": {
            "done": len(updates),
            "planned": run.planned_updates,
            "last_step": updates[-1].step if updates else None,
        },
        "dropped_steps": int(_last(run.series, "train/bad_steps") or 0),
        "train_loss": _last(run.series, "train/loss"),
        "last_written": None if written is None else written.isoformat(timespec="seconds"),
        "bundle": None if not bundles else bundles[0].name,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "notes": list(run.notes),
    }


def evaluations_of(series: Series) -> list[dict[str, float]]:
    """What each evaluation found, with its step."""
    found: dict[int, dict[str, float]] = {}
    for tag, points in series.items():
        if tag.startswith("eval/"):
            for step, value in points:
                found.setdefault(step, {"step": step})[tag.removeprefix("eval/")] = value
    return [found[step] for step in sorted(found)]


def last_written(folder: RunFolder) -> datetime | None:
    """When the run last wrote what it trains by, in UTC."""
    files = [
        folder.config,
        folder.metrics,
        folder.best,
        folder.sparse,
        *folder.bundles(),
        *(folder.path / "masks").glob("step_*"),
    ]
    times = []
    for file in files:
        with contextlib.suppress(OSError):  # not yet written, replaced while we look, or a link to nowhere
            times.append(file.stat().st_mtime)
    return datetime.fromtimestamp(max(times), UTC) if times else None


def _last(series: Series, tag: str) -> float | None:
    points = series.get(tag)
    return points[-1][1] if points else None
