"""The model card of a sparse checkpoint: a ``README.md`` in the layout of Hugging Face, made from the file alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor

from experiments.data.data_config import DataConfig
from models import create_model
from sparse_trainer import flops
from sparse_trainer.files.checkpoint import SparseFile, read_sparse
from sparse_trainer.files.masked_tensor import block_of
from sparse_trainer.files.sparse_info import SparseInfo
from sparse_trainer.files.whole_file import write_atomically
from sparse_trainer.patterns import Pattern
from sparse_trainer.units import find_blocks

CARD = "README.md"
TASK, LIBRARY = "image-classification", "sparse-trainer"
SHOWN_CLASSES, LONGEST = 20, 80
METRICS = {"top1": "accuracy", "top5": "top-5 accuracy", "loss": "loss"}
"""What our metrics are called there."""
MADE = "<!-- made by sparse-trainer -->"
"""First line after the metadata of a card of ours, which another one of ours may replace."""
TWO_OF_FOUR = Pattern(1, 4, 2)
_HUB_PREFIXES = ("hfds", "hfids")
_MARKUP = re.compile(r"[!\"#$&*+.:;<=>?@\[\\\]^_`{|}~-]")
"""What means something to Markdown or a web page; dots and colons would make a link of an address."""


def model_card(path: Path, data: DataConfig | None = None) -> str:
    """The card as Markdown, its metadata in front.

    Args:
        path: of the sparse checkpoint. It may come from a stranger, so its words are shown as words.
        data: what it was trained on, if that is known.

    Raises:
        CheckpointError: the file is damaged.
    """
    contents = read_sparse(path)
    info = contents.info
    name, public = info.recipe or info.model, public_name(data)
    metrics = metrics_of(info)
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=public or "unknown",
            dataset_name=public or "the images of its evaluation",
            metric_type=METRICS[key],
            metric_name=METRICS[key],
            metric_value=round(metrics[key], 4),
        )
        for key in METRICS
        if key in metrics
    ]
    on_hub = public is not None and data is not None and data.dataset.split("/")[0].lower() in _HUB_PREFIXES
    front = ModelCardData(
        pipeline_tag=TASK,
        library_name=LIBRARY,
        tags=[TASK, "vision-transformer", "sparse", "dynamic-sparse-training"],
        datasets=[public] if on_hub and public is not None else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{front.to_yaml()}\n---", MADE, f"# {plain(name)}", _summary(info), *_sections(contents, path)]
    return "\n\n".join(parts) + "\n"


def write_card(checkpoint: Path, data: DataConfig | None = None) -> bool:
    """Write the card beside a checkpoint, unless there is a ``README.md`` that is somebody's own; whether it did."""
    path = checkpoint.with_name(CARD)
    if path.exists() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        return False
    write_atomically(path, [model_card(checkpoint, data).encode()])
    return True


def is_ours(text: str) -> bool:
    """Whether a card begins as ours do; one that quotes them does not."""
    return re.match(rf"---\n.*?\n---\n\n{re.escape(MADE)}\n", text, re.DOTALL) is not None


def public_name(data: DataConfig | None) -> str | None:
    """A data set by the name that others know it by; None for a folder of somebody's own."""
    if data is None or data.is_folder:
        return None
    return data.dataset.partition("/")[2] or data.dataset


def metrics_of(info: SparseInfo) -> dict[str, float]:
    """Of the weights in the file: those of the average, where there is one."""
    averaged = {key.removeprefix("ema_"): value for key, value in info.metrics.items() if key.startswith("ema_")}
    return {key: value for key, value in info.metrics.items() if not key.startswith("ema_")} | averaged


def plain(text: str) -> str:
    """Words as they are, whatever Markdown or HTML would make of them, cut where they are long."""
    shown = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return _MARKUP.sub(lambda found: f"\\{found[0]}", shown)


def _summary(info: SparseInfo) -> str:
    return (
        f"A Vision Transformer, `{info.model}` in timm, that classifies images. {info.budget.live:,} of "
        f"{info.budget.total:,} prunable weights are live; all others are 0 or left out."
    )


def _sections(contents: SparseFile, path: Path) -> list[str]:
    info, file = contents.info, path.name
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(contents, path))]
    needs = ", create_model=create_model" if info.selector is not None else ""
    imports = "from models import create_model\n" if info.selector is not None else ""
    sections = [
        "## What it is",
        "\n".join(table),
        "## Use it",
        f"```bash\nsparse-trainer predict {file} IMAGES...\nsparse-trainer evaluate {file} --kernels auto\n```",
        f"```python\n{imports}from sparse_trainer import load_sparse\n\n"
        f'model = load_sparse("{file}"{needs})  # logits; kernels="auto" skips dead weights on a CPU\n```',
    ]
    if info.class_names:
        shown = ", ".join(map(plain, info.class_names[:SHOWN_CLASSES]))
        more = len(info.class_names) - SHOWN_CLASSES
        sections += ["## Classes", shown + (f" and {more:,} more" if more > 0 else "") + "."]
    return sections


def _facts(contents: SparseFile, path: Path) -> list[tuple[str, str]]:
    """Rows of the table, the dense network's numbers beside those of this one."""
    info = contents.info
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    with torch.device("meta"):
        dense: Any = create_model(info.model, **dict(info.model_args))
    try:
        macs, blocks = f" of {flops.count(dense).macs:,.0f} in the dense network", find_blocks(dense)
    except ValueError:  # no ViT of timm: it has neither heads to take out nor known MACs
        macs, blocks = "", {}
    rows = [("live weights", f"{info.budget}")]
    pattern = pattern_of(contents.masks)
    if pattern is not None:
        rows.append(("live and die together", pattern))
    for kind, units in (("heads", info.live_heads), ("neurons", info.live_neurons)):
        counts = sorted({len(live) for live in units.values()})
        if counts and blocks:
            of = getattr(next(iter(blocks.values())), kind).count()
            rows.append(
                (f"live {kind} of a block", f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} of {of}")
            )
    if info.selector is not None:
        rows.append(("patches are dropped by", f"a selector, {plain(str(info.selector.get('kind')))}"))
    rows += [
        ("MACs of an image, of live weights", f"{info.macs:,}{macs}"),
        ("file", f"{path.stat().st_size / 1e6:,.3f} MB"),
        ("images", f"{height} x {width} pixels, {info.in_chans} channels"),
        ("mean, standard deviation", f"{_numbers(info.mean)}; {_numbers(info.std)}"),
        ("optimizer steps", f"{info.step:,}"),
    ]
    metrics = metrics_of(info)
    return rows + [(METRICS.get(key, plain(key)), f"{metrics[key]:,.4g}") for key in sorted(metrics)]


def pattern_of(masks: Mapping[str, Tensor]) -> str | None:
    """The pattern that most masks have; None for single weights."""
    found: dict[str, int] = {}
    for mask in masks.values():
        rows, columns = block_of(mask)
        name = f"{rows}x{columns}"
        if name == "1x1" and TWO_OF_FOUR.divides(mask.shape) and TWO_OF_FOUR.fits(mask):
            name = str(TWO_OF_FOUR)
        found[name] = found.get(name, 0) + 1
    most = max(found, key=lambda name: found[name], default="1x1")
    return None if most == "1x1" else most


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
