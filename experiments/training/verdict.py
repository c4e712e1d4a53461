"""Whether a step counts: what all processes say to each other, and when the host hears of it.

The host waits for the device once in a step, and late: what hangs on the verdict is decided on the device where that
can be, so that there is work left to do while the host waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.processes.processes import Processes


@dataclass(frozen=True)
class Verdict:
    """On one step, by all processes together."""

    drop: Tensor  #: float32 scalar on the device: 1 where nothing may move, else 0
    _read: Callable[[], list[float]]

    def read(self) -> tuple[bool, bool, bool]:
        """Whether any process has something that is not finite, is to stop, and could not read its images.

        Here the host waits until the device has come this far.
        """
        bad, stop, failed = (value > 0 for value in self._read())
        return bad, stop, failed


def agree(
    found: dict[str, Tensor],
    kept: Tensor | None,
    norm: Tensor,
    *,
    stop: bool,
    failed: bool,
    processes: Processes,
) -> Verdict:
    """The verdict of all processes on a step, in the one small vector that they add up beside the gradients.

    Args:
        found: the loss and its terms by name, scalars; they become the means over all processes.
        kept: patches kept ``[stages]``, with a selector; likewise.
        norm: of the whole gradient, a scalar.
        stop: whether this process was asked to end.
        failed: whether it could not read its images.
    """
    bad = (~(found["loss"] + norm).isfinite()).float()
    flags = torch.stack([bad, *(norm.new_full((), float(flag)) for flag in (stop, failed))])
    if processes.size > 1:
        measured = [torch.stack(list(found.values())), *([kept] if kept is not None else [])]
        vector = processes.sum(torch.cat([flags, *measured]))
        flags, values = vector[:3], vector[3:] / processes.size
        found.update(zip(found, values[: len(found)].unbind(), strict=True))
        if kept is not None:
            kept.copy_(values[len(found) :])
    return Verdict(((flags[0] + flags[2]) > 0).float(), fetch(flags))


def fetch(values: Tensor) -> Callable[[], list[float]]:
    """Send a small vector to the host; what is returned waits for it, and for nothing that comes after it."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read
