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

FALLS = 0.05
"""Share by which MACs in training differ from those at the end where a budget falls; thresholds move a little too."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to, read from the files it wrote."""

    accuracy: float  #: top-1 in percent after the last step
    loss: float  #: on the images of the evaluation, after the last step
    curve: tuple[tuple[int, float], ...]  #: (step, top-1)
    live_parameters: int
    macs: float  #: mean of one image, of live weights and kept tokens
    training_macs: float | None = None  #: the same, in the mean over the steps; None where nobody noted it


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
    curve, losses = (values.get(f"eval/ema_{key}", values[f"eval/{key}"]) for key in ("top1", "loss"))
    return Outcome(
        accuracy=curve[-1][1],
        loss=losses[-1][1],
        curve=tuple(curve),
        live_parameters=int(values["budget/live_parameters"][-1][1]),
        macs=values["budget/macs"][-1][1],
        training_macs=mean_over_steps(values.get("train/macs", values["budget/macs"]), curve[-1][0]),
    )


def mean_over_steps(points: Sequence[tuple[int, float]], end: int) -> float:
    """The mean over all steps up to ``end`` of what holds from one point to the next."""
    later = [step for step, _ in points[1:]] + [end]
    spans = [(next_step - step, value) for (step, value), next_step in zip(points, later, strict=True)]
    total = sum(span for span, _ in spans)
    return sum(span * value for span, value in spans) / total if total else points[-1][1]


def summarize(outcomes: Mapping[str, Mapping[int, Outcome]], baseline: str) -> list[dict[str, Any]]:
    """One row per entry that has finished runs: mean, spread, and the paired difference to the baseline, of top-1 and
    of the loss.

    An interval holds the mean difference with 95 % confidence (Student's t over the seeds).

    Args:
        outcomes: by entry and seed.
    """
    base = outcomes[baseline]
    rows = []
    for entry, found in outcomes.items():
        if not found:
            continue
        top1, loss = [outcome.accuracy for outcome in found.values()], [outcome.loss for outcome in found.values()]
        row: dict[str, Any] = {
            "entry": entry,
            "seeds": len(found),
            "top1_mean": statistics.mean(top1),
            "top1_spread": statistics.stdev(top1) if len(top1) > 1 else None,
            "top1": top1,
            "loss_mean": statistics.mean(loss),
            "loss": loss,
            "live_parameters": next(iter(found.values())).live_parameters,
            "macs": statistics.mean(outcome.macs for outcome in found.values()),
            "training_macs": statistics.mean(outcome.training_macs or outcome.macs for outcome in found.values()),
            "curves": [outcome.curve for outcome in found.values()],
        }
        if base:
            row["macs_ratio"] = row["macs"] / next(iter(base.values())).macs
            row["training_macs_ratio"] = row["training_macs"] / next(iter(base.values())).macs
            row["live_ratio"] = row["live_parameters"] / next(iter(base.values())).live_parameters
        if entry != baseline:
            row |= differences(found, base)
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

    shown = dict(map(mean, (0.25, 0.5, FLAT, 0.9, 1.0)))  # a short curve has fewer points
    points = ", ".join(f"{value:.2f} at step {step:,}" for step, value in shown.items())
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
        row = differences(outcomes[first], outcomes[second])
        if "interval" in row:
            rows.append({"entry": first, "beside": second, **row})
    return rows


def compare_with_chance(
    outcomes: Mapping[str, Mapping[int, Outcome]], chance: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """One row for each entry with a selector: its top-1, and that with as many patches drawn at random.

    Args:
        outcomes: by entry and seed.
        chance: of :func:`experiments.grids.chance.measure_chance`.
    """
    rows = []
    for entry, drawn in chance.items():
        pairs = [(outcomes[entry][int(seed)].accuracy, top1) for seed, top1 in drawn.items()]
        apart = [chosen - random for chosen, random in pairs]
        row: dict[str, Any] = {
            "entry": entry,
            "seeds": len(pairs),
            "chosen": statistics.mean(chosen for chosen, _ in pairs),
            "random": statistics.mean(random for _, random in pairs),
            "difference": statistics.mean(apart),
        }
        if len(pairs) > 1:
            row["interval"] = interval(apart)
        rows.append(row)
    return rows


def differences(first: Mapping[int, Outcome], second: Mapping[int, Outcome]) -> dict[str, Any]:
    """The first less the second over the seeds that both have: means, and from two seeds on their intervals.

    Args:
        first, second: outcomes by seed.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return {}
    top1 = [first[seed].accuracy - second[seed].accuracy for seed in seeds]
    loss = [first[seed].loss - second[seed].loss for seed in seeds]
    row: dict[str, Any] = {
        "paired_seeds": len(seeds),
        "difference": statistics.mean(top1),
        "loss_difference": statistics.mean(loss),
    }
    if len(seeds) > 1:
        row |= {"interval": interval(top1), "loss_interval": interval(loss)}
    return row


def to_markdown(name: str, report: Mapping[str, Any]) -> str:
    """The report for people.

    Args:
        report: what is in the grid's JSON file: ``title``, ``command``, ``baseline``, ``labels``, ``rows`` of
            :func:`summarize`, ``pairs`` of :func:`compare`, and ``speeds`` of
            :func:`experiments.grids.speed.measure_speed`, empty if nothing was timed, and likewise ``chance`` of
            :func:`compare_with_chance`.
    """
    baseline, rows = report["baseline"], report["rows"]
    lines = [f"# {name}", "", *([report["title"], ""] if report["title"] else []), "Made by", ""]
    lines += [f"    {report['command']}", ""]
    lines.append(
        f"Top-1 in percent and loss after the last step, means over the seeds, with the standard deviation of top-1. "
        f"Differences are to `{baseline}` and paired by seed, with a 95 % interval (Student's t). Live parameters and "
        f"MACs are shares of those of `{baseline}`; MACs are those of live weights and kept tokens, mean of one image."
    )
    if falls_in(rows):
        lines[-1] += " Those of training are the mean over its steps, by which the table is sorted."
    lines += ["", *_table(report)]
    if report["pairs"]:
        lines += ["", "Other pairs:", "", "| | less | seeds | top-1 | loss |", "|---|---|---|---|---|"]
        lines += [
            f"| {_label(report, pair['entry'])} | {_label(report, pair['beside'])} | {pair['paired_seeds']} | "
            f"{_difference(pair, '', 2)} | {_difference(pair, 'loss_', 3)} |"
            for pair in report["pairs"]
        ]
    if report.get("chance"):
        lines += [
            "",
            "Top-1 with the patches that selectors choose, and with as many of every image drawn at random:",
            "",
        ]
        lines += ["| | seeds | chosen | at random | difference |", "|---|---|---|---|---|"]
        lines += [
            f"| {_label(report, row['entry'])} | {row['seeds']} | {row['chosen']:.2f} | {row['random']:.2f} | "
            f"{_difference(row, '', 2)} |"
            for row in report["chance"]
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
    kernels = any("kernels_ratio" in speed for speed in measured.values())
    falls = falls_in(report["rows"])
    lines = [
        "| | seeds | top-1 | difference | loss | difference | live | MACs |"
        + " in training |" * falls
        + " step time | throughput |" * bool(measured)
        + " with kernels |" * kernels,
        "|---|---|---|---|---|---|---|---|" + "---|" * falls + "---|---|" * bool(measured) + "---|" * kernels,
    ]
    rows = list(report["rows"])
    if falls:
        rows.sort(key=lambda row: float(row.get("training_macs_ratio", 1)))
    for row in rows:
        spread = f" ± {row['top1_spread']:.2f}" if row["top1_spread"] is not None else ""
        seeds = str(row["seeds"])
        if row.get("paired_seeds", row["seeds"]) < row["seeds"]:
            seeds += f", {row['paired_seeds']} paired"
        line = (
            f"| {_label(report, row['entry'])} | {seeds} | {row['top1_mean']:.2f}{spread} | "
            f"{_difference(row, '', 2)} | {row['loss_mean']:.3f} | {_difference(row, 'loss_', 3)} | "
            f"{100 * row.get('live_ratio', 1):.0f} % | {100 * row.get('macs_ratio', 1):.0f} % |"
        )
        if falls:
            line += f" {100 * row.get('training_macs_ratio', 1):.0f} % |"
        if measured:
            speed = measured.get(row["entry"])
            line += f" {speed['step_ratio']:.2f} | {speed['throughput_ratio']:.2f} |" if speed else " | |"
        if kernels:
            line += f" {speed['kernels_ratio']:.2f} |" if speed and "kernels_ratio" in speed else " |"
        lines.append(line)
    return lines


def falls_in(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the MACs of some entry were others during its training than in the end; the table is then sorted by
    what training took."""
    return any(abs(row.get("training_macs", row["macs"]) / row["macs"] - 1) > FALLS for row in rows)


def _label(report: Mapping[str, Any], entry: str) -> str:
    label = report["labels"].get(entry)
    return f"{label} (`{entry}`)" if label else entry


def _difference(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A mean difference and its interval, as far as there are any."""
    if f"{key}difference" not in row:
        return ""
    text = f"{row[f'{key}difference']:+.{digits}f}"
    if f"{key}interval" in row:
        low, high = row[f"{key}interval"]
        text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return text.replace("-", "−")


def _speed_notes(baseline: str, speeds: Mapping[str, Any]) -> list[str]:
    """How the time was taken, and the patches that are kept where every image has its own number."""
    machine, base = speeds["machine"], speeds["baseline"]
    kernels = any("kernels_ratio" in speed for speed in speeds["entries"].values())
    dead = (
        "Single dead weights save neither in torch's kernels. The last column is the throughput with `--kernels auto`, "
        "over the same dense network in torch's."
    )
    lines = [
        f"Step time and throughput are ratios to `{baseline}`, medians of {speeds['pairs']} alternating pairs in one "
        f"run on {machine['device']}, {machine['threads']} threads ({machine['instructions']}), in {speeds['amp']}: a "
        f"training step takes {1e3 * base['step_seconds']:.1f} ms there, and {base['throughput']:,.0f} images a second "
        f"are classified in batches of {speeds['batch_size']}. "
        + (dead if kernels else "Single dead weights save neither.")
    ]
    if "onnxruntime_ratio" in base:
        lines[0] += f" onnxruntime classifies with that dense network {base['onnxruntime_ratio']:.2f} times as many."
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
