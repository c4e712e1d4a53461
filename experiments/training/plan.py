"""How a run is cut into steps: where epochs begin, when to evaluate and when to save."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config.run_config import RunConfig
from experiments.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """How a run is cut: everything counted in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every: int
    checkpoint_every: int
    accumulate: int

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch, and first batch in it, of the step after ``step`` steps."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.accumulate

    def evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.total_steps


def create_plan(config: RunConfig, batches_per_epoch: int) -> Plan:
    """Cut a run of ``config`` over so many batches an epoch; those that fill no whole step are left out.

    Raises:
        ConfigError: an epoch has less than one step, or the warm-up takes the whole run.
    """
    training = config.training
    steps_per_epoch = batches_per_epoch // training.accumulate
    if steps_per_epoch == 0:
        raise ConfigError(
            f"training.accumulate: {training.accumulate} is more than the {batches_per_epoch} batches of an epoch"
        )
    total = training.steps if training.steps is not None else training.epochs * steps_per_epoch
    warmup = _steps(config.schedule.warmup_epochs, steps_per_epoch)
    if warmup >= total:
        raise ConfigError(
            f"schedule.warmup_epochs: {config.schedule.warmup_epochs} ({warmup} steps) does not end before the run "
            f"({total} steps); less than {total / steps_per_epoch:g} works"
        )
    eval_every = max(1, _steps(training.eval_every, steps_per_epoch))
    checkpoint_every = eval_every
    if training.checkpoint_every is not None:
        checkpoint_every = max(1, _steps(training.checkpoint_every, steps_per_epoch))
    return Plan(steps_per_epoch, total, warmup, eval_every, checkpoint_every, training.accumulate)


def _steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps of so many epochs, which may be more than any run has."""
    return round(min(epochs * steps_per_epoch, 1e18))
