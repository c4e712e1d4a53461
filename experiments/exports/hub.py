"""A folder that ``huggingface_hub.upload_folder`` takes as it is: the sparse checkpoint, its card and its settings."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError
from experiments.evaluation.evaluate_checkpoint import data_of
from experiments.exports.source import Source
from experiments.run_folder.model_card import CARD, LIBRARY, write_card
from sparse_trainer.files.whole_file import write_atomically

CHECKPOINT, SETTINGS = "sparse.safetensors", "config.json"
FILES = frozenset({CHECKPOINT, SETTINGS, CARD})


def write_hub(folder: Path, source: Source) -> None:
    """Card and settings beside the checkpoint that lies in the folder already."""
    data: DataConfig | None
    try:
        data = data_of(source.path, source.info)
    except ConfigError:
        data = None
    write_card(folder / CHECKPOINT, data)
    settings = {"library_name": LIBRARY, **source.info.to_metadata()}
    write_atomically(folder / SETTINGS, [json.dumps(settings, indent=2).encode() + b"\n"])
