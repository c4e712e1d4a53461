"""Folders as people have them: which pictures are taken, of which class each is, and what is said of the rest."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.__main__ import main
from experiments.data.create_data import Data, create_data
from experiments.data.data_config import DataConfig
from experiments.data.folders import Listing, list_pictures

SPLITS = {"train": 8, "validation": 4}
"""Pictures of each class."""


def picture(brightness: float, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("L", (width, height), round(255 * brightness))


def put(image: Image.Image, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file


def two_classes(root: Path) -> Path:
    """Dark cats and bright dogs, all a little different, none of one colour."""
    for split, count in SPLITS.items():
        for number in range(count):
            for name, base in (("cat", 40), ("dog", 200)):
                values = np.random.default_rng(number).integers(base, base + 20, (8, 8), dtype=np.uint8)
                put(Image.fromarray(values), root / split / name / f"{number}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_classes(tmp_path / "images")


def create(root: Path, **options: object) -> Data:
    settings = {"dataset": "folder", "root": str(root), "batch_size": 4, "workers": 0, "horizontal_flip": 0.0}
    return create_data(DataConfig(**{**settings, "mean": (0.0,), "std": (1.0,), **options}), device="cpu", seed=0)  # type: ignore[arg-type]


def held(data: Data) -> list[tuple[int, int]]:
    """Class and mean brightness, in steps of 64, of each picture to evaluate."""
    return [
        (int(target), int(image.mean() * 255 // 64))
        for images, targets in data.eval.batches()
        for image, target in zip(images, targets, strict=True)
    ]


CLEAN = [(0, 0)] * 4 + [(1, 3)] * 4


@pytest.mark.parametrize(
    "stray",
    [
        ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/._0.png", ".git/x.png", "@eaDir/0.png", "lost+found/0.png",
        "stray.png", ".DS_Store", "cat/._0.png", "cat/.ipynb_checkpoints/0.png", "labels.csv", "cat/notes.txt",
        "dog/@eaDir/0.png", "notes/readme.md", "dog/0.png.part", "cat/Thumbs.db",
    ],
)  # fmt: skip
def test_what_is_no_picture_of_a_class_is_passed_over_and_said(stray: str, root: Path) -> None:
    for split in SPLITS:
        put(picture(1.0), root / split / "x.png").rename(root / split / "keep")
        (root / split / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / split / "keep").rename(root / split / stray)
    data = create(root)
    assert data.class_names == ("cat", "dog")
    assert data.train_size == 16
    assert held(data) == CLEAN
    assert "passed over: " in data.summary[1]
    named = data.summary[1].split("passed over: ")[1]
    assert any(part in named for part in Path(stray).parts)


def test_the_top_folders_are_the_classes(root: Path) -> None:
    for split in SPLITS:
        for name in ("cat", "dog"):
            for number, file in enumerate(sorted((root / split / name).iterdir())):
                deep = root / split / name / ("day", "night/early", "night/late")[number % 3] / file.name
                deep.parent.mkdir(parents=True, exist_ok=True)
                file.rename(deep)
    data = create(root)
    assert data.class_names == ("cat", "dog")
    assert sorted(held(data)) == CLEAN
    assert data.summary[0] == "2: cat 8 + 4, dog 8 + 4 (to train on + to evaluate)"


def test_an_archive_that_was_unpacked_into_a_folder_of_its_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for split in SPLITS:
        shutil.move(root / split, tmp_path / "other" / split / split)
    assert create(tmp_path / "other").class_names == ("cat", "dog")
    for split in SPLITS:  # one class with folders in it is no such archive
        shutil.move(tmp_path / "other" / split / split, tmp_path / "other" / split / "animals")
    with pytest.raises(ValueError, match=r"images of 1 class in .* \(animals\)"):
        create(tmp_path / "other")


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "tiff", "gif", "avif", "pgm", "JPG", "jfif"])
def test_a_class_of_any_format(ending: str, root: Path) -> None:
    for split, count in SPLITS.items():
        for number in range(count):
            file = root / split / "dog" / f"{number}.png"
            with Image.open(file) as image:
                image.save(file.with_suffix(f".{ending}"))
            file.unlink()
    data = create(root, in_chans=1)
    assert data.class_names == ("cat", "dog")
    assert sorted(held(data)) == CLEAN


def test_links_are_followed_but_not_in_circles(root: Path) -> None:
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    shutil.move(root / "train" / "dog", root / "kennel")
    (root / "train" / "dog").symlink_to(root / "kennel")
    assert create(root).summary[0].startswith("2: cat 8 + 4, dog 8 + 4 ")


def pack(folder: Path, tar: Path, prefix: str = "") -> None:
    with tarfile.open(tar, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.add(path, prefix + str(path.relative_to(folder)))


@pytest.mark.parametrize("kind", ["tar", "dot", "wrapped", "by class", "shards", "tar of tars"])
def test_tars_have_the_classes_of_the_folder(kind: str, root: Path, tmp_path: Path) -> None:
    """With all that a folder may have: deep folders, hidden files of a Mac, other formats."""
    for split in SPLITS:
        put(picture(1.0), root / split / "cat" / "._0.png")
        deep = root / split / "cat" / "day"
        deep.mkdir()
        (root / split / "cat" / "0.png").rename(deep / "0.png")
        with Image.open(root / split / "dog" / "0.png") as image:
            image.save(root / split / "dog" / "0.webp")
        (root / split / "dog" / "0.png").unlink()
    packed = tmp_path / "packed"
    packed.mkdir()
    for split in SPLITS:
        if kind in ("tar", "dot", "wrapped"):
            pack(root / split, packed / f"{split}.tar", {"tar": "", "dot": "./", "wrapped": f"{split}/"}[kind])
        elif kind == "shards":
            (packed / split).mkdir()
            pack(root / split, packed / split / "000.tar")
        else:
            (packed / split).mkdir()
            for name in ("cat", "dog"):
                # No folder within the tar; or the class once more, as with cat/day.
                pack(root / split / name, packed / split / f"{name}.tar", "cat/" if name == "cat" else "")
            if kind == "tar of tars":
                pack(packed / split, packed / f"{split}.tar")
                shutil.rmtree(packed / split)
    data = create(packed, in_chans=1)
    assert data.class_names == ("cat", "dog")
    assert sorted(held(data)) == CLEAN
    assert "hidden (._0.png)" in data.summary[1]


def test_a_tar_that_is_cut_off(root: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.tar").write_bytes(b"no tar")
    shutil.move(root / "validation", tmp_path / "packed" / "validation")
    with pytest.raises(ValueError, match=r"data\.train_split: no images in .*train\.tar"):
        create(tmp_path / "packed")


def test_one_colour_picture_among_grey_ones(root: Path) -> None:
    file = root / "train" / "dog" / "7.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file)
    data = create(root, mean=None, std=None)
    assert data.in_chans == 3
    assert "L 15, RGB 1, read as colour" in data.summary[1]
    assert f"1 of one colour ({file})" in data.summary[1]
    assert create(root, in_chans=1).in_chans == 1


def test_grey_of_sixteen_bits_is_learned_as_of_eight(root: Path, tmp_path: Path) -> None:
    for file in (root / "train").rglob("*.png"):
        with Image.open(file) as image:
            values = np.asarray(image).astype(np.uint16) * 257
        Image.fromarray(values).save(file)
    deep, flat = create(root), create(two_classes(tmp_path / "flat"))
    assert deep.in_chans == 1
    (left, _), (right, _) = next(iter(deep.train.batches(0))), next(iter(flat.train.batches(0)))
    assert torch.equal(left, right)
    assert "I;16 16, read as grey" in deep.summary[1]
    assert "white_level" not in deep.summary[1]


def test_dark_pictures_of_a_camera_are_said(root: Path) -> None:
    for file in root.rglob("*.png"):
        with Image.open(file) as image:
            values = np.asarray(image).astype(np.uint16) * 16
        Image.fromarray(values).save(file)
    dark = create(root)
    assert "pictures of 16 bits reach 3,504 of 65,535 and are that dark: data.white_level says" in dark.summary[1]
    bright = create(root, white_level=4080)
    assert held(bright) == CLEAN
    assert "white_level" not in bright.summary[1]


@pytest.mark.parametrize("in_memory", ["always", "never"])
@pytest.mark.parametrize(("fit", "seen"), [("crop", 0.0), ("pad", 1 / 8), ("squash", 1 / 2)])
def test_long_pictures(fit: str, seen: float, in_memory: str, tmp_path: Path) -> None:
    """Bright in their outer quarters only: the middle is black, all of it half bright."""
    values = np.zeros((28, 112), dtype=np.uint8)
    values[:, :28] = values[:, -28:] = 255
    for split, count in SPLITS.items():
        for number in range(count):
            put(Image.fromarray(values), tmp_path / split / "across" / f"{number}.png")
            put(Image.fromarray(values.T.copy()), tmp_path / split / "along" / f"{number}.png")
    data = create(tmp_path, fit=fit, image_size=28, in_memory=in_memory, interpolation="nearest")
    for batches in (data.train.batches(0), data.eval.batches()):
        images = torch.cat([images for images, _ in batches])
        expected = seen if fit != "pad" else 1 / 8  # a quarter of the square is picture, half of which is bright
        assert torch.allclose(images.mean(dim=(1, 2, 3)), torch.tensor(expected), atol=0.01)
    done = {"crop": "cut to the middle", "pad": "given black borders", "squash": "squashed"}[fit]
    assert f"not square: {done} (data.fit)" in data.summary[1]
    assert "28 x 112 to 112 x 28" in data.summary[1]


@pytest.mark.parametrize("in_memory", ["always", "never"])
@pytest.mark.parametrize("damage", ["text", "empty", "cut off"])
def test_a_class_of_which_nothing_can_be_read(damage: str, in_memory: str, root: Path) -> None:
    for file in (root / "train" / "dog").iterdir():
        content = {"text": b"no picture", "empty": b"", "cut off": file.read_bytes()[:50]}[damage]
        file.write_bytes(content)
    if damage == "cut off" and in_memory == "never":  # its head is whole, and of files not held a few are decoded
        assert "8 cannot be read" in create(root, in_memory=in_memory).summary[1]
        return
    with pytest.raises(ValueError, match=r"no image of class 'dog' can be read; of 8 the first is .*dog.0\.png \(.+\)"):
        create(root, in_memory=in_memory)


def test_a_class_without_images_to_evaluate(root: Path) -> None:
    shutil.rmtree(root / "validation" / "cat")
    data = create(root)
    assert data.class_names == ("cat", "dog")
    assert held(data) == CLEAN[4:]
    assert data.summary[0].endswith("; none to evaluate of cat")
    assert create(root, eval_subset=2).eval_size == 2


def test_many_classes_are_summed_up(tmp_path: Path) -> None:
    for split, count in SPLITS.items():
        for label in range(12):
            for number in range(count + (label == 11)):
                put(picture(0.1 + number / 20), tmp_path / split / f"class{label}" / f"{number}.png")
    line = create(tmp_path).summary[0]
    assert line.startswith("12: class0 8 + 4, class1 8 + 4, class2 8 + 4, ")  # in their natural order
    assert line.endswith("class9 8 + 4, ... (8 to 9 + 4 to 5 each) (to train on + to evaluate)")


def test_reading_at_an_offset_is_reading_the_file(root: Path, tmp_path: Path) -> None:
    pack(root / "train", tmp_path / "train.tar")
    listing = list_pictures(tmp_path / "train.tar")
    assert isinstance(listing, Listing)
    for number, (member, *_) in enumerate(listing.samples):
        assert listing.read(number) == (root / "train" / member.name).read_bytes()
        assert listing.name(number) == f"{tmp_path}/train.tar/{member.name}"


SHORT = [
    "--selector=null", "--losses.macs_target=null", "--data.batch_size=8", "--data.workers=0",
    "--model.kwargs={embed_dim: 16, depth: 1, num_heads: 2, patch_size: 4}", "--data.dataset=folder",
    "--training.steps=2", "--schedule.warmup_epochs=0", "--training.device=cpu", "--sparsity.updates=1",
    "--sparsity.head_density=0.5",
]  # fmt: skip


def test_a_run_says_what_it_read_and_its_checkpoint_needs_test_images_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train" / "stray.png").write_bytes(b"")
    assert main(["train", *SHORT, f"--data.root={root}", f"--output.runs={tmp_path}", "--output.name=run"]) == 0
    out = capsys.readouterr().out
    assert "\nclasses   2: cat 8 + 4, dog 8 + 4 (to train on + to evaluate)\n" in out
    assert "\npictures  8 x 8; L 16, read as grey; passed over: 1 in no class folder (stray.png)\n" in out
    checkpoint = str(tmp_path / "run" / "sparse.safetensors")

    def evaluate(*options: str) -> dict[str, object]:
        assert main(["evaluate", checkpoint, "--json", "--device=cpu", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    whole = evaluate()
    shutil.rmtree(root / "train")
    again = evaluate()
    assert (again["top1"], again["loss"], again["images"]) == (whole["top1"], whole["loss"], 8)
    # A folder of the classes itself, and one of them alone.
    assert evaluate(f"--data.root={root / 'validation'}")["loss"] == whole["loss"]
    shutil.rmtree(root / "validation" / "cat")
    assert evaluate()["images"] == 4
    (root / "validation" / "dog").rename(root / "validation" / "wolf")
    assert main(["evaluate", checkpoint, "--device=cpu"]) == 2
    assert "wolf is not among the 2 known ones, of which it lacks cat, dog; choose" in capsys.readouterr().err


def test_names_are_shown_on_one_line(root: Path) -> None:
    put(picture(0.5), root / "train" / "cat" / "a\nb.png")
    assert "\n" not in "".join(create(root).summary)


def test_a_stream_is_read_by_the_same_reader() -> None:
    """Of WebDataset's images none is converted before it comes here."""
    from experiments.data.batches import Stream
    from experiments.data.sources import StreamSource

    config = DataConfig(dataset="wds/x", root="x", in_chans=1, num_classes=2, image_size=2)
    source = StreamSource(config, "train", True, ("a", "b"), 1)
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 257 * 9, dtype=np.uint16)).save(file, "png")
    stream = Stream([(Image.open(file), 1)], source, lambda image: torch.from_numpy(np.array(image)), 0)
    assert next(iter(stream)).image.tolist() == [[9, 9], [9, 9]]  # type: ignore[union-attr]
