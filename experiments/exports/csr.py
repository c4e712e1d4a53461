"""The weights as ``scipy.sparse`` matrices in one ``.npz`` file, for analysis and for CPU kernels.

Any NumPy reads it, without this project::

    import numpy as np
    from scipy.sparse import csr_array

    file, name = np.load("sparse.npz"), "blocks.0.mlp.fc1.weight"
    parts = (file[f"{name}.data"], file[f"{name}.indices"], file[f"{name}.indptr"])
    weight = csr_array(parts, shape=file[f"{name}.shape"])

(of a file in float16: ``file[f"{name}.data"].astype("f4")``, because SciPy knows no float16).

The weight of each Linear and Conv2d is a matrix ``[out, in]``, that of a convolution ``[out, in * height * width]``.
Stored are its *live* elements, so one that is live and 0 is there as a 0. Matrices hold the live heads and neurons
alone. Every other tensor lies under its own name, and ``metadata`` is a JSON text: what the checkpoint says of
itself, which heads and neurons are live, and the shapes of the matrices that were convolutions.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from sparse_trainer.files.checkpoint import CheckpointError, SparseInfo

FORMAT, VERSION = "sparse-trainer-csr", 1
PARTS = ("data", "indices", "indptr", "shape")


@dataclass(frozen=True)
class CsrFile:
    """The contents of such a file."""

    matrices: Mapping[str, csr_array]  #: by parameter name; float16 as float32, because SciPy knows no float16
    tensors: Mapping[str, NDArray[Any]]  #: all others, by state_dict name
    metadata: Mapping[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """All of it under the names and in the shapes of the compact model; dead elements are 0."""
        shapes = self.metadata["shapes"]
        state = {name: torch.from_numpy(np.asarray(array)) for name, array in self.tensors.items()}
        for name, matrix in self.matrices.items():
            state[name] = torch.from_numpy(matrix.toarray()).view(shapes.get(name, matrix.shape))
        return state


def to_csr(weight: Tensor, mask: Tensor) -> csr_array:
    """The elements of ``weight`` ``[out, ...]`` where ``mask`` is True, as ``[out, rest]``, zeros among them too."""
    rows = mask.flatten(1).numpy()
    indptr = np.concatenate([[0], np.cumsum(rows.sum(axis=1))]).astype(np.int32)
    indices = np.nonzero(rows)[1].astype(np.int32)
    return csr_array((weight.flatten(1).numpy()[rows], indices, indptr), shape=rows.shape)


def write_csr(path: Path, model: nn.Module, masks: Mapping[str, Tensor], info: SparseInfo, dtype: torch.dtype) -> None:
    """Write the file; not atomic by itself.

    Args:
        model: compact, in float32.
        masks: bool, by parameter name; a Linear or Conv2d without one is live as a whole.
        dtype: of the values. NumPy has no bfloat16: they are rounded to it and stored as float32.
    """
    matrices = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    arrays: dict[str, Any] = {}
    shapes = {}
    for name, tensor in model.state_dict().items():
        values = tensor.to(dtype).float() if tensor.is_floating_point() else tensor
        if name in matrices or name in masks:
            matrix = to_csr(values, masks.get(name, torch.ones_like(values, dtype=torch.bool)))
            arrays |= {
                f"{name}.data": _narrow(matrix.data, dtype),
                f"{name}.indices": matrix.indices,
                f"{name}.indptr": matrix.indptr,
                f"{name}.shape": np.array(matrix.shape),
            }
            if tensor.dim() != 2:
                shapes[name] = list(tensor.shape)
        else:
            arrays[name] = _narrow(values.numpy(), dtype)
    said = {"format": FORMAT, "version": VERSION, "dtype": str(dtype).removeprefix("torch."), "shapes": shapes}
    arrays["metadata"] = np.array(json.dumps({**info.to_metadata(), **said}))
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _narrow(values: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    return values.astype(np.float16) if dtype == torch.float16 and values.dtype == np.float32 else values


def _widen(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype == np.float16 else values


def read_csr_file(path: Path | str) -> CsrFile:
    """Everything in a file that ``sparse-trainer export --format csr`` wrote. Nothing in it is ever unpickled.

    Raises:
        CheckpointError: it is another file, or a damaged one.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: is damaged or no .npz file: {str(error)[:200]}") from error
    try:
        metadata = json.loads(str(arrays.pop("metadata")))
        if (metadata["format"], metadata["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {metadata['format']!r} version {metadata['version']!r}")
        names = [key.removesuffix(".indptr") for key in arrays if key.endswith(".indptr")]
        matrices = {}
        for name in names:
            data, indices, indptr, shape = (arrays.pop(f"{name}.{part}") for part in PARTS)
            matrices[name] = csr_array((_widen(data), indices, indptr), shape=tuple(shape.tolist()))
            matrices[name].check_format(full_check=True)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected version {VERSION} of what sparse-trainer export --format csr writes, found "
            f"{str(error)[:200]}"
        ) from error
    return CsrFile(matrices, {name: _widen(array) for name, array in arrays.items()}, metadata)


def read_csr(path: Path | str) -> dict[str, csr_array]:
    """The matrices alone, by parameter name; see :func:`read_csr_file`."""
    return dict(read_csr_file(path).matrices)
