"""The model card beside a sparse file, and the folder for the hub: what others read of us."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from experiments.__main__ import main
from experiments.data.data_config import DataConfig
from experiments.run_folder.model_card import CARD, MADE, model_card, public_name, write_card
from models import create_model
from sparse_trainer import SparseInfo, SparsityConfig, SparsityScheduler, flops, load_sparse, read_info, save_sparse
from tests.conftest import TINY
from tests.test_cli import SMALL

EVIL = "a|b](http://evil.example)<script>*_"
ADDRESS = "www.evil.example"


def card_of(folder: Path, data: DataConfig | None = None, pattern: str = "1x1", **changes: Any) -> str:
    """The card of a small network."""
    model = create_model("deit_tiny_patch16_224", **TINY, selector=changes.get("selector"))
    config = SparsityConfig(density=0.5, pattern=pattern, updates=0)
    scheduler = SparsityScheduler(model, config, total_steps=1)
    values = {
        "model": "deit_tiny_patch16_224",
        "model_args": TINY,
        "budget": scheduler.budget,
        "macs": 1234,
        "image_size": 16,
        "in_chans": 1,
        "mean": (0.5,),
        "std": (0.25,),
        "recipe": "mine",
        "metrics": {"top1": 81.256, "top5": 99.0},
        "class_names": ("cat", "dog", "c", "d", "e"),
    }
    info = SparseInfo(**{**values, **changes})
    save_sparse(folder / "s.safetensors", model, masks=scheduler.masks, info=info, create_model=create_model)
    return model_card(folder / "s.safetensors", data)


def data_called(name: str) -> DataConfig:
    return DataConfig(dataset=name, root=None if name == "fashion-mnist-10k" or "hf" in name else "/images")


def test_the_metadata_are_read_back(tmp_path: Path) -> None:
    """As the hub reads them; its own validator, which needs the network, was not asked."""
    card = ModelCard(card_of(tmp_path, data_called("hfds/owner/flowers")))
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == "sparse-trainer"
    assert data["datasets"] == ["owner/flowers"]
    assert card.data.eval_results is not None
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 81.256, "top-5 accuracy": 99.0}
    live = read_info(tmp_path / "s.safetensors").budget
    dense = flops.count(create_model("deit_tiny_patch16_224", **TINY)).macs
    for text in (str(live), f"1,234 of {dense:,.0f} in the dense network", "cat, dog, c, d, e."):
        assert text in card.text
    assert 'load_sparse("s.safetensors")' in card.text
    assert "live and die together" not in card.text


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("fashion-mnist-10k", "fashion-mnist-10k"),
        ("torch/cifar10", "cifar10"),
        ("torch/folder", None),
        ("folder", None),
    ],
)
def test_only_data_sets_of_the_hub_are_named_as_such(tmp_path: Path, name: str, public: str | None) -> None:
    assert public_name(data_called(name)) == public
    assert "datasets" not in ModelCard(card_of(tmp_path, data_called(name))).data.to_dict()


def test_the_accuracy_is_that_of_the_weights_in_the_file(tmp_path: Path) -> None:
    """Of the average, where one was kept."""
    card = ModelCard(card_of(tmp_path, metrics={"top1": 60.0, "ema_top1": 70.0, "loss": 1.0, "ema_loss": 0.5}))
    assert card.data.eval_results is not None
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 70.0, "loss": 0.5}
    assert "60" not in card.text


def test_patterns_units_and_selectors(tmp_path: Path) -> None:
    selector = {"kind": "top_k", "stages": [0], "keep_ratio": 0.5}
    card = ModelCard(card_of(tmp_path, metrics={}, selector=selector))
    assert card.data.eval_results is None
    assert 'load_sparse("s.safetensors", create_model=create_model)' in card.text
    assert "a selector, top\\_k" in card.text
    for pattern in ("8x1", "2:4"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the patch embedding has single weights
            assert f"| live and die together | {pattern} |" in card_of(tmp_path, pattern=pattern)


def test_words_of_a_stranger_stay_words(tmp_path: Path) -> None:
    """A class or a recipe may be called like markup, an address, or the end of the metadata."""
    text = card_of(
        tmp_path,
        recipe=f"--- {EVIL}",
        class_names=(EVIL, ADDRESS, "c", "d", "e"),
        metrics={"top1": 1.0, EVIL: 2.0},
    )
    body = text.split(MADE)[1]
    for unsafe in (EVIL, ADDRESS, "http://", "<script>"):
        assert unsafe not in body
    assert ModelCard(text).data.to_dict()["model-index"][0]["name"] == f"--- {EVIL}"


def test_a_readme_of_ones_own_stays(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    path = tmp_path / "s.safetensors"
    assert write_card(path)
    assert (tmp_path / CARD).read_text() == card
    assert write_card(path)
    own = f"# Mine\n\nBegins unlike\n\n{MADE}\n"
    (tmp_path / CARD).write_text(own)
    assert not write_card(path)
    assert (tmp_path / CARD).read_text() == own


def test_a_run_and_its_folder_for_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, f"--output.runs={tmp_path}", "--output.name=run"]) == 0
    run, hub = tmp_path / "run", tmp_path / "hub"
    results = metadata_load(run / CARD)["model-index"][0]["results"]
    assert results[0]["dataset"]["name"] == "fashion-mnist-10k"
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
