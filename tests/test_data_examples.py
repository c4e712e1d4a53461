"""``docs/data.md`` is true: its commands train and evaluate on each kind of data, made small here."""

from __future__ import annotations

import io
import json
import pickle
import re
import shlex
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torchvision
from PIL import Image

from experiments.__main__ import main
from experiments.data.data_config import DataConfig

TEXT = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
CLASSES = ("aster", "daisy", "rose")
TRAIN, EVAL = 24, 12  # images

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    # The libraries leave files open.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
#: One step on few images, with a network of one tiny block.
SHORT = [
    "--selector=null", "--losses.macs_target=null",
    "--model.kwargs={embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8}", "--data.batch_size=8",
    "--data.workers=0", "--training.steps=2", "--schedule.warmup_epochs=0", "--sparsity.updates=1",
    "--sparsity.head_density=0.5", "--selector=null", "--losses.macs_target=null", "--training.device=cpu",
]  # fmt: skip


def pixels(number: int, label: int, side: int = 32) -> np.ndarray:
    """Noise whose brightness tells the class: uint8 [side, side, 3]."""
    return np.random.default_rng(number).integers(80 * label, 80 * label + 60, (side, side, 3), dtype=np.uint8)


def jpeg(number: int, label: int) -> bytes:
    """Not square, so that it must be resized."""
    content = io.BytesIO()
    Image.fromarray(pixels(number, label, 40)[:36]).save(content, "jpeg")
    return content.getvalue()


def files(count: int) -> dict[str, bytes]:
    """``<class>/<n>.jpg`` and what is in it."""
    return {f"{CLASSES[number % 3]}/{number}.jpg": jpeg(number, number % 3) for number in range(count)}


def write_files(root: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_tar(path: Path, contents: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def make_folders(data: Path) -> None:
    write_files(data / "flowers" / "train", files(TRAIN))
    write_files(data / "flowers" / "val", files(EVAL))


def make_tars(data: Path) -> None:
    write_tar(data / "flowers-tar" / "train.tar", files(TRAIN))
    write_tar(data / "flowers-tar" / "val.tar", files(EVAL))


def make_cifar10(data: Path) -> None:
    """Its files in its own format, with 24 and 12 images in place of 50,000 and 10,000."""
    folder = data / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    parts = {f"data_batch_{part}": range(5 * part, 5 * part + 5) for part in range(5, 0, -1)}
    for name, numbers in {**parts, "test_batch": range(EVAL)}.items():
        images = np.stack([pixels(number, number % 3).transpose(2, 0, 1).reshape(-1) for number in numbers])
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [number % 10 for number in numbers]}))


def make_hugging_face(data: Path) -> None:
    write_files(data / "flowers-hf" / "train", files(TRAIN))
    write_files(data / "flowers-hf" / "validation", files(EVAL))


def make_shards(data: Path) -> None:
    for split, count in (("train", TRAIN), ("val", EVAL)):
        for shard in range(2):
            contents = {}
            for number in range(shard, count, 2):
                contents[f"{shard}_{number}.jpg"] = jpeg(number, number % 3)
                contents[f"{shard}_{number}.cls"] = str(number % 3).encode()
            write_tar(data / "flowers-wds" / f"{split}-{shard:04d}.tar", contents)


MAKERS = {
    "Folders": make_folders,
    "Tar files": make_tars,
    "torchvision": make_cifar10,
    "Hugging Face": make_hugging_face,
    "WebDataset": make_shards,
}


def commands(section: str) -> list[list[str]]:
    """The commands under a heading, split into words."""
    text = TEXT.split(f"## {section}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("sparse-trainer ")]


def test_every_kind_has_an_example() -> None:
    assert re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE) == ["What is read, and how", *MAKERS]


@pytest.mark.parametrize("section", MAKERS)
def test_the_commands_train_and_evaluate(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The small files have not the checksums of the real ones.
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    MAKERS[section](tmp_path / "data")
    train, evaluate = commands(section)
    assert main([*train, *SHORT]) == 0
    output = capsys.readouterr().out
    assert " ".join(["sparse-trainer", *evaluate]) in output
    last = json.loads((tmp_path / Path(evaluate[1]).parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert main([*evaluate, "--json", "--device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == EVAL
    assert found["top1"] == last["eval/top1"]
    assert found["live_parameters"] == found["total_parameters"] // 2


def test_columns_of_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of CIFAR-10 on the hub, whose images are in a column img."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_hugging_face(tmp_path / "data")
    images = datasets.load_dataset(str(tmp_path / "data" / "flowers-hf"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "other").mkdir()
    for split, part in images.rename_columns({"image": "img", "label": "kind"}).items():
        part.to_parquet(tmp_path / "other" / f"{split}.parquet")
    arguments = ["train", "--data.dataset=hfds/other", "--data.root=cache", "--data.image_size=32", *SHORT]
    capsys.readouterr()
    assert main([*arguments, "--data.target_key=kind"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "sparse-trainer train: error: data.input_key is null, but 'hfds/other' has no column 'image'; it has img, kind"
    )
    assert main([*arguments, "--data.input_key=img"]) == 2
    assert (
        "data.target_key is null, but 'hfds/other' has no column 'label'; it has img, kind" in capsys.readouterr().err
    )
    assert main([*arguments, "--data.input_key=img", "--data.target_key=kind"]) == 0


@pytest.mark.parametrize("dataset", ["folder", "torch/cifar10"])
def test_columns_are_for_records(dataset: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.input_key is 'img', but images of '{dataset}' are no records"):
        DataConfig(dataset=dataset, root="data", input_key="img")
