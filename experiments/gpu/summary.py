"""The short table at the end of a call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from experiments.gpu.record import read_record
from experiments.gpu.settings import Settings

MOST = 12
"""Failures that are listed."""


def summarize(settings: Settings) -> str:
    """What was found, and what failed, from the files of a call."""
    lines = ["", f"results in {settings.output}"]
    failures: list[str] = []
    for part in settings.only:
        content = read_record(settings.output / f"{part}.json")
        if part == settings.only[0] and "machine" in content:
            lines.append(f"on {content['machine']['device']}, torch {content['machine']['torch']}")
        lines += {"tests": _tests, "speed": _speed, "train": _train}[part](content["entries"])
        failures += [f"{entry['name']}: {entry['failed']}" for entry in content["entries"] if "failed" in entry]
        failures += [entry["name"] for entry in content["entries"] if entry.get("outcome") in ("failed", "error")]
    if failures:
        lines += ["failed:", *(f"  {line}" for line in failures[:MOST])]
        lines += [f"  and {len(failures) - MOST} more"] if len(failures) > MOST else []
    return "\n".join(lines)


def _tests(entries: list[dict[str, Any]]) -> Iterator[str]:
    counts = Counter(entry["outcome"] for entry in entries if "outcome" in entry)
    yield "tests: " + (", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none was run")


def _speed(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        name = entry["name"]
        if "skipped" in entry or "failed" in entry:
            continue
        if name == "loop":
            kind = "compiled" if entry["compiled"] else "eager"
            yield (
                f"speed: loop, {kind}: {1e3 * entry['step_seconds']:.2f} ms a step, busy {_share(entry['busy'])}, "
                f"{entry['kernels_per_step']:.0f} kernels"
            )
        elif name == "overhead":
            figures = entry["figures"]
            yield (
                f"speed: scheduler: step {entry['step_ratio']:.3f} of one without, masking "
                f"{1e3 * figures['masking all gradients']:.2f} ms, update {1e3 * figures['update']:.1f} ms"
            )
        elif "speedup" in entry:
            yield (
                f"speed: {name}: {entry['speedup']:.2f} times dense, {entry['ideal']:.2f} by MACs "
                f"({entry['achieved']:.2f}), {entry['peak_mib']:,.0f} MiB"
            )
        else:
            yield f"speed: {name}: {1e3 * entry['seconds']:.2f} ms, {entry['images_per_second']:,.0f} images/s"
    left_out = sum("skipped" in entry for entry in entries)
    if left_out:
        yield f"speed: {left_out} left out for want of time"


def _train(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        if "top1" in entry:
            yield f"train: {entry['name']}: top-1 {entry['top1']:.2f}, loss {entry['loss']:.3f}, {entry['took']:.0f} s"
    left_out = [entry["name"] for entry in entries if "skipped" in entry]
    if left_out:
        yield f"train: not trained: {', '.join(left_out)}"


def _share(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.2f}"
