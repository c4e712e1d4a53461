"""A folder that ``huggingface_hub.upload_folder`` takes as it is: the sparse checkpoint, its card and its settings."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of
from experiments.exports.source import Source
from experiments.run_folder.model_card import CARD, known_dataset, model_card
from sparse_trainer.files.whole_file import write_atomically

CHECKPOINT, SETTINGS = "sparse.safetensors", "config.json"
FILES = frozenset({CHECKPOINT, SETTINGS, CARD})


def dataset_of(source: Source) -> str | None:
    """The data set that a checkpoint was trained on, if that is known and not a folder of somebody's own."""
    try:
        return known_dataset(data_of(source.path, source.info).dataset)
    except ConfigError:
        return None


def write_hub(folder: Path, source: Source) -> None:
    """Card and settings beside the checkpoint that lies in the folder already."""
    size = (folder / CHECKPOINT).stat().st_size
    card = model_card(source.info, file=CHECKPOINT, size=size, dataset=dataset_of(source))
    settings = {"library_name": "sparse-trainer", **source.info.to_metadata()}
    write_atomically(folder / CARD, [card.encode()])
    write_atomically(folder / SETTINGS, [json.dumps(settings, indent=2).encode() + b"\n"])
