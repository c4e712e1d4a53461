"""Which pictures a folder or tar files hold, and of which class each is: that of the top folder it lies in."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from timm.data.readers.reader_image_in_tar import extract_tarinfos
from timm.utils.misc import natural_key
from torch import Tensor

from experiments.data.picture import ENDINGS, is_hidden, is_picture


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder or of tar files, in the natural order of their names."""

    root: str
    samples: Sequence[Any]  #: of a folder paths; of tars ``(member, tar below root or None, tar within it or None)``
    targets: Tensor  #: int64 [N], the classes
    class_names: tuple[str, ...]
    in_tars: bool = False
    #: Names of what was passed over, by reason.
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def name(self, number: int) -> str:
        """The file of a picture; of one in a tar behind the path of that."""
        if not self.in_tars:
            return str(self.samples[number])
        member, shard, _ = self.samples[number]
        return f"{os.path.join(self.root, shard) if shard else self.root}/{member.name}"

    def read(self, number: int) -> bytes:
        """The bytes of a picture in a tar, or in a tar within a tar.

        Each is read at its offset through a file of its own: a shared one must not cross into worker processes, where
        several would move one position.

        Raises:
            OSError: the tar is shorter than it says.
        """
        member, shard, inner = self.samples[number]
        with open(os.path.join(self.root, shard) if shard else self.root, "rb") as file:
            file.seek(member.offset_data + (inner.offset_data if inner else 0))
            content = file.read(member.size)
        if len(content) != member.size:
            raise OSError(f"the tar ends after {len(content)} of {member.size} bytes")
        return content


def _listing(root: Path, found: list[tuple[Any, str, str]], skipped: dict[str, list[str]], in_tars: bool) -> Listing:
    """Args: ``found`` has each picture, its path, and its class."""
    found.sort(key=lambda item: natural_key(item[1]))
    names = tuple(sorted({name for *_, name in found}, key=natural_key))
    numbers = {name: number for number, name in enumerate(names)}
    targets = torch.tensor([numbers[name] for *_, name in found], dtype=torch.int64)
    return Listing(str(root), [item for item, *_ in found], targets, names, in_tars, skipped)


def list_folder(root: Path) -> Listing:
    """The pictures below ``root``, each of the class of its top folder, however deep it lies in that.

    A top folder that repeats the name of ``root``, as ``train/train``, and is the only one is passed through. Hidden
    files and folders, files of other kinds and pictures in no folder are left out, and named.
    """
    skipped: dict[str, list[str]] = {}
    tops = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
    if [path.name for path in tops] == [root.name]:
        return list_folder(tops[0])
    found: list[tuple[Any, str, str]] = []
    for path in sorted(root.iterdir()):
        if is_hidden(path.name):
            skipped.setdefault("hidden", []).append(path.name)
        elif not path.is_dir():
            _pass_over(path.name, skipped, "in no class folder")
    for top in tops:
        before = len(found)
        for file in _files_below(top, skipped):
            if is_picture(file):
                found.append((file, file, top.name))
            else:
                _pass_over(file, skipped, "")
        if len(found) == before:
            skipped.setdefault("no pictures in the folder", []).append(top.name)
    return _listing(root, found, skipped, in_tars=False)


def _pass_over(file: str, skipped: dict[str, list[str]], reason: str) -> None:
    """Note a file: a picture for ``reason``, another by the ending of its name."""
    ending = os.path.splitext(file)[1].lower()
    if not is_picture(file):
        reason = f"Pillow here opens no {ending}" if ending in ENDINGS else ending or "no ending"
    skipped.setdefault(reason, []).append(os.path.basename(file))


def _files_below(top: Path, skipped: dict[str, list[str]]) -> Iterator[str]:
    """Paths of all files; links are followed, but not in circles."""
    seen = {os.path.realpath(top)}
    for folder, inner, files in os.walk(top, followlinks=True):
        for name in [name for name in inner if is_hidden(name)] + [name for name in files if is_hidden(name)]:
            skipped.setdefault("hidden", []).append(name)
        inner[:] = sorted(name for name in inner if not is_hidden(name))
        for name in list(inner):
            real = os.path.realpath(os.path.join(folder, name))
            if real in seen:
                inner.remove(name)
            seen.add(real)
        yield from (os.path.join(folder, name) for name in files if not is_hidden(name))


def pictures_below(folder: Path) -> list[str]:
    """Paths of all pictures in a folder and its folders, hidden ones left out, in the natural order of their names."""
    return sorted((file for file in _files_below(folder, {}) if is_picture(file)), key=natural_key)


def list_tars(path: Path) -> Listing:
    """The pictures in a tar, in the tars of a folder, or in tars within a tar.

    The class is the top folder within the tar, one that repeats the name of ``path`` left out; where there is none, it
    is the name of the tar.

    Raises:
        ValueError: there are none, or a tar cannot be read.
    """
    try:
        samples, *_ = extract_tarinfos(str(path), extensions={ending for ending in ENDINGS if is_picture(f"x{ending}")})
    except (tarfile.TarError, AssertionError, ValueError) as error:
        # timm's reader fails so where it finds nothing.
        raise ValueError(f"no images in {str(path)!r}: {error}") from error
    skipped: dict[str, list[str]] = {}
    found: list[tuple[Any, str, str]] = []
    for member, shard, inner in samples:
        parts = [part for part in PurePosixPath(member.name).parts if part not in (".", "/")]
        tars = [name for name in (shard, inner.name if inner else None) if name] or [path.name]
        folders = parts[:-1]
        if len(folders) > 1 and folders[0] == path.name.removesuffix(".tar"):
            folders = folders[1:]
        is_split = not folders and not inner and not shard
        if any(map(is_hidden, parts)):
            skipped.setdefault("hidden", []).append(parts[-1])
        elif is_split:
            skipped.setdefault("in no class folder", []).append(parts[-1])
        else:
            name = folders[0] if folders else PurePosixPath(tars[-1]).stem
            found.append(((member, shard, inner), member.name, name))
    return _listing(path, found, skipped, in_tars=True)


def list_pictures(path: Path) -> Listing:
    """Of a tar, a folder of tars, or a folder.

    Raises:
        ValueError: there are none, or a tar cannot be read.
    """
    try:
        visible = [inner for inner in path.iterdir() if not is_hidden(inner.name)] if path.is_dir() else []
        has_folders = any(inner.is_dir() for inner in visible)
        if path.is_file() or (not has_folders and any(inner.suffix == ".tar" for inner in visible)):
            listing = list_tars(path)
        else:
            listing = list_folder(path)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not listing.samples:
        what = describe_skipped(listing.skipped)
        raise ValueError(f"no images in {str(path)!r}" + (f"; passed over: {what}" if what else ""))
    return listing


def describe_skipped(skipped: dict[str, list[str]], most: int = 3) -> str:
    """``2 .txt (a.txt, b.txt), 1 hidden (.DS_Store)``."""
    parts = []
    for reason, names in skipped.items():
        some = ", ".join(sorted(set(names))[:most]) + (", ..." if len(set(names)) > most else "")
        parts.append(f"{len(names):,} {reason} ({some})")
    return ", ".join(parts)
