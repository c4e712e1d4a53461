"""``sparse-trainer predict``: classes by name, whatever the files are like, and what was not read is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.evaluation.evaluate_checkpoint import data_of
from sparse_trainer import read_info
from tests.test_cli import last_line
from tests.test_folders import SHORT, two_classes

SELECTORS = {
    "none": "null",
    "top_k": "{kind: top_k, stages: [0], keep_ratio: 0.5}",
    "threshold": "{kind: threshold, stages: [1], thresholds: [0.05]}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each selector, on dark cats and bright dogs; and the images."""
    folder = tmp_path_factory.mktemp("predict")
    two_classes(folder / "images")
    for name, selector in SELECTORS.items():
        options = [f"--selector={selector}", "--training.steps=30", "--sparsity=null", f"--output.runs={folder}"]
        options += ["--model.kwargs={embed_dim: 16, depth: 2, num_heads: 2, patch_size: 4}", "--optimizer.lr=0.003"]
        assert main(["train", *SHORT, *options, f"--data.root={folder / 'images'}", f"--output.name={name}"]) == 0
    return folder


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_other_kernels_see_the_same(runs: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    where = (runs / name / "sparse.safetensors", runs / "images", "--amp=float32")
    plain, sparse = (predict(capsys, *where, f"--kernels={kernels}") for kernels in ("dense", "sparse"))
    assert [image["classes"][0]["class"] for image in plain["images"]] == [
        image["classes"][0]["class"] for image in sparse["images"]
    ]


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["predict", *map(str, arguments), "--json", "--device=cpu", "--amp=float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def guesses(found: dict[str, Any]) -> dict[str, str]:
    return {image["image"]: image["classes"][0]["class"] for image in found["images"]}


@pytest.mark.parametrize("selector", SELECTORS)
def test_it_sees_what_the_evaluation_sees(selector: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = runs / "images" / "validation"
    found = predict(capsys, runs / selector, images)
    assert len(found["images"]) == 8
    for image in found["images"]:
        assert sum(one["share"] for one in image["classes"]) == pytest.approx(1)
        shares = [one["share"] for one in image["classes"]]
        assert shares == sorted(shares, reverse=True)
        assert ("patches_kept" in image) == (selector != "none")
    right = [Path(name).parent.name == guess for name, guess in guesses(found).items()]
    assert main(["evaluate", str(runs / selector / "sparse.safetensors"), "--json", "--amp=float32"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 100 * sum(right) / len(right) == 100
    # An image's shares are its own, however it is put into batches.
    small = predict(capsys, runs / selector / "sparse.safetensors", images, "--batch-size=3")
    for left, other in zip(found["images"], small["images"], strict=True):
        assert left["classes"][0]["share"] == pytest.approx(other["classes"][0]["share"], abs=1e-5)


def test_a_file_that_was_moved_away_from_its_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How pictures are brought to their size is in the file, not in the folder around it."""
    options = ["--selector=null", "--sparsity=null", "--training.steps=2", "--data.fit=pad", "--data.crop_pct=0.7"]
    options += ["--data.interpolation=nearest", "--model.kwargs={embed_dim: 16, depth: 1, num_heads: 2, patch_size: 4}"]
    where = [f"--data.root={runs / 'images'}", f"--output.runs={tmp_path}", "--output.name=padded"]
    assert main(["train", *SHORT, *options, *where]) == 0
    inside = tmp_path / "padded" / "sparse.safetensors"
    alone = tmp_path / "elsewhere" / "alone.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(inside.read_bytes())
    info = read_info(alone)
    expected = {"interpolation": "nearest", "crop_pct": 0.7, "fit": "pad", "white_level": None}
    assert dict(info.preparation) == expected
    data = data_of(alone, info)
    assert (data.interpolation, data.crop_pct, data.fit) == ("nearest", 0.7, "pad")
    wide = tmp_path / "wide.png"
    Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (30, 1))).save(wide)
    shares = [predict(capsys, file, wide)["images"][0]["classes"] for file in (inside, alone)]
    assert shares[0] == shares[1]


def test_files_as_people_have_them(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of one bright picture, and what cannot be read among them."""
    values = np.random.default_rng(9).integers(200, 220, (8, 8), dtype=np.uint8)
    grey = Image.fromarray(values)
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "colour.webp", lossless=True)
    grey.convert("RGB").quantize().save(tmp_path / "palette.gif")
    grey.convert("RGBA").save(tmp_path / "alpha.png")
    grey.convert("CMYK").save(tmp_path / "inks.tif")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(np.float32) / 255).save(tmp_path / "fractions.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(values))).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    grey.save(tmp_path / "deep" / "folder" / "1.bmp")
    (tmp_path / ".hidden").mkdir()
    grey.save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut off.png").write_bytes((tmp_path / "grey.png").read_bytes()[:60])
    found = predict(capsys, runs / "none", tmp_path)
    assert {Path(name).name for name in guesses(found)} == {
        "grey.png", "colour.webp", "palette.gif", "alpha.png", "inks.tif", "deep.png", "fractions.tiff", "turned.png",
        "1.bmp",
    }  # fmt: skip
    assert set(guesses(found).values()) == {"dog"}
    shares = {Path(image["image"]).name: image["classes"][0]["share"] for image in found["images"]}
    for name in ("colour.webp", "alpha.png", "deep.png", "fractions.tiff", "turned.png", "1.bmp"):
        assert shares[name] == pytest.approx(shares["grey.png"], abs=1e-6), name
    assert {Path(one["image"]).name for one in found["skipped"]} == {"empty.png", "cut off.png"}
    assert all(one["reason"] for one in found["skipped"])
    # A file that is named is tried whatever it is called.
    named = predict(capsys, runs / "none", tmp_path / "notes.txt", tmp_path / "grey.png", tmp_path / "grey.png")
    assert [len(named["images"]), len(named["skipped"])] == [1, 1]
    assert main(["predict", str(runs / "none"), str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "skipped: " in out
    assert "9 images, 2 skipped; " in out
    assert "images/s, " in out
    assert "dog " in out
    assert " %" in out


def test_the_patches_that_were_looked_at(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file = runs / "images" / "validation" / "dog", tmp_path / "overlay.png"
    for selector, columns in (("top_k", 2), ("threshold", 2)):
        found = predict(capsys, runs / selector, images, f"--overlay={file}")
        assert found["overlay"] == str(file)
        with Image.open(file) as picture:
            assert picture.size == (columns * (112 + 4) + 4, 4 * (112 + 4) + 4)
    assert [image["patches_kept"] for image in predict(capsys, runs / "top_k", images)["images"]] == [[2]] * 4
    assert main(["predict", str(runs / "top_k"), str(images), f"--overlay={file}"]) == 0
    assert f"{file}: 4 images, each with what is left of its patches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a sparse checkpoint, such as runs/<name>/sparse.safetensors, and images or folders"),
        (["{runs}/none"], "give a sparse checkpoint, such as runs/<name>/sparse.safetensors, and images or folders"),
        (["{runs}/none", "gone.png"], "there is no gone.png; give image files, or folders of them"),
        (["{runs}/none", "{runs}/none/checkpoints"], "holds no pictures that can be read here"),
        (["{runs}/none", "{runs}/none/config.yaml"], "none of 1 images can be read; the first is "),
        (["{runs}/gone", "x.png"], "checkpoint: there is no "),
        (["{runs}/none", "{runs}/images", "--top=0"], "--top: 0 is not a positive whole number"),
        (["{runs}/none", "{runs}/images", "--batch-size=0"], "--batch-size: 0 is not a positive whole number"),
        (["{runs}/none", "{runs}/images", "--overlay=x.png"], "--overlay: "),
        (["{runs}/top_k", "{runs}/images", "--overlay=x.txt"], "--overlay: x.txt is no name of a picture"),
        (["{runs}/top_k", "{runs}/images", "--overlay={runs}/images/train/cat/0.png"], "is one of the images"),
        (["{runs}/none", "{runs}/images", "--tops=1"], "tops: unknown key; did you mean top?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *(argument.format(runs=runs) for argument in arguments)]) == 2
    assert message in last_line(capsys)
