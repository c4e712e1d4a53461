"""Runs that are killed and resumed end in the same bits: ``python -m experiments.trials.kill --kills 50``.

A small run is trained once without a break. Then the same run is started again and again: each of its processes is
killed at some moment (drawn from a seed; some anywhere, some while the masks are updated, some while files are written)
and started anew with ``--resume auto``, until the last one comes to the end. What is left is compared in every bit: the
last resume bundle (weights, moments, masks, averages, generators), the sparse and the best checkpoint, the mask
timeline, ``metrics.jsonl`` and what TensorBoard reads, all but the numbers that a clock decides.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.processes.signals import exit_code
from experiments.trials import compare
from experiments.trials.victims import (
    BUNDLE,
    CUTTING,
    EVALUATION,
    PHASES,
    RECORD,
    SPARSE,
    START,
    STEP,
    UPDATE,
    Victim,
    end_victims,
    start_victims,
)

COMMON = (
    "--selector=null", "--losses.macs_target=null",
    "--model.kwargs={embed_dim: 24, depth: 2, patch_size: 7}", "--model.drop_path=0.1",
    "--data.train_subset=200", "--data.eval_subset=100", "--data.batch_size=8", "--data.mixup=0.2",
    "--optimizer.lr=1e-3", "--schedule.warmup_epochs=1",
    "--training.device=cpu", "--training.amp=float32", "--training.epochs=3", "--training.accumulate=2",
    "--training.eval_every=0.5", "--training.checkpoint_every=0.25", "--training.log_every=2",
    "--sparsity.updates=null", "--sparsity.update_every=4", "--sparsity.stop_at=0.9",
)  # fmt: skip
"""36 steps, twelve an epoch; an update every four, a checkpoint every three and with every new best."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "weights": ("--sparsity.growth_batches=4", "--sparsity.head_density=1", "--sparsity.neuron_density=1"),
    "structured": (
        "--sparsity.density=null", "--sparsity.head_density=0.67", "--sparsity.neuron_density=0.5",
        "--sparsity.swap=always", "--training.ema_decay=0.9",
    ),
    "tokens": ("--sparsity=null", "--selector.kind=top_k", "--selector.keep_ratio=0.5", "--selector.noise=1"),
    "joint": (
        "--sparsity.density=0.4", "--sparsity.head_density=0.67", "--sparsity.neuron_density=0.5",
        "--sparsity.swap=always", "--selector.kind=top_k", "--selector.keep_ratio=0.5", "--selector.noise=1",
        "--training.ema_decay=0.9",
    ),
}  # fmt: skip
KILLS_OF_A_RUN = 6
"""After so many a run is left alone."""
PATIENCE = 120.0
"""Seconds for anything."""


@dataclass
class Outcome:
    """What the kills of one variant came to."""

    variant: str
    signal: str
    processes: int
    seed: int
    kills: int = 0
    equal: int = 0  #: kills in runs that ended like the one without a break
    runs: int = 0
    phases: Counter[str] = field(default_factory=Counter)  #: in which a process was when it was killed
    faults: list[str] = field(default_factory=list)  #: what was not the same, or went otherwise than it should

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "phases": {phase: self.phases[phase] for phase in PHASES if self.phases[phase]}}


@dataclass(frozen=True)
class Aim:
    """When to kill: some seconds after a phase was entered for that time."""

    phase: int
    times: int
    delay: float


def draw_aim(
    generator: random.Random, seconds: Mapping[int, Sequence[float]], *, has_masks: bool, at_start: bool
) -> Aim:
    """Half of the aims lie anywhere in the training, the others in what is short and delicate.

    Args:
        seconds: that each phase took without a break, each time.
        has_masks: whether the run updates masks.
        at_start: whether to aim at the start too.
    """
    delicate = [BUNDLE, BUNDLE, SPARSE, EVALUATION]
    delicate += [UPDATE, UPDATE, RECORD] if has_masks else []
    delicate += [START, CUTTING] if at_start else []
    phase = generator.choice([STEP] * len(delicate) + delicate)
    times = {START: 0, CUTTING: 1, STEP: generator.randint(1, 9)}.get(phase, generator.randint(1, 3))
    # A little over, so that what follows the phase is hit as well.
    return Aim(phase, times, generator.uniform(0.0, 1.2) * statistics.median(seconds.get(phase, [0.5])))


def train_once(variant: str, runs: Path, name: str, processes: int) -> list[Victim]:
    """Start the run called ``name``, or go on with it."""
    arguments = [*COMMON, *VARIANTS[variant], f"--output.runs={runs}", f"--output.name={name}", "--resume=auto"]
    return start_victims(processes, arguments, runs / f"{name}.log")


def finish(victims: Sequence[Victim]) -> list[int | None]:
    """How all of them ended by themselves."""
    for victim in victims:
        if not victim.wait(PATIENCE):
            end_victims(victims, 1.0)
            raise TimeoutError(f"process {victim.pid} did not end in {PATIENCE:.0f} s")
    return [victim.ended for victim in victims]


def kill(victims: Sequence[Victim], aim: Aim, number: int, generator: random.Random) -> int | None:
    """Send the signal at the moment that is aimed at, and wait for the end.

    Returns:
        The phase in which the process was when it was sent; None if the run had ended before.
    """
    first = victims[0]
    if not first.wait_for(aim.phase, aim.times, PATIENCE):
        return None
    time.sleep(aim.delay)
    if not first.listen(0.0):
        return None
    phase = first.phase
    if number == signal.SIGKILL:
        for victim in victims:
            victim.send(number)
    else:  # to any one of them: the others hear of it from that one
        generator.choice(victims).send(number)
    finish(victims)
    if number == signal.SIGKILL:
        phase = first.phase
    return phase


def run_variant(variant: str, number: int, processes: int, kills: int, seed: int, runs: Path) -> Outcome:
    """Kill and resume until there were ``kills`` kills, and compare each run that went through some of them."""
    outcome = Outcome(variant, signal.Signals(number).name, processes, seed)
    generator = random.Random(f"{variant} {number} {processes} {seed}")
    runs.mkdir(parents=True, exist_ok=True)
    whole = train_once(variant, runs, "whole", processes)
    if set(finish(whole)) != {0}:
        outcome.faults.append(f"the run without a break ended with {[victim.ended for victim in whole]}")
        return outcome
    expected = compare.fingerprint(runs / "whole")
    killed = -number if number == signal.SIGKILL else exit_code(number)
    while outcome.kills < kills and not outcome.faults:
        name = f"killed-{outcome.runs}"
        hits = 0
        while True:
            victims = train_once(variant, runs, name, processes)
            wanted = min(KILLS_OF_A_RUN, kills - outcome.kills)
            phase = None
            if hits < wanted:
                aim = draw_aim(
                    generator,
                    whole[0].seconds,
                    has_masks="--sparsity=null" not in VARIANTS[variant],
                    at_start=number == signal.SIGKILL,
                )
                phase = kill(victims, aim, number, generator)
            codes = finish(victims)
            if phase is None or set(codes) == {0}:  # a signal in the last moments lets the run end
                break
            hits += 1
            outcome.phases[PHASES[phase]] += 1
            if set(codes) != {killed}:
                outcome.faults.append(f"{name}: killed in {PHASES[phase]!r}, the processes ended with {codes}")
                break
        outcome.kills += hits
        outcome.runs += 1
        if set(codes) != {0}:
            outcome.faults.append(f"{name}: the last processes ended with {codes}")
            break
        odd = compare.differences(expected, compare.fingerprint(runs / name))
        if odd:
            outcome.faults.append(f"{name}: after {hits} kills not the same: {', '.join(odd)}")
        else:
            outcome.equal += hits
            shutil.rmtree(runs / name)
    return outcome


def to_markdown(outcomes: Sequence[dict[str, Any]]) -> str:
    """The report for people."""
    lines = [
        "# Killed and resumed",
        "",
        " ".join((__doc__ or "").split("\n\n", 1)[1].replace("``", "`").split()),
        "",
        "| variant | signal | processes | kills | same bits at the end | runs | killed in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in outcomes:
        phases = ", ".join(f"{phase} {count}" for phase, count in row["phases"].items())
        lines.append(
            f"| {row['variant']} | {row['signal']} | {row['processes']} | {row['kills']} | {row['equal']} of "
            f"{row['kills']} | {row['runs']} | {phases} |"
        )
    lines += [
        "",
        f"Left out of the comparison, as a clock decides it: {', '.join(f'`{tag}`' for tag in compare.CLOCKS)} in "
        "`metrics.jsonl` and TensorBoard, and the seconds that the resume bundle counts. SIGTERM is sent to one of the "
        "processes, which then end together after the step they are in, with exit code 143.",
        "",
        "Made by",
        "",
        *(f"    {row['command']}" for row in outcomes),
    ]
    faults = [fault for row in outcomes for fault in row["faults"]]
    return "\n".join([*lines, *(["", *(f"- FAULT: {fault}" for fault in faults)] if faults else [])]) + "\n"


def write_results(results: Path, outcomes: Sequence[dict[str, Any]]) -> None:
    """Add to the report: a variant with the same signal and processes is replaced."""
    data = results.with_suffix(".json")
    rows = json.loads(data.read_text()) if data.is_file() else []
    new = {(row["variant"], row["signal"], row["processes"]) for row in outcomes}
    rows = [row for row in rows if (row["variant"], row["signal"], row["processes"]) not in new] + list(outcomes)
    order = [*VARIANTS]
    rows.sort(key=lambda row: (row["processes"], row["signal"], order.index(row["variant"])))
    results.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    results.with_suffix(".md").write_text(to_markdown(rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial; the exit code is 0 if all that was killed ended like what was not."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.trials.kill", description=(__doc__ or "").split("\n\n", 1)[0]
    )
    parser.add_argument("--kills", type=int, default=50, help="of each variant (default: 50)")
    parser.add_argument("--variant", choices=list(VARIANTS), action="append", help="default: all of them")
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM", "SIGUSR1"], default="SIGKILL")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs; default: one that is deleted")
    parser.add_argument("--results", type=Path, default=None, help="report, such as experiments/results/kill.md")
    options = parser.parse_args(arguments)
    number = signal.Signals[options.signal]
    rows = []
    for variant in options.variant or VARIANTS:
        with tempfile.TemporaryDirectory() as temporary:
            runs = (options.runs or Path(temporary)) / f"{variant}-{options.signal}-{options.processes}"
            outcome = run_variant(variant, number, options.processes, options.kills, options.seed, runs)
        command = (
            f"{parser.prog} --kills {options.kills} --variant {variant} --signal {options.signal} "
            f"--processes {options.processes} --seed {options.seed}"
        )
        rows.append({**outcome.to_json(), "command": command})
        print(
            f"{variant}: {outcome.equal} of {outcome.kills} kills ({options.signal}, {options.processes} processes) "
            f"ended in the same bits; {dict(outcome.phases)}",
            flush=True,
        )
        for fault in outcome.faults:
            print(f"  FAULT: {fault}", file=sys.stderr)
    if options.results is not None:
        write_results(options.results, rows)
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
