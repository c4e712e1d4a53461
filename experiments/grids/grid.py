"""Many runs at once: ``python -m experiments.grids GRID.yaml`` trains every entry with every seed and reports.

A grid file names a recipe, what all entries change in it, and the entries::

    recipe: quickstart
    seeds: [0, 1, 2]
    baseline: dense
    common: {training: {epochs: 100}}
    entries:
      dense: {sparsity: null}
      half: {sparsity: {density: 0.5}}
      fewer_tokens: {sparsity: null, model: {start: "{run:dense}"}, selector: {kind: threshold}}
    labels: {half: half of the weights live}
    compare: [[half, fewer_tokens]]

Outcomes are kept in the grid's JSON file (:mod:`experiments.grids.memory`): what it knows is not trained again, so a
grid can be cut off and go on on another machine, with ``--only`` to choose. Measuring needs the runs themselves.

``{run:ENTRY}`` stands for the folder of an earlier entry's run with the same seed, which is waited for, and ``{seed}``
for the seed. Runs go to ``runs/<grid>/<entry>-seed<k>``. One that was interrupted goes on, one that is done is not
repeated. The report (:mod:`experiments.grids.report`) compares each entry with the baseline, and the pairs of
``compare`` with each other, seed by seed: the same seed means the same first weights and images. With ``--measure``
the finished runs are then timed against the baseline's, one after the other (:mod:`experiments.grids.speed`), and what
selectors chose is compared with chance (:mod:`experiments.grids.chance`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from experiments.benchmarks.timing import use_threads
from experiments.config import yaml_text
from experiments.config.reading import find_config
from experiments.errors import ConfigError
from experiments.grids.chance import measure_chance
from experiments.grids.memory import digest, recall, remember
from experiments.grids.plot import draw
from experiments.grids.report import Outcome, compare, compare_with_chance, read_outcome, summarize, to_markdown
from experiments.grids.speed import Precision, measure_speed
from sparse_trainer.files.checkpoint import CheckpointError

NEEDED = re.compile(r"\{run:([^}]*)\}")


@dataclass(frozen=True)
class Grid:
    """What to run."""

    name: str
    recipe: str
    seeds: tuple[int, ...]
    baseline: str
    entries: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""  #: what the grid is about, for the report
    labels: Mapping[str, str] = field(default_factory=dict)  #: what entries are, in words
    pairs: tuple[tuple[str, str], ...] = ()  #: entries that are compared with each other beside the baseline

    def digest(self, entry: str) -> str:
        """Of all settings that an entry has, those of the recipe included."""
        recipe = yaml_text.load(find_config(self.recipe).read_text(encoding="utf-8"))
        return digest({"recipe": recipe, "common": dict(self.common), "entry": dict(self.entries[entry])})

    def needs(self, entry: str) -> set[str]:
        """The entries whose runs this one starts from or learns from."""
        return set(NEEDED.findall(yaml.safe_dump([dict(self.common), dict(self.entries[entry])])))


def read_grid(path: Path) -> Grid:
    """The grid in a file.

    Raises:
        ValueError: a key is missing or unknown, an entry is named that is none, or one needs another that is not
            before it.
    """
    try:
        content = yaml_text.load(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    optional = {"common", "title", "labels", "compare"}
    known = {"recipe", "seeds", "baseline", "entries"} | optional
    if not isinstance(content, dict) or not known - optional <= set(content) <= known:
        raise ValueError(f"{path}: a grid has the keys {', '.join(sorted(known))}")
    pairs = content.get("compare") or []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{path}: compare is a list of pairs of entries, such as [[half, fewer_tokens]]")
    grid = Grid(
        name=path.stem,
        recipe=content["recipe"],
        seeds=tuple(content["seeds"]),
        baseline=content["baseline"],
        entries={str(name): entry or {} for name, entry in content["entries"].items()},
        common=content.get("common") or {},
        title=" ".join(content.get("title", "").split()),
        labels=content.get("labels") or {},
        pairs=tuple((first, second) for first, second in pairs),
    )
    named = {
        "baseline": [grid.baseline],
        "labels": grid.labels,
        "compare": [entry for pair in grid.pairs for entry in pair],
    }
    for key, entries in named.items():
        for entry in entries:
            if entry not in grid.entries:
                raise ValueError(f"{path}: {key} {entry!r} is none of the entries {', '.join(grid.entries)}")
    before: set[str] = set()
    for entry in grid.entries:
        late = sorted(grid.needs(entry) - before)
        if late:
            raise ValueError(f"{path}: {entry} needs the run of {late[0]!r}, which is no entry before it")
        before.add(entry)
    return grid


class Runs:
    """The runs of a grid, which may wait for one another.

    Args:
        folder: of the run folders.
        threads: CPU threads of each run.
        extra: options of ``train`` for all of them.
        only: entries to train, and what they need; all of them, if None.
        known: outcomes of runs that are not trained again, unless others start from them.
    """

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        threads: int,
        extra: Sequence[str],
        only: Sequence[str] | None = None,
        known: Mapping[str, Mapping[int, Outcome]] | None = None,
    ) -> None:
        self.known = known or {}
        self.grid, self.folder, self.threads, self.extra = grid, folder, threads, extra
        self.entries = [entry for entry in grid.entries if only is None or entry in self._with_needs(only)]
        self._done = {task: threading.Event() for task in self.tasks()}

    def tasks(self) -> Iterator[tuple[str, int]]:
        """Entry and seed; seed by seed, so that a grid that is cut off has whole comparisons."""
        return ((entry, seed) for seed in self.grid.seeds for entry in self.entries)

    def _is_due(self, entry: str, seed: int) -> bool:
        """Whether the run is not known, or another one that is due needs its folder."""
        if seed not in self.known.get(entry, {}):
            return True
        return any(self._is_due(other, seed) for other in self.entries if entry in self.grid.needs(other))

    def _with_needs(self, entries: Sequence[str]) -> set[str]:
        found = set(entries)
        for entry in entries:
            found |= self._with_needs(sorted(self.grid.needs(entry)))
        return found

    def path(self, entry: str, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / f"{entry}-seed{seed}"

    def all(self, jobs: int) -> list[str]:
        """Train what is not trained yet, so many side by side; returns what went wrong."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a run needs has always been begun before it, so that waiting for it comes to an end.
        with ThreadPoolExecutor(jobs) as pool:
            return [failure for failure in pool.map(lambda task: self._one(*task), self.tasks()) if failure]

    def _one(self, entry: str, seed: int) -> str | None:
        try:
            if not self._is_due(entry, seed):
                return None
            for needed in sorted(self.grid.needs(entry)):
                self._done[needed, seed].wait()
                if read_outcome(self.path(needed, seed)) is None:
                    return f"{self.path(entry, seed).name} was not begun: {needed} did not end here"
            return self._train(entry, seed)
        finally:
            self._done[entry, seed].set()

    def _train(self, entry: str, seed: int) -> str | None:
        """Train in a process of its own; returns what went wrong, if anything did."""
        folder = self.path(entry, seed)
        if read_outcome(folder) is not None:
            return None
        command = [sys.executable, "-m", "experiments", *self.command(entry, seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        log = self.folder / f"{folder.name}.log"
        with open(log, "a", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
        return None if done.returncode == 0 else f"{folder.name} ended with code {done.returncode}; see {log}"

    def command(self, entry: str, seed: int) -> list[str]:
        """The arguments of the run; writes the files they name."""
        folder = self.path(entry, seed)
        command = ["train", "--config", self.grid.recipe]
        for name, content in (("common", self.grid.common), ("entry", self.grid.entries[entry])):
            if content:
                file = self.folder / f"{folder.name}.{name}.yaml"
                file.write_text(self._filled_in(yaml.safe_dump(dict(content)), seed), encoding="utf-8")
                command += ["--config", str(file)]
        command += ["--training.seed", str(seed), "--output.runs", str(self.folder), "--output.name", folder.name]
        return [*command, *self.extra, "--resume", "auto"]

    def _filled_in(self, text: str, seed: int) -> str:
        text = NEEDED.sub(lambda match: str(self.path(match.group(1), seed)), text)
        return text.replace("{seed}", str(seed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a grid, and write its report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.grids",
        description=(__doc__ or "").splitlines()[0],
        epilog="Options that are not listed go to every run, such as --training.epochs 1 to try a grid out.",
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, help="a grid file, such as experiments/config/recipes/grids/ablations.yaml")
    parser.add_argument("--recipe", help="in place of the grid's; the results are then called GRID-RECIPE")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="folder of the report")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=0, help="threads of each; 0 shares the cores among the jobs")
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help="train these, and what they need")
    parser.add_argument("--report-only", action="store_true", help="only read what is there")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time training and inference of what is finished, and compare selectors with chance; on a quiet machine",
    )
    parser.add_argument(
        "--measure-amp",
        choices=get_args(Precision),
        help="precision of what is timed, in place of that of the runs",
    )
    options, extra = parser.parse_known_args(arguments)
    try:
        grid = read_grid(options.grid)
        odd = sorted(set(options.only or ()) - set(grid.entries))
        if odd:
            raise ValueError(f"--only: {odd[0]!r} is none of the entries {', '.join(grid.entries)}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    command = ["python -m experiments.grids", str(options.grid)]
    if options.recipe is not None:
        grid = replace(grid, recipe=options.recipe, name=f"{grid.name}-{Path(options.recipe).stem}")
        command += ["--recipe", options.recipe]
    cores = os.cpu_count() or 1
    threads = options.threads or max(1, cores // max(1, options.jobs))
    data = options.results / f"{grid.name}.json"
    earlier = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
    digests = {entry: grid.digest(entry) for entry in grid.entries}
    known = recall(earlier, digests) if not extra else {}
    runs = Runs(grid, options.runs / grid.name, threads, extra, options.only, known)
    failures = [] if options.report_only else runs.all(max(1, options.jobs))
    for failure in failures:
        print(failure, file=sys.stderr)
    here = {
        entry: {seed: found for seed in grid.seeds if (found := read_outcome(runs.path(entry, seed)))}
        for entry in grid.entries
    }
    outcomes = {entry: {**known.get(entry, {}), **found} for entry, found in here.items()}
    rows = summarize(outcomes, grid.baseline)
    if not rows:
        print(f"{parser.prog}: error: no run of {grid.name} is finished in {runs.folder}", file=sys.stderr)
        return 1
    speeds, chance = earlier.get("speeds", {}), earlier.get("chance", [])
    if options.measure:
        try:
            with use_threads(options.threads or None):
                finished = {entry: runs.path(entry, min(found)) for entry, found in here.items() if found}
                speeds = measure_speed(finished, grid.baseline, options.measure_amp)
            runs_of = {entry: {seed: runs.path(entry, seed) for seed in found} for entry, found in here.items()}
            chance = compare_with_chance(here, measure_chance(runs_of))
        except (ConfigError, CheckpointError) as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
    options.results.mkdir(parents=True, exist_ok=True)
    if speeds or chance:
        command.append("--measure")
        if speeds.get("amp_asked"):
            command += ["--measure-amp", speeds["amp_asked"]]
    line = " ".join([*command, *extra])
    report = {
        "command": line,
        "title": grid.title,
        "baseline": grid.baseline,
        "labels": dict(grid.labels),
        "rows": rows,
        "pairs": compare(outcomes, grid.pairs),
        "speeds": speeds,
        "chance": chance,
        "outcomes": remember(outcomes, digests),
    }
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = to_markdown(grid.name, report)
    data.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, grid.baseline, data.with_suffix(".png"))
    print(text)
    return 1 if failures else 0
