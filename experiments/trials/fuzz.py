"""Tens of thousands of damaged files, none of which may do more than be refused.

    python -m experiments.trials.fuzz --files 20000 --seed 0 --results experiments/results/fuzz.md

Each file is a real one, mutated; its number and the seed say how. A reader may load what the original holds, or refuse
with the one error that readers have. It may take little time, and little memory for the size of the file. Files are
read by the hundreds in a process of their own, so that even a crash of the interpreter is found and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.trials.mutations import MUTATIONS
from experiments.trials.readers import Source, judge, real_files

BATCH = 500
"""Files that one process reads."""
MOST_SECONDS = 10.0
"""Of processor time for one file: the largest model that timm knows is built in two."""
PATIENCE = 60.0
"""Seconds by the clock, after which a reader counts as hanging."""
MOST_MEMORY = 64 << 20
MEMORY_PER_BYTE = 64
"""A file may take so many bytes of memory, and so many more for each of its own."""
ADDRESS_SPACE = 4 << 30
"""Bytes that a process may ask for beyond what it has at its start, used or not."""


class TooSlow(BaseException):
    """Raised inside a reader that takes too long; no handler of errors stops it."""


@dataclass
class Report:
    """What became of some files."""

    files: int = 0
    #: By ``source / mutation / outcome``.
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    most_seconds: float = 0.0  #: of processor time
    most_memory: int = 0  #: bytes beyond what the process had

    def add(self, other: Report) -> None:
        """Count another one in."""
        self.files += other.files
        self.outcomes.update(other.outcomes)
        self.failures += other.failures
        self.most_seconds = max(self.most_seconds, other.most_seconds)
        self.most_memory = max(self.most_memory, other.most_memory)


def mutate(sources: Sequence[Source], seed: int, number: int) -> tuple[Source, str, bytes]:
    """The file of that number: which source, which kind of mutation, what it became."""
    draw = random.Random(f"{seed} {number}")
    source, other = draw.choice(sources), draw.choice(sources)
    kind = draw.choice(["bytes", "header", "meaning", "meaning", "forged"])
    return source, kind, MUTATIONS[kind](source.content, other.content, draw)


def read_files(sources: Sequence[Source], seed: int, numbers: Sequence[int], folder: Path) -> Report:
    """Mutate and read files; those with which something is wrong stay in ``folder``."""
    report = Report()
    for number in numbers:
        source, kind, content = mutate(sources, seed, number)
        path = folder / f"{number:07d}"
        path.write_bytes(content)  # there if the process dies
        problem, outcome = "", "failed"
        memory = reset_peak_memory()
        started = time.process_time()
        try:
            with time_limit(PATIENCE):
                outcome = judge(source, content, folder / "reading", blind=kind == "bytes")
        except TooSlow:
            problem = f"not done after {PATIENCE:g} seconds"
        except Exception as error:
            problem = f"{type(error).__name__}: {error!s:.500}"
        seconds, memory = time.process_time() - started, peak_memory() - memory
        if seconds > MOST_SECONDS:
            problem = problem or f"{seconds:.1f} seconds"
        if memory > MOST_MEMORY + MEMORY_PER_BYTE * len(content):
            problem = problem or f"{memory:,} bytes of memory for a file of {len(content):,}"
        if problem:
            report.failures.append({"number": number, "source": source.name, "mutation": kind, "problem": problem})
            outcome = "failed"
        else:
            path.unlink()
        report.files += 1
        report.outcomes[f"{source.name} / {kind} / {outcome}"] += 1
        report.most_seconds = max(report.most_seconds, seconds)
        report.most_memory = max(report.most_memory, memory)
    return report


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`TooSlow` in the block when it takes longer; only in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reset_peak_memory() -> int:
    """Bytes that this process has in memory now, from where its peak is measured (on Linux; else 0)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _memory("VmRSS")


def peak_memory() -> int:
    """Most bytes that this process has had in memory since :func:`reset_peak_memory`."""
    return _memory("VmHWM")


def _memory(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def read_batch(seed: int, first: int, files: int, folder: Path) -> Report:
    """Files ``first`` to ``first + files`` in this process, whose address space is bounded from here on."""
    sources = real_files(folder / "sources")
    for source in sources:  # whatever is imported and kept once is so now
        assert judge(source, source.content, folder / "reading", blind=True) == "same"
    size = _memory("VmSize")
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE,) * 2)
    return read_files(sources, seed, range(first, first + files), folder)


def read_apart(seed: int, first: int, files: int, folder: Path) -> Report:
    """The same in a process of its own; one that dies is a failure of the file that it read, and another goes on."""
    report = Report()
    while files > 0:
        output = folder / f"{first}.json"
        command = [sys.executable, "-m", "experiments.trials.fuzz", f"--files={files}", f"--first={first}"]
        command += [f"--seed={seed}", f"--folder={folder}", f"--json={output}"]
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if output.is_file():
            report.add(from_json(output.read_text()))
            break
        left = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        last = (done.stderr.strip().splitlines() or [""])[-1]
        problem = f"the process ended with code {done.returncode}: {last:.300}"
        at = max((number for number in left if first <= number < first + files), default=None)
        if at is None:  # no file did that
            raise RuntimeError(f"{' '.join(command)}: {problem}")
        if at > first:  # what it had counted is lost with it
            report.add(read_apart(seed, first, at - first, folder))
        report.failures.append({"number": at, "source": "unknown", "mutation": "unknown", "problem": problem})
        report.files += 1
        report.outcomes["unknown / unknown / failed"] += 1
        first, files = at + 1, first + files - at - 1
    return report


def to_json(report: Report) -> str:
    """The numbers."""
    return json.dumps({**vars(report), "outcomes": dict(sorted(report.outcomes.items()))}, indent=1) + "\n"


def from_json(text: str) -> Report:
    """The inverse of :func:`to_json`."""
    values = json.loads(text)
    return Report(**{**values, "outcomes": Counter(values["outcomes"])})


def to_markdown(report: Report, command: str) -> str:
    """The report for people."""
    outcomes = ("refused", "same", "consistent", "failed")
    rows: dict[tuple[str, str], Counter[str]] = {}
    for key, count in report.outcomes.items():
        source, mutation, outcome = key.split(" / ")
        rows.setdefault((source, mutation), Counter())[outcome] += count
    lines = [
        "# Damaged and hostile files",
        "",
        "Made by",
        "",
        f"    {command}",
        "",
        f"{report.files:,} files, {len(report.failures)} failures. The readers are `load_sparse`, `load_resume`, "
        "`read_timeline`, and a run that goes on from its bundle and trains. A file counts as *refused* if that raised "
        "`CheckpointError`, as *same* if it loaded and held what the original held (a byte of no meaning was changed, "
        "or none), and as *consistent* if its checksums were made anew and it is another sound file: what was loaded "
        "is, tensor by tensor, what the safetensors library finds in it (of bundles and timelines: what comes back "
        "after it is saved and loaded again). Every other outcome is a failure: another exception, other content, a "
        f"crash, more than {MOST_SECONDS:g} s of processor time, or more memory than {MOST_MEMORY >> 20} MiB and "
        f"{MEMORY_PER_BYTE} times the file.",
        "",
        f"Most processor time for one file: {report.most_seconds:.2f} s. Most memory: "
        f"{report.most_memory / 2**20:.0f} MiB.",
        "",
        "- *bytes*: bits flipped, bytes written over, lost, added, moved from another file; checksums not corrected",
        "- *header*: offsets, shapes, types, repeated keys, odd JSON; checksums corrected",
        "- *meaning*: metadata, model arguments, masks, tensors, structure; checksums corrected",
        "- *forged*: of a sparse checkpoint another model, made up whole, of which the file says and holds the same; "
        "of other files as *meaning*",
        "",
        "| file | mutation | files | refused | same | consistent | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (source, mutation), found in sorted(rows.items()):
        counts = [found[outcome] for outcome in outcomes]
        lines.append(f"| {source} | {mutation} | {sum(counts):,} | " + " | ".join(f"{n:,}" for n in counts) + " |")
    if report.failures:
        lines += ["", "Failures:", ""]
        lines += [f"- {f['number']} ({f['source']}, {f['mutation']}): {f['problem']}" for f in report.failures]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the files and write the report; returns 1 if there is a failure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.trials.fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--files", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other files")
    parser.add_argument("--first", type=int, default=0, help="number of the first, to look at one again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--folder", type=Path, default=None, help="where files that failed are left")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    parser.add_argument(
        "--results", type=Path, default=None, help="write the report to this .md file, numbers beside it"
    )
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        last = options.first + options.files
        if options.files <= BATCH:
            report = read_batch(options.seed, options.first, options.files, folder)
        else:
            parts = [(first, min(BATCH, last - first)) for first in range(options.first, last, BATCH)]
            report = Report()
            with ThreadPoolExecutor(options.jobs) as pool:
                for found in pool.map(
                    lambda part: read_apart(options.seed, part[0], part[1], folder / f"{part[0]}"), parts
                ):
                    report.add(found)
                    print(f"{report.files:,} files, {len(report.failures)} failures", flush=True)
    if options.json is not None:
        options.json.write_text(to_json(report), encoding="utf-8")
    command = f"python -m experiments.trials.fuzz --files {options.files} --seed {options.seed}"
    text = to_markdown(report, command)
    if options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(text, encoding="utf-8")
        options.results.with_suffix(".json").write_text(to_json(report), encoding="utf-8")
    print(text)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
