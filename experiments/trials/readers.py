"""Real files of every kind that the project reads, and what its readers may do with a damaged one."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.config.reading import build
from experiments.config.run_config import RunConfig, resolve
from experiments.data.create_data import Data, create_data
from experiments.errors import ConfigError
from experiments.run_folder.folder import RunFolder
from experiments.training.loop import Loop
from experiments.training.trainer import Trainer, TrainingError
from models import create_model
from sparse_trainer import SparsityConfig, SparsityScheduler
from sparse_trainer.files.checkpoint import (
    CheckpointError,
    SparseInfo,
    load_resume,
    load_sparse,
    read_info,
    read_sparse,
    save_resume,
    save_sparse,
)
from sparse_trainer.mask_log import MaskLog, read_timeline, record_path, write_record

TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "in_chans": 1,
    "num_classes": 5,
}
DEIT, DINO = "deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
WEIGHTS: dict[str, Any] = {"density": 0.5}
UNITS: dict[str, Any] = {"density": 0.4, "head_density": 0.67, "neuron_density": 0.5}
TOP_K: dict[str, Any] = {"kind": "top_k", "keep_ratio": 0.6, "noise": 1.0}
THRESHOLD: dict[str, Any] = {"kind": "threshold", "stages": [1], "thresholds": [0.0045]}
#: Twelve steps with updates, of a network with everything that has a state.
RUN: dict[str, dict[str, Any]] = {
    "model": {"kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 7, "num_heads": 3}},
    "data": {"train_subset": 60, "eval_subset": 20, "batch_size": 10},
    "sparsity": {
        "density": 0.4,
        "head_density": 0.67,
        "neuron_density": 0.5,
        "swap": "always",
        "candidates": "first",
        "updates": 4,
    },
    "selector": {"keep_ratio": 0.5, "noise": 1.0},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_epochs": 0.5},
    "training": {"epochs": 2, "device": "cpu", "amp": "float32", "ema_decay": 0.9},
}
STOP = 4
"""Step after which that run was stopped."""
UPDATE = 2
"""Step of the update in the mask timeline."""


class Broken(Exception):
    """A reader did what it must not do."""


@dataclass(frozen=True)
class Source:
    """A real file."""

    name: str
    kind: str  #: a key of :data:`READERS`
    content: bytes


@dataclass(frozen=True)
class _Trained:
    model: nn.Module
    scheduler: SparsityScheduler
    optimizer: torch.optim.Optimizer
    info: SparseInfo


def _train(folder: Path, name: str, sparsity: dict[str, Any], selector: dict[str, Any] | None = None) -> _Trained:
    """A tiny network after a few steps and updates, with its mask timeline in ``folder``."""
    torch.manual_seed(0)
    model = create_model(name, selector=selector, **TINY)
    config = SparsityConfig(**{"update_every": 1, "drop_fraction": 0.6, "swap": "always", **sparsity})
    scheduler = SparsityScheduler(model, config, total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    log = MaskLog(folder, None)
    images, targets = torch.randn(8, 1, 16, 16), torch.randint(5, (8,))
    for _ in range(UPDATE):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        update = scheduler.step(lambda: F.cross_entropy(model(images), targets))
        optimizer.zero_grad()
        assert update is not None
        update = replace(update, seconds=0.5)  # the one number that is not the same every time
        log.log_update(update, scheduler.masks, live_heads=scheduler.live_heads, live_neurons=scheduler.live_neurons)
    info = SparseInfo(
        model=name,
        model_args=TINY,
        selector=selector,
        budget=scheduler.budget,
        macs=12_345,
        image_size=16,
        in_chans=1,
        mean=(0.5,),
        std=(0.25,),
        class_names=("a", "b", "c", "d", "é"),
        step=UPDATE,
        recipe="quickstart",
        metrics={"top1": 81.5},
        live_heads=scheduler.live_heads or {},
        live_neurons=scheduler.live_neurons or {},
    )
    return _Trained(model, scheduler, optimizer, info)


def real_files(folder: Path) -> list[Source]:
    """One file of each kind: sparse checkpoints, a resume bundle, a record of the mask timeline; always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny counts are rounded, and swaps come back
        joint = _train(folder, DEIT, UNITS, THRESHOLD)
        trained = {
            "weights": (_train(folder / "weights", DEIT, WEIGHTS), torch.float32),
            "heads and neurons": (_train(folder / "units", DEIT, UNITS), torch.float32),
            "top-k tokens": (_train(folder / "tokens", DEIT, WEIGHTS, TOP_K), torch.bfloat16),
            "joint": (joint, torch.float16),
            "registers, mixed types": (_train(folder / "registers", DINO, WEIGHTS), None),
        }
    mixed = trained["registers, mixed types"][0].model
    for module in mixed.modules():
        if not isinstance(module, nn.LayerNorm) and not any(True for _ in module.children()):
            module.bfloat16()
    sources = []
    path = folder / "file"
    for name, (run, dtype) in trained.items():
        save_sparse(path, run.model, masks=run.scheduler.masks, info=run.info, dtype=dtype, create_model=create_model)
        sources.append(Source(name, "sparse", path.read_bytes()))
    state = {
        "model": dict(joint.model.state_dict()),
        "optimizer": joint.optimizer.state_dict(),
        "sparsity": joint.scheduler.state_dict(),
        "random": (random.Random(0).getstate(), torch.Generator().manual_seed(0).get_state()),
        "history": [{"step": 1, "top1": 10.0, "loss": math.inf}],
    }
    save_resume(path, state)
    sources.append(Source("resume bundle", "resume", path.read_bytes()))
    sources.append(Source("mask timeline", "timeline", record_path(folder, UPDATE).read_bytes()))
    stopped = RunFolder(folder / "run")
    stopped.checkpoints.mkdir(parents=True)
    sources.append(Source("bundle of a run", "run", _stopped_run(stopped)))
    shutil.rmtree(folder)
    return sources


@cache
def _open_data() -> Data:
    return create_data(_configuration().data, device="cpu", seed=0)


def _configuration() -> RunConfig:
    return resolve(build({name: dict(section) for name, section in RUN.items()}), "trial")


def _stopped_run(folder: RunFolder) -> bytes:
    """The resume bundle of a run that was stopped after :data:`STOP` steps."""
    loop = Loop(Trainer(_configuration(), _open_data()), folder)
    for _ in range(STOP):
        loop.trainer.train_step()
    path = folder.bundle(STOP)
    save_resume(
        path,
        {
            "trainer": loop.trainer.state_dict(),
            "history": [{"step": 2, "top1": 10.0}],
            "best": {"step": 2, "top1": 10.0},
            "seconds": 1.5,
            "images_since": 20,
            "seconds_since": 0.5,
            "metrics_size": 0,
            "metrics_line": {},
        },
    )
    return path.read_bytes()


def judge(source: Source, content: bytes, folder: Path, *, blind: bool) -> str:
    """Let the reader of ``source`` read what has become of it.

    Args:
        folder: where the file is written.
        blind: whoever changed the bytes knew no checksum.

    Returns:
        ``refused``; ``same``: it loaded, with the content of the original; ``consistent``: it was sealed anew, and
        what loaded is what an independent reader finds in it.

    Raises:
        Broken: anything else. Also whatever a reader raises that is not its one error.
    """
    path = {
        "timeline": record_path(folder / "run", UPDATE),
        "run": RunFolder(folder / "run").bundle(STOP),
    }.get(source.kind, folder / "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        found = READERS[source.kind](path)
    except CheckpointError as error:
        message = str(error)
        if not message.startswith(str(path)) or len(message) > 3000 or not message.isprintable():
            raise Broken(f"an error that does not name the file, or cannot be shown: {message!r:.300}") from error
        if "does not fit in memory" in message:
            raise Broken(f"an allocation that failed: {message:.300}") from error
        return "refused"
    if found == source.content:
        return "same"
    if blind:
        raise Broken("loaded, with another content than the original")
    return "consistent"


def _read_sparse(path: Path) -> bytes:
    """Load it as a model and compare that with what the safetensors library finds; the file as it would be saved."""
    model = load_sparse(path, create_model=create_model, dtype=None)
    info, contents = read_info(path), read_sparse(path)
    expected = _independent_state(path)
    found = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    if found.keys() != expected.keys():
        raise Broken(f"the tensors of the model are not those of the file: {found.keys() ^ expected.keys()}")
    for name, tensor in found.items():
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name]):
            raise Broken(f"{name} is not what the file holds")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Broken(f"{name} is not finite")
    live = sum(int(mask.count_nonzero()) for mask in contents.masks.values())
    if contents.masks and live != info.budget.live:
        raise Broken(f"{live} live elements, and a budget of {info.budget.live}")
    again = path.with_name("again")
    save_sparse(again, model, masks=contents.masks, info=info, dtype=None, create_model=create_model)
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    model = load_sparse(path, create_model=create_model)
    # Whether a network can compute anything is not for the reader to say; that it ends is.
    with torch.inference_mode(), contextlib.suppress(RuntimeError):
        model(torch.zeros(2, info.in_chans, height, width))
    return again.read_bytes()


def _independent_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a sparse checkpoint, by the safetensors library and a few lines of NumPy."""
    with safetensors.safe_open(path, "pt") as file:
        masked = json.loads(file.metadata()["masked"])
    stored = safetensors.torch.load_file(path)
    for name, shape in masked.items():
        bits = np.unpackbits(stored.pop(f"{name}.mask").numpy(), bitorder="little")[: math.prod(shape)]
        values = stored.pop(f"{name}.values")
        stored[name] = values.new_zeros(math.prod(shape))
        stored[name][torch.from_numpy(bits).bool()] = values
        stored[name] = stored[name].view(shape)
    return stored


def _read_resume(path: Path) -> bytes:
    """Load it, and save it again: what was read must be what can be written."""
    again = path.with_name("again")
    save_resume(again, load_resume(path))
    content = again.read_bytes()
    save_resume(again, load_resume(again))
    if again.read_bytes() != content:
        raise Broken("what was loaded is not what is loaded after saving it")
    return content


def _read_timeline(path: Path) -> bytes:
    """Read all of it, and write it again."""
    (record,) = read_timeline(path.parent.parent)
    masks = record.masks()
    run = path.parent.parent.with_name("run again")
    return write_record(run, record.step, masks, record.live_heads, record.live_neurons, record.update).read_bytes()


def _read_run(path: Path) -> bytes:
    """Go on with a run from it, for as long as an update takes; the state as it would be saved at once."""
    data = _open_data()
    data.corrupt_files.clear()
    loop = Loop(Trainer(_configuration(), data, resuming=True), RunFolder(path.parent.parent))
    try:
        loop.resume()
    except ConfigError as error:  # it says that it is of another run
        raise CheckpointError(f"{path}: {error!s:.500}") from error
    again = path.with_name("again")
    save_resume(again, {**load_resume(path), "trainer": loop.trainer.state_dict()})
    with contextlib.suppress(TrainingError):
        for _ in range(4):
            if not loop.trainer.finished:
                loop.trainer.train_step()
    return again.read_bytes()


#: How each kind of file is read; all return the file that would be written of what was read.
READERS: dict[str, Callable[[Path], bytes]] = {
    "sparse": _read_sparse,
    "resume": _read_resume,
    "timeline": _read_timeline,
    "run": _read_run,
}
