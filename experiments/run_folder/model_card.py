"""The model card of a sparse checkpoint: a ``README.md`` in the layout of Hugging Face, made from the file alone."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from sparse_trainer.files.sparse_info import SparseInfo
from sparse_trainer.files.whole_file import write_atomically

CARD = "README.md"
TASK, LIBRARY = "image-classification", "sparse-trainer"
SHOWN_CLASSES = 20
METRICS = {"top1": "accuracy", "top5": "top-5 accuracy"}
"""What our metrics are called there."""
MADE = "<!-- made by sparse-trainer -->"
"""In a card of ours, which another one of ours may replace."""


def model_card(info: SparseInfo, *, file: str, size: int, dataset: str | None = None) -> str:
    """The card as Markdown, its metadata in front.

    Args:
        info: what the file says of itself. It may come from a stranger, so its words are shown as words.
        file: name of the sparse checkpoint beside the card.
        size: of the file, in bytes.
        dataset: what it was trained on, if that is known.
    """
    name = info.recipe or info.model
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=_slug(dataset or "unknown"),
            dataset_name=dataset or "the images of its evaluation",
            metric_type=METRICS[key],
            metric_name=METRICS[key],
            metric_value=round(info.metrics[key], 2),
        )
        for key in METRICS
        if key in info.metrics
    ]
    data = ModelCardData(
        pipeline_tag=TASK,
        library_name=LIBRARY,
        tags=[TASK, "vision-transformer", "sparse", "dynamic-sparse-training"],
        datasets=[_slug(dataset)] if dataset else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", MADE, f"# {_plain(name)}", _summary(info), *_sections(info, file, size)]
    return "\n\n".join(parts) + "\n"


def write_card(folder: Path, card: str) -> bool:
    """Write the card, unless there is a ``README.md`` that is somebody's own; whether it was written."""
    path = folder / CARD
    if path.exists() and MADE not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_atomically(path, [card.encode()])
    return True


def known_dataset(name: str) -> str | None:
    """A data set by its name; None for a folder of somebody's own."""
    return None if name in ("folder", "tar") else name


def _summary(info: SparseInfo) -> str:
    return (
        f"A sparse Vision Transformer, `{info.model}` in timm, that classifies images. It was trained sparse: "
        f"{info.budget.live:,} of {info.budget.total:,} prunable weights are live, and all others are 0 or left out."
    )


def _sections(info: SparseInfo, file: str, size: int) -> list[str]:
    height, width = info.image_size if isinstance(info.image_size, tuple) else (info.image_size,) * 2
    rows = [
        ("live weights", f"{info.budget}"),
        ("MACs of an image, of live weights", f"{info.macs:,}"),
        ("file", f"{size / 1e6:,.3f} MB"),
        ("images", f"{height} x {width} pixels, {info.in_chans} channels"),
        ("mean, standard deviation", f"{_numbers(info.mean)}; {_numbers(info.std)}"),
        ("optimizer steps", f"{info.step:,}"),
    ]
    for kind, units in (("heads", info.live_heads), ("neurons", info.live_neurons)):
        if units:
            counts = sorted({len(live) for live in units.values()})
            rows.insert(1, (f"live {kind} of a block", " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))))
    if info.selector is not None:
        rows.insert(1, ("patches are dropped by", f"a selector, {info.selector.get('kind')}"))
    rows += [(METRICS.get(key, key), f"{value:,.4g}") for key, value in sorted(info.metrics.items())]
    table = ["| | |", "|---|---|", *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows)]
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
        shown = ", ".join(map(_plain, info.class_names[:SHOWN_CLASSES]))
        more = len(info.class_names) - SHOWN_CLASSES
        sections += ["## Classes", shown + (f" and {more:,} more" if more > 0 else "") + "."]
    return sections


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _plain(text: str) -> str:
    """Words as they are, whatever Markdown or HTML would make of them."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$-])", r"\\\1", text) if re.search(r"[\\`*\[\]<>|~&$#!]", text) else text


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-.")[:96] or "unknown"
