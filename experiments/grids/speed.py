"""What the entries of a grid save in time: a training step and the classification of images, beside the baseline's.

The runs themselves are no measure of speed, since several may share a machine; so a run of each entry is taken up
again, and takes turns with the baseline in one process.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from experiments.benchmarks.onnx import REST, WARMUP, session_for
from experiments.benchmarks.timing import alternate, describe_machine, paired, summarize
from experiments.config.reading import load_config
from experiments.config.run_config import RunConfig, resolve
from experiments.data.create_data import Data, create_data
from experiments.errors import ConfigError
from experiments.evaluation.measuring import measure
from experiments.evaluation.precision import precision_context
from experiments.exports.onnx import run_onnx
from experiments.training.trainer import Trainer
from models import create_model
from models.threshold_selector import ThresholdSelector
from sparse_trainer import accelerate
from sparse_trainer.files.checkpoint import CheckpointError, load_sparse, load_sparse_masks

Precision = Literal["float32", "bfloat16"]
PAIRS = 9
STEPS = 4
"""Training steps, or batches, in one timing."""
DECILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def measure_speed(folders: dict[str, Path], baseline: str, amp: Precision | None = None) -> dict[str, Any]:
    """Time one run of each entry against the baseline's, pair by pair.

    Args:
        folders: of a finished run, by entry.
        amp: precision of what is timed; None for that in which each run was trained.

    Returns:
        JSON values: ``machine``, ``pairs``, the ``baseline`` in seconds, and by entry the median ratios of a training
        step (below 1 is faster) and of the throughput (above 1 is faster), the latter with torch's kernels and with
        the fastest there are, and how many patches images keep. With the baseline goes ``onnxruntime_ratio``, its
        throughput in onnxruntime over that in PyTorch, in float32 on a CPU where onnxruntime is installed.

    Raises:
        ConfigError: the configuration of a run is not understood.
    """

    def config_of(entry: str) -> RunConfig:
        config = resolve(load_config(folders[entry] / "config.yaml"))
        return config if amp is None else replace(config, training=replace(config.training, amp=amp))

    base = config_of(baseline)
    device = torch.device(base.training.device)
    # Entries share their images, whose decoding takes longer than what is timed.
    open_data = cache(partial(create_data, device=base.training.device, seed=base.training.seed))
    trainer = trainer_of(folders[baseline], base, open_data(base.data))
    classify = _Classifier(folders[baseline], base, open_data(base.data))
    entries: dict[str, Any] = {}
    for entry, folder in folders.items():
        if entry == baseline:
            continue
        config = config_of(entry)
        data = open_data(config.data)
        other = trainer_of(folder, config, data)
        steps = paired(trainer.train_step, other.train_step, device=device, pairs=PAIRS, warmup=2, each=STEPS)
        small = _Classifier(folder, config, data)
        batches = paired(classify, small, device=device, pairs=PAIRS, warmup=2, each=STEPS)
        fast = _Classifier(folder, config, data, kernels="auto")
        entries[entry] = {
            "step_seconds": steps.second,
            "step_ratio": steps.ratio,
            "throughput": classify.images / batches.second,
            "throughput_ratio": 1 / batches.ratio,
            "kernels_ratio": 1 / paired(classify, fast, device=device, pairs=PAIRS, warmup=2, each=STEPS).ratio,
            "kept": small.kept(),
        }
        baseline_seconds = {"step_seconds": steps.first, "throughput": classify.images / batches.first}
    return {
        "machine": describe_machine(device),
        "pairs": PAIRS,
        "amp": base.training.amp,
        "amp_asked": amp,
        "batch_size": classify.images,
        "baseline": baseline_seconds | classify.in_onnxruntime(),
        "entries": entries,
    }


def trainer_of(folder: Path, config: RunConfig, data: Data) -> Trainer:
    """A run at its beginning; with thresholds alone the network that it came to, since what a step takes depends on
    what they have learned to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(config, data)
    if isinstance(getattr(trainer.model, "selector", None), ThresholdSelector) and trainer.sparsity is None:
        learned = load_sparse(folder / "sparse.safetensors", create_model=create_model, device=trainer.device)
        trainer.model.load_state_dict(learned.state_dict())
    return trainer


class _Classifier:
    """Classifies the same batch of images again and again, as its run would at evaluation."""

    def __init__(self, folder: Path, config: RunConfig, data: Data, kernels: str = "dense") -> None:
        device = torch.device(config.training.device)
        self.data = data
        self.batch = next(iter(self.data.eval.batches()))[0].to(device)
        self.images = len(self.batch)
        file, amp = folder / "sparse.safetensors", config.training.amp
        self.amp = amp
        self.model: nn.Module = load_sparse(file, create_model=create_model, device=device)
        self.model.eval()
        if kernels != "dense":
            tokens = self.images * int(cast(Any, self.model.patch_embed).num_patches)
            masks = load_sparse_masks(file)
            self.model = accelerate(self.model, masks, kernels=kernels, rows=tokens, dtype=getattr(torch, amp))
        self.autocast = precision_context(device, amp)

    @torch.inference_mode()
    def __call__(self) -> object:
        with self.autocast():
            return self.model(self.batch)

    def in_onnxruntime(self) -> dict[str, float]:
        """``onnxruntime_ratio``: throughput of this network there over that here; nothing where it cannot be had."""
        if self.batch.device.type != "cpu" or self.amp != "float32":
            return {}
        try:
            session = session_for(self.model, self.batch)
        except (ConfigError, CheckpointError):
            return {}
        rounds = alternate(
            self, partial(run_onnx, session, self.batch), device=self.batch.device, pairs=WARMUP + PAIRS, rest=REST
        )[WARMUP:]
        return {"onnxruntime_ratio": 1 / summarize([(here, there) for here, there in rounds]).ratio}

    def kept(self) -> dict[str, Any] | None:
        """Deciles of the patches that images keep after the last stage; None where all keep as many."""
        found = measure(self.model, self.data.eval, self.autocast)
        if found.kept is None:
            return None
        last = found.kept[:, -1].double()
        patches = int(cast(Any, self.model).patch_embed.num_patches)
        if bool((last == last[0]).all()):
            return None
        values = torch.quantile(last, torch.tensor(DECILES, dtype=torch.float64), interpolation="nearest").tolist()
        return {"patches": patches, "deciles": values}
