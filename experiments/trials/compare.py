"""Whether two finished runs are the same in every bit, but for what is measured with a clock."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from experiments.run_folder.folder import RunFolder
from sparse_trainer.files.checkpoint import load_resume
from sparse_trainer.mask_log import read_timeline

CLOCKS = ("train/images_per_second", "update/seconds", "result/images_per_second")
"""Numbers of ``metrics.jsonl`` and TensorBoard that a clock decides."""
BUNDLE_CLOCKS = ("seconds", "seconds_since", "images_since", "metrics_size", "metrics_line")
"""Parts of a resume bundle that a clock decides; the last two hold numbers of ``metrics.jsonl``."""
FILES = {
    "README.md",
    ".lock",
    "checkpoints",
    "config.yaml",
    "masks",
    "metrics.jsonl",
    "origin.json",
    "sparse.safetensors",
    "tensorboard",
}
"""What a finished run holds."""


def fingerprint(path: Path) -> dict[str, str]:
    """A digest by name of each thing that a finished run left: two runs are the same if their digests are.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = RunFolder(path)
    found = {
        "sparse checkpoint": _of_file(folder.sparse),
        "best checkpoint": _of_file(folder.best),
        "metrics": _of_value(read_metrics(folder.metrics)),
        "tensorboard": _of_value(read_events(folder.tensorboard)),
        "stray files": ", ".join(sorted(_strays(folder))),
    }
    for record in read_timeline(path) if (path / "masks").is_dir() else ():
        update = asdict(record.update) if record.update is not None else {}
        update.pop("seconds", None)
        values = [dict(record.live_heads), dict(record.live_neurons), update, record.masks()]
        found[f"masks of step {record.step}"] = _of_value(values)
    state = load_resume(folder.bundles()[0])
    found["step"] = folder.bundles()[0].name
    found |= {key: _of_value(value) for key, value in state.items() if key not in (*BUNDLE_CLOCKS, "trainer")}
    # Where a run lies is no part of what it is.
    found |= {f"state: {key}": _of_value(value) for key, value in state["trainer"].items() if key != "config"}
    return found


def differences(left: Mapping[str, str], right: Mapping[str, str]) -> list[str]:
    """Names of what is not the same in two fingerprints."""
    return [name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, without what a clock decides."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{tag: value for tag, value in record.items() if tag not in CLOCKS} for record in records]


def read_events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: steps and values of the scalars by tag, steps of the pictures and histograms; without
    what a clock decides."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it hides
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    shown = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in tags["scalars"]
        if tag not in CLOCKS
    }
    shown |= {tag: [(event.step, 0.0) for event in events.Images(tag)] for tag in tags["images"]}
    shown |= {tag: [(event.step, 0.0) for event in events.Histograms(tag)] for tag in tags["histograms"]}
    return {tag: shown[tag] for tag in sorted(shown)}


def _strays(folder: RunFolder) -> set[str]:
    """What does not belong into the folder of a finished run, such as files that were begun and not finished."""
    expected = {folder.best.name, *(path.name for path in folder.bundles())}
    checkpoints = {f"checkpoints/{path.name}" for path in folder.checkpoints.iterdir() if path.name not in expected}
    masks = {f"masks/{path.name}" for path in (folder.path / "masks").glob(".*")}
    return {path.name for path in folder.path.iterdir() if path.name not in FILES} | checkpoints | masks


def _of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_value(value: Any) -> str:
    """Digest of nested dicts, lists and tuples of tensors, numbers and texts: of their types and every bit."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(type(value).__name__.encode() + b":")
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, float):
            digest.update(struct.pack("<d", value))
        elif isinstance(value, Mapping):
            digest.update(f"{len(value)} ".encode())
            for key, inner in value.items():
                add(key)
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} ".encode())
            for inner in value:
                add(inner)
        else:
            text = repr(value).encode()
            digest.update(f"{len(text)} ".encode() + text)

    add(value)
    return digest.hexdigest()
