"""A checkpoint against its dense twin: what it should save by its arithmetic, and what it saves on this machine.

The twin is the same architecture with all heads, neurons, weights and tokens; its weights are random, since they
do not change its speed. The checkpoint is the real one on real images, since they decide how many tokens it keeps.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.benchmarks.images import sample
from experiments.benchmarks.onnx import REST, session_for
from experiments.benchmarks.setting import Setting, Step, classifier, inference
from experiments.benchmarks.timing import PERCENTILES, Spread, alternate, peak_memory, percentiles_of, spread
from experiments.errors import ConfigError
from experiments.evaluation.measuring import TokenUse, count_used, describe_tokens, known_tokens
from experiments.exports.onnx import run_onnx
from experiments.training.pretrained import find_checkpoint
from models import create_model, tokens_per_block
from sparse_trainer.files.checkpoint import (
    CheckpointError,
    SparseInfo,
    load_sparse,
    load_sparse_masks,
    read_info,
    read_sparse,
)
from sparse_trainer.files.tensor_file import fault
from sparse_trainer.flops import Count
from sparse_trainer.kernels.accelerate import KERNELS, accelerate, describe_choices
from sparse_trainer.units import find_blocks

WARMUP = 2
"""Pairs that do not count; a compiled model is compiled in them."""
LARGEST = 4
"""Times the nominal image size, for models that take any."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report is of, and where it goes."""

    checkpoint: str | None = None
    """A sparse checkpoint, or the folder of a finished run."""
    images: tuple[str, ...] | None = None
    """Image files or folders; without it those that the checkpoint was evaluated on."""
    calls: int = 100
    """Single images whose latency is taken."""
    output: str | None = None
    """Page to write, such as report.html; or a picture, report.png."""
    kernels: str = "dense"
    """Products of layers with dead weights: auto takes the fastest for each, sparse those that skip dead weights."""

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels: {self.kernels!r} is not one of {', '.join(KERNELS)}")
        if self.calls < 1:
            raise ConfigError(f"calls: {self.calls} is not positive")


@dataclass(frozen=True)
class Row:
    """One property of both networks."""

    name: str
    unit: str
    dense: float
    sparse: float
    ratio: float  #: sparse over dense; of times the median over the pairs
    quartiles: tuple[float, float] | None = None  #: of the pairs' ratios, where there are pairs
    ideal: float | None = None  #: what the ratio would be if only the arithmetic (or the bytes) counted
    more_is_better: bool = False

    @property
    def of_ideal(self) -> float | None:
        """1 where everything is gained that the arithmetic promises; below it less."""
        if self.ideal is None:
            return None
        return self.ratio / self.ideal if self.more_is_better else self.ideal / self.ratio


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    checkpoint: str
    facts: tuple[tuple[str, str], ...]  #: what the checkpoint is and what it was measured with, for people
    rows: tuple[Row, ...]

    def content(self, machine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON values."""
        rows = [{**asdict(row), "of_ideal": row.of_ideal} for row in self.rows]
        facts = dict(self.facts)
        return {"machine": machine, "settings": settings, "checkpoint": self.checkpoint, "facts": facts, "rows": rows}


def size_rows(sparse: Count, dense: Count, sparse_bytes: int, dense_bytes: int) -> list[Row]:
    """What needs no clock.

    Args:
        sparse: of the checkpoint, with the tokens that its images keep.
        sparse_bytes, dense_bytes: of the files, in the same dtype.
    """

    def row(name: str, unit: str, of_dense: float, of_sparse: float, scale: float, ideal: float | None = None) -> Row:
        return Row(name, unit, of_dense / scale, of_sparse / scale, of_sparse / of_dense, ideal=ideal)

    live = sparse.live_parameters / dense.parameters
    return [
        row("MACs of an image", "M", dense.macs, sparse.macs, 1e6),
        row("MACs, live weights only", "M", dense.macs, sparse.live_macs, 1e6),
        row("parameters", "M", dense.parameters, sparse.parameters, 1e6),
        row("live parameters", "M", dense.parameters, sparse.live_parameters, 1e6),
        row("file", "MB", dense_bytes, sparse_bytes, 1e6, live),
    ]


def throughput_row(times: Sequence[tuple[float, ...]], batch_size: int, macs_share: float) -> Row:
    """Images per second.

    Args:
        times: seconds per batch, (dense, sparse), pair by pair.
        macs_share: of the dense network's MACs.
    """
    ratios = spread([dense / sparse for dense, sparse in times])
    return Row(
        f"throughput, batch {batch_size}",
        "images/s",
        batch_size / statistics.median(dense for dense, _ in times),
        batch_size / statistics.median(sparse for _, sparse in times),
        ratios.median,
        (ratios.low, ratios.high),
        1 / macs_share,
        more_is_better=True,
    )


def latency_rows(times: Sequence[tuple[float, ...]], macs_share: float) -> list[Row]:
    """Milliseconds of a single image at percentiles; the ratio at the median is that of the pairs.

    Args:
        times: seconds per image, (dense, sparse), pair by pair.
        macs_share: of the dense network's MACs.
    """
    dense, sparse = (percentiles_of(column) for column in zip(*times, strict=True))
    pairs = spread([of_sparse / of_dense for of_dense, of_sparse in times])
    rows = []
    for percentile in PERCENTILES:
        ratio = sparse[percentile] / dense[percentile]
        ratios = pairs if percentile == 50 else Spread(ratio, ratio, ratio)
        rows.append(
            Row(
                f"latency, batch 1, p{percentile}",
                "ms",
                1e3 * dense[percentile],
                1e3 * sparse[percentile],
                ratios.median,
                (ratios.low, ratios.high) if percentile == 50 else None,
                macs_share,
            )
        )
    return rows


def count_tokens(model: nn.Module, run: Callable[..., Any], images: Tensor) -> tuple[TokenUse | None, Tensor | None]:
    """What a model keeps of these images, and the kept patches ``[B, stages]``; None without a selector.

    Args:
        run: the model in the precision that is measured, as a function of images.
    """
    selector = cast(Any, getattr(model, "selector", None))
    if selector is None:
        return None, None
    selection = run(images, return_selection=True)[1]
    tokens = tokens_per_block(selection, len(find_blocks(model))).double()
    kept = selection.counts
    known = known_tokens(model)
    if known is not None:
        return known, kept
    use = TokenUse(
        stages=selector.stages,
        patches=int(selection.masks[0].shape[1]),
        kept=tuple(kept.double().mean(dim=0).tolist()),
        mean=tuple(tokens.mean(dim=0).tolist()),
        mean_square=tuple(tokens.square().mean(dim=0).tolist()),
    )
    return use, kept


def check_image_size(path: Path, info: SparseInfo, model: nn.Module) -> None:
    """Refuse a file that says another image size than its model has, before images of that size are made.

    Raises:
        CheckpointError: it says so.
    """
    embed = cast(Any, getattr(model, "patch_embed", None))
    taken = getattr(embed, "img_size", None)
    if taken is None:
        return
    given = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    fits = given == tuple(taken) if embed.strict_img_size else max(given) <= LARGEST * max(taken)
    if not fits or embed.proj.in_channels != info.in_chans:
        expected = f"{taken[0]} x {taken[1]} x {embed.proj.in_channels}, which the model takes"
        raise fault(path, "image size", expected=expected, found=f"{given[0]} x {given[1]} x {info.in_chans}")


def create_dense(info: SparseInfo) -> nn.Module:
    """The dense twin, with random weights, on the CPU.

    Raises:
        CheckpointError: a file that claims more dormant units than this machine has memory for.
    """
    with torch.device("meta"):
        size = sum(parameter.nbytes for parameter in create_model(info.model, **dict(info.model_args)).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40
    if 2 * size > memory:
        raise CheckpointError(
            f"{info.model}: its dense twin takes {size / 2**30:,.1f} GiB, more than half of this machine's memory"
        )
    return create_model(info.model, **dict(info.model_args)).eval()


def dense_file_size(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights as a plain safetensors file."""
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format).to(dtype if tensor.is_floating_point() else None)
        for name, tensor in model.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "dense.safetensors")
        return (Path(folder) / "dense.safetensors").stat().st_size


def load(path: Path, setting: Setting, kernels: str) -> nn.Module:
    """The network of a checkpoint, with these products, chosen for the precision that is measured."""
    model = load_sparse(path, create_model=create_model, device=setting.on)
    if kernels == "dense":
        return model
    return accelerate(model, load_sparse_masks(path), kernels=kernels, dtype=getattr(torch, setting.amp))


def run_sparse(path: Path, images: np.ndarray, setting: Setting, kernels: str) -> Step:
    """A forward pass of the checkpoint (importable, so that it can run in a process of its own)."""
    model = load(path, setting, kernels)
    return inference(model, torch.from_numpy(images).to(setting.on), setting)


def run_dense(info: SparseInfo, images: np.ndarray, setting: Setting) -> Step:
    """A forward pass of the dense twin."""
    return inference(create_dense(info).to(setting.on), torch.from_numpy(images).to(setting.on), setting)


def memory_row(path: Path, info: SparseInfo, images: Tensor, setting: Setting, kernels: str) -> Row:
    """MiB of the network and of what it needs to classify one batch."""
    plain = replace(setting, compile=False)  # else the compiler's own memory would count
    pixels = images.cpu().numpy()
    sparse = peak_memory(run_sparse, path, pixels, plain, kernels, device=setting.on) / 2**20
    dense = peak_memory(run_dense, info, pixels, plain, device=setting.on) / 2**20
    return Row(f"peak memory, batch {len(images)}", "MiB", dense, sparse, sparse / max(dense, 1e-9))


def measure_report(setting: Setting, options: ReportOptions) -> Report:
    """A sparse checkpoint against its dense twin: size, MACs, speed, memory; what is ideal beside what is achieved.

    Args:
        setting: batch size, precision, device and number of pairs.
        options: the checkpoint, and images for it.

    Raises:
        ConfigError, CheckpointError: there is no checkpoint, it is damaged, or there are no images for it.
    """
    if options.checkpoint is None:
        raise ConfigError("give a sparse checkpoint, such as runs/<name>/sparse.safetensors")
    path = find_checkpoint(options.checkpoint, "checkpoint")
    info = read_info(path)
    device = setting.on
    contents = read_sparse(path)
    plain = load(path, setting, "dense")  # whose layers can be counted
    check_image_size(path, info, plain)
    images, source = sample(options.images, path, info, setting.batch_size)
    images = images.to(device)
    dense = create_dense(info).to(device)
    dtype = next((t.dtype for t in contents.tensors.values() if t.is_floating_point()), torch.float32)
    sparse = plain if options.kernels == "dense" else load(path, setting, options.kernels)
    use, kept = count_tokens(sparse, classifier(sparse, replace(setting, compile=False)), images)
    input_size = (images.shape[1], images.shape[2], images.shape[3])
    count, dense_count = count_used(plain, contents.masks, use, input_size), count_used(dense, {}, None, input_size)
    share = (count.macs if options.kernels == "dense" else count.live_macs) / dense_count.macs

    # The same model is compiled once for batches and once for single images.
    batches = alternate(
        inference(dense, images, setting), inference(sparse, images, setting), device=device,
        pairs=WARMUP + setting.pairs,
    )[WARMUP:]  # fmt: skip
    singles = images.split(1)
    latencies = alternate(
        _one_by_one(classifier(dense, setting), singles), _one_by_one(classifier(sparse, setting), singles),
        device=device, pairs=len(singles) + options.calls,
    )[len(singles) :]  # fmt: skip
    rows = [
        *size_rows(count, dense_count, path.stat().st_size, dense_file_size(dense, dtype)),
        throughput_row(batches, setting.batch_size, share),
        *latency_rows(latencies, share),
    ]
    if options.kernels != "dense" and setting.amp == "float32" and device.type == "cpu":
        rows += onnx_rows(dense, sparse, images, setting)
    facts = describe(info, sparse, dense, use, kept)
    facts += [("images", source), ("precision", setting.amp + _compiled(setting))]
    if options.kernels != "dense":
        facts.append(("kernels", describe_choices(sparse)))
    del dense, sparse, plain
    rows.append(memory_row(path, info, images, setting, options.kernels))
    return Report(str(path), tuple(facts), tuple(rows))


def onnx_rows(dense: nn.Module, sparse: nn.Module, images: Tensor, setting: Setting) -> list[Row]:
    """Throughput beside the dense twin in onnxruntime, where that is installed and takes the twin."""
    try:
        session = session_for(dense, images)
    except (ConfigError, CheckpointError):
        return []
    times = alternate(
        lambda: run_onnx(session, images), inference(sparse, images, setting), device=setting.on,
        pairs=WARMUP + setting.pairs, rest=REST,
    )[WARMUP:]  # fmt: skip
    row = throughput_row(times, setting.batch_size, 1.0)
    return [replace(row, name=f"{row.name}, dense in onnxruntime", ideal=None)]


def _one_by_one(run: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> Step:
    """A step that classifies the next image, so that two of them that take turns see the same ones."""
    following = itertools.cycle(images)
    return lambda: run(next(following))


def _compiled(setting: Setting) -> str:
    return ", torch.compile (not for the memory)" if setting.compile else ""


def describe(
    info: SparseInfo, sparse: nn.Module, dense: nn.Module, use: TokenUse | None, kept: Tensor | None
) -> list[tuple[str, str]]:
    """What is in the checkpoint, for people."""
    facts = [("model", info.model), ("prunable weights", f"{info.budget} live")]
    if info.live_heads or info.live_neurons:
        blocks, dense_blocks = (list(find_blocks(model).values()) for model in (sparse, dense))
        for kind in ("heads", "neurons"):
            live, of = (sorted({getattr(block, kind).count() for block in group}) for group in (blocks, dense_blocks))
            facts.append((f"{kind} of a block", f"{' or '.join(map(str, live))} of {' or '.join(map(str, of))}"))
    if use is not None and kept is not None:
        facts.append(("patches kept", describe_tokens(use)))
        least, most = int(kept[:, -1].min()), int(kept[:, -1].max())
        if least < most:
            facts.append(("after the last stage", f"from {least} to {most}, image by image"))
    if "top1" in info.metrics:
        facts.append(("top-1, when it was saved", f"{info.metrics['top1']:.2f} %"))
    return facts
