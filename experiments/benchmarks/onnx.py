"""The compact network with top-k tokens in onnxruntime and in PyTorch, each against the dense network there."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from experiments.benchmarks.setting import (
    Setting,
    Step,
    Structure,
    inference,
    macs_of,
    make_model,
    make_small,
    textured_images,
)
from experiments.benchmarks.timing import Figure, alternate, percentiles_of, summarize
from experiments.exports.onnx import build_onnx, export_onnx, onnx_session, require_onnx, run_onnx
from sparse_trainer import flops

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = torch.device("cpu")
WARMUP = 2
"""Rounds that do not count."""
REST = 0.2
"""Seconds before each timing: onnxruntime's threads wait busily for more work, up to 80 ms long on the machine on which
this was looked at, and would take a core from whoever comes next."""


def session_for(model: nn.Module, images: Tensor) -> InferenceSession:
    """The model in onnxruntime, on as many threads as torch has, for images ``[B, C, H, W]``.

    Raises:
        ConfigError: a library is missing.
        CheckpointError: the model cannot be written as ONNX.
    """
    size = (images.shape[1], images.shape[2], images.shape[3])
    return onnx_session(build_onnx(model, size).SerializeToString(), torch.get_num_threads())


def benchmark_onnx(setting: Setting, structure: Structure) -> list[Figure]:
    """Throughput and latency of the compact network over the dense one, in PyTorch and in onnxruntime, in one run.

    Args:
        setting: model, size and number of rounds, in which all four networks take turns.
        structure: what is live; tokens is what top-k keeps at the input.

    Raises:
        ConfigError: there is no such model, or a library is missing.
        CheckpointError: the network cannot be exported.
    """
    require_onnx("onnx")
    dense, small = make_model(setting).eval(), make_small(setting, structure, structure.top_k).eval()
    images = textured_images(setting.batch_size, setting.image_size, CPU)
    macs, dense_macs = macs_of(small, structure), flops.count(dense).macs
    ideal = dense_macs / macs
    size = (images.shape[1], images.shape[2], images.shape[3])
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx", Path(folder) / "small.onnx"]
        differences = [
            export_onnx(model, file, input_size=size) for model, file in zip((dense, small), files, strict=True)
        ]
        sizes = [file.stat().st_size / 1e6 for file in files]
        sessions = [onnx_session(file, threads) for file in files]

    def runs(batch: torch.Tensor) -> list[Step]:
        """PyTorch dense and compact, onnxruntime dense and compact."""
        in_torch = [inference(model, batch, setting) for model in (dense, small)]
        return [*in_torch, *(lambda session=session: run_onnx(session, batch) for session in sessions)]

    figures = [
        Figure("MACs of one image", macs, "", dense_macs, macs / dense_macs),
        Figure("ONNX file", sizes[1], "MB", sizes[0], sizes[1] / sizes[0]),
        Figure("largest difference of logits, onnxruntime to PyTorch", differences[1], "", differences[0]),
    ]
    times = alternate(*runs(images), device=CPU, pairs=WARMUP + setting.pairs, rest=REST)[WARMUP:]
    columns = list(zip(*times, strict=True))
    for name, first in (("PyTorch", 0), ("onnxruntime", 2)):
        found = summarize([(row[first], row[first + 1]) for row in times])
        speeds = [setting.batch_size / seconds for seconds in (found.second, found.first)]
        figures += [
            Figure(f"{name}: throughput", speeds[0], "images/s", speeds[1], 1 / found.ratio, ideal),
            Figure(f"{name}: achieved over ideal", 1 / found.ratio / ideal, "", ideal=1.0),
        ]
    for name, pytorch, onnxruntime in (("dense", 0, 2), ("compact", 1, 3)):
        speeds = [setting.batch_size / statistics.median(columns[column]) for column in (onnxruntime, pytorch)]
        ratio = summarize([(row[onnxruntime], row[pytorch]) for row in times]).ratio
        figures.append(Figure(f"{name}: onnxruntime over PyTorch", speeds[0], "images/s", speeds[1], ratio))
    calls = 3 * setting.pairs
    singles = alternate(*runs(images[:1]), device=CPU, pairs=WARMUP + calls, rest=REST)[WARMUP:]
    latencies = [percentiles_of(column) for column in zip(*singles, strict=True)]
    for name, first in (("PyTorch", 0), ("onnxruntime", 2)):
        for percentile, seconds in latencies[first + 1].items():
            of_dense = latencies[first][percentile]
            figures.append(
                Figure(
                    f"{name}: latency at batch 1, p{percentile}",
                    1e3 * seconds,
                    "ms",
                    1e3 * of_dense,
                    seconds / of_dense,
                    1 / ideal,
                )
            )
    return figures
