"""What one call is asked for, and how it is told to the process of each part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("tests", "speed", "train")
SHARES = {"tests": 90.0, "speed": 150.0}
"""Seconds that a part may take at most; training takes what is left."""
RESERVE = 15.0
"""Seconds of the call that are kept for its end."""


@dataclass(frozen=True)
class Settings:
    """What one call is asked for."""

    minutes: float
    output: Path
    only: tuple[str, ...]
    have: tuple[Path, ...]
    dry: bool
    data: Path
    epochs: int
    jobs: int
    compile: bool
    part: str | None = None  #: this process is one part of a call
    seconds: float = 0.0  #: of that part

    def arguments(self, part: str, seconds: float) -> list[str]:
        """The command line of one part."""
        return [
            *("--part", part, "--seconds", f"{seconds:.1f}", "--output", str(self.output), "--data", str(self.data)),
            *("--epochs", str(self.epochs), "--jobs", str(self.jobs), "--only", part),
            *(["--have", *map(str, self.have)] if self.have else []),
            *(["--dry"] if self.dry else []),
            *(["--compile"] if self.compile else []),
        ]


def read_settings(arguments: Sequence[str] | None) -> Settings:
    """Read the command line; what is wrong with it ends the process with one line and code 2."""
    parser = argparse.ArgumentParser(
        prog="python3 -m experiments.gpu",
        description="Run the tests for GPUs, measure speed and train the grid cifar10, in so many minutes. Results are "
        "written as they come, and a step that fails does not end the call.",
        epilog="Without a GPU, or with --dry, everything runs in miniature on the CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results, at most 8 files")
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument(
        "--have", nargs="+", type=Path, default=[], metavar="FILE", help="cifar10.json of earlier calls"
    )
    parser.add_argument("--dry", action="store_true", help="in miniature on the CPU")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="image folder with train and test")
    parser.add_argument("--epochs", type=int, default=24, help="of each run of the grid, which has 200")
    parser.add_argument("--jobs", type=int, default=4, help="runs side by side")
    parser.add_argument("--compile", action="store_true", help="train the grid through torch.compile")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    only = [part for given in options.only for part in given.split(",") if part]
    odd = [part for part in only if part not in PARTS]
    if odd or not only:
        parser.error(f"--only: {', '.join(odd) or 'nothing'} is none of {', '.join(PARTS)}")
    for key in ("minutes", "epochs", "jobs"):
        if not getattr(options, key) > 0:
            parser.error(f"--{key}: {getattr(options, key)} is not positive")
    missing = [path for path in options.have if not path.is_file()]
    if missing:
        parser.error(f"--have: there is no file {missing[0]}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: {options.output} is no folder")
    return Settings(
        minutes=options.minutes,
        output=options.output,
        only=tuple(part for part in PARTS if part in only),
        have=tuple(options.have),
        dry=options.dry,
        data=options.data,
        epochs=options.epochs,
        jobs=options.jobs,
        compile=options.compile,
        part=options.part,
        seconds=options.seconds,
    )
