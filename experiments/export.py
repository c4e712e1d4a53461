"""``sparse-trainer export``: a sparse checkpoint in other formats, each checked before it gets its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.markup import escape
from torch import Tensor, nn

from experiments.config import ConfigError
from experiments.config_reading import explain
from experiments.console import create_console, print_table, run_command
from experiments.data_config import DataConfig
from experiments.evaluate import data_of
from experiments.exports import csr, dense, onnx
from experiments.exports.fixed_tokens import FixedTokens
from experiments.exports.staging import check_target, staged
from experiments.pretrained import find_checkpoint
from models import create_model
from models.token_selector import ThresholdSelector
from sparse_trainer.checkpoint import CheckpointError, SparseInfo, expand, load_sparse, read_sparse, save_sparse

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ENDINGS = {"dense": "-dense", "onnx": ".onnx", "csr": ".npz", "sparse": ".safetensors"}
TITLES = {
    "dense": "a folder that timm opens",
    "onnx": f"ONNX, operator set {onnx.OPSET}",
    "csr": "scipy.sparse matrices in an .npz file",
    "sparse": "a sparse checkpoint",
}


MOST_VALUES = 1 << 26
"""In an image that logits are compared on: a file may say any size."""


def add_arguments(parser: ArgumentParser) -> None:
    """All options."""
    parser.add_argument("checkpoint", nargs="?", help="a sparse checkpoint, or the folder of a finished run")
    parser.add_argument(
        "--format",
        choices=list(ENDINGS),
        default=None,
        help="dense: a folder for timm.create_model('local-dir:PATH', pretrained=True). onnx: the compact network, "
        "for any batch size (pip install 'sparse-trainer[onnx]'). csr: scipy.sparse matrices in one .npz file. "
        "sparse: a sparse checkpoint again, in another dtype.",
    )
    parser.add_argument("--output", type=str, default=None, help="file or folder to write; by default beside it")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default=None, help="of the stored weights; by default that of the checkpoint"
    )
    parser.add_argument(
        "--tokens",
        type=str,
        default=None,
        help="onnx, for a threshold selector: patches that every image keeps at each stage, such as 140,98,70",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return run_command("export", lambda: _export(arguments))


@dataclass(frozen=True)
class Exported:
    """What was written."""

    checkpoint: str
    format: str
    output: str
    dtype: str
    bytes: int
    dense_bytes: int  #: of the weights of the dense network in that dtype
    difference: float  #: greatest of any logit, from the checkpoint's in float32, on seeded random images
    notes: tuple[str, ...]  #: what else one should know
    use: str  #: how to open it


@dataclass(frozen=True)
class Source:
    """The checkpoint that is exported."""

    path: Path
    info: SparseInfo
    masks: Mapping[str, Tensor]  #: bool, by parameter name
    model: nn.Module  #: compact, in float32
    dtype: torch.dtype  #: to store weights in
    images: Tensor  #: ``[B, C, H, W]`` to compare logits on

    def rounded(self, model: nn.Module) -> nn.Module:
        """``model``, in float32, with the values that :attr:`dtype` can hold.

        Raises:
            ConfigError: a weight is too large for it.
        """
        if self.dtype == torch.float32:
            return model
        result = copy.deepcopy(model).to(self.dtype).float()
        for name, tensor in result.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ConfigError(
                    f"--dtype: {name_of(self.dtype)} holds at most {torch.finfo(self.dtype).max:,.0f}, and {name} has "
                    "a greater value; choose float32 or bfloat16"
                )
        return result


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def open_source(path: Path, dtype: torch.dtype | None) -> Source:
    """Read a checkpoint.

    Args:
        dtype: to store weights in; None for that of the file.

    Raises:
        CheckpointError: it is damaged, or does not take the images that it says.
    """
    contents = read_sparse(path)
    info = contents.info
    stored = next((t.dtype for t in contents.tensors.values() if t.is_floating_point()), torch.float32)
    model = load_sparse(path, create_model=create_model)
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    if info.in_chans * height * width > MOST_VALUES:  # of a model that takes images of any size
        raise CheckpointError(f"{path}: images of {height} x {width} x {info.in_chans} are too large to try it with")
    images = onnx.random_images((info.in_chans, height, width))
    try:
        with torch.inference_mode():
            model(images[:1])
    except Exception as error:  # of any model
        raise CheckpointError(f"{path}: the model does not take images of {height} x {width}: {error}") from error
    return Source(path, info, contents.masks, model, dtype or stored, images)


def images_of(source: Source) -> tuple[str, float, list[str]]:
    """Interpolation and crop of the images that the checkpoint was made for; a note where they are a guess."""
    try:
        data, notes = data_of(source.path, source.info), []
    except ConfigError:
        data = DataConfig()
        notes = [f"the run's config.yaml cannot be read; {data.interpolation} resizing without a crop is assumed"]
    return data.interpolation, data.crop_pct, notes


@torch.inference_mode()
def compare(found: nn.Module, expected: nn.Module, images: Tensor) -> float:
    """The greatest difference of their logits."""
    return float((found(images) - expected(images)).abs().max())


def check(found: nn.Module, expected: nn.Module, images: Tensor) -> None:
    """Make sure that what was written is the network that was meant.

    Raises:
        CheckpointError: its logits are others.
    """
    with torch.inference_mode():
        limit = onnx.TOLERANCE * max(1.0, float(expected(images).abs().max()))
    difference = compare(found, expected, images)
    if not difference <= limit:
        raise CheckpointError(
            f"what was written gives logits that differ from the checkpoint's by {difference:.2g}, more than "
            f"{limit:.2g}; it was removed"
        )


def export_dense(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """timm's folder; the largest difference of its logits, and notes."""
    info = source.info
    interpolation, crop_pct, notes = images_of(source)
    expected = dense.without_selector(source.model, info, compacted=True)
    expanded = dense.without_selector(expand(source.path, create_model=create_model), info, compacted=False)
    config = dense.timm_config(expanded, info, interpolation=interpolation, crop_pct=crop_pct)
    written = source.rounded(expanded)
    with staged(target, overwrite=overwrite) as new:
        dense.write_dense(new, written, config, source.dtype)
        opened = dense.open_dense(new)
        check(opened, source.rounded(expected), source.images)
    if info.selector is not None:
        notes.append(f"{dense.LEFT_OUT}. Logits are compared with the checkpoint's with all tokens kept")
    return compare(opened, expected, source.images), notes


def export_onnx(source: Source, target: Path, overwrite: bool, counts: Sequence[int] | None) -> tuple[float, list[str]]:
    """The ONNX file; as :func:`export_dense`."""
    info, model = source.info, source.model
    interpolation, crop_pct, notes = images_of(source)
    if counts is not None:
        try:
            model = FixedTokens(model, counts).eval()
        except ValueError as error:
            raise ConfigError(f"--tokens: {error}") from error
        notes.append(
            f"every image keeps its best {', '.join(map(str, counts))} patches, where the checkpoint decides image by "
            "image, so its accuracy may be another; measure it. Logits are compared with the checkpoint's by this rule"
        )
    if source.dtype != torch.float32:
        notes.append("weights are stored in 16 bits; input, output and arithmetic are float32")
    said = {
        **info.to_metadata(),
        "mean": info.mean,
        "std": info.std,
        "image_size": info.image_size,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "tokens": counts,
        "weights_dtype": name_of(source.dtype),
    }
    said.pop("input")
    rounded = source.rounded(model)
    _, channels, height, width = source.images.shape
    size = channels, height, width
    onnx.export_onnx(rounded, target, input_size=size, dtype=source.dtype, metadata=said, overwrite=overwrite)
    with torch.inference_mode():
        found = onnx.run_onnx(onnx.onnx_session(target), source.images)
        return float((found - model(source.images)).abs().max()), notes


def export_csr(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """The ``.npz`` file; as :func:`export_dense`."""
    rounded, notes = source.rounded(source.model), []
    opened = copy.deepcopy(source.model)
    with staged(target, overwrite=overwrite) as new:
        csr.write_csr(new, rounded, source.masks, source.info, source.dtype)
        opened.load_state_dict(csr.read_csr_file(new).state_dict())
        check(opened, rounded, source.images)
    if source.dtype == torch.bfloat16:
        notes.append("NumPy has no bfloat16: values are rounded to it and stored as float32")
    return compare(opened, source.model, source.images), notes


def export_sparse(source: Source, target: Path, overwrite: bool) -> tuple[float, list[str]]:
    """The sparse checkpoint; as :func:`export_dense`."""
    rounded = source.rounded(source.model)
    with staged(target, overwrite=overwrite) as new:
        save_sparse(
            new,
            source.model,
            masks=source.masks,
            info=source.info,
            dtype=source.dtype,
            create_model=create_model,
        )
        opened = load_sparse(new, create_model=create_model)
        check(opened, rounded, source.images)
    return compare(opened, source.model, source.images), []


WRITERS: dict[str, Callable[[Source, Path, bool], tuple[float, list[str]]]] = {
    "dense": export_dense,
    "csr": export_csr,
    "sparse": export_sparse,
}


def read_tokens(text: str | None, format: str, source: Source) -> tuple[int, ...] | None:
    """The counts of ``--tokens``; None where the network needs none.

    Raises:
        ConfigError: they are missing, or given where they mean nothing.
    """
    selector = getattr(source.model, "selector", None)
    needed = format == "onnx" and isinstance(selector, ThresholdSelector)
    if text is None and needed:
        assert isinstance(selector, ThresholdSelector)
        means = [source.info.metrics.get(f"tokens_kept/{stage}") for stage in selector.stages]
        known = [max(1, round(mean)) for mean in means if mean is not None]
        example = ",".join(map(str, known)) if len(known) == len(means) else "140,98,70"
        what = "the means of its last evaluation" if len(known) == len(means) else "falling numbers"
        raise ConfigError(
            "--format onnx: this checkpoint keeps another number of patches of each image, and a graph for batches "
            f"needs one number for all; say how many at its {len(means)} stages: --tokens {example} ({what})"
        )
    if text is None:
        return None
    if not needed:
        kind = "goes with --format onnx" if format != "onnx" else "is for checkpoints with a threshold selector"
        raise ConfigError(f"--tokens: {kind}; leave it out")
    parts = text.replace(" ", "").split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ConfigError(f"--tokens: {text!r} is not whole numbers with commas, such as 140,98,70")
    return tuple(map(int, parts))


def default_output(path: Path, format: str, dtype: str | None) -> Path:
    """A name beside the checkpoint: ``sparse-dense``, ``sparse-float16.onnx``, ..."""
    word = f"-{dtype}" if dtype not in (None, "float32") or format == "sparse" else ""
    ending = ENDINGS[format]
    return path.with_name(f"{path.stem}{ending}{word}" if format == "dense" else f"{path.stem}{word}{ending}")


def dense_parameters(info: SparseInfo) -> int:
    """Of the network with all heads and neurons and without a selector."""
    with torch.device("meta"):
        model = create_model(info.model, **dict(info.model_args))
    return sum(parameter.numel() for parameter in model.parameters())


def _use(format: str, target: Path) -> str:
    return {
        "dense": f"timm.create_model('local-dir:{target}', pretrained=True)",
        "onnx": f"onnxruntime.InferenceSession('{target}').run(['{onnx.OUTPUT}'], {{'{onnx.INPUT}': images}})",
        "csr": f"experiments.exports.csr.read_csr('{target}'), or numpy.load",
        "sparse": f"sparse-trainer evaluate {target}",
    }[format]


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="sparse-trainer export",
        description="Write a sparse checkpoint in another format. What was written is opened again and its logits "
        "compared before it gets its name.",
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
    if options.format is None:
        raise ConfigError(f"--format: give one of {', '.join(ENDINGS)}")
    return options


def _export(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    format = options.format
    if format == "onnx":
        onnx.require_onnx()
    path = find_checkpoint(options.checkpoint, "checkpoint")
    source = open_source(path, DTYPES.get(options.dtype))
    dtype, counts = name_of(source.dtype), read_tokens(options.tokens, format, source)
    target = Path(options.output) if options.output is not None else default_output(path, format, dtype)
    files = dense.FILES if format == "dense" else None
    check_target(target, checkpoint=path, overwrite=options.overwrite, files=files)
    if format == "onnx":
        difference, notes = export_onnx(source, target, options.overwrite, counts)
    else:
        difference, notes = WRITERS[format](source, target, options.overwrite)
    written = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    exported = Exported(
        checkpoint=str(path),
        format=format,
        output=str(target),
        dtype=dtype,
        bytes=sum(file.stat().st_size for file in written),
        dense_bytes=dense_parameters(source.info) * source.dtype.itemsize,
        difference=difference,
        notes=tuple(notes),
        use=_use(format, target),
    )
    if options.json:
        print(json.dumps(asdict(exported)))
        return 0
    share = exported.bytes / exported.dense_bytes
    rows = [
        ("written", exported.output),
        ("format", f"{TITLES[format]}, {dtype}"),
        ("size", f"{exported.bytes / 1e6:,.3f} MB, {share:.1%} of the dense network in {dtype}"),
        ("largest logit difference", f"{difference:.2g}, on {len(source.images)} random images, in float32"),
        *(("note", note) for note in notes),
        ("open it", exported.use),
    ]
    # A path may hold what rich takes for markup.
    print_table(create_console(), escape(f"{path}, exported"), [(name, escape(text)) for name, text in rows])
    return 0
