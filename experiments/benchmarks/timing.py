"""Measuring: paired medians, peak memory, and figures that can be compared between runs and releases.

Machines are shared and noisy, so two things are never timed one after the other and divided: their runs
alternate, each pair gives a ratio, and the median over the pairs is reported.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.errors import ConfigError
from experiments.terminal import create_console


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
class Spread:
    """The middle of some numbers, and the quarters below and above which the rest lies."""

    median: float
    low: float  #: a quarter lies below
    high: float  #: a quarter lies above


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, by linear interpolation between the sorted values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Paired:
    """Medians of alternating runs, in seconds, and the median of the pairs' ratios."""

    first: float
    second: float
    ratio: float  #: second over first
    ratios: Spread  #: of the pairs


def summarize(times: Sequence[tuple[float, ...]]) -> Paired:
    """Pairs of seconds to their medians. The ratio is that of the pairs and not of the medians: what slows the machine
    for a while slows both runs of a pair."""
    ratios = spread([second / first for first, second in times])
    return Paired(
        first=statistics.median(first for first, _ in times),
        second=statistics.median(second for _, second in times),
        ratio=ratios.median,
        ratios=ratios,
    )


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

    times = alternate(several(first), several(second), device=device, pairs=warmup + pairs)[warmup:]
    return summarize([(a / each, b / each) for a, b in times])


WAKE = 0.03
"""Seconds that a processor is given to wake up; what takes longer than that needs none."""


def alternate(
    *runs: Callable[[], object], device: torch.device, pairs: int, rest: float = 0.0
) -> list[tuple[float, ...]]:
    """Seconds of each of the ``runs`` in each of ``pairs`` rounds; every second round goes the other way round.

    Args:
        rest: seconds of silence before each timing, for libraries whose threads stay busy for a while after a run. What
            is short runs for a while before it is timed, since a processor that has rested has to wake up.
    """
    rounds: list[tuple[float, ...]] = []
    for index in range(pairs):
        order = range(len(runs)) if index % 2 == 0 else reversed(range(len(runs)))
        seconds = {}
        for number in order:
            if rest:
                time.sleep(rest)
                awake = time.perf_counter() + WAKE
                while time.perf_counter() < awake and not (rounds and rounds[-1][number] > WAKE):
                    runs[number]()
            seconds[number] = timed(runs[number], device)
        rounds.append(tuple(seconds[number] for number in range(len(runs))))
    return rounds


PERCENTILES = (50, 90, 99)


def percentiles_of(times: Sequence[float]) -> dict[int, float]:
    """The values at the 50th, 90th and 99th percentile: of the values themselves, none in between."""
    ordered = sorted(times)
    return {p: ordered[round(p / 100 * (len(ordered) - 1))] for p in PERCENTILES}


def percentiles(run: Callable[[], object], device: torch.device, repeats: int, warmup: int = 3) -> dict[int, float]:
    """Latency in seconds at the 50th, 90th and 99th percentile."""
    for _ in range(warmup):
        run()
    return percentiles_of([timed(run, device) for _ in range(repeats)])


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Run torch on ``count`` CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(task: Callable[..., Callable[[], object]], *arguments: Any, device: torch.device) -> int:
    """Bytes that ``task(*arguments)()`` needs at its peak, what ``task(*arguments)`` made included.

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
        return int(pool.apply(_peak_resident, (task, arguments, torch.get_num_threads())))


def _peak_resident(task: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    _lower_high_water_mark()
    before = _high_water_mark()
    run = task(*arguments)
    _lower_high_water_mark()
    run()
    run()
    return _high_water_mark() - before


def _lower_high_water_mark() -> None:
    """Let the peak start again at what is in use now, where Linux and its C library allow it: what was needed to make
    a model, and what the allocator keeps of that, is not what it needs."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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
    machine = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instructions": ", ".join(_instructions()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        machine |= {"device": torch.cuda.get_device_name(device), "processor": machine["device"]}
    return machine


def _instructions() -> list[str]:
    """The widest vector instructions that torch uses, and those for matrices and for bfloat16 where there are any."""
    queries = {"_is_avx512_bf16_supported": "AVX512_BF16", "_is_amx_tile_supported": "AMX"}
    return [
        torch.backends.cpu.get_cpu_capability(),
        *(name for query, name in queries.items() if getattr(torch.cpu, query, lambda: False)()),
    ]


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
    (console or create_console()).print(table)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    else:
        text = f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:,.3g}" if abs(value) < 1 else f"{value:,.1f}"
    return f"{text} {unit}".rstrip()


def check_output(key: str, path: str | None) -> None:
    """Find out before the minutes of measuring whether their result can be written.

    Raises:
        ConfigError: it cannot; the message names ``key``.
    """
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{key}: {path} is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise ConfigError(
            f"{key}: there is no folder {target.parent}; make it, or choose another place for {target.name}"
        )
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"{key}: {path} may not be written; choose another place")


def write_text(key: str, path: str, text: str) -> None:
    """Write a result.

    Raises:
        ConfigError: the disk is full, or the like.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: cannot write {path}: {error.strerror or error}") from error


def write_json(path: str, content: dict[str, Any]) -> None:
    """What was measured, for machines."""
    write_text("json", path, json.dumps(content, indent=2) + "\n")


def figures_content(figures: Sequence[Figure], machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Figures with what they were measured on and how, as JSON values."""
    return {"machine": machine, "settings": settings, "figures": [asdict(figure) for figure in figures]}
