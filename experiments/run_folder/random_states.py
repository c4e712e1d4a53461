"""What chance decides in a run: the states of the global random generators, as something that a checkpoint can hold."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data.batches import derive_seed
from sparse_trainer.generators import restore_generator

NUMPY_WORDS = 624
PROCESS = 4  #: what a seed is derived for, after those of the data


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside the block torch uses only algorithms that give the same bits each time, if that is wanted.

    It comes before the first use of a GPU, whose matrix products need memory of their own for it.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def seed_process(seed: int, rank: int, step: int = 0) -> None:
    """Streams of this process's own, for what is drawn image by image: drop path and dropout.

    The first process goes on with the streams that there are, as if it were alone.
    """
    if rank > 0:
        seed_everything(derive_seed(seed, PROCESS, rank, step))


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's global generators, and that of its device, in words that JSON knows."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _to_text(torch.get_rng_state()),
        # Only of the own device: to ask another one would set it up and take its memory.
        "cuda": _to_text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_states`; a device of another kind keeps its own state.

    Raises:
        ValueError: the states are none; the file that they come from may be a stranger's.
    """
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = states["numpy"]
        if len(keys) != NUMPY_WORDS or not 0 <= position <= NUMPY_WORDS:  # NumPy would read beyond its words
            raise ValueError(f"NumPy's at word {position} of {len(keys)}")
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
        restore_generator(torch.default_generator, _from_text(states["torch"]))
        if states["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(_from_text(states["cuda"]), device)
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the random states cannot be: {error}") from error


def resume_random_states(
    states: Sequence[Mapping[str, Any]], device: torch.device, *, rank: int, size: int, seed: int, step: int
) -> None:
    """Go on with the states of all processes as they were saved.

    With as many processes as then each takes its own, so the run draws the same numbers as if it had not stopped.
    With another number the first goes on with its own, and the others begin new streams.

    Raises:
        ValueError: there are none, or they cannot be.
    """
    if not states:
        raise ValueError("the random states are missing")
    if len(states) == size:
        restore_random_states(states[rank], device)
    else:
        restore_random_states(states[0], device)
        seed_process(seed, rank, step)


def _to_text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
