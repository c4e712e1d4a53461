"""``sparse-trainer evaluate``: accuracy of a sparse checkpoint."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from experiments.config import ConfigError, RunConfig, choose_device, has_bfloat16_matmul
from experiments.config_reading import build, explain, explain_options, load_config, naming, recipes
from experiments.console import create_console, print_table, run_command
from experiments.data import Data, DataConfig, create_data
from experiments.metrics import Measured, count_used, describe_tokens, measure
from experiments.precision import precision_context
from models import create_model
from models.token_selector import ThresholdSelector, TopKSelector
from sparse_trainer.checkpoint import CheckpointError, SparseInfo, load_sparse, load_sparse_masks, read_info


def add_arguments(parser: ArgumentParser) -> None:
    """All options; those of the data by their dotted names."""
    parser.add_argument("checkpoint", nargs="?", help="a sparse checkpoint, such as runs/<name>/sparse.safetensors")
    parser.add_argument("--batch-size", type=int, default=None, help="images at a time")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--amp", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="precision of matrix products"
    )
    parser.add_argument(
        "--selection",
        choices=["learned", "random"],
        default="learned",
        help="random: draw as many patches of every image as the selector keeps, to see what its choice is worth",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_class_arguments(DataConfig, "data")
    explain_options(parser)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("evaluate", lambda: _evaluate(arguments))


def data_of(checkpoint: Path, info: SparseInfo) -> DataConfig:
    """The data that a checkpoint was trained on: of its run folder, else of its recipe, else the embedded set."""
    for folder in checkpoint.resolve().parents[:2]:
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml").data
    known = recipes()
    return load_config(known[info.recipe]).data if info.recipe in known else DataConfig()


def open_eval_data(config: DataConfig, info: SparseInfo, device: str) -> Data:
    """The evaluation images as the checkpoint's model wants them.

    Raises:
        ConfigError: they are missing, or of other classes than the model's.
    """
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    if height != width:
        raise ConfigError(f"data.image_size: the model takes {height} x {width} pixels; only square images can be read")
    if config.image_size not in (None, height):
        raise ConfigError(
            f"data.image_size: {config.image_size} does not match the checkpoint's image size {height}; leave it out"
        )
    classes = info.class_names
    config = dataclasses.replace(
        config,
        image_size=height,
        in_chans=info.in_chans,
        mean=info.mean,
        std=info.std,
        # Nothing is trained: of the training images only their classes matter.
        train_subset=len(classes) if classes and not config.streams else None,
        batch_size=1,
        repeated_augmentation=1,
        mixup=0.0,
        cutmix=0.0,
    )
    with naming("data"):
        try:
            data = create_data(config, device=device, seed=0)
        except OSError as error:
            raise ValueError(f"cannot be read: {error}") from error
    if classes is not None and data.class_names != classes:
        raise ConfigError(
            f"data.dataset: {config.dataset!r} has {data.num_classes} classes ({_some(data.class_names)}), the "
            f"checkpoint knows {len(classes)} ({_some(classes)}); choose the data that it was trained on"
        )
    return data


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint achieved on a set of images."""

    info: SparseInfo
    measured: Measured
    macs: float  #: mean of one image, with the patches that these images kept
    seconds: float  #: reading the images included
    #: By the block before which patches are dropped: how many images kept so many, ``{"4": {"98": 12, ...}}``.
    histogram: dict[str, dict[str, int]]


def evaluate(
    path: Path, data_config: DataConfig, *, device: torch.device, amp: str, at_random: bool = False
) -> Evaluation:
    """Measure a sparse checkpoint.

    Args:
        data_config: as :func:`data_of` finds it.
        amp: float32, bfloat16 or float16.
        at_random: draw as many patches as the selector keeps, in place of those it keeps.

    Raises:
        CheckpointError: the file is damaged, or none, or its network cannot run.
        ConfigError: the images are missing, or of other classes than the model's.
    """
    info = read_info(path)
    model = load_sparse(path, create_model=create_model, device=device)
    if at_random:
        selector = getattr(model, "selector", None)
        if not isinstance(selector, TopKSelector | ThresholdSelector):
            raise ConfigError(f"--selection: random needs a checkpoint with a token selector; {path} has none")
        selector.chance = torch.Generator().manual_seed(0)
    data = open_eval_data(data_config, info, str(device))
    classes = getattr(model, "num_classes", data.num_classes)
    if classes != data.num_classes:
        raise ConfigError(
            f"data.dataset: {data_config.dataset!r} has {data.num_classes} classes, the checkpoint knows {classes}; "
            "choose the data that it was trained on"
        )
    started = time.perf_counter()
    with naming("data"):
        try:
            measured = measure(model, data.eval, precision_context(device, amp))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # its parts agree, but they are not those of a network
            raise CheckpointError(f"{path}: its network cannot run: {str(error).splitlines()[0][:300]}") from error
    seconds = time.perf_counter() - started
    macs = float(info.macs)
    histogram: dict[str, dict[str, int]] = {}
    if measured.tokens is not None:  # they depend on the images
        size = (data.in_chans, data.image_size, data.image_size)
        macs = count_used(model, load_sparse_masks(path), measured.tokens, size).live_macs
        if measured.kept is not None and (info.selector or {}).get("kind") == "threshold":
            for stage, counts in zip(measured.tokens.stages, measured.kept.unbind(dim=1), strict=True):
                kept, images = counts.unique(return_counts=True)
                histogram[str(stage)] = dict(zip(map(str, kept.tolist()), images.tolist(), strict=True))
    return Evaluation(info, measured, macs, seconds, histogram)


def describe_histogram(images: Mapping[str, int], bins: int = 8) -> str:
    """``98-111: 12, 112-125: 40, ...``: images by the patches they kept, in at most ``bins`` equal steps."""
    low, high = min(map(int, images)), max(map(int, images))
    width = -(-(high - low + 1) // bins)
    sums: dict[int, int] = {}
    for kept, count in images.items():
        step = (int(kept) - low) // width
        sums[step] = sums.get(step, 0) + count
    ends = {step: (low + step * width, min(high, low + (step + 1) * width - 1)) for step in sorted(sums)}
    return ", ".join(f"{a}-{b}: {sums[step]:,}" if a < b else f"{a}: {sums[step]:,}" for step, (a, b) in ends.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _parse(arguments: Sequence[str], defaults: DataConfig | None) -> Namespace:
    parser = ArgumentParser(
        prog="sparse-trainer evaluate",
        description="Accuracy of a sparse checkpoint. The data and its normalisation are those of the training.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add_arguments(parser)
    if defaults is not None:
        parser.set_defaults({f"data.{key}": value for key, value in dataclasses.asdict(defaults).items()})
    try:
        return parser.parse_args(list(arguments))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, arguments, sections=("data",))) from error


def _evaluate(arguments: Sequence[str]) -> int:
    named = _parse(arguments, None).checkpoint
    if named is None:
        raise ConfigError("give a sparse checkpoint, such as runs/<name>/sparse.safetensors")
    path = Path(named)
    info = read_info(path)
    options = _parse(arguments, data_of(path, info))
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size: {options.batch_size} is not a positive whole number")
    config: RunConfig = build({"data": options.as_dict()["data"]})
    data_config = config.data
    if options.batch_size is not None:
        data_config = dataclasses.replace(data_config, eval_batch_size=options.batch_size)
    device = choose_device(options.device)
    amp = options.amp
    if amp == "auto":
        amp = "bfloat16" if has_bfloat16_matmul(device) else "float32"
    at_random = options.selection == "random"
    evaluation = evaluate(path, data_config, device=device, amp=amp, at_random=at_random)
    measured, macs = evaluation.measured, evaluation.macs
    found = measured.metrics
    numbers: dict[str, Any] = {
        **found,
        "images_per_second": found["images"] / evaluation.seconds,
        "live_parameters": info.budget.live,
        "total_parameters": info.budget.total,
        "macs": round(macs),
    }
    if at_random:
        numbers["selection"] = "random"
    if evaluation.histogram:
        numbers["images_by_patches_kept"] = evaluation.histogram
    if options.json:
        print(json.dumps({"checkpoint": str(path), **numbers}))
        return 0
    rows = [
        ("accuracy", f"top-1 {found['top1']:.2f} %   top-5 {found['top5']:.2f} %"),
        ("loss", f"{found['loss']:.4f}"),
        ("images", f"{found['images']:,} of {data_config.dataset} ({data_config.eval_split})"),
        ("model", info.model),
        ("live parameters", str(info.budget)),
        ("MACs per image", f"{macs / 1e6:,.1f} M live"),
        ("speed", f"{numbers['images_per_second']:,.0f} images/s, {amp} on {device}, data included"),
    ]
    if measured.tokens is not None:
        chosen = "; drawn at random" if at_random else ""
        rows.insert(-1, ("patches kept", describe_tokens(measured.tokens) + chosen))
    for stage, images in evaluation.histogram.items():
        rows.insert(-1, (f"images by patches kept, block {stage}", describe_histogram(images)))
    print_table(create_console(), str(path), rows)
    return 0
