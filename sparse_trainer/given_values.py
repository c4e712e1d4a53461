"""What users give as numbers: as those of Python, wherever they come from."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """A number or array of NumPy or torch as number or list of Python; anything else as it is."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value


def whole(value: object, least: int) -> TypeGuard[int]:
    """Whether it is a whole number, and not less; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
