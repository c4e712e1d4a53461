"""``sparse-trainer evaluate``: accuracy of a sparse checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from experiments.config.explaining import explain
from experiments.config.reading import build, explain_options
from experiments.config.run_config import RunConfig, choose_device, has_bfloat16_matmul
from experiments.data.data_config import OF_THE_MODEL, TRAINING_ONLY, DataConfig
from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of, evaluate
from experiments.evaluation.measuring import describe_tokens
from experiments.terminal import create_console, print_table, run_command
from sparse_trainer.files.checkpoint import read_info
from sparse_trainer.kernels.accelerate import KERNELS


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
    parser.add_argument(
        "--kernels",
        choices=list(KERNELS),
        default="dense",
        help="auto: for each layer the fastest of the dense product and those that skip dead weights, and attention of "
        "images of unequal lengths in one call (a CPU needs a C++ compiler at the first use); sparse: ours wherever "
        "there is one",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_class_arguments(DataConfig, "data", skip={*TRAINING_ONLY, *OF_THE_MODEL})
    explain_options(parser)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("evaluate", lambda: _evaluate(arguments))


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


def _parse(arguments: Sequence[str], defaults: DataConfig | None) -> Namespace:
    parser = ArgumentParser(
        prog="sparse-trainer evaluate",
        description="Accuracy of a sparse checkpoint. The data and its normalisation are those of the training.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add_arguments(parser)
    if defaults is not None:
        values = dataclasses.asdict(defaults).items()
        parser.set_defaults({f"data.{k}": v for k, v in values if k not in (*TRAINING_ONLY, *OF_THE_MODEL)})
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--data.")
        if argument.startswith("--data.") and key in TRAINING_ONLY:
            raise ConfigError(f"data.{key}: is for training alone; leave it out")
        if argument.startswith("--data.") and key in OF_THE_MODEL:
            raise ConfigError(f"data.{key}: is that of the checkpoint; leave it out")
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
    own = data_of(path, info)
    options = _parse(arguments, own)
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size: {options.batch_size} is not a positive whole number")
    config: RunConfig = build({"data": {**dataclasses.asdict(own), **options.as_dict()["data"]}})
    data_config = config.data
    if options.batch_size is not None:
        data_config = dataclasses.replace(data_config, eval_batch_size=options.batch_size)
    device = choose_device(options.device)
    amp = options.amp
    if amp == "auto":
        amp = "bfloat16" if has_bfloat16_matmul(device) else "float32"
    at_random = options.selection == "random"
    evaluation = evaluate(path, data_config, device=device, amp=amp, at_random=at_random, kernels=options.kernels)
    measured, macs = evaluation.measured, evaluation.macs
    found = measured.metrics
    numbers: dict[str, Any] = {
        **found,
        "images_per_second": found["images"] / evaluation.seconds,
        "live_parameters": info.budget.live,
        "total_parameters": info.budget.total,
        "macs": round(macs),
    }
    if options.kernels != "dense":
        numbers["kernels"] = evaluation.kernels
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
        ("classes", evaluation.summary[0]),
        ("pictures", evaluation.summary[1]),
        ("model", info.model),
        ("live parameters", str(info.budget)),
        ("MACs per image", f"{macs / 1e6:,.1f} M live"),
        ("speed", f"{numbers['images_per_second']:,.0f} images/s, {amp} on {device}, data included"),
    ]
    if options.kernels != "dense":
        rows.append(("kernels", evaluation.kernels))
    if measured.tokens is not None:
        chosen = "; drawn at random" if at_random else ""
        rows.insert(-1, ("patches kept", describe_tokens(measured.tokens) + chosen))
    for stage, images in evaluation.histogram.items():
        rows.insert(-1, (f"images by patches kept, block {stage}", describe_histogram(images)))
    print_table(create_console(), str(path), rows)
    return 0
