"""Measuring: paired medians, peak memory, and figures that can be compared between runs and releases.

Machines are shared and noisy, so two things are never timed one after the other and divided: their runs
alternate, each pair gives a ratio, and the median over the pairs is reported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number.

    ``ratio`` is value over reference where both are timed in pairs (the median over the pairs), ``ideal`` what the
    ratio (or, without one, the value) would be if only the arithmetic or the bytes counted.
    """

    name: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    ideal: float | None = None


@dataclass(frozen=True)
class Paired:
    """Medians of alternating runs, in seconds, and the median of the pairs' ratios."""

    first: float
    second: float
    ratio: float  #: second over first


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    device: torch.device,
    pairs: int,
    warmup: int = 1,
    each: int = 1,
) -> Paired:
    """Time two things in alternation; the order within a pair alternates too.

    Args:
        pairs: how many pairs count, after ``warmup`` that do not.
        each: calls per timing, for things too short to time alone.
    """

    def several(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(each)]

    times: list[tuple[float, float]] = []
    for index in range(warmup + pairs):
        if index % 2:
            b, a = timed(several(second), device), timed(several(first), device)
        else:
            a, b = timed(several(first), device), timed(several(second), device)
        if index >= warmup:
            times.append((a / each, b / each))
    return Paired(
        first=statistics.median(a for a, _ in times),
        second=statistics.median(b for _, b in times),
        ratio=statistics.median(b / a for a, b in times),
    )


def percentiles(run: Callable[[], object], device: torch.device, repeats: int, warmup: int = 3) -> dict[int, float]:
    """Latency in seconds at the 50th, 90th and 99th percentile."""
    for _ in range(warmup):
        run()
    times = sorted(timed(run, device) for _ in range(repeats))
    return {p: times[min(len(times) - 1, round(p / 100 * (len(times) - 1)))] for p in (50, 90, 99)}


def peak_memory(task: Callable[..., Callable[[], object]], *arguments: Any, device: torch.device) -> int:
    """Bytes that ``task(*arguments)()`` needs at its peak, the model included.

    On a GPU the allocator counts them. On a CPU the task runs in a process of its own, and what is reported is the
    growth of its peak resident memory over what the libraries alone take.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        run = task(*arguments)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_peak_resident, (task, arguments)))


def _peak_resident(task: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    before = _high_water_mark()
    run = task(*arguments)
    run()
    run()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    """Peak resident bytes of this process.

    Where Linux tells it, of the process image alone: ``ru_maxrss`` starts at what the parent process held.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show(title: str, figures: Sequence[Figure], machine: dict[str, Any], console: Console | None = None) -> None:
    """A table for people."""
    table = Table(title=title, title_justify="left", caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    table.add_column("figure")
    for column in ("value", "reference", "ratio", "ideal"):
        table.add_column(column, justify="right")
    for figure in figures:
        table.add_row(
            figure.name,
            _number(figure.value, figure.unit),
            _number(figure.reference, figure.unit),
            _number(figure.ratio),
            _number(figure.ideal),
        )
    (console or Console()).print(table)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    else:
        text = f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:,.3g}" if abs(value) < 1 else f"{value:,.1f}"
    return f"{text} {unit}".rstrip()


def write_json(path: str, figures: Sequence[Figure], machine: dict[str, Any], settings: dict[str, Any]) -> None:
    """The same figures for machines."""
    content = {"machine": machine, "settings": settings, "figures": [asdict(figure) for figure in figures]}
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
