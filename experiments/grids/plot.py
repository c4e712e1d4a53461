"""The picture of a grid: accuracy over MACs, and over the steps of the run; needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LABEL_GAP = 0.028
"""Of the height of a panel, between two labels."""
ROUNDS, TOLERANCE = 5000, 0.02
"""How often labels that lie on one another are pushed apart at most, and the share of the gap that may be missing."""
BASELINE, OTHERS = "black", "#1f6fb4"


def draw(rows: Sequence[Mapping[str, Any]], baseline: str, file: Path) -> None:
    """Write the picture; without matplotlib there is none.

    Args:
        rows: of :func:`experiments.grids.report.summarize`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(13, 5.6), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _over_macs(left, rows, baseline)
    _over_steps(right, rows, baseline)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def _over_macs(axes: Any, rows: Sequence[Mapping[str, Any]], baseline: str) -> None:
    """A point for each entry, the baseline as a line."""
    base = next((row for row in rows if row["entry"] == baseline), None)
    low, high = (choose(row["top1_mean"] for row in rows) for choose in (min, max))
    if base is not None:
        axes.axhline(base["top1_mean"], color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for row in rows:
        is_base = row["entry"] == baseline
        axes.errorbar(
            100 * row.get("macs_ratio", 1.0), row["top1_mean"], yerr=row["top1_spread"], fmt="s" if is_base else "o",
            color=BASELINE if is_base else OTHERS, ecolor="#b9cfe4", elinewidth=1, capsize=0, markersize=6, zorder=2,
        )  # fmt: skip
    margin = 0.12 * max(high - low, 0.5)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 1.08 * max(100.0, *(100 * row.get("macs_ratio", 1.0) for row in rows)))
    points = {row["entry"]: (100 * row.get("macs_ratio", 1.0), row["top1_mean"]) for row in rows}
    _label(axes, points, near=25)
    axes.set_xlabel(f"MACs of live weights and kept tokens, in percent of {baseline}")
    axes.set_ylabel("top-1 in percent, mean of the seeds (bar: standard deviation)")


def _over_steps(axes: Any, rows: Sequence[Mapping[str, Any]], baseline: str) -> None:
    """The mean curve of each entry over its own steps."""
    ends, last = {}, 0
    for row in rows:
        length = min(len(curve) for curve in row["curves"])
        steps = [step for step, _ in row["curves"][0][:length]]
        means = [statistics.mean(curve[i][1] for curve in row["curves"]) for i in range(length)]
        is_base = row["entry"] == baseline
        axes.plot(
            steps, means, color=BASELINE if is_base else OTHERS, linewidth=2 if is_base else 1,
            alpha=1 if is_base else 0.6, zorder=2 if is_base else 1,
        )  # fmt: skip
        ends[row["entry"]] = (float(steps[-1]), means[-1])
        last = max(last, steps[-1])
    values = sorted(value for row in rows for curve in row["curves"] for _, value in curve)
    axes.set_ylim(values[len(values) // 5], values[-1] + 0.04 * (values[-1] - values[len(values) // 5]))
    axes.set_xlim(0, 1.25 * last)
    _label(axes, ends, near=0.25 * last, turn=1.25 * last, room=0.035)
    axes.set_xlabel("optimizer step (the least fifth of all values is below the edge)")
    axes.set_ylabel("top-1 in percent, mean of the seeds")


def _label(
    axes: Any, points: Mapping[str, tuple[float, float]], near: float, turn: float = 85, room: float = 0.012
) -> None:
    """Names beside points, pushed apart where they would lie on one another.

    Args:
        points: by name, in the units of the axes.
        near: how far apart in x two labels never meet.
        turn: beyond this x the name stands to the left of its point.
        room: of the width of the panel, between a point and its name.
    """
    bottom, top = axes.get_ylim()
    gap = LABEL_GAP * (top - bottom)
    pad = room * (axes.get_xlim()[1] - axes.get_xlim()[0])
    names = sorted(points, key=lambda name: points[name][1])
    heights = [points[name][1] for name in names]
    for _ in range(ROUNDS):
        # Beyond the edge a name would not be drawn.
        heights = [min(max(height, bottom + gap / 2), top - gap / 2) for height in heights]
        worst = 0.0
        for upper in range(len(names)):
            for lower in range(upper):
                overlap = gap - (heights[upper] - heights[lower])
                if overlap > 0 and abs(points[names[upper]][0] - points[names[lower]][0]) < near:
                    heights[upper] += overlap / 2
                    heights[lower] -= overlap / 2
                    worst = max(worst, overlap)
        if worst <= TOLERANCE * gap:
            break
    for name, y in zip(names, heights, strict=True):
        x = points[name][0]
        left = x > turn
        side = x - pad if left else x + pad
        if abs(y - points[name][1]) > gap / 2:  # a name that was pushed away is tied to its point
            axes.plot([x, side], [points[name][1], y], color="#999999", linewidth=0.5, zorder=1)
        axes.annotate(
            name, (side, y), fontsize=8, va="center", ha="right" if left else "left",
            color="#333333", bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip
