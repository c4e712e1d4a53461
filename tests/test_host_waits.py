"""How often the host waits for the device in a training step: once, after all work of the step is queued.

On a CPU each reading of a tensor is counted, whoever asks for it (``item``, ``bool``, ``tolist``, ``nonzero``, ...); on
a GPU torch itself says where it synchronises.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.data.create_data import create_data
from experiments.run_folder.random_states import deterministic_algorithms
from experiments.training.trainer import Trainer
from tests.conftest import DEVICES
from tests.test_training import Sick, configure, equal, json_like

ROOT = Path(__file__).parent.parent
READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
}
ON_THE_HOST = {
    "masks.py:zero_dead": "NumPy, for tensors on a CPU alone",
    "masks.py:count_dead_nonzero": "NumPy, for tensors on a CPU alone",
}
"""Where only tensors on the CPU are read, whatever the device is."""


def caller() -> str:
    """File and function of this project that asked."""
    own = (ROOT / "experiments", ROOT / "models", ROOT / "sparse_trainer")
    for frame in reversed(traceback.extract_stack()):
        if any(Path(frame.filename).is_relative_to(folder) for folder in own):
            return f"{Path(frame.filename).name}:{frame.name}"
    return "elsewhere"


class Reads(TorchDispatchMode):
    """Notes who reads a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list) else []
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if name in READS or by_mask:
            self.found.append(caller())
        return func(*args, **(kwargs or {}))


@contextmanager
def count_waits(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where the host waits in the block."""
    if device == "cuda":
        found: list[str] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        return
    reads = Reads()
    with monkeypatch.context() as patched, reads:
        # On a CPU these are no operations.
        # And what sends numbers to a device waits until they are there.
        for owner, name in (
            (Tensor, "tolist"),
            (Tensor, "numpy"),
            (Tensor, "cpu"),
            (Tensor, "new_tensor"),
            (torch, "tensor"),
        ):
            original = getattr(owner, name)

            def watched(*arguments: Any, original: Any = original, **options: Any) -> Any:
                reads.found.append(caller())
                return original(*arguments, **options)

            patched.setattr(owner, name, watched)
        yield reads.found
    reads.found[:] = [place for place in reads.found if place not in ON_THE_HOST]


EVERYTHING: dict[str, Any] = {
    "data": {
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "random_erasing": 0.3,
        "color_jitter": 0.2,
        "in_chans": 3,
    },
    "training": {"clip_grad": 1.0, "ema_decay": 0.9, "ema_warmup": True, "accumulate": 2},
    "model": {"drop_path": 0.1, "kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 7}},
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": None},
    "weights": {"sparsity": {"density": 0.5, "updates": None, "update_every": 100}},
    "units": {
        "sparsity": {"density": None, "head_density": 0.67, "neuron_density": 0.5, "updates": None, "update_every": 100}
    },
    "top_k": {"selector": {"keep_ratio": 0.5, "noise": 1.0}, "sparsity": None},
    "threshold": {"selector": {"kind": "threshold", "stages": [1]}, "sparsity": None},
    "everything": {**EVERYTHING, "sparsity": {"density": 0.5, "updates": None, "update_every": 100}},
}


def trainer_on(device: str, *changes: dict[str, Any]) -> Trainer:
    config = configure({"training": {"device": device, "epochs": 100}}, *changes)
    return Trainer(config, create_data(config.data, device=config.training.device, seed=0))


@pytest.mark.filterwarnings("ignore:.*is rounded to")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_once_in_a_step(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_on(device, KINDS[kind])
    for _ in range(4):  # the first ones look at more
        trainer.train_step()
    with count_waits(device, monkeypatch) as waits:
        trainer.train_step()
    # Where patches are dropped image by image, one look at each stage says how many are left.
    stages = ["packing.py:lay_out"] * (kind == "threshold")
    if device == "cuda":  # the other wait is for an event, which torch does not count
        assert len(waits) == len(stages), waits
    else:
        assert waits == [*stages, "verdict.py:read"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_left_out_on_the_device_as_the_host_would_leave_it_out(device: str) -> None:
    """The same bits, whether the host hears of what is not finite before the optimizer steps or after it."""
    changes = {**EVERYTHING, "sparsity": {"density": 0.5, "updates": None, "update_every": 4, "growth_batches": 1}}
    states = []
    with deterministic_algorithms(True):
        for waits in (True, False):
            trainer = trainer_on(device, changes)
            assert trainer.weight_step.may_wait
            trainer.weight_step.may_wait = waits
            # Of the steps, each of two batches, the first, the third, and one that an update follows.
            trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call in (1, 6, 11))
            results = [trainer.train_step() for _ in range(9)]
            assert [result.counted for result in results] == [False, True, False, True, True, False, True, True, True]
            assert [result.update is not None for result in results] == [False] * 6 + [True] + [False] * 2
            states.append(json_like(trainer.state_dict()))
    assert equal(*states)
