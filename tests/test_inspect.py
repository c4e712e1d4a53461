"""``sparse-trainer inspect``: the table, the JSON, the picture, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from experiments.__main__ import commands, main
from experiments.config import to_yaml
from experiments.overlay import GAP, SIDE
from sparse_trainer.checkpoint import read_info
from tests.test_losses import JOINT, THRESHOLD
from tests.test_training import configure, open_data, run, start


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: joint (top-k), adaptive (threshold), plain (no selector)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "joint": JOINT,
        "adaptive": {"sparsity": None, "selector": THRESHOLD},
        "plain": {},
    }
    for name, changes in kinds.items():
        loop = start(folder / name, changes, {"training": {"epochs": 1}})
        loop.folder.config.write_text(to_yaml(loop.trainer.config))
        run(loop)
    return folder


def read_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_is_a_command() -> None:
    assert "inspect" in commands()


def test_a_joint_checkpoint_by_hand(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three heads of 8, 48 of 96 neurons, 8 of 16 patches; the width is 24."""
    report = read_json(capsys, runs / "joint")
    info = read_info(runs / "joint" / "sparse.safetensors")
    parts = {part["name"]: part for part in report["parts"]}
    assert list(parts) == ["patch_embed.proj", "blocks.0", "blocks.1", "head", "selector.scorers.0"]
    block = parts["blocks.0"]
    assert block["shapes"] == {
        "attn.qkv": [48, 24],
        "attn.proj": [24, 16],
        "mlp.fc1": [48, 24],
        "mlp.fc2": [24, 48],
    }
    assert (block["heads"], block["neurons"], block["tokens"]) == ([2, 3], [48, 96], 9)
    assert block["total"] == 4 * 24 * 24 + 2 * 24 * 96
    assert block["density"] == block["live"] / block["total"]
    assert block["macs"] == pytest.approx(9 * block["live"] + 2 * 9 * 9 * 16)
    prunable = [part for name, part in parts.items() if not name.startswith("selector")]
    assert sum(part["live"] for part in prunable) == report["live_parameters"] == info.budget.live
    assert sum(part["total"] for part in prunable) == report["total_parameters"] == info.budget.total
    assert sum(part["macs"] for part in parts.values()) == pytest.approx(report["macs"], abs=1)
    assert report["provenance"] == {"recipe": "test", "step": 10, "metrics": dict(info.metrics)}


def test_a_threshold_checkpoint_tells_the_measured_tokens(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read_json(capsys, runs / "adaptive" / "sparse.safetensors")
    tokens = [part["tokens"] for part in report["parts"] if part["name"].startswith("blocks.")]
    assert tokens == [17, 1 + report["provenance"]["metrics"]["tokens_kept/1"]]
    assert tokens[1] < 17


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokens in (("joint", True), ("plain", False)):
        assert main(["inspect", str(runs / name)]) == 0
        out = capsys.readouterr().out
        for text in ("blocks.0", "patch_embed.proj", "live weights", "density", "MMACs", "recipe test, 10 steps"):
            assert text in out
        assert ("tokens ┃" in out) == tokens
        assert ("2 of 3" in out) == tokens


def test_the_picture_of_evaluation_images(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_json(capsys, runs / "adaptive", "--output", tmp_path / "overlay.png")
    assert (found["stages"], found["patches"], len(found["images"])) == ([1], 16, 10)
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.size == (GAP + 2 * (SIDE + GAP), GAP + 10 * (SIDE + GAP))


def test_the_picture_of_files_and_folders(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with the pixels of an evaluation image is seen as that image."""
    data = open_data(configure())
    images, targets = next(iter(data.eval.batches()))
    first = int((targets == 0).nonzero()[0])  # of class 0, as the first of the examples
    pixels = ((images[first, 0] * data.std[0] + data.mean[0]) * 255).round().to(torch.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels.numpy()).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels.numpy()).convert("RGB").resize((90, 60)).save(tmp_path / "b.jpg")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    files = [tmp_path / "images", tmp_path / "b.jpg"]
    found = read_json(capsys, runs / "adaptive", "--images", *files, "--output", tmp_path / "overlay.png")
    names = [image["image"] for image in found["images"]]
    assert names == [str(tmp_path / "images" / "a.png"), str(tmp_path / "b.jpg")]
    own = read_json(capsys, runs / "adaptive", "--output", tmp_path / "own.png")
    assert found["images"][0]["kept"] == own["images"][0]["kept"]
    with Image.open(tmp_path / "overlay.png") as drawn, Image.open(tmp_path / "own.png") as whole:
        size = (0, 0, drawn.width, GAP + SIDE)
        assert drawn.crop(size).tobytes() == whole.crop(size).tobytes()
    assert main(["inspect", str(runs / "joint"), "--output", str(tmp_path / "joint.png")]) == 0
    assert "the image itself, then what is left of its 16 patches before block 0" in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_code_2(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("hello")
    adaptive, output = str(runs / "adaptive"), f"--output={tmp_path / 'x.png'}"
    for arguments, message in (
        ([], "give a sparse checkpoint, such as runs/<name>/sparse.safetensors"),
        (["gone"], "checkpoint: there is no gone; give the folder of a finished run, or a sparse checkpoint"),
        ([str(tmp_path / "empty")], f"checkpoint: {tmp_path / 'empty'} holds no sparse.safetensors; "),
        ([str(tmp_path / "text.png")], f"{tmp_path / 'text.png'}: is truncated or no safetensors file"),
        ([adaptive, "--images", "x.png"], "--images: needs --output, the picture to write, such as overlay.png"),
        ([adaptive, "--images", "gone.png", output], "--images: there is no gone.png"),
        ([adaptive, "--images", str(tmp_path / "empty"), output], f"--images: {tmp_path / 'empty'} holds no images"),
        ([adaptive, "--images", str(tmp_path / "text.png"), output], f"--images: {tmp_path / 'text.png'} cannot be "),
        ([adaptive, "--output=overlay"], "--output: overlay is no name of a picture; end it in .png"),
        ([adaptive, f"--output={tmp_path}/gone/x.png"], f"--output: cannot write {tmp_path}/gone/x.png: "),
        ([str(runs / "plain"), output], "--output: "),
        ([adaptive, "--ouput=x.png"], "ouput: unknown key; did you mean output?"),
    ):
        assert main(["inspect", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"sparse-trainer inspect: error: {message}")
