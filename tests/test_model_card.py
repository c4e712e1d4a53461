"""The model card beside a sparse file, and the folder for the hub: what others read of us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from experiments.__main__ import main
from experiments.run_folder.model_card import CARD, MADE, model_card, write_card
from models import create_model
from sparse_trainer import Budget, SparseInfo, load_sparse
from tests.test_cli import SMALL

EVIL = "a|b](x)<script>*_"


def info(**changes: Any) -> SparseInfo:
    values = {
        "model": "deit_tiny_patch16_224",
        "budget": Budget(50, 100),
        "macs": 1234,
        "image_size": 32,
        "in_chans": 3,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "recipe": "mine",
        "step": 10,
        "metrics": {"top1": 81.256, "top5": 99.0, "loss": 0.5},
        "class_names": ("cat", "dog"),
        "live_heads": {"blocks.0": (0, 2), "blocks.1": (1,)},
    }
    return SparseInfo(**{**values, **changes})


def test_the_metadata_are_read_back() -> None:
    """As the hub reads them; its own validator, which needs the network, was not asked."""
    card = ModelCard(model_card(info(), file="sparse.safetensors", size=2_500_000, dataset="fashion-mnist-10k"))
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == "sparse-trainer"
    assert data["datasets"] == ["fashion-mnist-10k"]
    assert card.data.eval_results is not None
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 81.26, "top-5 accuracy": 99.0}
    for text in ("50 of 100", "| live heads of a block | 1 to 2 |", "| file | 2.500 MB |", "cat, dog."):
        assert text in card.text
    assert 'load_sparse("sparse.safetensors")' in card.text


def test_without_metrics_and_with_a_selector() -> None:
    card = ModelCard(model_card(info(metrics={}, selector={"kind": "top_k"}), file="s.safetensors", size=1))
    assert card.data.eval_results is None
    assert "datasets" not in card.data.to_dict()
    assert 'load_sparse("s.safetensors", create_model=create_model)' in card.text
    assert "a selector, top" in card.text


def test_words_of_a_stranger_stay_words() -> None:
    """A class or a recipe may be called like markup, or like the end of the metadata."""
    text = model_card(
        info(recipe=f"--- {EVIL}", class_names=(EVIL, "b"), metrics={"top1": 1.0, EVIL: 2.0}), file="s", size=1
    )
    assert EVIL not in text.split("---\n", 2)[2]
    assert "<script>" not in text.split("---\n", 2)[2].replace("\\<script\\>", "")
    assert ModelCard(text).data.to_dict()["model-index"][0]["name"] == f"--- {EVIL}"


def test_a_readme_of_ones_own_stays(tmp_path: Path) -> None:
    assert write_card(tmp_path, f"{MADE} one")
    assert write_card(tmp_path, f"{MADE} two")
    assert (tmp_path / CARD).read_text() == f"{MADE} two"
    (tmp_path / CARD).write_text("my own")
    assert not write_card(tmp_path, f"{MADE} three")
    assert (tmp_path / CARD).read_text() == "my own"


def test_a_run_and_its_folder_for_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run"]) == 0
    run, hub = tmp_path / "run", tmp_path / "hub"
    assert metadata_load(run / CARD)["datasets"] == ["fashion-mnist-10k"]
    (run / CARD).unlink()  # as if the process had been killed before it
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / CARD).is_file()
    assert main(["export", str(run), "--format", "hub", "--output", str(hub)]) == 0
    assert "nothing was uploaded" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in hub.iterdir()} == {CARD, "config.json", "sparse.safetensors"}
    card = ModelCard.load(hub / CARD)
    assert card.data.eval_results is not None
    settings = json.loads((hub / "config.json").read_text())
    assert settings["model"]["name"] == "deit_quickstart" or settings["model"]["name"].startswith("deit")
    images = torch.randn(2, 1, 28, 28)
    one, other = (load_sparse(folder / "sparse.safetensors", create_model=create_model) for folder in (run, hub))
    with torch.inference_mode():
        assert torch.equal(one(images), other(images))
    assert main(["export", str(run), "--format", "hub", "--output", str(hub)]) == 2
    assert "exists; give another name, or --overwrite" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "hub", "--output", str(hub), "--overwrite"]) == 0
