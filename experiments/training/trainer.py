"""One optimizer step of a training run, and its evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from experiments.evaluation.measuring import Measured, measure
from experiments.processes.data_parallel import averaging
from experiments.training.numerical_trouble import Recording, explain
from experiments.training.outcome import StepResult, TrainingError
from experiments.training.run_state import RunState
from experiments.training.running_means import Running
from experiments.training.verdict import agree
from sparse_trainer.agreement import DisagreementError
from sparse_trainer.report import MaskUpdate

SCORED_WHERE_UNITS_MOVE = 2
"""Heads and neurons that move between blocks are scored by one image of so many. Such an update changes shapes, and so
takes longer than others; the accuracy is that of scores by whole batches (``experiments/RESULTS.md``)."""


class Trainer(RunState):
    """Moves a run on, one optimizer step at a time; what it is made of is in :class:`RunState`."""

    def train_step(self, stop: bool = False) -> StepResult:
        """One optimizer step. Where loss or gradient is not finite, on one process or all, it is dropped: no weight,
        moment, average, mask or schedule moves; only the loss scale of float16 falls.

        Args:
            stop: whether this process was asked to end after the step; the result tells it to all.

        Raises:
            TrainingError: too many steps in a row were dropped, the data cannot be read any more, or the masks of
                the processes differ.
        """
        self.objective.progress = self.tried / self.plan.total_steps
        if hasattr(self.model, "set_progress"):
            cast(Any, self.model).set_progress(self.objective.progress)
        recording = Recording(self.model, self.device) if self._is_last_chance else None
        found, kept, last = self._collect_gradients(recording)
        norm, whole_norm = self.weight_step.norms()
        error = self.feed.error
        verdict = agree(found, kept, whole_norm, stop=stop, failed=error is not None, processes=self.processes)
        # An update of the masks looks at the gradient of its step, so near one it must be known what that is.
        due = self.sparsity is not None and self.sparsity.update_due
        near = due or (self.sparsity is not None and self.sparsity.collecting)
        known = near or recording is not None or not self.weight_step.may_wait
        if not known:
            self.weight_step.move_unless(verdict.drop, norm)
        bad, stops, failed = verdict.read()
        if failed:
            errors = self.processes.gather(error and str(error))
            raise TrainingError("; ".join(f"{error} (process {rank})" for rank, error in enumerate(errors) if error))
        reason = ""
        if bad and recording is not None:
            reason = explain(recording, self.objective, self.processes, self.scaler.scale)
        if known:
            self.weight_step.move(norm, bad, overflowed=whole_norm)
        update, notes = self._update_masks(*last, due=due, skipped=bad and not known)
        if update is not None and update.reshaped:
            self._remake_forward()
        self.optimizer.zero_grad(set_to_none=True)
        self.tried += 1
        if bad:
            self.bad_in_a_row += 1
        else:
            self.step += 1
            self.bad_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.model, step=self.step)
            self.lr_schedule.step_update(self.step)
            self.running.add({f"train/{name}": value for name, value in {**found, "grad_norm": norm}.items()}, kept)
        if reason:
            raise TrainingError(
                f"step {self.tried}: loss or gradient was not finite in {self.bad_in_a_row} steps in a row "
                f"(loss {float(found['loss']):g}, gradient norm {float(whole_norm):g}); {reason}; a lower "
                "optimizer.lr, training.clip_grad or another training.amp may help"
            )
        return StepResult(not bad, update, notes, stops)

    def _collect_gradients(
        self, recording: Recording | None
    ) -> tuple[dict[str, Tensor], Tensor | None, tuple[Tensor, Tensor]]:
        """Forward and backward passes of one step.

        Returns:
            the loss and its terms by name, scalars; the patches kept ``[stages]``, with a selector; both are means
            over this process's images. And the last batch.
        """
        accumulate = self.plan.accumulate
        found: dict[str, Tensor] = {}
        kept: Tensor | None = None
        for number in range(accumulate):
            images, targets = self.feed.next()
            if recording is not None:
                recording.batches.append((images, targets))
            with averaging(self.forward, number == accumulate - 1):
                terms, selection = self.objective.terms(self.forward, images, targets)
                loss = self.objective.weigh(terms)
                self.scaler.scale(loss / accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                part = value.detach().float() / accumulate
                found[name] = found[name] + part if name in found else part
            if selection is not None:
                share = selection.counts.float().mean(dim=0) / accumulate
                kept = share if kept is None else kept + share
        self.scaler.unscale_(self.optimizer)
        return found, kept, (images, targets)

    @property
    def _is_last_chance(self) -> bool:
        """Whether the run ends if the next step is dropped too."""
        return self.bad_in_a_row + 1 >= self.config.training.max_bad_steps

    def take_running(self) -> dict[str, float]:
        """Means since the last call by tag: loss and its terms (unweighted), gradient norm, patches kept per stage."""
        means, self.running = self.running.means(self.stages), Running()
        return means

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> Measured:
        """Accuracy in percent and loss of the model, and of the average of its weights as ``ema_*``.

        With a selector also the patches that :attr:`result_model` kept, ``tokens_kept/<block>``, and its mean MACs
        of one image, which hold until the next evaluation.

        Args:
            stop: asked before each batch whether this process was asked to end.

        Raises:
            MeasuringStopped: on all processes, if any was; nothing has changed then.
        """
        found = measure(self.model, self.data.eval, self.autocast, self.processes, stop)
        metrics = {name: found.metrics[name] for name in ("top1", "top5", "loss")}
        if self.ema is not None:
            found = measure(self.ema.module, self.data.eval, self.autocast, self.processes, stop)
            metrics |= {f"ema_{name}": found.metrics[name] for name in ("top1", "top5", "loss")}
        if found.tokens is not None:
            self.tokens = found.tokens
            metrics |= {"macs": self.count().live_macs, **found.tokens.metrics()}
        return Measured(metrics, found.tokens, found.kept)

    def _update_masks(
        self, images: Tensor, targets: Tensor, *, due: bool, skipped: bool
    ) -> tuple[MaskUpdate | None, tuple[str, ...]]:
        """Tell the scheduler of the step, whether it was taken or not; also what it warns of.

        Args:
            due: whether the step ends in an update, if it counts.
            skipped: the optimizer was called, and left the step out on the device.
        """
        if self.sparsity is None:
            return None, ()
        closure = None
        if self.sparsity.needs_closure:
            # The batch as it was trained on, mixed already: the probe draws nothing anew.
            moves = self.sparsity.config.unit_distribution == "global"
            scored = slice(None, None, SCORED_WHERE_UNITS_MOVE if moves else None)

            def closure() -> Tensor:
                return self.objective.probe(images[scored], targets[scored])

        if not due:
            return self.sparsity.step(closure, skipped=skipped), ()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                update = self.sparsity.step(closure)
            except DisagreementError as error:
                raise TrainingError(f"{error}; go on from the last checkpoint") from error
            except FloatingPointError as error:
                raise TrainingError(f"step {self.tried + 1}: {error}; a lower optimizer.lr may help") from error
        return update, tuple(str(warning.message) for warning in caught)
