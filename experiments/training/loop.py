"""The loop over a run: train, record, evaluate, save, and the sparse checkpoint at its end."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import ConfigError
from experiments.evaluation.measuring import MeasuringStopped
from experiments.processes.shared_failure import together
from experiments.processes.signals import SIGNALS, StopRequest
from experiments.run_folder.folder import RunFolder
from experiments.terminal import Display
from experiments.training.resume_bundle import check_bundle, read_newest
from experiments.training.run_log import Journal
from experiments.training.speeds import Speeds, measure_speeds
from experiments.training.trainer import StepResult, Trainer, TrainingError
from models import create_model
from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo, save_resume, save_sparse

CUT = 1000
"""Times that gradients may be longer than what they are clipped to, on the mean, before the run says so."""


class Stopped(Exception):
    """A signal ended the run before its last step; everything done so far is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Clock:
    """Seconds of training, over all processes of a run; evaluation and saving are left out."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before, self._since = seconds, time.perf_counter()
        self._running = False

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._running else 0.0)

    def pause(self) -> None:
        self._before, self._running = self.seconds, False

    def go_on(self) -> None:
        if not self._running:
            self._since, self._running = time.perf_counter(), True


@dataclass
class History:
    """What the evaluations found."""

    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Each with its step."""
    best: dict[str, float] | None = None


def describe(trainer: Trainer, metrics: Mapping[str, float]) -> SparseInfo:
    """What the sparse checkpoint says of itself.

    Raises:
        ValueError: the model has arguments that no checkpoint may hold.
    """
    selector = trainer.config.selector
    return SparseInfo(
        model=trainer.model_name,
        model_args=trainer.model_arguments,
        budget=trainer.budget,
        macs=round(trainer.count().live_macs),
        image_size=trainer.data.image_size,
        in_chans=trainer.data.in_chans,
        mean=trainer.data.mean,
        std=trainer.data.std,
        preparation=trainer.config.data.preparation,
        selector=None if selector is None else selector.to_dict(),
        class_names=trainer.data.class_names,
        step=trainer.step,
        recipe=trainer.config.recipe,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    )


class Loop:
    """A trainer and where it writes. The first of several processes alone writes and speaks.

    The resume bundle is the truth about a run: whatever else lies in the folder is cut back to what it knows, or made
    again from it. So a process may be killed anywhere.

    Args:
        trainer: at its start, or with its state loaded by :meth:`resume`.
        folder: of the run.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self.trainer, self.folder, self.processes = trainer, folder, trainer.processes
        self.history = History()
        self.speeds: Speeds | None = None  #: once the run is complete, in the process that completed it
        self.clock = Clock()
        self.score = "ema_top1" if trainer.ema is not None else "top1"
        self.notes: list[str] = []
        """What was found wrong with the folder."""
        self.saved: int | None = None
        """Step of the last resume bundle that is known to be whole."""
        self._resumed = False
        self._metrics_size, self._metrics_line = 0, dict[str, float]()
        self._images_since, self._seconds_since = 0, 0.0
        self._told_of_cut = False
        self.journal: Journal | None = None  # of the first process, while it runs

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.trainer.finished and self.processes.share(self.folder.sparse.is_file())

    def resume(self) -> None:
        """Go on from the newest resume bundle in the folder that is whole.

        Raises:
            CheckpointError: none is.
            ConfigError: it is of another configuration.
        """
        path, state, notes = read_newest(self.folder, self.processes)
        self.notes += notes
        try:
            check_bundle(path, state, self.trainer)
            self.trainer.load_state_dict(state["trainer"])
            self.history = History(state["history"], state["best"])
            self.clock = Clock(state["seconds"])
            self._images_since, self._seconds_since = state["images_since"], state["seconds_since"]
            self._metrics_size, self._metrics_line = state["metrics_size"], state.get("metrics_line", {})
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:
            raise CheckpointError(f"{path}: is not of this run or version: {error!r:.300}") from error
        self._resumed, self.saved = True, self.trainer.tried

    def run(self, display: Display, stop: StopRequest) -> None:
        """Train to the end, and write the sparse checkpoint.

        Raises:
            Stopped: ``stop`` was made on some process; the state is saved.
            TrainingError: too many steps were not finite, or a file could not be written.
        """
        trainer = self.trainer
        stop.waits = True
        try:
            self._begin(display)
            if self._evaluation_due:
                self._look_up(display, stop, stopping=False)
            self.clock.go_on()
            while not trainer.finished:
                result = trainer.train_step(stop=stop.made)
                self._images_since += trainer.config.step_images
                self._record(result, display)
                display.advance(trainer.tried)
                # A process that is alone need not hear of the request from the others.
                self._look_up(display, stop, stopping=result.stop or (stop.made and self.processes.size == 1))
            self.clock.pause()
            self._finish(display)
        finally:
            self.clock.pause()
            if self.journal is not None:  # still open if something went wrong, and then that is what matters
                with suppress(OSError):
                    self.journal.writer.close()

    @property
    def _evaluation_due(self) -> bool:
        """Whether this step ends in an evaluation that was not made yet."""
        tried, made = self.trainer.tried, self.history.evaluations
        return tried > 0 and self.trainer.plan.evaluates(tried) and (not made or made[-1]["step"] != tried)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written ends the run, on all processes."""
        with together(self.processes):
            try:
                yield
            except CheckpointError as error:
                raise TrainingError(f"cannot write the run: {error}") from error
            except OSError as error:
                file = error.filename or self.folder.path
                raise TrainingError(f"cannot write the run: {file}: {error.strerror or error}") from error

    def _look_up(self, display: Display, stop: StopRequest, *, stopping: bool) -> None:
        """What comes between two steps: evaluate and save, if it is time, and end if someone asked for it.

        Raises:
            Stopped: someone did.
        """
        trainer = self.trainer
        tried, best = trainer.tried, self.history.best
        if self._evaluation_due and not stopping:
            stopping = not self._evaluate(display, stop)
        if stopping or trainer.plan.saves(tried) or self.history.best is not best:
            self.save()
            stopping = stopping or self.processes.any(stop.made)
        if stopping and (self._evaluation_due or not trainer.finished):
            asked = (number for number in SIGNALS if self.processes.any(stop.made and stop.number == number))
            raise Stopped(next(asked, stop.number))

    def save(self) -> None:
        """Write the resume bundle, and what follows from it."""
        self.clock.pause()
        state: dict[str, Any] = {
            "trainer": self.trainer.state_dict(),
            "history": self.history.evaluations,
            "best": self.history.best,
            "seconds": self.clock.seconds,
            "images_since": self._images_since,
            "seconds_since": self._seconds_since,
        }
        with self._writing():
            if self.journal is not None:
                writer = self.journal.writer
                if not self._evaluation_due:
                    writer.end_line()
                writer.sync()
                state |= {"metrics_size": writer.size, "metrics_line": writer.line}
                save_resume(self.folder.bundle(self.trainer.tried), state)
                self.saved = self.trainer.tried
                self.folder.prune_bundles(self.trainer.config.output.keep_last)
                self._save_best()
        self.saved = self.trainer.tried
        self.clock.go_on()

    def _save_best(self) -> None:
        """Write the best checkpoint if it is of this step.

        It comes after the bundle that calls it the best: a process that is killed in between writes it on resuming.
        """
        best = self.history.best
        if best is not None and best["step"] == self.trainer.tried:
            self._save_sparse(self.folder.best, {name: value for name, value in best.items() if name != "step"})

    def _begin(self, display: Display) -> None:
        for note in self.trainer.notes:
            display.line(f"note: {note}")
        with self._writing():
            if self.processes.is_main:
                self._open()
        for note in self.notes:
            display.line(f"note: {note}")
        with self._writing():
            if self.journal is not None and self._resumed:
                self._save_best()
            elif self.journal is not None:
                self.journal.begin()
                if not self._evaluation_due:
                    self.journal.writer.end_line()
                self.folder.sync()
        if not self._resumed:  # what the disk refuses it refuses now, and a run that is killed early can be resumed
            self.save()

    def _open(self) -> None:
        """Make the folder what the state knows, and open its files."""
        folder, tried = self.folder, self.trainer.tried
        folder.checkpoints.mkdir(exist_ok=True)
        folder.clean()
        folder.set_aside_bundles(tried)
        first = tried + 1 if self._resumed else 0
        self.journal = Journal(self.trainer, folder, first, self._metrics_size, self._metrics_line)
        missing = self.journal.writer.missing
        if missing:
            self.notes.append(f"{folder.metrics}: {missing:,} bytes are missing, which the run had written")

    def _record(self, result: StepResult, display: Display) -> None:
        """Numbers of the training itself, at an update and every ``log_every`` steps."""
        trainer, tried = self.trainer, self.trainer.tried
        for warning in result.warnings:
            display.line(f"step {tried:,}: {warning}")
        if not result.counted:
            display.line(f"step {tried:,}: loss or gradient not finite, dropped")
        numbers: dict[str, float] = {}
        if tried % trainer.config.training.log_every == 0 or trainer.finished:
            numbers = self._measure()
            display.status(tried, trainer.epoch, numbers["train/loss"], numbers["train/images_per_second"])
            self._tell_of_cut(numbers["train/grad_norm"], display)
        elif result.update is None:
            return
        with self._writing():
            if self.journal is not None:
                if result.update is not None:
                    self.journal.add_update(result.update)
                self.journal.writer.add_numbers(numbers, tried)
                if not self._evaluation_due:
                    self.journal.writer.end_line()

    def _tell_of_cut(self, norm: float, display: Display) -> None:
        """Say once where clipping leaves next to nothing of the gradients of most weights."""
        clip = self.trainer.config.training.clip_grad
        if clip is not None and norm > CUT * clip and not self._told_of_cut:
            self._told_of_cut = True
            display.line(
                f"step {self.trainer.tried:,}: gradients have a norm of {norm:.3g} and are clipped to {clip:g}, so "
                "most weights hardly learn; see train/grad_norm, and try a lower optimizer.lr or another selector"
            )

    def _measure(self) -> dict[str, float]:
        """By tag, what happened since the last record."""
        trainer, seconds = self.trainer, self.clock.seconds
        speed = self._images_since / max(seconds - self._seconds_since, 1e-9)
        self._images_since, self._seconds_since = 0, seconds
        return {
            **trainer.take_running(),
            **trainer.thresholds(),
            **trainer.training_macs(),
            "train/lr": trainer.lr,
            "train/images_per_second": speed,
            "train/epoch": trainer.epoch,
            "train/bad_steps": trainer.bad_steps,
        }

    def _evaluate(self, display: Display, stop: StopRequest) -> bool:
        """Whether the evaluation was made: not if someone asked for an end meanwhile."""
        self.clock.pause()
        trainer, tried = self.trainer, self.trainer.tried
        try:
            measured = trainer.evaluate(lambda: stop.made)
        except MeasuringStopped:
            return False
        metrics = measured.metrics
        with self._writing():
            if self.journal is not None:
                self.journal.add_evaluation(measured)
                self.journal.writer.end_line()
        self.history.evaluations.append({"step": tried, **metrics})
        best = self.history.best
        # A network that is still above its budget is not what was asked for.
        counts = trainer.sparsity is None or not trainer.sparsity.falling or trainer.finished
        is_best = counts and (best is None or metrics[self.score] > best[self.score])
        if is_best:
            self.history.best = self.history.evaluations[-1]
        average = f"  average {metrics['ema_top1']:.2f}" if trainer.ema is not None else ""
        display.line(
            f"epoch {trainer.epoch:7.2f}  step {tried:>7,}  top-1 {metrics['top1']:6.2f}{average}  "
            f"top-5 {metrics['top5']:6.2f}  loss {metrics['loss']:.4f}  lr {trainer.lr:.2e}"
            + ("  best" if is_best else "")
        )
        self.clock.go_on()
        return True

    def _save_sparse(self, path: Path, metrics: Mapping[str, float]) -> None:
        """The average of the weights where one is kept, else the weights."""
        sparsity = self.trainer.sparsity
        save_sparse(
            path,
            self.trainer.result_model,
            masks=self.trainer.masks,
            live_heads=sparsity.live_heads if sparsity is not None else None,
            live_neurons=sparsity.live_neurons if sparsity is not None else None,
            info=describe(self.trainer, metrics),
            create_model=create_model,
        )

    def _measure_speeds(self, display: Display) -> Speeds | None:
        """None, and a note, where that does not work: a run that is trained is not lost for it."""
        try:
            return measure_speeds(self.trainer)
        except Exception as error:
            display.line(f"note: images per second were not measured: {error!r:.200}")
            return None

    def _finish(self, display: Display) -> None:
        """The sparse checkpoint comes last: where it is, the run is complete."""
        with self._writing():
            if self.journal is not None:
                final = {name: value for name, value in self.history.evaluations[-1].items() if name != "step"}
                written = self.folder.sparse.with_name(f".{self.folder.sparse.name}.tmp")
                self._save_sparse(written, final)
                self.speeds = self._measure_speeds(display)
                self.journal.end(final, written.stat().st_size, self.speeds)
                os.replace(written, self.folder.sparse)
                self.folder.sync()
