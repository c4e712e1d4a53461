"""What one optimizer step came to."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_trainer.report import MaskUpdate


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    counted: bool  #: False: loss or gradient was not finite, on whichever process, and nothing moved on any
    update: MaskUpdate | None = None
    warnings: tuple[str, ...] = ()
    stop: bool = False  #: a process was asked to stop
