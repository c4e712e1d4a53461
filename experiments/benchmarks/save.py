"""What saving costs: the sparse file against plain safetensors, and how long a training run stands still for a save."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.benchmarks.setting import Setting, Weights, make_model, make_scheduler, training_step
from experiments.benchmarks.timing import Figure, paired
from experiments.errors import ConfigError
from models import resolve
from sparse_trainer import SparsityScheduler, flops
from sparse_trainer.files.checkpoint import SparseInfo, load_sparse, read_sparse, save_resume, save_sparse

State = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where the files are written."""

    folder: str | None = None
    """An existing folder on the disk to measure; null for the system's folder of temporary files, which may be in
    memory."""

    def __post_init__(self) -> None:
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"folder: there is no folder {self.folder}")


@contextmanager
def _unflushed() -> Iterator[None]:
    """Leave it to the operating system when bytes reach the disk, as plain safetensors does."""
    with mock.patch.object(os, "fsync", return_value=None):
        yield


def save_flushed(state: State, path: Path) -> None:
    """A plain safetensors file that has reached the disk."""
    save_file(state, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_plain(path: Path) -> State:
    """The tensors of a plain safetensors file, each in memory of its own: ``load_file`` alone maps the file and reads
    nothing yet."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def of_dtype(state: State, dtype: torch.dtype) -> State:
    """The floating tensors in ``dtype``."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def benchmark_save(setting: Setting, weights: Weights, place: Place) -> list[Figure]:
    """Saving and loading a sparse network against plain safetensors; the pause that a checkpoint makes in training.

    Args:
        setting: model, size, precision and number of pairs.
        weights: density of the masks.
        place: where the files are written.
    """
    model = make_model(setting).train()
    dense = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    scheduler = make_scheduler(model, weights, total_steps=10**7, update_every=10**6)
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        return [
            *_files(Path(folder), setting, model, scheduler, dense),
            *_pause(Path(folder), setting, model, scheduler),
        ]


def _files(
    folder: Path, setting: Setting, model: torch.nn.Module, scheduler: SparsityScheduler, dense: State
) -> list[Figure]:
    """Sizes, and seconds of saving and loading: value is the sparse file, reference the plain one."""
    name, arguments = resolve(
        setting.model, {"img_size": setting.image_size, "patch_size": setting.patch_size, "num_classes": 10}
    )
    masks = scheduler.masks
    counted = flops.count(model, masks)
    info = SparseInfo(
        model=name,
        model_args=arguments,
        budget=scheduler.budget,
        macs=round(counted.live_macs),
        image_size=setting.image_size,
        in_chans=3,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    live = counted.live_parameters / counted.parameters
    figures = []
    for dtype, words in ((torch.float16, "16 bit"), (torch.float32, "float32")):  # the last one is timed below
        save_file(of_dtype(dense, dtype), folder / "dense.safetensors")
        save_sparse(folder / "sparse.safetensors", model, masks=masks, info=info, dtype=dtype)
        sizes = [(folder / f"{kind}.safetensors").stat().st_size / 1e6 for kind in ("sparse", "dense")]
        figures.append(Figure(f"file, {words}", sizes[0], "MB", sizes[1], sizes[0] / sizes[1], live))
    share = sizes[0] / sizes[1]

    def compare(name: str, plain: Callable[[], object], sparse: Callable[[], object]) -> None:
        times = paired(plain, sparse, device=torch.device("cpu"), pairs=setting.pairs)
        figures.append(Figure(name, times.second, "s", times.first, times.ratio, share))

    def save() -> None:
        save_sparse(folder / "sparse.safetensors", model, masks=masks, info=info)

    def load_plain_model() -> None:
        timm.create_model(name, **arguments).load_state_dict(load_file(folder / "dense.safetensors"))

    with _unflushed():
        compare("saving, not flushed", lambda: save_file(dense, folder / "dense.safetensors"), save)
    compare("saving, flushed to the disk", lambda: save_flushed(dense, folder / "dense.safetensors"), save)
    compare(
        "reading the tensors into memory",
        lambda: read_plain(folder / "dense.safetensors"),
        lambda: read_sparse(folder / "sparse.safetensors"),
    )
    compare("loading a model", load_plain_model, lambda: load_sparse(folder / "sparse.safetensors"))
    return figures


def _pause(folder: Path, setting: Setting, model: torch.nn.Module, scheduler: SparsityScheduler) -> list[Figure]:
    """How long training stands still while everything that decides its future is written."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = copy.deepcopy(model)
    scheduler.attach(optimizer, ema=average)
    step = training_step(model, setting, scheduler.step, optimizer)
    step()  # the moments exist from here on

    def save() -> None:
        state = {
            "model": dict(model.state_dict()),
            "optimizer": optimizer.state_dict(),
            "sparsity": scheduler.state_dict(),
            "ema": dict(average.state_dict()),
        }
        save_resume(folder / "last.resume", state)

    times = paired(step, save, device=setting.on, pairs=setting.pairs)
    size = (folder / "last.resume").stat().st_size
    return [
        Figure("checkpoint of a run: weights, moments, average, masks", size / 1e6, "MB"),
        Figure("pause by saving it, beside a training step", times.second, "s", times.first, times.ratio, 1.0),
    ]
