"""The tests that are marked ``cuda``: each outcome is written as it comes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from experiments.gpu.record import Deadline, Record
from experiments.gpu.settings import Settings

OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
MARKS = ("mark.cuda", "DEVICES")
"""How a test file says that some of its tests are for a GPU."""


def run(settings: Settings) -> int:
    """Run them; returns the exit code."""
    deadline = Deadline(settings.seconds)
    record = Record(settings.output / "tests.json")
    files = marked_files(Path("tests"))
    if not files:
        record.add(name="tests", failed="no test is marked cuda; start in the root of the repository")
        return 1
    # Another machine may have other versions of libraries, and their new warnings are no failures of ours.
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "-o", "addopts=", "-o", "filterwarnings=default"]
    command += ["-p", "no:cacheprovider", "--no-header", "--durations=10", *map(str, files)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = OUTCOME.match(line)
            if found is not None:
                record.add(name=found[1], outcome=found[2].lower(), at=round(settings.seconds - deadline.left, 1))
    if not record.entries:
        record.add(name="tests", failed=f"pytest ended with code {process.returncode} before the first test")
    return 0 if process.returncode == 0 else 1


def marked_files(folder: Path) -> list[Path]:
    """The test files that know the mark: to import all the others takes time, and packages that may be missing."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("test_*.py"))}
    return [path for path, text in texts.items() if any(mark in text for mark in MARKS)]
