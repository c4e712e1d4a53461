"""The compiled kernels: built at first use by the system's compiler, and kept in a cache that is the user's alone.

Building at first use needs no wheels for every processor, and gives each one its own instructions. The file in the
cache is named by the hash of the source, the flags, the compiler and the processor, so a change of any of them builds
anew. It is written under another name and then renamed: a process that is killed, or two that build at once, do no
harm. A checksum beside it tells a damaged file, which could end the process; one that others may write to is not
loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno")
NATIVE = ("-march=native",)
SOURCES = ("products.cpp", "attention.cpp", "vectors.h")
LIMIT = 120
"""Seconds that a compiler may take."""
WITHOUT = "weights that are dead take as long as live ones"


class KernelError(RuntimeError):
    """There are no compiled kernels; the message says why, and what would give some."""


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded kernels."""

    path: Path
    functions: ctypes.CDLL
    lanes: int  #: numbers in a vector register
    tokens: int  #: of the largest tile of a kernel for blocks
    parallel: int | None  #: address of the function that runs threads; None: one thread

    def __deepcopy__(self, memo: Any) -> Library:
        return self

    def __reduce__(self) -> Any:
        raise RuntimeError("compiled kernels cannot be saved; save the model that accelerate() was given")


@lru_cache(maxsize=1)
def load_library() -> Library:
    """The kernels of this machine, compiled if need be; once for a process.

    Raises:
        KernelError: there is no compiler, or what it made does not work.
    """
    return open_library(build())


def build(flags: Sequence[str] = NATIVE, folder: Path | None = None) -> Path:
    """The path of the compiled kernels; compiles them where the cache has none that can be trusted.

    Args:
        flags: of the target, such as ``("-mavx2", "-mfma")``; plain ones are tried where the compiler refuses them.
        folder: of the cache.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    source = {name: resources.files(__package__).joinpath(name).read_bytes() for name in SOURCES}
    folder = cache_folder() if folder is None else folder
    path = folder / f"products-{_key(source, compiler, flags)}.so"
    if _is_trusted(path):
        try:
            open_library(path)
            return path
        except KernelError:  # damaged; it is built again
            pass
    _compile(compiler, source, flags, path)
    return path


def find_compiler() -> str:
    """Of the environment's CXX, or one of the usual names.

    Raises:
        KernelError: there is none.
    """
    named = os.environ.get("CXX", "").split()
    for name in (*named[:1], *COMPILERS):
        found = shutil.which(name)
        if found is not None:
            return found
    raise KernelError(
        f"no C++ compiler was found, so {WITHOUT}; install one (such as g++) or set CXX, and they will save time"
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's own folder, or a private temporary one where that cannot be written.

    Raises:
        KernelError: neither can be had.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "sparse-trainer" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_own(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    try:
        return _temporary_folder()
    except OSError as error:
        raise KernelError(f"no folder for compiled kernels can be written ({error}), so {WITHOUT}") from error


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="sparse-trainer-"))


def open_library(path: Path) -> Library:
    """Load compiled kernels.

    Raises:
        KernelError: the file is damaged, or not the kernels.
    """
    try:
        functions = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        shared: list[Any] = [pointer, size, pointer, pointer, pointer, pointer, pointer, size, size, size, size, size]
        functions.sparse_blocks.argtypes = [*shared, number, number, number, number, pointer, number]
        functions.sparse_any.argtypes = [*shared, number, number, number, pointer, number]
        functions.sparse_attention.argtypes = [
            *[pointer] * 6, *[size] * 4, ctypes.c_float, number, pointer, number
        ]  # fmt: skip
        functions.sparse_attention.restype = None
        functions.sparse_mask.argtypes = [pointer, pointer, size, pointer, number]
        functions.sparse_mask.restype = None
        lanes, tokens = int(functions.sparse_lanes()), int(functions.sparse_tokens())
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded ({str(error)[:200]}), so {WITHOUT}") from error
    return Library(path, functions, lanes, tokens, _openmp())


def _openmp() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded.

    One runtime for both: the idle threads of a second one would spin on the cores that the first one needs.
    """
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    names = {line.split(maxsplit=5)[5].strip() for line in mapped.splitlines() if len(line.split(maxsplit=5)) > 5}
    for name in sorted(name for name in names if os.path.basename(name).startswith(("libgomp", "libomp", "libiomp"))):
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _compile(compiler: str, source: Mapping[str, bytes], flags: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        made = Path(name) / "products.so"
        for file, content in source.items():
            (Path(name) / file).write_bytes(content)
        code = [str(Path(name) / file) for file in source if file.endswith(".cpp")]
        problem = ""
        for target in (tuple(flags), ()):  # a compiler may not know the processor
            command = [compiler, *FLAGS, *target, "-o", str(made), *code]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = str(error)
                continue
            if done.returncode == 0 and made.is_file():
                made.chmod(0o700)
                noted = Path(name) / "sum"
                noted.write_text(_checksum(made.read_bytes()), encoding="ascii")
                os.replace(made, path)
                os.replace(noted, _sum_of(path))
                return
            problem = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise KernelError(f"{compiler} cannot build the kernels ({problem[:200]}), so {WITHOUT}")


def _key(source: Mapping[str, bytes], compiler: str, flags: Sequence[str]) -> str:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        version = b""
    digest = hashlib.blake2b(digest_size=12)
    for part in (*source.values(), repr((FLAGS, tuple(flags))).encode(), compiler.encode(), version, _processor()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _processor() -> bytes:
    """What decides which instructions there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(said))]).encode()


def _is_own(path: Path) -> bool:
    """Whether the path is this user's and nobody else may write to it."""
    found = os.lstat(path)
    owner = getattr(os, "getuid", lambda: found.st_uid)()
    return found.st_uid == owner and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not path.is_symlink()


def _is_trusted(path: Path) -> bool:
    """Whether the file is this user's, and whole: what was written last."""
    try:
        noted = _sum_of(path)
        if not (path.is_file() and noted.is_file() and _is_own(path) and _is_own(noted)):
            return False
        return noted.read_text(encoding="ascii") == _checksum(path.read_bytes())
    except (OSError, ValueError):
        return False


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sum")


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()
