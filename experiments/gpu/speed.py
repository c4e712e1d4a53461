"""How fast: dense against fewer heads, neurons and tokens, single dead weights and 2:4, in an order of worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from experiments.benchmarks.overhead import benchmark_overhead
from experiments.benchmarks.setting import Setting, Weights
from experiments.benchmarks.timing import describe_machine
from experiments.gpu.comparison import Case, Comparison
from experiments.gpu.loop_share import measure_loop
from experiments.gpu.record import Deadline, Record
from experiments.gpu.settings import Settings

EAGER, COMPILED, LOOP, OVERHEAD = 5.0, 40.0, 25.0, 25.0
"""Seconds that a measurement may take, by which it is decided whether it is still begun."""
SMALL, BASE = "deit_small_patch16_224", "deit_base_patch16_224"
GROUPS = (
    (SMALL, 256, False, "inference"),
    (SMALL, 256, False, "training"),
    ("loop", 256, False, ""),
    ("loop", 256, True, ""),
    ("overhead", 256, False, ""),
    (SMALL, 256, True, "training"),
    (BASE, 256, False, "inference"),
    (BASE, 256, False, "training"),
    (SMALL, 64, False, "inference"),
    (SMALL, 64, False, "training"),
    (BASE, 64, False, "inference"),
    (BASE, 64, False, "training"),
    (SMALL, 256, True, "inference"),
    (BASE, 256, True, "training"),
    (BASE, 256, True, "inference"),
    (SMALL, 64, True, "training"),
    (SMALL, 64, True, "inference"),
    (BASE, 64, True, "training"),
    (BASE, 64, True, "inference"),
)
"""What is measured, in this order: network (or what else), batch, whether it is compiled, task."""
DRY_GROUPS = (
    ("deit_tiny_patch16_224", 2, False, "inference"),
    ("deit_tiny_patch16_224", 2, True, "training"),
    ("loop", 2, False, ""),
    ("overhead", 2, False, ""),
)


def run(settings: Settings) -> int:
    """Measure until the time is over; returns the exit code, 1 if something failed."""
    torch.backends.cuda.matmul.allow_tf32 = True
    # Each network is compiled by itself, and torch would take them all for one that changes.
    torch._dynamo.config.recompile_limit = 256  # type: ignore[attr-defined]
    device = torch.device("cpu" if settings.dry else "cuda")
    deadline = Deadline(settings.seconds)
    record = Record(settings.output / "speed.json", machine=describe_machine(device), dry=settings.dry)
    good = True
    for name, batch, compiled, task in DRY_GROUPS if settings.dry else GROUPS:
        words = [name, f"batch {batch}", "compiled" if compiled else "eager", task]
        title = ", ".join(word for word in words if word)
        setting = _setting(name, batch, settings)
        if name == "loop":
            if _is_time(deadline, LOOP * (1 + compiled), title, record, settings):
                good &= record.attempt("loop", partial(measure_loop, settings, compile=compiled), compiled=compiled)
        elif name == "overhead":
            if _is_time(deadline, OVERHEAD, title, record, settings):
                good &= record.attempt("overhead", partial(_overhead, setting))
        else:
            good &= _compare(Case(setting, compiled, task), title, deadline, record, settings)
    return 0 if good else 1


def _setting(name: str, batch: int, settings: Settings) -> Setting:
    model = name if name.startswith("deit") else SMALL
    if settings.dry:
        return Setting("deit_tiny_patch16_224", 32, 16, batch, "float32", "cpu", pairs=1)
    return Setting(model, 224, 16, batch, "bfloat16", "cuda", pairs=5)


def _is_time(deadline: Deadline, seconds: float, title: str, record: Record, settings: Settings) -> bool:
    """Whether so many seconds are left; notes what was left out where they are not."""
    if deadline.left > seconds or settings.dry:
        return True
    record.add(name=title, skipped=f"{deadline.left:.0f} s left")
    return False


def _overhead(setting: Setting) -> dict[str, object]:
    figures = benchmark_overhead(replace(setting, pairs=max(1, setting.pairs - 2)), Weights())
    return {"figures": {figure.name: figure.value for figure in figures}, "step_ratio": figures[0].ratio}


def _compare(case: Case, title: str, deadline: Deadline, record: Record, settings: Settings) -> bool:
    """The variants of one network against it."""
    seconds = COMPILED if case.compiled else EAGER
    if not _is_time(deadline, 2 * seconds, title, record, settings):
        return True
    good = True
    entry = {"model": case.setting.model, "batch": case.setting.batch_size, "compiled": case.compiled}
    comparison: list[Comparison] = []
    whole = {**entry, "task": case.task}
    if not record.attempt(f"{title}: dense", partial(_dense, comparison, case, settings), **whole, variant="dense"):
        return False
    for variant in _variants(case, settings):
        if _is_time(deadline, seconds, f"{title}: {variant}", record, settings):
            good &= record.attempt(
                f"{title}: {variant}",
                partial(comparison[0].measure, variant),
                **whole,
                variant=variant,
            )
    del comparison[:]
    if not settings.dry:
        torch.cuda.empty_cache()
    return good


def _dense(found: list[Comparison], case: Case, settings: Settings) -> dict[str, object]:
    found.append(Comparison(case, backend="eager" if settings.dry else "inductor"))
    return found[0].dense()


def _variants(case: Case, settings: Settings) -> Iterator[str]:
    yield "units"
    yield "tokens by threshold"
    yield "units and tokens by threshold"
    yield "tokens by top-k"
    if case.task == "training":
        yield "weight masks"
    elif not settings.dry:
        yield "2:4"
