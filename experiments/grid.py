"""Many runs at once: ``python -m experiments.grid GRID.yaml`` trains every entry with every seed and reports.

A grid file names a recipe, what all entries change in it, and the entries::

    recipe: quickstart
    seeds: [0, 1, 2]
    baseline: dense
    common: {training: {epochs: 100}}
    entries:
      dense: {sparsity: null}
      half: {sparsity: {density: 0.5}}

Where a text holds ``{seed}``, the run's seed stands in its place, so that one grid can start from the networks of
another. Runs go to ``runs/<grid>/<entry>-seed<k>``. One that was interrupted goes on, one that is done is not repeated.
The report compares each entry with the baseline seed by seed: the same seed means the same first weights and images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from scipy import stats


@dataclass(frozen=True)
class Grid:
    """What to run."""

    name: str
    recipe: str
    seeds: tuple[int, ...]
    baseline: str
    entries: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any] = field(default_factory=dict)


def read_grid(path: Path) -> Grid:
    """The grid in a file.

    Raises:
        ValueError: a key is missing or unknown, or the baseline is no entry.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {"recipe", "seeds", "baseline", "entries", "common"}
    if not isinstance(content, dict) or not known - {"common"} <= set(content) <= known:
        raise ValueError(f"{path}: a grid has the keys {', '.join(sorted(known))}")
    grid = Grid(
        name=path.stem,
        recipe=content["recipe"],
        seeds=tuple(content["seeds"]),
        baseline=content["baseline"],
        entries=content["entries"],
        common=content.get("common", {}),
    )
    if grid.baseline not in grid.entries:
        raise ValueError(f"{path}: baseline {grid.baseline!r} is none of the entries {', '.join(grid.entries)}")
    return grid


@dataclass(frozen=True)
class Outcome:
    """What one run came to, read from the files it wrote."""

    accuracy: float  #: top-1 in percent after the last step
    curve: tuple[tuple[int, float], ...]  #: (step, top-1)
    live_parameters: int
    macs: float
    images_per_second: float  #: median over the run; of runs side by side, so no measure of speed


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
        images_per_second=statistics.median(value for _, value in values["train/images_per_second"]),
    )


def run_one(grid: Grid, entry: str, seed: int, runs: Path, threads: int, extra: Sequence[str]) -> str | None:
    """Train one entry with one seed in a process of its own; returns what went wrong, if anything did."""
    folder = runs / f"{entry}-seed{seed}"
    if read_outcome(folder) is not None:
        return None
    runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments", "train", "--config", grid.recipe]
    for name, content in (("common", grid.common), ("entry", grid.entries[entry])):
        if content:
            file = runs / f"{folder.name}.{name}.yaml"
            file.write_text(yaml.safe_dump(dict(content)).replace("{seed}", str(seed)), encoding="utf-8")
            command += ["--config", str(file)]
    command += ["--training.seed", str(seed), "--output.runs", str(runs), "--output.name", folder.name, *extra]
    command += ["--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(runs / f"{folder.name}.log", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    return None if code == 0 else f"{folder.name} ended with code {code}; see {runs / (folder.name + '.log')}"


def summarize(grid: Grid, runs: Path) -> list[dict[str, Any]]:
    """One row per entry that has finished runs: mean, spread, and the paired difference to the baseline.

    The interval holds the mean difference with 95 % confidence (Student's t over the seeds).
    """
    outcomes = {
        entry: {seed: outcome for seed in grid.seeds if (outcome := read_outcome(runs / f"{entry}-seed{seed}"))}
        for entry in grid.entries
    }
    base = outcomes[grid.baseline]
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
        if entry != grid.baseline and differences:
            row["difference"] = statistics.mean(differences)
            if len(differences) > 1:
                interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
                row["interval"] = [float(interval.low), float(interval.high)]
        rows.append(row)
    return rows


def to_markdown(grid: Grid, rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The report for people."""
    lines = [
        f"# {grid.name}",
        "",
        f"Recipe `{grid.recipe}`, seeds {', '.join(map(str, grid.seeds))}. Made by",
        "",
        f"    {command}",
        "",
        f"Top-1 in percent after the last step, mean and standard deviation over seeds; the difference to "
        f"`{grid.baseline}` is paired by seed, with a 95 % interval (Student's t).",
        "",
        "| entry | seeds | top-1 | difference | 95 % interval | live parameters | share | live MACs | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {row['top1_spread']:.2f}" if row["top1_spread"] is not None else ""
        difference = f"{row['difference']:+.2f}" if "difference" in row else ""
        interval = f"{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}" if "interval" in row else ""
        lines.append(
            f"| {row['entry']} | {row['seeds']} | {row['top1_mean']:.2f}{spread} | {difference} | {interval} | "
            f"{row['live_parameters']:,} | {row.get('live_ratio', 1):.3f} | {row['macs'] / 1e6:,.1f} M | "
            f"{row.get('macs_ratio', 1):.3f} |"
        )
    base = next((row for row in rows if row["entry"] == grid.baseline), None)
    if base is not None:
        curve = base["curves"][0]
        points = [curve[round(share * (len(curve) - 1))] for share in (0.25, 0.5, 0.75, 0.9, 1.0)]
        text = ", ".join(f"{value:.2f} at step {step:,}" for step, value in points)
        lines += ["", f"The curve of `{grid.baseline}` (first seed): {text}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a grid, and write its report. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.grid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("grid", type=Path, help="a grid file, such as experiments/recipes/grids/structured.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="folder of the report")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=0, help="threads of each; 0 shares the cores among the jobs")
    parser.add_argument("--report-only", action="store_true", help="only read what is there")
    options, extra = parser.parse_known_args(arguments)
    try:
        grid = read_grid(options.grid)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    runs = options.runs / grid.name
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    failures = []
    if not options.report_only:
        # seed by seed, so that a grid that is cut off has whole comparisons
        tasks = [(entry, seed) for seed in grid.seeds for entry in grid.entries]
        with ThreadPoolExecutor(options.jobs) as pool:
            found = pool.map(lambda task: run_one(grid, task[0], task[1], runs, threads, extra), tasks)
            failures = [failure for failure in found if failure]
    rows = summarize(grid, runs)
    for failure in failures:
        print(failure, file=sys.stderr)
    if not rows:
        print(f"{parser.prog}: error: no run of {grid.name} is finished in {runs}", file=sys.stderr)
        return 1
    command = " ".join(["python -m experiments.grid", str(options.grid), *extra])
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{grid.name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = to_markdown(grid, rows, command)
    (options.results / f"{grid.name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
