"""What the runs of a grid came to: means, paired differences with an interval, a table and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

FLAT = 0.75
"""The curve is flat if, in the mean over the seeds, it rises by less than the spread between them after this share of
the run."""
LABEL_GAP = 0.028
"""Of the height of the picture, between two labels."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to, read from the files it wrote."""

    accuracy: float  #: top-1 in percent after the last step
    curve: tuple[tuple[int, float], ...]  #: (step, top-1)
    live_parameters: int
    macs: float  #: mean of one image, of live weights and kept tokens


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome of a finished run; None where it is not finished."""
    if not (folder / "sparse.safetensors").is_file():
        return None
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if value is not None:
                values.setdefault(key, []).append((record["step"], value))
    curve = values.get("eval/ema_top1", values["eval/top1"])
    return Outcome(
        accuracy=curve[-1][1],
        curve=tuple(curve),
        live_parameters=int(values["budget/live_parameters"][-1][1]),
        macs=values["budget/macs"][-1][1],
    )


def summarize(outcomes: Mapping[str, Mapping[int, Outcome]], baseline: str) -> list[dict[str, Any]]:
    """One row per entry that has finished runs: mean, spread, and the paired difference to the baseline.

    The interval holds the mean difference with 95 % confidence (Student's t over the seeds).

    Args:
        outcomes: by entry and seed.
    """
    base = outcomes[baseline]
    rows = []
    for entry, found in outcomes.items():
        if not found:
            continue
        accuracies = [outcome.accuracy for outcome in found.values()]
        row: dict[str, Any] = {
            "entry": entry,
            "seeds": len(found),
            "top1_mean": statistics.mean(accuracies),
            "top1_spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "top1": accuracies,
            "live_parameters": next(iter(found.values())).live_parameters,
            "macs": statistics.mean(outcome.macs for outcome in found.values()),
            "curves": [outcome.curve for outcome in found.values()],
        }
        if base:
            row["macs_ratio"] = row["macs"] / next(iter(base.values())).macs
            row["live_ratio"] = row["live_parameters"] / next(iter(base.values())).live_parameters
        differences = [found[seed].accuracy - base[seed].accuracy for seed in found if seed in base]
        if entry != baseline and differences:
            row["difference"] = statistics.mean(differences)
            if len(differences) > 1:
                row["interval"] = interval(differences)
        rows.append(row)
    return rows


def interval(differences: Sequence[float]) -> list[float]:
    """Where the mean lies with 95 % confidence; where all are equal, there."""
    if len(set(differences)) == 1:
        return [differences[0], differences[0]]
    found = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return [float(found.low), float(found.high)]


def describe_curve(row: Mapping[str, Any]) -> str:
    """The mean curve of an entry at a few shares of its run, and whether it is flat at the end."""
    curves = row["curves"]
    length = min(len(curve) for curve in curves)

    def mean(share: float) -> tuple[int, float]:
        index = round(share * (length - 1))
        return curves[0][index][0], statistics.mean(curve[index][1] for curve in curves)

    points = ", ".join(f"{value:.2f} at step {step:,}" for step, value in map(mean, (0.25, 0.5, FLAT, 0.9, 1.0)))
    rise = mean(1.0)[1] - mean(FLAT)[1]
    text = f"The curve of `{row['entry']}`, mean of the seeds: {points}. In the last quarter of the run {rise:+.2f}"
    if row["top1_spread"] is None:
        return f"{text}."
    flat = rise < row["top1_spread"]
    return f"{text}, {'less' if flat else 'more'} than the {row['top1_spread']:.2f} by which seeds differ."


def to_markdown(
    name: str,
    title: str,
    baseline: str,
    rows: Sequence[Mapping[str, Any]],
    speeds: Mapping[str, Any],
    command: str,
) -> str:
    """The report for people.

    Args:
        rows: of :func:`summarize`.
        speeds: of :func:`experiments.grid_speed.measure_speed`; empty if nothing was timed.
    """
    measured: Mapping[str, Mapping[str, Any]] = speeds.get("entries", {})
    lines = [
        f"# {name}",
        "",
        *([title, ""] if title else []),
        "Made by",
        "",
        f"    {command}",
        "",
        f"Top-1 in percent after the last step, mean and standard deviation over the seeds; the difference to "
        f"`{baseline}` is paired by seed, with a 95 % interval (Student's t). MACs are those of live weights and kept "
        "tokens, mean of one image.",
        "",
        "| entry | seeds | top-1 | difference | 95 % interval | live parameters | share | MACs | share |"
        + (" step time | throughput |" if measured else ""),
        "|---|---|---|---|---|---|---|---|---|" + ("---|---|" if measured else ""),
    ]
    for row in rows:
        spread = f" ± {row['top1_spread']:.2f}" if row["top1_spread"] is not None else ""
        difference = f"{row['difference']:+.2f}" if "difference" in row else ""
        between = f"{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}" if "interval" in row else ""
        line = (
            f"| {row['entry']} | {row['seeds']} | {row['top1_mean']:.2f}{spread} | {difference} | {between} | "
            f"{row['live_parameters']:,} | {row.get('live_ratio', 1):.3f} | {row['macs'] / 1e6:,.1f} M | "
            f"{row.get('macs_ratio', 1):.3f} |"
        )
        if measured:
            speed = measured.get(row["entry"])
            line += f" {speed['step_ratio']:.2f} | {speed['throughput_ratio']:.2f} |" if speed else " | |"
        lines.append(line)
    base = next((row for row in rows if row["entry"] == baseline), None)
    if base is not None:
        lines += ["", describe_curve(base)]
    if measured:
        machine, dense = speeds["machine"], speeds["baseline"]
        lines += [
            "",
            f"Step time and throughput are ratios to `{baseline}`, medians of {speeds['pairs']} alternating pairs in "
            f"one run on {machine['device']}, {machine['threads']} threads ({machine['instructions']}), in "
            f"{speeds['amp']}: a training step takes {1e3 * dense['step_seconds']:.1f} ms there, and "
            f"{dense['throughput']:,.0f} images a second are classified in batches of {speeds['batch_size']}. Single "
            "dead weights save neither.",
        ]
        kept = [(entry, speed["kept"]) for entry, speed in measured.items() if speed.get("kept")]
        if kept:
            lines += ["", "Patches that images keep after the last stage:", ""]
            lines += [
                "| entry | of | least | a tenth below | median | a tenth above | most |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {entry} | {counts['patches']} | " + " | ".join(f"{value:g}" for value in counts["deciles"]) + " |"
                for entry, counts in kept
            ]
    lines += ["", f"![accuracy over MACs]({name}.png)"]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], baseline: str, file: Path) -> None:
    """Accuracy over MACs, with the baseline as a line, and the interval of each difference; needs matplotlib.

    Without matplotlib no picture is written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 5.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    base = next((row for row in rows if row["entry"] == baseline), None)
    low = min(row["top1_mean"] for row in rows)
    high = max(row["top1_mean"] for row in rows)
    if base is not None:
        axes.axhline(base["top1_mean"], color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for row in rows:
        is_base = row["entry"] == baseline
        x = 100 * row.get("macs_ratio", 1.0)
        axes.errorbar(
            x, row["top1_mean"], yerr=row["top1_spread"], fmt="s" if is_base else "o",
            color="black" if is_base else "#1f6fb4", ecolor="#b9cfe4", elinewidth=1, capsize=0, markersize=6, zorder=2,
        )  # fmt: skip
    margin = 0.12 * max(high - low, 0.5)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 108)
    _label(axes, rows)
    axes.set_xlabel(f"MACs of live weights and kept tokens, in percent of {baseline}")
    axes.set_ylabel("top-1 in percent, mean of the seeds (bar: standard deviation)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=140, metadata={"Software": None})


def _label(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Names beside the points, pushed apart where they would lie on one another."""
    bottom, top = axes.get_ylim()
    gap = LABEL_GAP * (top - bottom)
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row["top1_mean"]):
        x, wanted = 100 * row.get("macs_ratio", 1.0), row["top1_mean"]
        y = wanted
        while any(abs(y - other) < gap and abs(x - near) < 22 for near, other in placed):
            y += gap / 4
        placed.append((x, y))
        left = x > 85
        axes.annotate(
            row["entry"], (x, wanted), xytext=(x - 1.2 if left else x + 1.2, y), fontsize=8, va="center",
            ha="right" if left else "left", color="#333333",
        )  # fmt: skip
