"""A model and all its parts have one scheduler. A second one would draw its masks within those of the first, and the
budgets compound."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

ATTRIBUTE = "_sparsity_owner"


class Owner:
    """The mark that a scheduler leaves on its model and its parts. A copy of them, such as an average, has no owner."""

    def __init__(self, scheduler: Any, model: nn.Module) -> None:
        self._scheduler, self._model = weakref.ref(scheduler), weakref.ref(model)
        # Layers without weights, and frozen networks, may be shared with a model that has a scheduler of its own.
        parts = [part for part in model.modules() if any(p.requires_grad for p in part.parameters())]
        self._marked = [weakref.ref(module) for module in (model, *parts)]

    @property
    def scheduler(self) -> Any:
        """The scheduler; None if there is none any more."""
        return self._scheduler()

    def has_as_model(self, module: nn.Module) -> bool:
        """Whether the scheduler was built on this module, not on one that it is a part of."""
        return self._model() is module

    def marked(self) -> Iterator[nn.Module]:
        """The model and its parts at that time, as far as they are still there."""
        return (module for reference in self._marked if (module := reference()) is not None)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return (_nobody, ())


def _nobody() -> None:
    return None


def claim(model: nn.Module, scheduler: Any) -> None:
    """Make ``scheduler`` the owner of ``model`` and all of its parts."""
    owner = Owner(scheduler, model)
    for module in owner.marked():
        setattr(module, ATTRIBUTE, owner)


def release(model: nn.Module) -> None:
    """Let another scheduler have the model, or a part of it; parts that were taken out since are free too."""
    owner = getattr(model, ATTRIBUTE, None)
    for module in owner.marked() if owner is not None else ():
        if getattr(module, ATTRIBUTE, None) is owner:
            delattr(module, ATTRIBUTE)


def check_free(model: nn.Module, successor_of: Any = None) -> None:
    """Refuse a model that has an owner, unless it is handed over.

    Args:
        successor_of: the scheduler that hands it over.

    Raises:
        ValueError: the model, a part of it, or one that it is a part of, has another owner.
    """
    for name, module in model.named_modules():
        owner = getattr(module, ATTRIBUTE, None)
        if owner is None:
            continue
        whole = owner.has_as_model(module)
        handed_over = successor_of is not None and owner.scheduler is successor_of
        if handed_over and (whole or name):  # not by a part alone: the former would lose the rest
            continue
        which = f"its part {name}" if name else "it"
        what = "was made sparse" if whole else "is a part of one that was made sparse"
        raise ValueError(
            f"the model has a scheduler already ({which} {what}): a second one would prune what the first "
            "left. Go on with the first, hand it over by resume_from=scheduler, or give the model free by "
            "scheduler.detach(release=True)"
        )
