"""What the runs of a grid came to: means, paired differences with an interval, and the report that says so."""

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


def compare(outcomes: Mapping[str, Mapping[int, Outcome]], pairs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One row for each pair of entries that have two or more seeds in common: the first less the second, by seed.

    Args:
        outcomes: by entry and seed.
    """
    rows = []
    for first, second in pairs:
        seeds = sorted(set(outcomes[first]) & set(outcomes[second]))
        if len(seeds) < 2:
            continue
        differences = [outcomes[first][seed].accuracy - outcomes[second][seed].accuracy for seed in seeds]
        rows.append(
            {
                "entry": first,
                "beside": second,
                "seeds": len(seeds),
                "difference": statistics.mean(differences),
                "interval": interval(differences),
            }
        )
    return rows


def to_markdown(name: str, report: Mapping[str, Any]) -> str:
    """The report for people.

    Args:
        report: what is in the grid's JSON file: ``title``, ``command``, ``baseline``, ``labels``, ``rows`` of
            :func:`summarize`, ``pairs`` of :func:`compare`, and ``speeds`` of
            :func:`experiments.grid_speed.measure_speed`, empty if nothing was timed.
    """
    baseline, rows = report["baseline"], report["rows"]
    lines = [f"# {name}", "", *([report["title"], ""] if report["title"] else []), "Made by", ""]
    lines += [f"    {report['command']}", ""]
    lines.append(
        f"Top-1 in percent after the last step, mean and standard deviation over the seeds; the difference to "
        f"`{baseline}` is paired by seed, with a 95 % interval (Student's t). Live parameters and MACs are shares of "
        f"those of `{baseline}`; MACs are those of live weights and kept tokens, mean of one image."
    )
    lines += ["", *_table(report)]
    if report["pairs"]:
        lines += ["", "Other pairs:", "", "| | less | seeds | difference | 95 % interval |", "|---|---|---|---|---|"]
        lines += [
            f"| {_label(report, pair['entry'])} | {_label(report, pair['beside'])} | {pair['seeds']} | "
            f"{pair['difference']:+.2f} | {_between(pair)} |"
            for pair in report["pairs"]
        ]
    base = next((row for row in rows if row["entry"] == baseline), None)
    if base is not None:
        lines += [
            "",
            f"`{baseline}` has {base['live_parameters']:,} live parameters and {base['macs'] / 1e6:,.1f} M MACs.",
        ]
        lines[-1] += f" {describe_curve(base)}"
    if report["speeds"]:
        lines += ["", *_speed_notes(baseline, report["speeds"])]
    lines += ["", f"![accuracy over MACs, and over the steps]({name}.png)"]
    return "\n".join(lines) + "\n"


def _table(report: Mapping[str, Any]) -> list[str]:
    """One line for each entry."""
    measured = report["speeds"].get("entries", {})
    lines = [
        "| | seeds | top-1 | difference | 95 % interval | live | MACs |"
        + (" step time | throughput |" * bool(measured)),
        "|---|---|---|---|---|---|---|" + "---|---|" * bool(measured),
    ]
    for row in report["rows"]:
        spread = f" ± {row['top1_spread']:.2f}" if row["top1_spread"] is not None else ""
        difference = f"{row['difference']:+.2f}" if "difference" in row else ""
        line = (
            f"| {_label(report, row['entry'])} | {row['seeds']} | {row['top1_mean']:.2f}{spread} | {difference} | "
            f"{_between(row)} | {100 * row.get('live_ratio', 1):.0f} % | {100 * row.get('macs_ratio', 1):.0f} % |"
        )
        if measured:
            speed = measured.get(row["entry"])
            line += f" {speed['step_ratio']:.2f} | {speed['throughput_ratio']:.2f} |" if speed else " | |"
        lines.append(line)
    return lines


def _label(report: Mapping[str, Any], entry: str) -> str:
    label = report["labels"].get(entry)
    return f"{label} (`{entry}`)" if label else entry


def _between(row: Mapping[str, Any]) -> str:
    return f"{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}" if "interval" in row else ""


def _speed_notes(baseline: str, speeds: Mapping[str, Any]) -> list[str]:
    """How the time was taken, and the patches that are kept where every image has its own number."""
    machine, base = speeds["machine"], speeds["baseline"]
    lines = [
        f"Step time and throughput are ratios to `{baseline}`, medians of {speeds['pairs']} alternating pairs in one "
        f"run on {machine['device']}, {machine['threads']} threads ({machine['instructions']}), in {speeds['amp']}: a "
        f"training step takes {1e3 * base['step_seconds']:.1f} ms there, and {base['throughput']:,.0f} images a second "
        f"are classified in batches of {speeds['batch_size']}. Single dead weights save neither."
    ]
    kept = [(entry, speed["kept"]) for entry, speed in speeds["entries"].items() if speed.get("kept")]
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
    return lines
