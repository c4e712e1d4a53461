"""``sparse-trainer export``: a sparse checkpoint in other formats, each checked before it gets its name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.markup import escape

from experiments.config.explaining import explain
from experiments.errors import ConfigError
from experiments.exports import dense, hub, onnx
from experiments.exports.source import Source, name_of, open_source
from experiments.exports.staging import check_target
from experiments.exports.writers import WRITERS, export_onnx
from experiments.terminal import create_console, print_table, run_command
from experiments.training.pretrained import find_checkpoint
from models import create_model
from models.threshold_selector import ThresholdSelector
from sparse_trainer.files.checkpoint import SparseInfo

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ENDINGS = {"dense": "-dense", "onnx": ".onnx", "csr": ".npz", "sparse": ".safetensors", "hub": "-hub"}
FOLDERS = {"dense": dense.FILES, "hub": hub.FILES}
"""Formats that are folders, and the files in them."""
TITLES = {
    "dense": "a folder that timm opens",
    "onnx": f"ONNX, operator set {onnx.OPSET}",
    "csr": "scipy.sparse matrices in an .npz file",
    "sparse": "a sparse checkpoint",
    "hub": "a folder for Hugging Face's hub",
}


def add_arguments(parser: ArgumentParser) -> None:
    """All options."""
    parser.add_argument("checkpoint", nargs="?", help="a sparse checkpoint, or the folder of a finished run")
    parser.add_argument(
        "--format",
        choices=list(ENDINGS),
        default=None,
        help="dense: a folder for timm.create_model('local-dir:PATH', pretrained=True). onnx: the compact network, "
        "for any batch size (pip install 'sparse-trainer[onnx]'). csr: scipy.sparse matrices in one .npz file. "
        "sparse: a sparse checkpoint again, in another dtype. hub: a folder with the sparse checkpoint, its model card "
        "and its settings, which huggingface_hub uploads as it is.",
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
    return path.with_name(f"{path.stem}{ending}{word}" if format in FOLDERS else f"{path.stem}{word}{ending}")


def dense_parameters(info: SparseInfo) -> int:
    """Of the network with all heads and neurons and without a selector."""
    with torch.device("meta"):
        model = create_model(info.model, **dict(info.model_args))
    return sum(parameter.numel() for parameter in model.parameters())


def _use(format: str, target: Path) -> str:
    return {
        "dense": f"timm.create_model({f'local-dir:{target}'!r}, pretrained=True)",
        "onnx": f"onnxruntime.InferenceSession({str(target)!r}).run(['{onnx.OUTPUT}'], {{'{onnx.INPUT}': images}})",
        "csr": f"experiments.exports.csr.read_csr({str(target)!r}), or numpy.load",
        "hub": f"huggingface_hub.upload_folder(repo_id=..., folder_path={str(target)!r})",
        "sparse": f"sparse-trainer evaluate {shlex.quote(str(target))}",
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
    check_target(target, checkpoint=path, overwrite=options.overwrite, files=FOLDERS.get(format))
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
