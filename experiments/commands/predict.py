"""``sparse-trainer predict``: what a sparse checkpoint sees in image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.markup import escape

from experiments.config.explaining import explain
from experiments.config.run_config import choose_device, has_bfloat16_matmul
from experiments.errors import ConfigError
from experiments.evaluation.precision import precision_context
from experiments.evaluation.predicting import Prediction, Predictions, find_images, predict
from experiments.evaluation.token_overlay import draw
from experiments.inspection.pictures import MOST_IMAGES, check_output, save_picture
from experiments.terminal import create_console, print_table, run_command
from experiments.training.pretrained import find_checkpoint
from sparse_trainer.files.checkpoint import read_info
from sparse_trainer.kernels.accelerate import KERNELS


def add_arguments(parser: ArgumentParser) -> None:
    """All options."""
    parser.add_argument("checkpoint", nargs="?", help="a sparse checkpoint, or the folder of a finished run")
    parser.add_argument("images", nargs="*", type=str, help="image files, and folders of them")
    parser.add_argument("--top", type=int, default=5, help="classes that are said of each image")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--amp", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="precision of matrix products"
    )
    parser.add_argument(
        "--overlay",
        type=str,
        default=None,
        metavar="FILE",
        help=f"draw the first {MOST_IMAGES} images, the patches dimmed that were not looked at, such as overlay.png",
    )
    parser.add_argument(
        "--kernels",
        choices=list(KERNELS),
        default="dense",
        help="auto: for each layer the fastest of the dense product and those that skip dead weights, and attention of "
        "images of unequal lengths in one call (a CPU needs a C++ compiler at the first use); sparse: ours wherever "
        "there is one",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("predict", lambda: _predict(arguments))


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="sparse-trainer predict",
        description="What a sparse checkpoint sees in images: the likeliest classes and their shares. Files that "
        "cannot be read are named and skipped.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        options = parser.parse_args(list(arguments))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, arguments, sections=())) from error
    if options.checkpoint is None or not options.images:
        raise ConfigError("give a sparse checkpoint, such as runs/<name>/sparse.safetensors, and images or folders")
    for name in ("top", "batch_size"):
        if options[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {options[name]} is not a positive whole number")
    return options


def _predict(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    path = find_checkpoint(options.checkpoint, "checkpoint")
    device, amp = choose_device(options.device), options.amp
    if amp == "auto":
        amp = "bfloat16" if has_bfloat16_matmul(device) else "float32"
    files = find_images(options.images)
    if options.overlay is not None:
        output = Path(options.overlay)
        check_output("--overlay", output, path, read_info(path))
        if any(output.exists() and output.samefile(file) for file in files if Path(file).exists()):
            raise ConfigError(f"--overlay: {output} is one of the images; choose another name")
    found, model = predict(
        path,
        files,
        device=device,
        amp=amp,
        batch_size=options.batch_size,
        keep=MOST_IMAGES,
        kernels=options.kernels,
    )
    if options.overlay is not None:
        info = found.info
        try:
            picture, _ = draw(model, found.first.to(device), info.mean, info.std, precision_context(device, amp))
        except ValueError as error:
            raise ConfigError(f"--overlay: {error}") from error
        save_picture("--overlay", picture, Path(options.overlay))
    if options.json:
        print(json.dumps(_content(str(path), found, options.top, options.overlay, amp, device)))
        return 0
    rows = [(escape(image.name), escape(_words(image, found.class_names, options.top))) for image in found.images]
    rows += [(escape(name), escape(f"skipped: {reason}")) for name, reason in found.skipped.items()]
    console = create_console()
    print_table(console, escape(str(path)), rows)
    skipped = f", {len(found.skipped):,} skipped" if found.skipped else ""
    speed = f"{len(found.images) / found.seconds:,.1f} images/s, {amp} on {device}, reading included"
    number = len(found.images)
    console.print(f"{number:,} image{'' if number == 1 else 's'}{skipped}; {speed}", soft_wrap=True, markup=False)
    if options.overlay is not None:
        drawn = min(len(found.images), len(found.first))
        console.print(
            f"{options.overlay}: {drawn} images, each with what is left of its patches", soft_wrap=True, markup=False
        )
    return 0


def _best(image: Prediction, names: Sequence[str], top: int) -> list[tuple[str, float]]:
    values, classes = image.shares.topk(min(top, len(names)))
    return [(names[number], share) for number, share in zip(classes.tolist(), values.tolist(), strict=True)]


def _words(image: Prediction, names: Sequence[str], top: int) -> str:
    """``dog 97.3 %, cat 2.1 %``, and the patches kept."""
    text = ", ".join(f"{name} {share:.1%}".replace("%", " %") for name, share in _best(image, names, top))
    return text + (f"; patches kept: {', '.join(map(str, image.kept))}" if image.kept else "")


def _content(
    checkpoint: str, found: Predictions, top: int, overlay: str | None, amp: str, device: torch.device
) -> dict[str, Any]:
    images = []
    for image in found.images:
        best = [{"class": name, "share": share} for name, share in _best(image, found.class_names, top)]
        images.append({"image": image.name, "classes": best, **({"patches_kept": image.kept} if image.kept else {})})
    return {
        "checkpoint": checkpoint,
        "images": images,
        "skipped": [{"image": name, "reason": reason} for name, reason in found.skipped.items()],
        "images_per_second": len(found.images) / found.seconds,
        "amp": amp,
        "device": str(device),
        **({"overlay": overlay} if overlay is not None else {}),
    }
