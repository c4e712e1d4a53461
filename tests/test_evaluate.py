"""``sparse-trainer evaluate``: how many images kept how many patches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.commands.evaluate import describe_histogram
from experiments.config.reading import to_yaml
from tests.test_losses import THRESHOLD
from tests.test_training import run, start


def test_a_histogram_in_words() -> None:
    assert describe_histogram({"7": 1000}) == "7: 1,000"
    assert describe_histogram({"4": 1, "5": 2, "6": 3}) == "4: 1, 5: 2, 6: 3"
    # 16 numbers in 8 steps of 2; the last is as long as there are numbers, and empty ones are left out.
    assert describe_histogram({"1": 1, "2": 2, "3": 3, "16": 4}) == "1-2: 3, 3-4: 3, 15-16: 4"
    assert describe_histogram({"1": 1, "2": 2, "5": 4}, bins=3) == "1-2: 3, 5: 4"


def test_images_that_keep_their_own_number_of_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = start(tmp_path / "run", {"sparsity": None, "selector": THRESHOLD}, {"training": {"epochs": 1}})
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    run(loop)
    capsys.readouterr()
    assert main(["evaluate", str(loop.folder.sparse), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for stage, images in found["images_by_patches_kept"].items():
        assert sum(images.values()) == found["images"]
        mean = sum(int(kept) * count for kept, count in images.items()) / found["images"]
        assert mean == pytest.approx(found[f"tokens_kept/{stage}"])
    assert main(["evaluate", str(loop.folder.sparse)]) == 0
    assert "images by patches kept" in capsys.readouterr().out
    assert main(["evaluate", str(loop.folder.sparse), "--json", "--selection", "random"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    first = min(found["images_by_patches_kept"], key=int)
    assert drawn["images_by_patches_kept"][first] == found["images_by_patches_kept"][first]
    assert (drawn["selection"], drawn["loss"] != found["loss"]) == ("random", True)


def test_without_a_selector_nothing_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = start(tmp_path / "run", {"sparsity": None, "selector": None}, {"training": {"epochs": 1}})
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    run(loop)
    capsys.readouterr()
    assert main(["evaluate", str(loop.folder.sparse), "--selection", "random"]) == 2
    assert "--selection: random needs a checkpoint with a token selector" in capsys.readouterr().err


def test_kernels_that_skip_dead_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same network, whatever computes it: with the same patches, up to rounding."""
    changes = {"sparsity": {"density": 0.3}, "selector": THRESHOLD}
    loop = start(tmp_path / "run", changes, {"training": {"epochs": 1}})
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    run(loop)
    capsys.readouterr()
    found = {}
    for kernels in ("dense", "sparse", "auto"):
        options = ["--json", "--amp", "float32", "--kernels", kernels]
        assert main(["evaluate", str(loop.folder.sparse), *options]) == 0
        found[kernels] = json.loads(capsys.readouterr().out)
    for kernels in ("sparse", "auto"):
        assert found[kernels]["loss"] == pytest.approx(found["dense"]["loss"], rel=1e-4)
        assert found[kernels]["macs"] == pytest.approx(found["dense"]["macs"], rel=1e-2)
    assert "kernels" not in found["dense"]
    assert "1x1: " in found["sparse"]["kernels"]
    assert main(["evaluate", str(loop.folder.sparse), "--kernels", "fast"]) == 2
