"""The parts of a call, each in a process of its own: what one does to the GPU or to itself does not end the others.

Files in the folder of the results, each whole at any moment: ``tests.json``, ``speed.json``, ``train.json``,
``cifar10.{json,md,png}``, ``dense-seed0.safetensors``, and ``log.txt`` with what was printed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from experiments.gpu.record import Deadline, in_one_line
from experiments.gpu.settings import RESERVE, SHARES, Settings, read_settings
from experiments.gpu.summary import summarize

MODULES = {"tests": "checks", "speed": "speed", "train": "train"}
MOST_LOG = 4 << 20
"""Bytes of the log that are kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a call, or the part of one that the command line names; returns the exit code, 1 if a part failed."""
    settings = read_settings(arguments)
    if settings.part is not None:
        module = importlib.import_module(f"experiments.gpu.{MODULES[settings.part]}")  # of the others it needs nothing
        return int(module.run(settings))
    if not settings.dry and not torch.cuda.is_available():
        print("there is no GPU: everything runs in miniature on the CPU", flush=True)
        settings = dataclasses.replace(settings, dry=True)
    settings.output.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(60 * settings.minutes)
    failed = []
    for part in settings.only:
        left = deadline.left - RESERVE * (not settings.dry)
        if left <= 0:
            failed.append(f"{part}: no time was left for it")
            continue
        failure = _run_part(settings, part, min(SHARES.get(part, left), left))
        if failure is not None:
            failed.append(f"{part}: {failure}")
    for line in failed:
        print(line, flush=True)
    print(summarize(settings), flush=True)
    return 1 if failed else 0


def _run_part(settings: Settings, part: str, seconds: float) -> str | None:
    """Run one part for so long at most; returns what went wrong, if anything did."""
    started = time.monotonic()
    log = settings.output / "log.txt"
    command = [sys.executable, "-u", "-m", "experiments.gpu", *settings.arguments(part, seconds)]
    try:
        with open(log, "a", encoding="utf-8") as output:
            print(f"== {part}: {seconds:.0f} s at most", file=output, flush=True)
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                code = process.wait(seconds + 5)
            except subprocess.TimeoutExpired:
                return "it did not end in time and was ended"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
                process.wait()
    except OSError as error:
        return in_one_line(error)
    finally:
        print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
        if log.is_file() and log.stat().st_size > MOST_LOG:
            log.write_bytes(log.read_bytes()[-MOST_LOG:])
    return None if code == 0 else f"it ended with code {code}; see {log}"
