"""Data: the embedded set, folders, tars, library names; purity of every batch; what a user gets told."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import struct
import tarfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments.data.batches import Place, epoch_order, share_of
from experiments.data.create_data import Data, create_data, mean_and_std
from experiments.data.data_config import DataConfig
from experiments.data.mixing import create_mixup
from experiments.data.sources import EMBEDDED_FOLDER, class_balanced, open_sources

CLASSES = ("ant", "bee", "cat")
# Python 3.12 warns of any fork beside torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
LIBRARY_LEAVES_FILES_OPEN = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
STRONG: dict[str, Any] = {
    "crop_padding": 2,
    "horizontal_flip": 0.5,
    "color_jitter": 0.4,
    "random_erasing": 0.5,
}


def write_folder(root: Path, per_class: int = 6, classes: tuple[str, ...] = CLASSES, side: int = 12) -> Path:
    """``root/{train,validation}/<class>/<n>.png``: noise whose brightness tells the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", per_class), ("validation", per_class // 2)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(80 * label, 80 * label + 60, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images")


def create(config: DataConfig, seed: int = 0, rank: int = 0, world_size: int = 1) -> Data:
    return create_data(config, device="cpu", seed=seed, rank=rank, world_size=world_size)


def folder_config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(**{"dataset": "folder", "root": str(root), "batch_size": 4, "workers": 0, **options})


def all_of(batches: Iterator[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return list(batches)


def assert_same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> None:
    assert len(left) == len(right)
    for (images, targets), (other_images, other_targets) in zip(left, right, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def held_targets(data: Data) -> Tensor:
    return torch.cat([targets for _, targets in data.eval.batches()])


# The embedded set


def test_embedded_pixels_are_those_that_the_script_chose() -> None:
    expected = {
        "train": (10_000, "52c7090f51dcdbf539d5e3ec22bb7c713cea775ec11a49d80ab32c1fce3b46a9"),
        "test": (2_000, "b06e8c761158b20fff16d7bb951ca9dcf45508554ae313b08a36eaea6cec457e"),
    }
    for source, (count, digest) in zip(open_sources(DataConfig()), expected.values(), strict=True):
        assert source.dataset.shape == (count, 28, 28)
        assert hashlib.sha256(source.dataset.tobytes()).hexdigest() == digest
        assert source.targets.bincount().tolist() == [count // 10] * 10


def test_embedded_folder_is_small_and_licensed() -> None:
    files = {path.name: path for path in EMBEDDED_FOLDER.iterdir() if path.is_file()}
    assert {"train.png", "test.png", "classes.txt", "LICENSE", "make.py"} <= set(files)
    assert sum(path.stat().st_size for path in files.values()) < 6_000_000
    licence = files["LICENSE"].read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert "2017 Zalando SE" in licence


def test_embedded_default() -> None:
    data = create(DataConfig())
    assert data.num_classes == 10
    assert data.class_names[:2] == ("T-shirt/top", "Trouser")
    assert (data.train_size, data.eval_size, data.image_size, data.in_chans) == (10_000, 2_000, 28, 1)
    assert data.steps_per_epoch() == 78
    assert data.path == "in memory on cpu"
    assert not data.corrupt_files
    images, targets = next(data.train.batches(0))
    assert (images.shape, images.dtype, targets.dtype) == ((128, 1, 28, 28), torch.float32, torch.int64)
    assert held_targets(data).bincount().tolist() == [200] * 10


def test_embedded_images_are_told_apart_by_their_class_means() -> None:
    # The nearest class mean is right for about two thirds of Fashion-MNIST; wrong labels would give a tenth.
    data = create(DataConfig(horizontal_flip=0.0, batch_size=10_000))
    images, targets = next(data.train.batches(0))
    means = torch.stack([images[targets == label].mean(0).flatten() for label in range(10)])
    right = sum(
        int((torch.cdist(images.flatten(1), means).argmin(1) == targets).sum())
        for images, targets in data.eval.batches()
    )
    assert right > 0.6 * 2_000


def test_training_images_are_normalised() -> None:
    data = create(DataConfig(batch_size=10_000))
    images, _ = next(data.train.batches(0))
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3


def test_mean_and_std_are_those_of_torch() -> None:
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = mean_and_std(images)
    values = images.double().transpose(0, 1).flatten(1) / 255
    assert torch.allclose(torch.tensor(mean).double(), values.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(std).double(), values.std(1, correction=0), atol=1e-6)


def test_subsets_are_balanced_and_do_not_depend_on_the_seed_of_the_run() -> None:
    config = DataConfig(train_subset=205, eval_subset=50, batch_size=205, horizontal_flip=0.0)
    first, second = create(config, seed=1), create(config, seed=2)
    images, targets = next(first.train.batches(0))
    assert targets.bincount().tolist() == [21] * 5 + [20] * 5
    assert held_targets(first).bincount().tolist() == [5] * 10
    others, _ = next(second.train.batches(0))
    assert not torch.equal(images, others)
    assert {row.numpy().tobytes() for row in images} == {row.numpy().tobytes() for row in others}


def test_class_balanced_by_hand() -> None:
    targets = torch.tensor([0, 0, 1, 1, 1, 0])
    assert class_balanced(targets, 6, 2, seed=0).tolist() == [0, 1, 2, 3, 4, 5]
    assert targets[class_balanced(targets, 3, 2, seed=0)].bincount().tolist() == [2, 1]
    with pytest.raises(ValueError, match="class 0 has 3 images of the 4"):
        class_balanced(targets, 8, 2, seed=0)


# Purity


@pytest.mark.parametrize("path", ["memory", "loader", "workers"])
def test_an_epoch_may_be_entered_at_any_batch(path: str, folder: Path) -> None:
    options = {"memory": {}, "loader": {"in_memory": "never"}, "workers": {"in_memory": "never", "workers": 2}}[path]
    config = folder_config(folder, **STRONG, **options, repeated_augmentation=2)
    data = create(config)
    whole = all_of(data.train.batches(3))
    assert len(whole) == data.steps_per_epoch() == 4
    # A pass that is left half-way must not disturb the next.
    next(data.train.batches(1))
    for start in range(5):
        assert_same(whole[start:], all_of(data.train.batches(3, start=start)))
    assert_same(whole, all_of(create(config).train.batches(3)))


@pytest.mark.parametrize("path", ["memory", "loader"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_make_the_slices_of_one_process(world_size: int, path: str, folder: Path) -> None:
    options = {"batch_size": 6, "in_memory": "auto" if path == "memory" else "never"}
    config = folder_config(folder, **STRONG, **options, repeated_augmentation=3)
    ranks = [all_of(create(config, rank=rank, world_size=world_size).train.batches(2)) for rank in range(world_size)]
    joined = [tuple(torch.cat(parts) for parts in zip(*pieces, strict=True)) for pieces in zip(*ranks, strict=True)]
    assert_same(all_of(create(config).train.batches(2)), joined)  # type: ignore[arg-type]


def test_worker_processes_end_with_the_data(folder: Path) -> None:
    # Left to the cycle collector, a loader waits five seconds for each of its workers.
    data = create(folder_config(folder, in_memory="never", workers=1))
    next(data.train.batches(0))
    loader = weakref.ref(data.train.loader)  # type: ignore[attr-defined]
    del data
    assert loader() is None


def test_pictures_can_be_sent_to_a_worker_that_was_not_forked(folder: Path) -> None:
    config = folder_config(folder, in_memory="never", auto_augment="rand-m9-mstd0.5-inc1", crop_scale=0.5)
    pictures = create(config).train.loader.dataset  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(copy[3, 7, True].image, pictures[3, 7, True].image)


def test_memory_and_loader_make_the_same_pictures(folder: Path) -> None:
    config = folder_config(folder, **STRONG, mean=(0.5,) * 3, std=(0.2,) * 3)
    memory, loader = create(config), create(replace(config, in_memory="never"))
    assert (memory.path, loader.path) == ("in memory on cpu", "timm loader, 0 workers")
    for epoch in range(2):
        assert_same(all_of(memory.train.batches(epoch)), all_of(loader.train.batches(epoch)))
    assert_same(all_of(memory.eval.batches()), all_of(loader.eval.batches()))


def test_embedded_images_are_the_same_through_the_loader() -> None:
    config = DataConfig(train_subset=20, eval_subset=20, batch_size=10, mean=(0.5,), std=(0.5,), workers=0, **STRONG)
    memory, loader = create(config), create(replace(config, in_memory="never"))
    assert_same(all_of(memory.train.batches(0)), all_of(loader.train.batches(0)))


def test_seeds_and_epochs_differ() -> None:
    config = DataConfig(batch_size=100, train_subset=100)
    first = next(create(config, seed=0).train.batches(0))[0]
    assert not torch.equal(first, next(create(config, seed=0).train.batches(1))[0])
    assert not torch.equal(first, next(create(config, seed=1).train.batches(0))[0])


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_global_random_states_are_left_alone(in_memory: str, folder: Path) -> None:
    options = {"auto_augment": "rand-m9-mstd0.5-inc1"} if in_memory == "never" else {"color_jitter": 0.3}
    config = folder_config(folder, in_memory=in_memory, mixup=0.8, random_erasing=0.5, **options)

    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    data = create(config)
    mixing = create_mixup(config, data.num_classes, seed=0)
    assert mixing is not None
    for batch, (images, targets) in enumerate(data.train.batches(0)):
        mixing(images, targets, epoch=0, batch=batch)
    all_of(data.eval.batches())
    assert states() == before


def test_an_epoch_holds_each_image_once() -> None:
    order = epoch_order(100, 10, 1, seed=3, epoch=0)
    assert order.shape == (10, 10)
    assert sorted(order.flatten().tolist()) == list(range(100))
    assert epoch_order(109, 10, 1, seed=3, epoch=0).shape == (10, 10)


def test_repeated_augmentation_by_hand() -> None:
    order = epoch_order(12, 6, 3, seed=0, epoch=0)
    first, second = order[0, 0].item(), order[0, 1].item()
    assert order[0].tolist() == [first, second] * 3
    # As long as the data set, so a third of the images.
    assert order.shape == (2, 6)
    assert order.flatten().bincount(minlength=12).sort().values.tolist() == [0] * 8 + [3] * 4


def test_copies_of_an_image_are_not_side_by_side() -> None:
    for row in epoch_order(1000, 100, 3, seed=0, epoch=0).tolist():
        assert all(left != right for left, right in pairwise(row))


@pytest.mark.parametrize("count", [1, 7, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_each_image_once(count: int, world_size: int) -> None:
    shares = [share_of(count, Place(torch.device("cpu"), rank, world_size)) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert len(shares[0]) > 0  # the first process shows pictures of them


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_evaluation_over_processes(in_memory: str, folder: Path) -> None:
    config = folder_config(folder, in_memory=in_memory, eval_batch_size=2)
    whole = torch.cat([images for images, _ in create(config).eval.batches()])
    assert len(whole) == 9
    parts = [create(config, rank=rank, world_size=2).eval.batches() for rank in range(2)]
    assert torch.equal(torch.cat([images for part in parts for images, _ in part]), whole)


# Folders, tars, library names


@pytest.mark.parametrize("in_memory", ["auto", "never"])
def test_folder(in_memory: str, folder: Path) -> None:
    data = create(folder_config(folder, in_memory=in_memory, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert data.class_names == CLASSES
    assert (data.train_size, data.eval_size, data.image_size, data.in_chans) == (18, 9, 12, 3)
    for batches in (data.train.batches(0), data.eval.batches()):
        for images, targets in batches:
            # The darkest class has values 0 .. 59 of 255, the next 80 .. 139, the last 160 .. 219.
            assert torch.equal((images.mean(dim=(1, 2, 3)) * 255 / 80).floor().long(), targets)


def pack(source: Path, target: Path, *, shards: bool) -> None:
    """``train.tar`` and ``validation.tar``, or folders ``train`` and ``validation`` with two tars each."""
    for split in ("train", "validation"):
        files = sorted((source / split).rglob("*.png"))
        if not shards:
            with tarfile.open(target / f"{split}.tar", "w") as tar:
                for file in files:
                    tar.add(file, file.relative_to(source / split))
            continue
        (target / split).mkdir()
        for shard in range(2):
            with tarfile.open(target / split / f"{shard:03d}.tar", "w") as tar:
                for file in files[shard::2]:
                    tar.add(file, file.relative_to(source / split))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_tar_gives_what_the_folder_gives(workers: int, shards: bool, folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    pack(folder, packed, shards=shards)
    options: dict[str, Any] = {"in_memory": "never", "workers": workers}
    from_folder, from_tar = (create(folder_config(root, **options)) for root in (folder, packed))
    assert from_tar.class_names == CLASSES

    def contents(data: Data) -> list[tuple[bytes, int]]:
        pairs = [(images, targets) for images, targets in data.eval.batches()]
        images, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return sorted((image.numpy().tobytes(), int(target)) for image, target in zip(images, targets, strict=True))

    assert contents(from_tar) == contents(from_folder)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("in_memory", ["auto", "never"])
def test_torchvision_name(in_memory: str, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    config = DataConfig(
        dataset="torch/mnist", root=str(tmp_path), batch_size=8, workers=0, in_memory=in_memory, train_subset=20
    )
    data = create(config)
    assert (data.num_classes, data.train_size, data.eval_size, data.in_chans) == (10, 20, 20, 1)
    assert held_targets(data).tolist() == [number % 10 for number in range(20)]
    images, _ = next(data.train.batches(0))
    assert images.shape == (8, 1, 28, 28)


def test_torchvision_image_folder(folder: Path) -> None:
    data = create(folder_config(folder, dataset="torch/image_folder"))
    assert data.class_names == CLASSES


@LIBRARY_LEAVES_FILES_OPEN
def test_hugging_face_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = create(folder_config(tmp_path / "cache", dataset=f"hfds/{folder}"))
    assert data.class_names == CLASSES
    assert (data.train_size, data.image_size) == (18, 12)
    assert held_targets(data).tolist() == [0] * 3 + [1] * 3 + [2] * 3


def write_shards(folder: Path, target: Path, split: str, count: int) -> None:
    for shard in range(count):
        with tarfile.open(target / f"{split}-{shard:04d}.tar", "w") as tar:
            for number, file in enumerate(sorted((folder / split).rglob("*.png"))[shard::count]):
                label = str(CLASSES.index(file.parent.name)).encode()
                for kind, content in (("png", file.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{shard}_{number}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@LIBRARY_LEAVES_FILES_OPEN
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_shards(workers: int, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for split in ("train", "validation"):
        write_shards(folder, tmp_path, split, 2)
    config = DataConfig(
        dataset="wds/shards",
        root=str(tmp_path),
        train_split="train-{0000..0001}.tar|18",
        eval_split="validation-{0000..0001}.tar|9",
        num_classes=3,
        image_size=12,
        batch_size=4,
        workers=workers,
        **STRONG,
    )
    data = create(config)
    assert data.path == f"timm loader, streamed, {workers} workers"
    assert sorted(held_targets(data).tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    whole = all_of(data.train.batches(1))
    assert len(whole) == data.steps_per_epoch() == 4
    assert_same(whole[2:], all_of(data.train.batches(1, start=2)))
    with pytest.raises(ValueError, match=r"data\.num_classes is 2, but a batch has labels"):
        all_of(create(replace(config, num_classes=2)).train.batches(0))


@LIBRARY_LEAVES_FILES_OPEN
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_webdataset_shards_over_processes(
    shards: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(folder, tmp_path, "train", shards)
    write_shards(folder, tmp_path, "validation", 1)
    config = DataConfig(
        dataset="wds/shards",
        root=str(tmp_path),
        train_split=f"train-{{0000..{shards - 1:04d}}}.tar|18",
        eval_split="validation-{0000..0000}.tar|9",
        num_classes=3,
        image_size=12,
        batch_size=6,
        workers=0,
        horizontal_flip=0.0,
    )
    if shards == 1:
        message = (
            r"data\.train_split has 1 shards for 2 readers \(2 processes, data.workers 0\), .* at least 2 are needed"
        )
        with pytest.raises(ValueError, match=message):
            create(config, world_size=2)
        return
    parts = [create(config, rank=rank, world_size=2) for rank in range(2)]
    assert ("do not divide evenly over 2 readers" in caplog.text) == (shards == 3)
    seen = [image.numpy().tobytes() for part in parts for images, _ in part.train.batches(0) for image in images]
    assert len(seen) == 18
    assert (len(set(seen)) == 18) == (shards == 2)
    evaluated = [len(images) for part in parts for images, _ in part.eval.batches()]
    assert sum(evaluated) == 9  # a stream cannot be shared out exactly: the first process has it all


def test_images_are_resized_and_recoloured_as_asked(folder: Path) -> None:
    data = create(folder_config(folder, image_size=20, in_chans=1, crop_pct=0.9))
    images, _ = next(data.train.batches(0))
    assert images.shape == (4, 1, 20, 20)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_policies_and_resized_crops_through_the_loader(in_chans: int, folder: Path) -> None:
    config = folder_config(
        folder,
        auto_augment="rand-m9-mstd0.5-inc1",
        crop_scale=0.3,
        random_erasing=0.25,
        image_size=8,
        in_chans=in_chans,
        repeated_augmentation=3,
    )
    data = create(config)
    assert data.path == "timm loader, 0 workers"
    for images, _ in data.train.batches(0):
        assert images.shape == (4, in_chans, 8, 8)
        assert images.isfinite().all()


def test_auto_stays_out_of_memory_where_something_would_be_lost(folder: Path) -> None:
    def path(**options: Any) -> str:
        return create(folder_config(folder, **options)).path.split(",")[0]

    assert path() == path(crop_scale=0.5) == path(image_size=8) == "in memory on cpu"
    assert path(auto_augment="rand-m9-mstd0.5-inc1") == path(crop_scale=0.5, image_size=8) == "timm loader"
    assert path(memory_limit=1e-6) == "timm loader"
    assert path(memory_limit=1e-6, in_memory="always") == "in memory on cpu"


def test_test_stands_in_for_a_missing_validation(folder: Path) -> None:
    (folder / "validation").rename(folder / "test")
    assert create(folder_config(folder)).eval_size == 9
    write_folder(folder / "more")
    (folder / "more" / "validation").rename(folder / "val")
    assert open_sources(folder_config(folder))[1].dataset.root == str(folder / "val")


# Corrupt files


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_corrupt_files_are_named_and_left_out(
    in_memory: str, workers: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncated = folder / "train" / "bee" / "2.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    text = folder / "validation" / "cat" / "1.png"
    text.write_text("not an image")
    data = create(folder_config(folder, in_memory=in_memory, workers=workers, batch_size=2))
    for epoch in range(3):
        assert all(len(images) == 2 for images, _ in data.train.batches(epoch))
    assert held_targets(data).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(data.corrupt_files) == [str(truncated), str(text)]
    named = [record for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(named) == 2


def test_nothing_but_corrupt_files_is_an_error(folder: Path) -> None:
    for file in (folder / "train").rglob("*.png"):
        file.write_text("not an image")
    with pytest.raises(ValueError, match=r"none of .* could be read.*ant.0\.png"):
        create(folder_config(folder))


def test_a_folder_that_went_away_is_an_error(folder: Path) -> None:
    data = create(folder_config(folder, in_memory="never"))
    for file in (folder / "train").rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match="in a row cannot be read"):
        all_of(data.train.batches(0))


def test_damaged_tar_member(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (folder / "train" / "ant" / "0.png").write_text("not an image")
    pack(folder, packed, shards=False)
    data = create(folder_config(packed))
    assert list(data.corrupt_files) == [f"{packed / 'train.tar'}/ant/0.png"]
    assert data.train_size == 17


# Mixup


def test_mixup_is_off_by_default() -> None:
    assert create_mixup(DataConfig(), 10, seed=0) is None


def test_mixup_mixes_neighbours_by_one_share() -> None:
    mixing = create_mixup(DataConfig(mixup=1.0), 4, seed=0)
    assert mixing is not None
    images = torch.tensor([0.0, 1.0, 10.0, 11.0]).view(4, 1, 1, 1)
    mixed, soft = mixing(images, torch.arange(4), epoch=0, batch=0)
    share = soft.max().item()
    # Image 0 with 1 and 2 with 3, each in its place.
    other = 1 - share
    first = share if soft[0, 0] == share else other
    for row, (own, neighbour) in enumerate([(0.0, 1.0), (1.0, 0.0), (10.0, 11.0), (11.0, 10.0)]):
        assert mixed[row].item() == pytest.approx(first * own + (1 - first) * neighbour, abs=1e-5)
    assert torch.allclose(soft.sum(1), torch.ones(4))


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixup_is_pure_and_the_same_on_every_process(options: dict[str, float]) -> None:
    mixing = create_mixup(DataConfig(label_smoothing=0.1, **options), 10, seed=3)
    assert mixing is not None
    images, targets = torch.rand(8, 1, 6, 6), torch.arange(8)

    def rows(first: int, last: int) -> Tensor:
        mixed, soft = mixing(images[first:last], targets[first:last], epoch=1, batch=5)
        return torch.cat((mixed.flatten(1), soft), dim=1)

    np.random.seed(1)  # noqa: NPY002
    whole = rows(0, 8)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(whole, rows(0, 8))
    assert torch.equal(whole, torch.cat((rows(0, 4), rows(4, 8))))
    assert not torch.equal(mixing(images, targets, epoch=1, batch=5)[0], mixing(images, targets, epoch=1, batch=6)[0])


# What a user gets told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0; it must be 1 or more"),
        ({"horizontal_flip": 1.5}, "data.horizontal_flip is 1.5; it must be a probability"),
        ({"in_chans": 2}, "data.in_chans is 2; it must be 1"),
        ({"mean": (0.5,)}, "data.mean and data.std go together"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "data.mean is .* one number per channel"),
        ({"crop_padding": 2, "crop_scale": 0.5}, "set crop_padding to 0 or crop_scale to 1"),
        ({"auto_augment": "rand-m9", "color_jitter": 0.4}, "set one of the two"),
        ({"auto_augment": "rand-m9", "in_memory": "always"}, "set in_memory to auto or never"),
        ({"root": "pictures"}, "set data.dataset to 'folder'"),
        (
            {"dataset": "cifar10", "root": "d"},
            "data.dataset is 'cifar10' .did you mean 'torch/cifar10'.*must be one of",
        ),
        ({"dataset": "torch/cifar10"}, "data.dataset 'torch/cifar10' needs data.root"),
        ({"dataset": "folder", "root": "d", "eval_split": "train"}, "are both 'train'"),
        ({"dataset": "folder", "root": "d", "eval_split": ""}, "data.eval_split is empty"),
    ],
)
def test_bad_values_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"data\.workers is -1[\s\S]*data\.mixup is -2") as error:
        DataConfig(workers=-1, mixup=-2.0, memory_limit=0)
    assert len(str(error.value).splitlines()) == 3


def test_fields_can_be_given_in_yaml_and_on_the_command_line() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataConfig, "data")
    given = ["--data.mean", "[0.5]", "--data.std", "[0.25]", "--data.auto_augment", "rand-m9-mstd0.5-inc1"]
    config = DataConfig(**vars(parser.parse_args([*given, "--data.train_subset", "100"]).data))
    assert config == DataConfig(mean=(0.5,), std=(0.25,), auto_augment="rand-m9-mstd0.5-inc1", train_subset=100)
    assert isinstance(config.mean, tuple)


def test_missing_and_empty_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root '.*nowhere' is not a folder"):
        create(folder_config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data\.eval_split: .* nor a tar named 'test'.*there are: train, validation"):
        create(folder_config(folder, eval_split="test"))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.eval_split: no images in .*empty"):
        create(folder_config(folder, eval_split="empty"))
    flat = write_folder(tmp_path / "flat", classes=("",))
    with pytest.raises(ValueError, match=r"no images in .*flat.train'; passed over: 6 in no class folder .0\.png, 1"):
        create(folder_config(flat))
    with pytest.raises(ValueError, match=r"images of 1 class in .* .ant.; it must have a folder a class"):
        create(folder_config(write_folder(tmp_path / "one", classes=("ant",))))


def test_different_classes(folder: Path) -> None:
    (folder / "validation" / "cat").rename(folder / "validation" / "dog")
    with pytest.raises(
        ValueError, match=r"different classes: dog is not among the 3 known ones, of which it lacks cat"
    ):
        create(folder_config(folder))


def test_evaluation_must_lie_apart(folder: Path) -> None:
    with pytest.raises(ValueError, match="neither may lie within the other"):
        create(folder_config(folder, eval_split="train/../train"))


def test_missing_download(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.download is off; set data\.download to true"):
        create(DataConfig(dataset="torch/cifar10", root=str(tmp_path)))


def test_unknown_torchvision_name_and_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch/cifar11.*did you mean 'torch/cifar10'"):
        create(DataConfig(dataset="torch/cifar11", root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.train_split is 'trian'; 'torch/cifar10' has train and test"):
        create(DataConfig(dataset="torch/cifar10", root=str(tmp_path), train_split="trian"))


def test_sizes_that_differ(folder: Path) -> None:
    Image.new("RGB", (20, 10)).save(folder / "train" / "ant" / "0.png")
    with pytest.raises(ValueError, match=r"not of one square size .the first is 20 x 10.; set data\.image_size"):
        create(folder_config(folder))
    assert create(folder_config(folder, image_size=12)).image_size == 12


def test_batches_that_cannot_be(folder: Path) -> None:
    with pytest.raises(ValueError, match="there are only 18 training images; it must be at most 18"):
        create(folder_config(folder, batch_size=19))
    with pytest.raises(ValueError, match="it must be a multiple of 3, as 6"):
        create(folder_config(folder, batch_size=4), world_size=3)
    with pytest.raises(ValueError, match="it must be a multiple of 4"):
        create(folder_config(folder, batch_size=6, mixup=0.8), world_size=2)
    with pytest.raises(ValueError, match=r"data\.train_subset is 100, but class 0 has 6 images of the 34"):
        create(folder_config(folder, train_subset=100))


def test_unknown_policy(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.auto_augment is 'nonsense'.*timm's policies"):
        create(folder_config(folder, auto_augment="nonsense"))


def test_wrong_number_of_classes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.num_classes is 4, but the data has 3 classes"):
        create(folder_config(folder, num_classes=4))


@pytest.mark.parametrize("name", ["hfds/x", "wds/x"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.data

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("No module named 'datasets'")

    monkeypatch.setattr(timm.data, "create_dataset", missing)
    with pytest.raises(ValueError, match=r"needs a package that is not installed .*pip install (datasets|webdataset)"):
        create(DataConfig(dataset=name, root=str(tmp_path)))
