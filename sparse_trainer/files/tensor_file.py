"""Files with tensors in them, which are checked before they are believed.

Every file with tensors in it (a sparse checkpoint, a resume bundle, one record of the mask timeline) is a
`safetensors <https://github.com/huggingface/safetensors>`_ file: an 8-byte length, a JSON header, the data.
Any reader of that format opens them. Two checksums lie in the header's metadata: ``header_sha256`` over the
header itself and ``data_sha256`` over the data, so that a flipped bit anywhere is found.

The reader trusts nothing: sizes are compared with the size of the file before anything is allocated, JSON is
parsed strictly, and there is no pickle anywhere. Whatever is wrong becomes one :class:`CheckpointError`. The
checksums find damage; one who means harm can compute them too, so nothing is believed because of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparse_trainer.files.whole_file import CheckpointError, replacing, write_atomically

__all__ = [
    "FORMATS",
    "MAX_HEADER_BYTES",
    "CheckpointError",
    "fault",
    "parse_json",
    "quote",
    "read_metadata",
    "read_tensors",
    "write_atomically",
    "write_tensors",
]

#: The header holds names, shapes and metadata, no weights; a longer one is an attempt to exhaust memory.
MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 8

#: From this size on a checksum is computed in a thread of its own, while the file is read or written.
_HASHED_BESIDE = 1 << 20

#: What the project writes, by the ``format`` entry of the metadata, and how to open it.
FORMATS = {
    "sparse-trainer": ("a sparse checkpoint", "load_sparse or `sparse-trainer evaluate`"),
    "sparse-trainer-resume": ("a resume bundle", "`sparse-trainer train --resume`"),
    "sparse-trainer-masks": ("a record of the mask timeline", "read_timeline"),
}

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def fault(path: str | os.PathLike[str], problem: str, *, expected: object, found: object) -> CheckpointError:
    """The error for ``path``, in the one form that all of them have."""
    return CheckpointError(f"{path}: {problem}: expected {expected}, found {found}")


def quote(value: object, limit: int = 80) -> str:
    """``repr`` on one line, cut to ``limit`` characters: what a file says may be long and hold control characters."""
    text = " ".join(line.strip() for line in repr(value).splitlines())  # that of a tensor has several
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Checksum:
    """sha256 of many chunks. A large sum is computed beside what the caller does, as hashlib releases Python's lock.

    Args:
        size: bytes to come, in all.
    """

    def __init__(self, size: int) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1) if size >= _HASHED_BESIDE else None
        self._pending: list[Future[None]] = []

    def __enter__(self) -> _Checksum:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, chunk: memoryview) -> None:
        """The next chunk; it must stay as it is until :meth:`hexdigest`."""
        if self._pool is None:
            self._digest.update(chunk)
        else:
            self._pending.append(self._pool.submit(self._digest.update, chunk))

    def hexdigest(self) -> str:
        for future in self._pending:
            future.result()
        return self._digest.hexdigest()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    format: str,
    version: int,
) -> None:
    """Write named tensors and metadata, atomically and checksummed.

    Args:
        tensors: dense, on any device; strides and shared memory do not matter, each is written in full.
        metadata: JSON values by name; each is stored as a JSON string, as the format asks.

    Raises:
        CheckpointError: if the file cannot be written.
        ValueError: if a dtype has no name in the format, or the metadata is no JSON or too long.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name}: a {tensor.layout} tensor of {tensor.dtype} cannot be stored")
    # Wide types first, so that every tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    strings = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    strings |= {"format": format, "version": str(version), "data_sha256": "0" * 64, "header_sha256": "0" * 64}
    header = {"__metadata__": strings, **entries}
    length = len(_header_bytes(header))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header takes {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    with replacing(path) as file, _Checksum(end) as checksum:
        # The header holds the checksum of the data, so its place, the length of which is known, is filled last.
        file.seek(8 + length)
        data = [_as_bytes(tensors[name]) for name in order]
        for chunk in data:
            checksum.add(chunk)
        for chunk in data:
            file.write(chunk)
        strings["data_sha256"] = checksum.hexdigest()
        strings["header_sha256"] = _header_digest(header)
        file.seek(0)
        file.write(length.to_bytes(8, "little") + _header_bytes(header))


def read_metadata(path: str | os.PathLike[str], *, format: str, version: int | Sequence[int]) -> dict[str, Any]:
    """The metadata of a file that :func:`write_tensors` wrote, without reading its data.

    Raises:
        CheckpointError: if the file is not of this format and version, or its header is damaged.
    """
    with _open(path) as file:
        return _metadata(path, _read_header(path, file), format, version)


def read_tensors(
    path: str | os.PathLike[str], *, format: str, version: int | Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors, on the CPU and each in memory of its own, and the metadata; both checksums are verified.

    Raises:
        CheckpointError: if the file is not of this format and version, or is damaged anywhere.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        metadata = _metadata(path, header, format, version)
        size = sum(entry.end - entry.begin for entry in header.entries.values())
        # A file with holes may take no disk and yet claim more than any machine could hold.
        if size > memory():
            raise fault(
                path,
                "the size of its tensors",
                expected=f"at most {memory():,} bytes, the memory of this machine",
                found=f"{size:,}",
            )
        tensors = {}
        with _Checksum(size) as checksum:
            for name, entry in sorted(header.entries.items(), key=lambda item: item[1].begin):
                try:
                    tensors[name] = tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
                except RuntimeError as error:
                    raise CheckpointError(f"{path}: {quote(name)} does not fit in memory") from error
                view = _as_bytes(tensor)
                if file.readinto(view) != len(view):  # type: ignore[attr-defined]
                    raise fault(path, "the file shrank while it was read", expected=entry.end, found="less data")
                checksum.add(view)
            found = checksum.hexdigest()
    if found != header.strings["data_sha256"]:
        expected = f"sha256 {quote(header.strings['data_sha256'][:16])}..."
        raise fault(path, "the tensor data is damaged", expected=expected, found=f"{found[:16]}...")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.view(torch.uint8).gt(1).any():
            raise fault(path, f"the bytes of {quote(name)}", expected="0 or 1, as bool", found="others")
    return tensors, metadata


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Header:
    entries: Mapping[str, _Entry]
    strings: Mapping[str, str]  #: the raw metadata
    digest: str  #: measured over the header without its ``header_sha256``


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file, if it is a regular one (a pipe or a device could be read for ever)."""
    special = CheckpointError(f"{path}: is a device or a pipe, expected a regular file")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            inside = Path(path) / "sparse.safetensors"
            hint = f"; did you mean {inside}?" if inside.is_file() else ""
            raise CheckpointError(f"{path}: is a folder, expected a file{hint}")
        if not stat.S_ISREG(mode):
            raise special
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was exchanged in between
                raise special
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit in memory") from error
    except ValueError as error:
        # The operating system refuses a path with a null byte in it.
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{quote(path)}: cannot be read: {error}") from error


def _open_at_once(path: str, flags: int) -> int:
    """Opening a pipe waits for its other end, unless one asks not to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def memory() -> int:
    """Bytes that this machine has, or no limit where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 63


def _read_header(path: str | os.PathLike[str], file: BinaryIO) -> _Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8) if size >= 8 else b""  # of size 0 are files of the system that never end
    length = int.from_bytes(start, "little")
    fits = len(start) == 8 and length <= min(size - 8, MAX_HEADER_BYTES)
    # Only where these bytes are no header length: that may begin with 0x80 as well.
    if not fits and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise fault(
            path,
            "looks like a pickle (torch.save), which can run code and is never opened",
            expected="a safetensors file that sparse-trainer wrote",
            found=quote(start),
        )
    if not fits:
        raise fault(
            path,
            "is truncated or no safetensors file",
            expected=f"a header of at most {max(0, min(size - 8, MAX_HEADER_BYTES)):,} bytes",
            found=f"{length:,}" if len(start) == 8 else f"a file of {size:,} bytes",
        )
    raw = file.read(length)
    try:
        header = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise fault(path, "the header is damaged or no safetensors header", expected="JSON", found=error) from error
    if not isinstance(header, dict):
        raise fault(path, "the header", expected="a JSON object", found=type(header).__name__)
    strings = header.get("__metadata__", {})
    if not isinstance(strings, dict) or not all(isinstance(value, str) for value in strings.values()):
        raise fault(path, "the metadata", expected="an object of strings", found=quote(strings))
    entries = {name: _entry(path, name, value) for name, value in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise fault(path, f"the place of {quote(name)}", expected=f"byte {end:,}", found=f"{entry.begin:,}")
        end = entry.end
    if 8 + length + end != size:
        raise fault(path, "is truncated or too long", expected=f"{8 + length + end:,} bytes", found=f"{size:,}")
    return _Header(entries, strings, _header_digest(header))


def _entry(path: str | os.PathLike[str], name: str, value: object) -> _Entry:
    """One tensor's entry in the header, if its parts agree with each other."""

    def damaged() -> CheckpointError:
        expected = "dtype, shape and data_offsets that go together"
        return fault(path, f"the header's entry for {quote(name)}", expected=expected, found=quote(value))

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged()
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_whole_numbers(shape) and len(shape) <= MAX_DIMENSIONS and _whole_numbers(offsets)):
        raise damaged()
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fault(path, f"the dtype of {quote(name)}", expected=", ".join(_DTYPES), found=quote(dtype))
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise damaged()
    if math.prod(max(1, side) for side in shape) >= 1 << 60:  # of no elements, but beyond what can be counted
        raise damaged()
    return _Entry(dtype, tuple(shape), *offsets)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _metadata(
    path: str | os.PathLike[str], header: _Header, format: str, version: int | Sequence[int]
) -> dict[str, Any]:
    """The metadata's values, if the file is of this format and version and its header is intact."""
    strings = dict(header.strings)
    found = strings.get("format", "")
    what, _ = FORMATS[format]
    if found not in FORMATS or "header_sha256" not in strings or "data_sha256" not in strings:
        raise fault(
            path,
            "is a safetensors file, but not one that sparse-trainer wrote",
            expected=what,
            found=f"{len(header.entries):,} tensors; timm.create_model(..., checkpoint_path=...) may open it",
        )
    if found != format:
        raise fault(path, "is another kind of file", expected=what, found="{} (for {})".format(*FORMATS[found]))
    if strings["header_sha256"] != header.digest:
        raise fault(
            path,
            "the header is damaged",
            expected=f"sha256 {quote(strings['header_sha256'][:16])}...",
            found=f"{header.digest[:16]}...",
        )
    versions = [str(number) for number in ((version,) if isinstance(version, int) else version)]
    if strings.get("version") not in versions:
        raise fault(
            path,
            "was written by another version of sparse-trainer",
            expected=f"format version {' or '.join(versions)}",
            found=quote(strings.get("version")),
        )
    values = {}
    for key in strings.keys() - {"format", "version", "header_sha256", "data_sha256"}:
        try:
            values[key] = parse_json(strings[key])
        except ValueError as error:
            raise fault(path, f"metadata {quote(key)}", expected="JSON", found=error) from error
    return values


def parse_json(text: str) -> Any:
    """Strict JSON: no repeated keys, no NaN or infinity, no absurd depth.

    Raises:
        ValueError: with what was found.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that occurs twice in one object")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]}, which is too large for a number")
    return value


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _header_digest(header: Mapping[str, Any]) -> str:
    """sha256 over the header in one canonical form, without the place where this digest itself is kept."""
    strings = {key: value for key, value in header.get("__metadata__", {}).items() if key != "header_sha256"}
    canonical = json.dumps({**header, "__metadata__": strings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _as_bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order; shares memory with a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # what one element or none is strided by says nothing, yet view() minds
        flat = flat.new_empty(flat.numel()).copy_(flat)
    return memoryview(flat.view(torch.uint8).numpy().data)
