"""Files that are whole or absent, and that are checked before they are believed.

Every file with tensors in it (a sparse checkpoint, a resume bundle, one record of the mask timeline) is a
`safetensors <https://github.com/huggingface/safetensors>`_ file: an 8-byte length, a JSON header, the data.
Any reader of that format opens them. Two checksums lie in the header's metadata: ``header_sha256`` over the
header itself and ``data_sha256`` over the data, so that a flipped bit anywhere is found.

The reader trusts nothing: sizes are compared with the size of the file before anything is allocated, JSON is
parsed strictly, and there is no pickle anywhere. Whatever is wrong becomes one :class:`CheckpointError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: The header holds names, shapes and metadata, no weights; a longer one is an attempt to exhaust memory.
MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 8

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


class CheckpointError(ValueError):
    """A file that cannot be written or trusted; the message names it, what was expected and found."""


def fault(path: str | os.PathLike[str], problem: str, *, expected: object, found: object) -> CheckpointError:
    """The error for ``path``, in the one form that all of them have."""
    return CheckpointError(f"{path}: {problem}: expected {expected}, found {found}")


def quote(value: object, limit: int = 80) -> str:
    """``repr`` cut to ``limit`` characters: what a file says may be long and hold control characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def write_atomically(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``chunks`` to ``path`` so that a reader finds the old file or the new one, never a part.

    The bytes go to ``.<name>.tmp`` in the same folder, are flushed to the disk, and the file is renamed; a
    crash leaves at most that one temporary file, which the next write to ``path`` replaces.

    Raises:
        CheckpointError: if the folder is missing or read-only, the disk is full, or the like.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "; the file that was there is unchanged" if path.is_file() else ""
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}{kept}") from error
    _sync_folder(path.parent)


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
    data = [_as_bytes(tensors[name]) for name in order]
    digest = hashlib.sha256()
    for chunk in data:
        digest.update(chunk)
    strings = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    strings |= {"format": format, "version": str(version), "data_sha256": digest.hexdigest()}
    header = {"__metadata__": strings, **entries}
    strings["header_sha256"] = _header_digest(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header takes {len(text):,} bytes, more than {MAX_HEADER_BYTES:,}")
    write_atomically(path, [len(text).to_bytes(8, "little"), text, *data])


def read_metadata(path: str | os.PathLike[str], *, format: str, version: int) -> dict[str, Any]:
    """The metadata of a file that :func:`write_tensors` wrote, without reading its data.

    Raises:
        CheckpointError: if the file is not of this format and version, or its header is damaged.
    """
    with _open(path) as file:
        return _metadata(path, _read_header(path, file), format, version)


def read_tensors(
    path: str | os.PathLike[str], *, format: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors, on the CPU and each in memory of its own, and the metadata; both checksums are verified.

    Raises:
        CheckpointError: if the file is not of this format and version, or is damaged anywhere.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        metadata = _metadata(path, header, format, version)
        digest = hashlib.sha256()
        tensors = {}
        for name, entry in sorted(header.entries.items(), key=lambda item: item[1].begin):
            try:
                tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
            except RuntimeError as error:
                raise CheckpointError(f"{path}: {quote(name)} does not fit in memory") from error
            view = _as_bytes(tensor)
            if file.readinto(view) != len(view):  # type: ignore[attr-defined]
                raise fault(path, "the file shrank while it was read", expected=entry.end, found="less data")
            if entry.dtype == "BOOL" and tensor.view(torch.uint8).gt(1).any():
                raise fault(path, f"the bytes of {quote(name)}", expected="0 or 1, as bool", found="others")
            digest.update(view)
            tensors[name] = tensor
    if digest.hexdigest() != header.strings["data_sha256"]:
        raise fault(
            path,
            "the tensor data is damaged",
            expected=f"sha256 {header.strings['data_sha256'][:16]}...",
            found=f"{digest.hexdigest()[:16]}...",
        )
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
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            inside = Path(path) / "sparse.safetensors"
            hint = f"; did you mean {inside}?" if inside.is_file() else ""
            raise CheckpointError(f"{path}: is a folder, expected a file{hint}")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: is a device or a pipe, expected a regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        # The operating system refuses a path with a null byte in it.
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{quote(path)}: cannot be read: {error}") from error


def _read_header(path: str | os.PathLike[str], file: BinaryIO) -> _Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
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
    expected = "dtype, shape and data_offsets that go together"
    damaged = fault(path, f"the header's entry for {quote(name)}", expected=expected, found=quote(value))
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_whole_numbers(shape) and len(shape) <= MAX_DIMENSIONS and _whole_numbers(offsets)):
        raise damaged
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fault(path, f"the dtype of {quote(name)}", expected=", ".join(_DTYPES), found=quote(dtype))
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise damaged
    return _Entry(dtype, tuple(shape), *offsets)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _metadata(path: str | os.PathLike[str], header: _Header, format: str, version: int) -> dict[str, Any]:
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
    if strings.get("version") != str(version):
        raise fault(
            path,
            "was written by another version of sparse-trainer",
            expected=f"format version {version}",
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
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that occurs twice in one object")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is no JSON number")


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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can (on Windows a folder cannot be opened)."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be flushed to the disk: {error.strerror}") from error
