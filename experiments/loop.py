"""The loop over a run: train, record, evaluate, save, and the sparse checkpoint at its end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from torch import Tensor

from experiments.config import flatten
from experiments.console import Display
from experiments.metrics import Measured
from experiments.overlay import draw, examples
from experiments.run_folder import MetricsWriter, RunFolder
from experiments.training import StepResult, Trainer, TrainingError
from models import create_model
from sparse_trainer.checkpoint import CheckpointError, SparseInfo, load_resume, save_resume, save_sparse
from sparse_trainer.mask_log import MaskLog

EXAMPLES = 10
"""Images in the picture of dropped patches."""


class Stopped(Exception):
    """The user ended the run before its last step; everything done so far is saved."""


@dataclass
class StopRequest:
    """Whether someone asked the run to end after the step it is in."""

    made: bool = False


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Inside the block the first Ctrl-C only asks for an end; a second one ends at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.made = True
        signal.signal(number, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


class Clock:
    """Seconds of training, over all processes of a run; evaluation and saving are left out."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before, self._since = seconds, time.perf_counter()
        self._running = True

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
        selector=None if selector is None else selector.to_dict(),
        class_names=trainer.data.class_names,
        step=trainer.step,
        recipe=trainer.config.recipe,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    )


class Loop:
    """A trainer and where it writes.

    Args:
        trainer: at its start, or with its state loaded by :meth:`resume`.
        folder: of the run.
    """

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self.trainer, self.folder = trainer, folder
        self.history = History()
        self.clock = Clock()
        self.clock.pause()
        self.budget = trainer.budget
        self._metrics_size = 0
        self._images_since, self._seconds_since = 0, 0.0
        self._examples: Tensor | None = None  # the images of tokens/overlay
        self.score = "ema_top1" if trainer.ema is not None else "top1"

    def resume(self) -> None:
        """Go on from the last checkpoint in the folder.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: it is of another configuration.
        """
        state = load_resume(self.folder.last)
        try:
            self.trainer.load_state_dict(state["trainer"])
            self.history = History(state["history"], state["best"])
            self.clock = Clock(state["seconds"])
            self.clock.pause()
            self._images_since, self._seconds_since = state["images_since"], state["seconds_since"]
            self._metrics_size = state["metrics_size"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder.last}: is not of this run or version: {error!r:.300}") from error

    def run(self, display: Display, stop: StopRequest) -> None:
        """Train to the end, and write the sparse checkpoint.

        Raises:
            Stopped: ``stop`` was made; the state is saved.
            TrainingError: too many steps were not finite, or a file could not be written.
        """
        trainer, plan = self.trainer, self.trainer.plan
        self.writer = MetricsWriter(self.folder, step=trainer.tried, size=self._metrics_size)
        self.mask_log = MaskLog(self.folder.path, self.writer)
        try:
            self._begin(display)
            self.clock.go_on()
            while not trainer.finished:
                result = trainer.train_step()
                self._images_since += trainer.config.step_images
                self._record(result, display)
                done = trainer.tried
                display.advance(done)
                if plan.evaluates(done):
                    self._evaluate(display)
                if plan.saves(done) or stop.made:
                    self.save()
                if stop.made and not trainer.finished:
                    raise Stopped
            self.clock.pause()
            self._finish()
        except (CheckpointError, OSError) as error:
            raise TrainingError(f"cannot write the run: {error}") from error
        finally:
            self.clock.pause()
            self.writer.close()

    def save(self) -> None:
        """Write the resume bundle."""
        self.clock.pause()
        state = {
            "trainer": self.trainer.state_dict(),
            "history": self.history.evaluations,
            "best": self.history.best,
            "seconds": self.clock.seconds,
            "images_since": self._images_since,
            "seconds_since": self._seconds_since,
            "metrics_size": self.writer.sync(),
        }
        save_resume(self.folder.last, state)
        self.clock.go_on()

    def _begin(self, display: Display) -> None:
        trainer = self.trainer
        for note in trainer.notes:
            display.line(f"note: {note}")
        if trainer.tried:
            self.mask_log.truncate_after(trainer.step)
            return
        if trainer.sparsity is not None:
            sparsity = trainer.sparsity
            self.mask_log.log_start(
                sparsity.masks,
                live_heads=sparsity.live_heads,
                live_neurons=sparsity.live_neurons,
                dense_heads=sparsity.dense_heads,
            )
        budget = trainer.budget
        numbers = {
            "budget/live_parameters": budget.live,
            "budget/total_parameters": budget.total,
            "budget/macs": trainer.count().live_macs,
        }
        self.writer.add_numbers(numbers, 0)

    def _record(self, result: StepResult, display: Display) -> None:
        """Numbers of the training itself, at an update and every ``log_every`` steps."""
        trainer = self.trainer
        for warning in result.warnings:
            display.line(f"step {trainer.tried:,}: {warning}")
        if not result.counted:
            display.line(f"step {trainer.tried:,}: loss or gradient not finite, dropped")
        if result.update is not None and trainer.sparsity is not None:
            sparsity = trainer.sparsity
            self.mask_log.log_update(
                result.update, sparsity.masks, live_heads=sparsity.live_heads, live_neurons=sparsity.live_neurons
            )
            self.writer.add_scalar("budget/macs", trainer.count().live_macs, result.update.step)
        if trainer.tried % trainer.config.training.log_every and not trainer.finished:
            return
        means = trainer.take_running()
        seconds = self.clock.seconds
        speed = self._images_since / max(seconds - self._seconds_since, 1e-9)
        self._images_since, self._seconds_since = 0, seconds
        numbers = {
            **means,
            **trainer.thresholds(),
            "train/lr": trainer.lr,
            "train/images_per_second": speed,
            "train/epoch": trainer.epoch,
            "train/bad_steps": trainer.bad_steps,
        }
        self.writer.add_numbers(numbers, trainer.tried)
        display.status(trainer.tried, trainer.epoch, means["train/loss"], speed)

    def _evaluate(self, display: Display) -> None:
        self.clock.pause()
        trainer = self.trainer
        measured = trainer.evaluate()
        metrics = measured.metrics
        self.writer.add_numbers({f"eval/{name}": value for name, value in metrics.items()}, trainer.tried)
        if measured.tokens is not None:
            self._show_tokens(measured)
        if trainer.sparsity is not None:
            self.mask_log.log_weights(trainer.tried, trainer.model, trainer.masks)
        self.history.evaluations.append({"step": trainer.tried, **metrics})
        best = self.history.best
        is_best = best is None or metrics[self.score] > best[self.score]
        if is_best:
            self.history.best = self.history.evaluations[-1]
            self._save_sparse(self.folder.best, metrics)
        average = f"  average {metrics['ema_top1']:.2f}" if trainer.ema is not None else ""
        display.line(
            f"epoch {trainer.epoch:7.2f}  step {trainer.tried:>7,}  top-1 {metrics['top1']:6.2f}{average}  "
            f"top-5 {metrics['top5']:6.2f}  loss {metrics['loss']:.4f}  lr {trainer.lr:.2e}"
            + ("  best" if is_best else "")
        )
        self.clock.go_on()

    def _show_tokens(self, measured: Measured) -> None:
        """What was kept at an evaluation: how it differs between images, and where in the images it lies."""
        trainer, step = self.trainer, self.trainer.tried
        self.writer.add_scalar("budget/macs", trainer.count().live_macs, step)
        if measured.kept is not None:
            for stage, counts in zip(trainer.stages, measured.kept.unbind(dim=1), strict=True):
                self.writer.add_histogram(f"tokens/kept_per_image/{stage}", counts.cpu(), step)
        if self._examples is None:
            self._examples = examples(*next(iter(trainer.data.eval.batches())), EXAMPLES)
        data = trainer.data
        picture, _ = draw(trainer.result_model, self._examples, data.mean, data.std, trainer.autocast)
        self.writer.add_image("tokens/overlay", picture, step)

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

    def _finish(self) -> None:
        final = {name: value for name, value in self.history.evaluations[-1].items() if name != "step"}
        self._save_sparse(self.folder.sparse, final)
        metrics = {f"eval/{name}": value for name, value in final.items()}
        metrics["budget/live_parameters"] = self.trainer.budget.live
        metrics["budget/macs"] = self.trainer.count().live_macs
        self.writer.add_settings(flatten(self.trainer.config), metrics)
