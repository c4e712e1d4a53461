"""One network against its smaller variants: time beside the multiply-accumulates, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.benchmarks.inference import calibrate
from experiments.benchmarks.setting import (
    Setting,
    Step,
    Structure,
    classifier,
    inference,
    macs_of,
    make_model,
    make_small,
    textured_images,
    training_step,
)
from experiments.benchmarks.timing import paired, synchronize, timed
from experiments.evaluation.precision import narrow
from models import tokens_per_block
from sparse_trainer import SparsityConfig, SparsityScheduler, flops
from sparse_trainer.units import find_blocks

UNITS = Structure(heads=0.67, neurons=0.6)
"""4 of 6 heads, 8 of 12, and 60 % of the neurons."""
KEEP = 0.7
"""Of the patches that reach a stage."""
CALIBRATED_ON = 64
"""Images."""
LONG_ENOUGH = 0.05
"""Seconds of one timing; what is shorter is repeated."""


@dataclass(frozen=True)
class Case:
    """What is compared."""

    setting: Setting
    compiled: bool
    task: str  #: "training" or "inference"


class Comparison:
    """The dense network of a case, against which variants of it are timed.

    Args:
        backend: of ``torch.compile``, where the case is compiled.
    """

    def __init__(self, case: Case, backend: str = "inductor") -> None:
        self.case, self.backend = case, backend
        self.device = case.setting.on
        self.images = textured_images(case.setting.batch_size, case.setting.image_size, self.device)
        model = make_model(case.setting)
        self.macs = flops.count(model).macs
        self.step, self.peak = self._prepare(model)
        self.seconds = min(timed(self.step, self.device) for _ in range(3))

    def dense(self) -> dict[str, Any]:
        """Time, images per second and memory of the dense network alone."""
        return {
            "seconds": self.seconds,
            "images_per_second": self.case.setting.batch_size / self.seconds,
            "gmacs": self.macs / 1e9,
            "peak_mib": self.peak,
        }

    def measure(self, variant: str) -> dict[str, Any]:
        """The same of a variant, in turns with the dense network: ``speedup`` is its time over the variant's, ``ideal``
        its multiply-accumulates over the variant's, and ``achieved`` the one over the other."""
        model, macs, after = self._make(variant)
        optimizer = None
        if isinstance(after, SparsityScheduler):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            after.attach(optimizer)
        step, peak = self._prepare(model, after.step if after is not None else None, optimizer)
        each = max(1, round(LONG_ENOUGH / self.seconds))
        pairs = self.case.setting.pairs
        times = paired(self.step, step, device=self.device, pairs=pairs, warmup=min(2, pairs), each=each)
        speedup, ideal = 1 / times.ratio, self.macs / macs
        return {
            "seconds": times.second,
            "dense_seconds": times.first,
            "images_per_second": self.case.setting.batch_size / times.second,
            "speedup": speedup,
            "ideal": ideal,
            "achieved": speedup / ideal,
            "peak_mib": peak,
            "dense_peak_mib": self.peak,
        }

    def _prepare(
        self,
        model: nn.Module,
        after: Callable[[], object] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> tuple[Step, float]:
        """The step that is timed, run twice already, and the memory in MiB at its peak, that of the model included."""
        setting = self.case.setting
        before = self._allocated() - _bytes(model) * (self.device.type == "cuda")
        if self.case.task == "inference":
            narrow(model, setting.amp)  # as who deploys a network in 16 bits keeps it
        forward = cast(nn.Module, torch.compile(model, backend=self.backend)) if self.case.compiled else model
        if self.case.task == "training":
            step = training_step(forward.train(), setting, after, optimizer)
        else:
            images = self.images.to(next(model.parameters()).dtype)
            step = inference(forward, images, setting)
        step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        step()
        synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else 0
        return step, peak / 2**20

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _make(self, variant: str) -> tuple[nn.Module, float, SparsityScheduler | None]:
        """The network of a variant, the multiply-accumulates of an image in it, and what follows its optimizer."""
        setting = self.case.setting
        if variant == "units":
            model = make_small(setting, UNITS)
            return model, flops.count(model).macs, None
        if variant == "tokens by top-k":
            kept = Structure(heads=1.0, neurons=1.0, tokens=KEEP)
            model = make_model(setting, kept.top_k)
            return model, macs_of(model, kept), None
        if variant in ("tokens by threshold", "units and tokens by threshold"):
            selector = {"kind": "threshold", "stages": (4, 7, 10)}
            model = make_small(setting, UNITS, selector) if "units" in variant else make_model(setting, selector)
            run = classifier(model, setting)
            calibrate(model, self.images[:CALIBRATED_ON], KEEP, run)
            selection = run(self.images, return_selection=True)[1]
            tokens = tokens_per_block(selection, len(find_blocks(model))).float().cpu()
            return model, float(flops.model_macs(model, tokens).mean()), None
        model = make_model(setting)
        if variant == "weight masks":
            config = SparsityConfig(density=0.5, update_every=10**6)
            return model, self.macs, SparsityScheduler(model, config, total_steps=10**7)
        assert variant == "2:4"
        saved = _linear_macs(model) / 2
        return _two_of_four(model), self.macs - saved, None


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _linear_macs(model: nn.Module) -> float:
    """Of the linear layers of the blocks."""
    layers = flops.count(model).layers
    return sum(
        layer.macs for name, layer in layers.items() if name.startswith("blocks.") and not name.endswith(".attn")
    )


@torch.no_grad()
def _two_of_four(model: nn.Module) -> nn.Module:
    """In 16 bits, with the two greatest of every four neighbouring inputs in its blocks, for torch's kernels."""
    from torch.sparse import to_sparse_semi_structured

    model = model.to(torch.bfloat16)
    for layer in cast(Any, model).blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(to_sparse_semi_structured(greatest_two_of_four(layer.weight)), False)
    return model


def greatest_two_of_four(weight: Tensor) -> Tensor:
    """``weight`` ``[out, in]`` with the two least of every four neighbours in a row at 0; ``in`` is a multiple of 4."""
    groups = weight.unflatten(1, (-1, 4))
    kept = groups.abs().topk(2, dim=-1).indices
    return (groups * torch.zeros_like(groups).scatter(-1, kept, 1.0)).flatten(1)
