"""The resume bundle: everything that decides the future of a run, in one checked file.

Tensors are stored by their place (``00012 state.optimizer.state.0.exp_avg``), all the rest as JSON in a byte
tensor called ``structure``. There is no pickle in it, so a bundle from a stranger cannot run code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_trainer.files.tensor_file import CheckpointError, fault, parse_json, quote, read_tensors, write_tensors

__all__ = ["CheckpointError", "load_resume", "save_resume"]

RESUME_FORMAT, RESUME_VERSION = "sparse-trainer-resume", 1
_MAX_DEPTH = 64
_DTYPES = {name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)}
"""Some optimizers keep the type of their moments among their settings."""

#: JSON takes some thirty times its length when it is parsed.
_MAX_STRUCTURE_BYTES = 32 << 20


def save_resume(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write everything that training continues from, atomically and checksummed.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None. Keys are
            strings, numbers or tuples of them. NumPy arrays and other objects are the caller's to convert.

    Raises:
        ValueError: for a value of another type; it says where.
        CheckpointError: if the file cannot be written; the file that was there is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, tensors, "state", 0), allow_nan=False, separators=(",", ":"))
    if len(text) > _MAX_STRUCTURE_BYTES:
        raise ValueError(
            f"all that is no tensor takes {len(text):,} bytes, more than {_MAX_STRUCTURE_BYTES:,}; "
            "store long lists of numbers as tensors"
        )
    # Long lists of numbers would not fit the header, which is bounded more tightly.
    tensors["structure"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    write_tensors(path, tensors, {}, format=RESUME_FORMAT, version=RESUME_VERSION)


def load_resume(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`save_resume` wrote, the same in every bit; tensors are on the CPU.

    Subclasses come back as what they derive from: an ``OrderedDict`` as a dict, a ``torch.Size`` as a tuple,
    a ``Parameter`` as a tensor.

    Raises:
        CheckpointError: if the file is damaged anywhere, or is no resume bundle.
    """
    tensors, _ = read_tensors(path, format=RESUME_FORMAT, version=RESUME_VERSION)
    try:
        structure = tensors.pop("structure")
        if structure.dtype != torch.uint8 or structure.numel() > _MAX_STRUCTURE_BYTES:
            raise ValueError(f"{structure.numel():,} elements of {structure.dtype}")
        state = _decode(parse_json(bytes(structure.numpy()).decode("utf-8")), tensors)
        if not isinstance(state, dict):
            raise TypeError(f"{type(state).__name__} where a dict was expected")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise fault(
            path, "the structure of the bundle", expected="what save_resume writes", found=quote(str(error))
        ) from error
    return state


def _encode(value: Any, tensors: dict[str, Tensor], place: str, depth: int) -> Any:
    """``value`` as JSON; tensors go to ``tensors``, and what JSON has no word for is a one-key object."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{place[:200]}...: nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d} {place}"
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [
                    _encode(k, tensors, f"{place} key", depth + 1),
                    _encode(v, tensors, f"{place}.{k}", depth + 1),
                ]
                for k, v in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{place}.{i}", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise ValueError(
        f"{place}: a {type(value).__module__}.{type(value).__qualname__} cannot be stored; "
        "use tensors, types of tensors, numbers, strings, None, and dicts, lists and tuples of them"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "float" and isinstance(inner, str):
        return float(inner)
    if kind == "dtype" and isinstance(inner, str) and inner in _DTYPES:
        return _DTYPES[inner]
    if kind == "dict" and isinstance(inner, list):
        result = {_decode(key, tensors): _decode(item, tensors) for key, item in inner}
        if len(result) != len(inner):
            raise ValueError("a key that occurs twice")
        return result
    if kind == "tuple" and isinstance(inner, list):
        return tuple(_decode(item, tensors) for item in inner)
    raise ValueError(f"a value of kind {kind!r}")
