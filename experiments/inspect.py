"""``sparse-trainer inspect``: what is in a sparse checkpoint, and which patches it looks at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import create_transform
from torch import Tensor, nn

from experiments.augment import normalize
from experiments.config import ConfigError, explain
from experiments.console import create_console, print_table, run_command
from experiments.data_config import DataConfig
from experiments.evaluate import data_of, open_eval_data
from experiments.metrics import known_tokens, precision_context
from experiments.overlay import draw, examples
from experiments.pretrained import find_checkpoint
from models import Selection, create_model
from sparse_trainer.checkpoint import SparseInfo, load_sparse, load_sparse_masks, read_info
from sparse_trainer.flops import Count, LayerCount, count
from sparse_trainer.units import BlockUnits, find_blocks

MOST_IMAGES = 10
"""Rows of a picture."""


def add_arguments(parser: ArgumentParser) -> None:
    """All options."""
    parser.add_argument("checkpoint", nargs="?", help="a sparse checkpoint, or the folder of a finished run")
    parser.add_argument(
        "--images",
        nargs="+",
        type=str,
        default=None,
        help=f"image files or folders to draw, the first {MOST_IMAGES}; without it some of the evaluation images",
    )
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        help="picture to write, such as overlay.png: dropped patches dimmed, by stage",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("inspect", lambda: _inspect(arguments))


@dataclass(frozen=True)
class Part:
    """A block, or a weight outside of the blocks."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  #: of its weights, as they are
    live: int  #: weights that are in the network
    total: int  #: weights of the dense network
    macs: float  #: of one image, live weights only
    heads: tuple[int, int] | None = None  #: live and of the dense network
    neurons: tuple[int, int] | None = None
    tokens: float | None = None  #: mean that enters

    @property
    def density(self) -> float:
        return self.live / self.total


def tokens_entering(model: nn.Module, info: SparseInfo) -> list[float] | None:
    """Mean tokens that enter each block: known for top-k, measured at the last evaluation for thresholds.

    Returns:
        None without a selector, and where nothing was measured.
    """
    known = known_tokens(model)
    if known is not None:
        return list(known.mean)
    selector = cast(Any, getattr(model, "selector", None))
    if selector is None or any(f"tokens_kept/{stage}" not in info.metrics for stage in selector.stages):
        return None
    prefix, left = cast(Any, model).num_prefix_tokens, float(cast(Any, model).patch_embed.num_patches)
    entering = []
    for block in range(len(cast(Any, model).blocks)):
        left = info.metrics[f"tokens_kept/{block}"] if block in selector.stages else left
        entering.append(prefix + left)
    return entering


def parts_of(model: nn.Module, masks: Mapping[str, Tensor], info: SparseInfo) -> list[Part]:
    """The blocks and the weights around them, in the model's order, counted on the tensors."""
    with torch.device("meta"):
        dense = create_model(info.model, **dict(info.model_args))
    size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    tokens = tokens_entering(model, info)
    blocks: dict[str, BlockUnits] = {}
    try:
        blocks, dense_blocks = find_blocks(model), find_blocks(dense)
        counted: Count = count(model, masks, tokens=tokens)
    except ValueError:  # not one of timm's VisionTransformers
        counted = count(model, masks, input_size=(info.in_chans, *size))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    dense_sizes = {name: parameter.numel() for name, parameter in dense.named_parameters()}

    def part(name: str, layers: Mapping[str, LayerCount], **more: Any) -> Part:
        weights = [layer for layer in layers if layer in shapes]
        return Part(
            name=name,
            shapes={layer.removesuffix(".weight").removeprefix(f"{name}."): shapes[layer] for layer in weights},
            live=sum(layers[layer].live for layer in weights),
            total=sum(dense_sizes.get(layer, layers[layer].parameters) for layer in weights),
            macs=sum(layer.live_macs for layer in layers.values()),
            **more,
        )

    found: dict[str, Part] = {}
    for index, (name, block) in enumerate(blocks.items()):
        layers = {key: layer for key, layer in counted.layers.items() if key.startswith(f"{name}.")}
        found[name] = part(
            name,
            layers,
            heads=(block.heads.count(), dense_blocks[name].heads.count()),
            neurons=(block.neurons.count(), dense_blocks[name].neurons.count()),
            tokens=tokens[index] if tokens is not None else None,
        )
    for key, layer in counted.layers.items():
        if _owner(key, blocks) not in blocks:
            found[_owner(key, blocks)] = part(_owner(key, blocks), {key: layer})
    order = list(dict.fromkeys(_owner(name, blocks) for name in shapes))
    return sorted(found.values(), key=lambda item: order.index(item.name))


def _owner(name: str, blocks: Mapping[str, object]) -> str:
    """The block that a parameter or layer belongs to, else its own name."""
    inside = [block for block in blocks if name.startswith(f"{block}.")]
    return inside[0] if inside else name.removesuffix(".weight")


def report_of(path: Path) -> dict[str, Any]:
    """Everything that a checkpoint says of itself and that can be counted on it, as JSON values.

    Raises:
        CheckpointError: the file is damaged.
    """
    info = read_info(path)
    model = load_sparse(path, create_model=create_model)
    masks = load_sparse_masks(path)
    parts = parts_of(model, masks, info)
    return {
        "checkpoint": str(path),
        "bytes": path.stat().st_size,
        "model": info.model,
        "model_args": dict(info.model_args),
        "selector": None if info.selector is None else dict(info.selector),
        "input": {"image_size": info.image_size, "in_chans": info.in_chans, "mean": info.mean, "std": info.std},
        "class_names": info.class_names,
        "parts": [
            {
                "name": part.name,
                "shapes": part.shapes,
                "live": part.live,
                "total": part.total,
                "density": part.density,
                "macs": part.macs,
                "heads": part.heads,
                "neurons": part.neurons,
                "tokens": part.tokens,
            }
            for part in parts
        ],
        "live_parameters": info.budget.live,
        "total_parameters": info.budget.total,
        "density": info.budget.density,
        "macs": info.macs,
        "provenance": {"recipe": info.recipe, "step": info.step, "metrics": dict(info.metrics)},
    }


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """The parts, then the totals and where they come from."""
    with_tokens = any(part["tokens"] is not None for part in report["parts"])
    table = Table(title=report["checkpoint"], title_justify="left")
    table.add_column("part", overflow="fold")
    table.add_column("shape", overflow="fold")
    for name in ("live weights", "density", "MMACs", "heads", "neurons", *(["tokens"] if with_tokens else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for part in report["parts"]:
        row = [
            part["name"],
            _shapes(part["shapes"]),
            f"{part['live']:,}",
            f"{part['density']:.1%}",
            f"{part['macs'] / 1e6:,.2f}",
            *(f"{part[key][0]:,} of {part[key][1]:,}" if part[key] else "" for key in ("heads", "neurons")),
        ]
        if with_tokens:
            row.append("" if part["tokens"] is None else f"{part['tokens']:.1f}")
        table.add_row(*row)
    console.print(table)
    provenance, selector, given = report["provenance"], report["selector"], report["input"]
    rows = [
        ("live parameters", f"{report['live_parameters']:,} of {report['total_parameters']:,} prunable weights"),
        ("MACs per image", f"{report['macs'] / 1e6:,.1f} M live, as measured at its last evaluation"),
        ("model", f"{report['model']} {json.dumps(report['model_args'])}"),
        ("token selector", "none" if selector is None else json.dumps(selector)),
        (
            "input",
            f"{' x '.join(map(str, given['image_size']))} x {given['in_chans']}, mean {_numbers(given['mean'])}, "
            f"std {_numbers(given['std'])}",
        ),
        ("made by", f"recipe {provenance['recipe'] or '(unnamed)'}, {provenance['step']:,} steps"),
        ("metrics", ", ".join(f"{name} {value:.6g}" for name, value in provenance["metrics"].items()) or "none"),
        ("file", f"{report['bytes'] / 1e6:,.3f} MB"),
    ]
    if report["class_names"] is not None:
        rows.insert(5, ("classes", f"{len(report['class_names'])}: {_some(report['class_names'])}"))
    print_table(console, "all of it", rows)


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """What tells the shapes of a block, or the shape of one weight."""
    readers = {name.rsplit(".", 1)[-1]: shape for name, shape in shapes.items() if "qkv" in name or "fc1" in name}
    if readers:
        return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in readers.items())
    return ", ".join("x".join(map(str, shape)) for shape in shapes.values())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def read_images(paths: Sequence[str], config: DataConfig, info: SparseInfo) -> tuple[list[str], Tensor]:
    """Names, and images ``[B, C, S, S]`` normalised as the model wants them: resized, and cut to the centre.

    Raises:
        ConfigError: a file is missing or no image, or a folder holds none.
    """
    known = Image.registered_extensions()
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in known) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"--images: {name} holds no images")
        files += inside
    files = files[:MOST_IMAGES]
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    transform = create_transform(
        (info.in_chans, height, width),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        use_prefetcher=True,
    )
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = transform(image.convert("L" if info.in_chans == 1 else "RGB"))
        except FileNotFoundError as error:
            raise ConfigError(f"--images: there is no {file}") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigError(f"--images: {file} cannot be read as an image: {error}") from error
        images.append(torch.as_tensor(pixels).view(info.in_chans, height, width))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    return [str(file) for file in files], normalize(torch.stack(images), mean, std)


def evaluation_images(path: Path, info: SparseInfo) -> tuple[list[str], Tensor]:
    """A few of the images that the checkpoint was evaluated on: class names, and the images as above."""
    data = open_eval_data(data_of(path, info), info, "cpu")
    images, targets = next(iter(data.eval.batches()))
    places = examples(torch.arange(len(targets)), targets, MOST_IMAGES)
    return [data.class_names[int(targets[place])] for place in places], images[places]


def draw_images(path: Path, paths: Sequence[str] | None, output: Path) -> tuple[list[str], Selection]:
    """Write the picture; returns the names of the images and what was kept of them.

    Raises:
        ConfigError: the checkpoint drops no patches, or a file cannot be read or written.
    """
    info = read_info(path)
    if info.selector is None:
        raise ConfigError(f"--output: {path} has no token selector, so it drops nothing that could be drawn")
    if output.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--output: {output} is no name of a picture; end it in .png")
    names, images = read_images(paths, data_of(path, info), info) if paths else evaluation_images(path, info)
    model = load_sparse(path, create_model=create_model)
    try:
        picture, selection = draw(model, images, info.mean, info.std, precision_context(torch.device("cpu"), "float32"))
    except ValueError as error:
        raise ConfigError(f"--output: {error}") from error
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    try:
        Image.fromarray(pixels).save(output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from error
    return names, selection


def _inspect(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="sparse-trainer inspect",
        description="What is in a sparse checkpoint; with --output a picture of the patches that it looks at.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        options = parser.parse_args(list(arguments))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(explain(str(error), parser, arguments, sections=())) from error
    if options.checkpoint is None:
        raise ConfigError("give a sparse checkpoint, such as runs/<name>/sparse.safetensors")
    if options.images is not None and options.output is None:
        raise ConfigError("--images: needs --output, the picture to write, such as overlay.png")
    path = find_checkpoint(options.checkpoint, "checkpoint")
    console = create_console()
    if options.output is None:
        report = report_of(path)
        if options.json:
            print(json.dumps(report))
        else:
            print_report(console, report)
        return 0
    names, selection = draw_images(path, options.images, Path(options.output))
    patches, counts = selection.masks[0].shape[1], selection.counts.tolist()
    if options.json:
        images = [{"image": name, "kept": kept} for name, kept in zip(names, counts, strict=True)]
        print(json.dumps({"output": options.output, "stages": selection.stages, "patches": patches, "images": images}))
        return 0
    stages = ", ".join(f"block {stage}" for stage in selection.stages)
    rows = [(name, ", ".join(map(str, kept))) for name, kept in zip(names, counts, strict=True)]
    print_table(console, "patches kept", rows)
    console.print(
        f"{options.output}: a row per image; the image itself, then what is left of its {patches} patches before "
        f"{stages}",
        soft_wrap=True,
        markup=False,
    )
    return 0
