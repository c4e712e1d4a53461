"""A model has one scheduler. A second one would draw its masks within those of the first, and the budgets compound."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

ATTRIBUTE = "_sparsity_owner"


class Owner:
    """The mark that a scheduler leaves on its model. A copy of the model, such as an average, has no owner."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = weakref.ref(scheduler)

    @property
    def scheduler(self) -> Any:
        """The scheduler; None if there is none any more."""
        return self._scheduler()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return (_nobody, ())


def _nobody() -> None:
    return None


def claim(model: nn.Module, scheduler: Any) -> None:
    """Make ``scheduler`` the owner of ``model``."""
    setattr(model, ATTRIBUTE, Owner(scheduler))


def release(model: nn.Module) -> None:
    """Let another scheduler have the model."""
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)


def check_free(model: nn.Module, successor_of: Any = None) -> None:
    """Refuse a model that has an owner, unless it is handed over.

    Args:
        successor_of: the scheduler that hands it over.

    Raises:
        ValueError: the model, or a part of it, has another owner.
    """
    for name, module in model.named_modules():
        owner = getattr(module, ATTRIBUTE, None)
        if owner is None or (successor_of is not None and owner.scheduler is successor_of):
            continue
        what = f"its part {name}" if name else "it"
        raise ValueError(
            f"the model has a scheduler already ({what} was made sparse): a second one would prune what the first "
            "left. Go on with the first, hand it over by resume_from=scheduler, or give the model free by "
            "scheduler.detach(release=True)"
        )
