"""What a data set turned out to be, said in two lines at the start of a run, so that a mistake in a folder is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch

from experiments.data.data_config import DataConfig
from experiments.data.folders import Listing, describe_skipped
from experiments.data.picture import UnreadableImage
from experiments.data.sources import ImageSource

MOST = 4000
"""Files whose heads are read; of more so many from all over them."""
THREADS = 8
DEEP_LOOKED_AT = 32
"""Images of more than 8 bits of which the greatest value is looked up."""
NAMED = 10
"""Classes that are named with their counts."""
GREY = ("1", "L", "LA", "La", "I", "F")


@dataclass
class Survey:
    """What the heads of image files say."""

    looked_at: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  #: (width, height)
    unreadable: dict[str, str] = field(default_factory=dict)  #: reason by name
    greatest: float | None = None  #: value of some images of 16 bits
    constant: tuple[str, ...] = ()  #: names of images of one colour
    constant_of: int | None = None  #: so many were looked at for that; None for all

    @property
    def first_size(self) -> tuple[int, int]:
        return next(iter(self.sizes))

    @property
    def side(self) -> int | None:
        """The side that all images share; None if they differ or are not square."""
        width, height = self.first_size
        return width if len(self.sizes) == 1 and width == height else None

    @property
    def channels(self) -> int:
        """1 where all images are grey, 3 where one is not."""
        return 1 if all(mode in GREY or mode.startswith("I;16") for mode in self.modes) else 3


def survey(source: ImageSource, *, training: bool = False, all_modes: bool = False) -> Survey:
    """Read the heads of the files.

    Args:
        training: whether there must be an image of every class.
        all_modes: where those that are looked at are all grey, look at all the others too.

    Raises:
        ValueError: no image could be read, or in training none of a class.
    """
    found = Survey()
    if isinstance(source.dataset, np.ndarray):
        size = source.dataset.shape[2], source.dataset.shape[1]
        return Survey(len(source), Counter({"L": len(source)}), Counter({size: len(source)}))
    numbers = torch.linspace(0, len(source) - 1, min(MOST, len(source))).long().unique().tolist()
    good = _look(source, numbers, found)
    if not found.modes:
        raise ValueError(
            f"none of {found.looked_at} images could be read, the first is {source.name(0)} "
            f"({found.unreadable[source.name(0)]})"
        )
    for label in sorted({int(source.targets[number]) for number in numbers} - good) if training else ():
        rest = (source.targets == label).nonzero().flatten().tolist()
        if not _look(source, sorted({*rest} - {*numbers}), found):  # a class is given up when all of it was tried
            refuse_class(source, label, found.unreadable)
    if all_modes and found.channels == 1 and found.looked_at < len(source):
        _look(source, sorted({*range(len(source))} - {*numbers}), found)
    if any(mode.startswith("I;16") for mode in found.modes):
        found.greatest = _greatest(source, numbers)
    return found


def refuse_class(source: ImageSource, label: int, unreadable: Mapping[str, str]) -> NoReturn:
    """Of class ``label`` nothing can be read."""
    members = (source.targets == label).nonzero().flatten().tolist()
    name = source.name(members[0])
    raise ValueError(
        f"data: no image of class {source.class_names[label]!r} can be read; of {len(members)} the first is {name} "
        f"({unreadable.get(name, 'unreadable')})"
    )


def _look(source: ImageSource, numbers: Sequence[int], found: Survey) -> set[int]:
    """Add what the files of these numbers say; returns the classes of which one can be opened."""

    def one(number: int) -> tuple[str, tuple[int, int]] | UnreadableImage:
        try:
            return source.look(number)
        except UnreadableImage as error:
            return error

    good = set()
    with ThreadPoolExecutor(THREADS) as pool:
        for number, head in zip(numbers, pool.map(one, numbers), strict=True):
            found.looked_at += 1
            if isinstance(head, UnreadableImage):
                found.unreadable[head.name] = head.reason
            else:
                found.modes[head[0]] += 1
                found.sizes[head[1]] += 1
                good.add(int(source.targets[number]))
    return good


def _greatest(source: ImageSource, numbers: Sequence[int]) -> float:
    """The greatest value in some of the images of 16 bits."""
    greatest, seen = 0.0, 0
    for number in numbers:
        try:
            if source.look(number)[0].startswith("I;16"):
                greatest, seen = max(greatest, float(source.raw(number).max())), seen + 1
        except (UnreadableImage, OSError, ValueError, SyntaxError):
            continue
        if seen == DEEP_LOOKED_AT:
            break
    return greatest


def describe(
    config: DataConfig, train: ImageSource | None, evaluation: ImageSource, seen: Survey, channels: int
) -> tuple[str, str]:
    """Two lines: the classes and how many images each has; what the files are like and what was left out.

    Args:
        train: None where there is only something to evaluate.
        seen: of the images to train on, else of those to evaluate.
        channels: that they are read with.
    """
    return _of_classes(train, evaluation), _of_files(config, train, evaluation, seen, channels)


def _of_classes(train: ImageSource | None, evaluation: ImageSource) -> str:
    names = [" ".join(name.split()) for name in evaluation.class_names]
    sources = [source for source in (train, evaluation) if source is not None]
    counts = [source.targets.bincount(minlength=len(names)).tolist() for source in sources]
    listed = [
        f"{name} {' + '.join(f'{n:,}' for n in numbers)}"
        for name, *numbers in zip(names[:NAMED], *counts, strict=False)
    ]
    if len(names) > NAMED:
        ranges = " + ".join(f"{min(numbers):,} to {max(numbers):,}" for numbers in counts)
        listed.append(f"... ({ranges} each)")
    what = "to train on + to evaluate" if train is not None else "to evaluate"
    line = f"{len(names):,}: {', '.join(listed)} ({what})"
    empty = [name for name, number in zip(names, counts[-1], strict=True) if not number]
    if empty:
        line += f"; none to evaluate of {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
    return line


def _of_files(
    config: DataConfig, train: ImageSource | None, evaluation: ImageSource, seen: Survey, channels: int
) -> str:
    sizes = sorted(seen.sizes)
    parts = [f"{w} x {h}" for w, h in dict.fromkeys((sizes[0], sizes[-1]))]
    line = " to ".join(parts) + (f" ({len(sizes)} sizes)" if len(sizes) > 2 else "")
    modes = [f"{mode} {number:,}" for mode, number in seen.modes.most_common()]
    line += f"; {', '.join(modes)}, read as {'grey' if channels == 1 else 'colour'}"
    total = len(train if train is not None else evaluation)
    if seen.looked_at < total:
        line += f" ({seen.looked_at:,} of {total:,} looked at)"
    long = sum(number for (width, height), number in seen.sizes.items() if width != height)
    if long:
        done = {"crop": "cut to the middle", "pad": "given black borders", "squash": "squashed"}[config.fit]
        line += f"; {long:,} not square: {done} (data.fit)"
    if config.white_level is None and seen.greatest is not None and seen.greatest * 4 < 65536:
        line += (
            f"; pictures of 16 bits reach {seen.greatest:,.0f} of 65,535 and are that dark: data.white_level says "
            "what is white"
        )
    skipped: dict[str, list[str]] = {}
    for source in (train, evaluation):
        if source is not None and isinstance(source.dataset, Listing):
            for reason, names in source.dataset.skipped.items():
                skipped.setdefault(reason, []).extend(names)
    if skipped:
        line += f"; passed over: {describe_skipped(skipped)}"
    if seen.unreadable:
        name, reason = next(iter(seen.unreadable.items()))
        more = "; ..." if len(seen.unreadable) > 1 else ""
        line += f"; {len(seen.unreadable):,} cannot be read ({name}: {reason}{more})"
    if seen.constant:
        of = f" of {seen.constant_of:,} looked at" if seen.constant_of is not None else ""
        more = ", ..." if len(seen.constant) > 1 else ""
        line += f"; {len(seen.constant):,}{of} of one colour ({seen.constant[0]}{more})"
    return " ".join(line.split())
