"""What the runs of all calls came to, as one report of the grid: ``cifar10.{json,md,png}``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from experiments.gpu.settings import Settings
from experiments.gpu.worth import Task
from experiments.grids.grid import Grid
from experiments.grids.plot import draw
from experiments.grids.report import Outcome, compare, summarize, to_markdown
from sparse_trainer.files.whole_file import write_atomically

KEPT = "dense-seed0.safetensors"
"""The network that others start from and learn from, for the next call."""


class Results:
    """Of this call, and of those whose files ``--have`` names.

    Args:
        grid: as long as it is trained.
    """

    def __init__(self, settings: Settings, grid: Grid) -> None:
        self.settings, self.grid = settings, grid
        self.runs: list[dict[str, Any]] = []
        for path in settings.have:
            for run in json.loads(path.read_text(encoding="utf-8")).get("runs", []):
                # Of another length it is no seed of this grid.
                if run["schedule"] == settings.epochs and run["entry"] in grid.entries and _task(run) not in self.done:
                    self.runs.append(run)
        if self.runs:
            self.write()

    @property
    def done(self) -> set[Task]:
        """Runs whose outcome is known."""
        return {_task(run) for run in self.runs}

    def add(self, task: Task, outcome: Outcome, *, machine: dict[str, Any], seconds: float) -> None:
        """One more run, and the report with it."""
        entry, seed = task
        found = dataclasses.asdict(outcome)
        own = {"entry": entry, "seed": seed, "schedule": self.settings.epochs, "dry": self.settings.dry}
        self.runs.append({**own, "device": machine["device"], "seconds": round(seconds, 1), **found})
        self.write()

    def write(self) -> None:
        """Write the report of all runs."""
        outcomes: dict[str, dict[int, Outcome]] = {entry: {} for entry in self.grid.entries}
        for run in self.runs:
            values = {field.name: run[field.name] for field in dataclasses.fields(Outcome)}
            values["curve"] = tuple((step, value) for step, value in values["curve"])
            outcomes[run["entry"]][run["seed"]] = Outcome(**values)
        rows = summarize(outcomes, self.grid.baseline)
        cards = sorted({run["device"] for run in self.runs})
        epochs = self.grid.entries[self.grid.baseline]["training"]["epochs"]
        report = {
            "command": f"python3 -m experiments.gpu --epochs {self.settings.epochs}",
            "title": f"{self.grid.title} Here dense has {epochs} epochs, and all others as much less. On "
            f"{', '.join(cards)}, several runs at once.",
            "baseline": self.grid.baseline,
            "labels": dict(self.grid.labels),
            "rows": rows,
            "pairs": compare(outcomes, self.grid.pairs),
            "speeds": {},
            "chance": [],
            "runs": self.runs,
        }
        data = self.settings.output / f"{self.grid.name}.json"
        write_atomically(data, [(json.dumps(report, indent=1) + "\n").encode()])
        write_atomically(data.with_suffix(".md"), [to_markdown(self.grid.name, report).encode()])
        draw(rows, self.grid.baseline, data.with_suffix(".png"))


def _task(run: dict[str, Any]) -> Task:
    return run["entry"], run["seed"]


def network_beside(have: Path, folder: Path) -> None:
    """Put the network of an earlier call, which lies beside its results, where its run would have left it."""
    kept = have.parent / KEPT
    if kept.is_file() and not folder.exists():
        folder.mkdir(parents=True)
        shutil.copyfile(kept, folder / "sparse.safetensors")
