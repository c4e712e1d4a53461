"""The table of backbones: its cells are what happens, a refusal is no fault, and the page is the data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.trials import backbones
from experiments.trials.backbones import (
    BACKBONES,
    CHECKS,
    FEATURES,
    Backbone,
    Cell,
    anonymous,
    main,
    together,
    told,
    try_backbone,
)
from sparse_trainer import CheckpointError

FILES = ("sparse file", "dense export")
SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
RESULTS = backbones.RESULTS

pytestmark = [pytest.mark.filterwarnings("ignore:.*is rounded to", "ignore:.*growth changes nothing")]


@pytest.mark.parametrize(
    ("name", "arguments", "size", "refused"),
    [
        ("deit_tiny_patch16_224", SMALL, 16, {}),
        ("deit_tiny_distilled_patch16_224", SMALL, 16, {}),
        ("deit3_small_patch16_224", SMALL, 16, {}),
        ("vit_small_patch14_reg4_dinov2", SMALL, 16, {}),
        ("vit_giant_patch14_dinov2", SMALL, 16, {}),
        (
            "vit_medium_patch16_reg4_gap_256",
            SMALL,
            16,
            {"top-k tokens": "no class token", "threshold tokens": "no class token"},
        ),
        (
            "cait_xxs24_224",
            {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4},
            16,
            {
                "heads and neurons": "heads cannot be taken out.*set head_density and neuron_density to 1",
                "top-k tokens": "class Cait; selectors work with VisionTransformer",
                "threshold tokens": "class Cait; selectors work with VisionTransformer",
            },
        ),
        (
            "test_convnext",
            {},
            64,
            {
                "heads and neurons": "ConvNeXt has no transformer blocks.*Weight masks work with this model",
                "top-k tokens": "class ConvNeXt; selectors work",
                "threshold tokens": "class ConvNeXt; selectors work",
            },
        ),
        (
            "test_resnet",
            {},
            64,
            {"heads and neurons": "no transformer blocks", "top-k tokens": "", "threshold tokens": ""},
        ),
    ],
)
def test_small_networks(
    name: str, arguments: dict[str, Any], size: int, refused: dict[str, str], tmp_path: Path
) -> None:
    backbone = Backbone(name, name, size, arguments, sized=bool(arguments))
    cells = try_backbone(backbone, tmp_path, FILES)
    assert list(cells) == [*FEATURES, *FILES]
    for column, cell in cells.items():
        assert cell.result == ("no" if column in refused else "yes"), (column, cell)
        assert not cell.broken
        if column in refused:
            assert re.search(refused[column], cell.text), cell.text


def test_a_network_that_breaks_a_promise_is_not_said_to_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone("tiny", "deit_tiny_patch16_224", 16, SMALL)
    load_sparse = backbones.load_sparse

    def load_and_change(*arguments: Any, **options: Any) -> nn.Module:
        model = load_sparse(*arguments, **options)
        with torch.no_grad():
            next(iter(model.parameters())).add_(1e-3)
        return model

    monkeypatch.setattr(backbones, "load_sparse", load_and_change)
    cells = try_backbone(backbone, tmp_path, FILES[:1])
    assert [cells[feature].result for feature in FEATURES] == ["yes"] * 4
    assert cells["sparse file"].result == "no"
    assert cells["sparse file"].broken
    assert "weight masks: Fault: the loaded network gives other logits" in cells["sparse file"].text


def test_a_file_that_could_not_be_written_is_not_taken_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone("tiny", "deit_tiny_patch16_224", 16, SMALL)
    save = backbones.save

    def save_without_units(trained: backbones.Trained, path: Path) -> None:
        if trained.scheduler.live_heads:
            raise CheckpointError(f"{path}: no space left")
        save(trained, path)

    monkeypatch.setattr(backbones, "save", save_without_units)
    cells = try_backbone(backbone, tmp_path, FILES)
    assert cells["sparse file"] == Cell("partly", "heads and neurons: no space left")
    assert cells["dense export"].result == "partly"
    assert cells["dense export"].text.startswith("heads and neurons: ")


def test_cells_by_hand(tmp_path: Path) -> None:
    assert told(CheckpointError(f"{tmp_path}/a.safetensors: expected\n 1"), tmp_path) == Cell("no", "expected 1")
    assert told(RuntimeError("sizes differ"), tmp_path) == Cell("no", "RuntimeError: sizes differ", broken=True)
    assert told(ValueError("x" * 400), tmp_path).text == "x" * 297 + "..."
    yes, no = Cell("yes"), Cell("no", "why", broken=True)
    assert together({"a": yes, "b": yes}) == yes
    assert together({"a": yes, "b": no}) == Cell("partly", "b: why", broken=True)
    assert together({"b": no}) == Cell("no", "b: why", broken=True)
    assert together({}) == Cell("no", "nothing could be trained")


def test_the_same_refusal_is_written_once() -> None:
    first = "blocks.0: timm.models.cait.TalkingHeadAttn is of a kind"
    second = "layers.0.blocks.0: timm.models.swin_transformer.WindowAttention is of a kind"
    assert anonymous(first) == anonymous(second) == "BLOCK: CLASS is of a kind"
    assert anonymous("ResNet has no transformer blocks") == "CLASS has no transformer blocks"
    lines = backbones.table(
        [
            (backbone, {"weight masks": Cell("no", text)})
            for backbone, text in zip(BACKBONES, (first, second), strict=False)
        ]
    )
    assert [line.split("|")[4].strip() for line in lines[2:4]] == ["no (1)", "no (1)"]
    assert lines[4:] == ["", "1. BLOCK: CLASS is of a kind"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Backbone("Tiny", "deit_tiny_patch16_224", 16, SMALL)
    monkeypatch.setattr(backbones, "BACKBONES", (tiny,))
    monkeypatch.setattr(backbones, "CHECKS", {"sparse file": CHECKS["sparse file"]})
    assert main(["--output", str(tmp_path / "new")]) == 0
    assert "sparse file yes" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "new" / "backbones.json").read_text())
    assert {cell["result"] for cell in row["cells"].values()} == {"yes"}
    page = (tmp_path / "new" / "backbones.md").read_text()
    assert "| Tiny | `deit_tiny_patch16_224`, patch_size 4, embed_dim 24, depth 2, num_heads 4 | 16 px | yes |" in page
    monkeypatch.setattr(backbones, "BACKBONES", (Backbone("Tiny", tiny.name, 15, SMALL),))
    assert main(["--output", str(tmp_path / "new")]) == 0  # every size is refused, and nothing is broken
    assert "patch_size (4, 4) does not divide img_size (15, 15)" in (tmp_path / "new" / "backbones.md").read_text()
    with pytest.raises(SystemExit) as exit_of:
        main(["--only", "swim"])
    assert exit_of.value.code == 2
    assert "--only: no name holds swim; there are deit_tiny_patch16_224" in capsys.readouterr().err
