"""Opens a data set by its name: images by number, with labels and class names, whatever library reads them."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor

from experiments.data.data_config import EMBEDDED, DataConfig
from experiments.data.folders import Listing, list_pictures
from experiments.data.picture import UnreadableImage, read_picture, to_mode

EMBEDDED_FOLDER = Path(__file__).parent / "fashion_mnist"
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "eval", "evaluation", "test")
#: torchvision data sets that timm opens by the two names "train" and anything else
TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
TORCH_NAMES = (*TWO_SPLITS, "inaturalist", "places365", "imagenet", "image_folder")


@dataclass(frozen=True)
class ImageSource:
    """Images by number.

    ``dataset`` is a :class:`Listing`, a timm reader, a torchvision data set, or a uint8 array [N, S, S] of greyscale
    images.
    ``numbers`` [M] are the images of ``dataset`` that take part, ``targets`` int64 [M] their classes.
    """

    dataset: Any
    targets: Tensor
    class_names: tuple[str, ...]
    numbers: Tensor
    mode: str = ""  #: "L" or "RGB"; "" is either, as the image is
    white_level: float | None = None  #: :attr:`DataConfig.white_level`

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int) -> Image.Image:
        """The decoded image.

        Raises:
            UnreadableImage: with the name of the file.
        """
        name, number = self.name(index), int(self.numbers[index])
        if isinstance(self.dataset, Listing):
            listing = self.dataset
            try:
                file = io.BytesIO(listing.read(number)) if listing.in_tars else listing.samples[number]
            except OSError as error:
                raise UnreadableImage(name, str(error)) from error
            return read_picture(file, name, self.mode, self.white_level)
        try:
            with _opened(self.dataset, number) as image:
                return to_mode(image, self.mode, self.white_level)
        except Exception as error:  # of whatever library reads it
            raise UnreadableImage(name, str(error) or type(error).__name__) from error

    def look(self, index: int) -> tuple[str, tuple[int, int]]:
        """Mode and size (width, height) as the file has them; of files nothing is decoded.

        Raises:
            UnreadableImage: with the name of the file.
        """
        number = int(self.numbers[index])
        try:
            with _opened(self.dataset, number) as image:
                return image.mode, image.size
        except Exception as error:
            raise UnreadableImage(self.name(index), str(error) or type(error).__name__) from error

    def raw(self, index: int) -> np.ndarray:
        """The values in the file, [H, W] or [H, W, C]."""
        with _opened(self.dataset, int(self.numbers[index])) as image:
            return np.asarray(image)

    def name(self, index: int) -> str:
        """The file of an image, or its number where the data set has no files."""
        number = int(self.numbers[index])
        if isinstance(self.dataset, Listing):
            return self.dataset.name(number)
        if _is_reader(self.dataset):
            return str(self.dataset.filename(number, absolute=True) or f"image {number}")
        if hasattr(self.dataset, "samples"):
            return str(self.dataset.samples[number][0])
        return f"image {number}"

    def pixels(self, shape: tuple[int, int, int]) -> Tensor | None:
        """All images as uint8 [M, C, S, S] if they lie ready in that shape (C, S, S), else None."""
        channels, *sides = shape
        if not isinstance(self.dataset, np.ndarray) or list(self.dataset.shape[1:]) != sides:
            return None
        return torch.from_numpy(self.dataset)[self.numbers, None].repeat(1, channels, 1, 1)

    def select(self, indices: Tensor) -> ImageSource:
        """Only the images at ``indices`` [K]."""
        return replace(self, numbers=self.numbers[indices], targets=self.targets[indices])


@dataclass(frozen=True)
class StreamSource:
    """Images that come in a row only (WebDataset and other streams). ``open()`` starts anew."""

    config: DataConfig
    split: str
    training: bool
    class_names: tuple[str, ...]
    size: int  #: images, as the data set says
    shards: int | None = None  #: files that are shared out whole over processes and workers (WebDataset)

    @property
    def mode(self) -> str:
        """That of the images, "L" or "RGB"."""
        return "L" if self.config.in_chans == 1 else "RGB"

    def open(self, batch_size: int, seed: int) -> timm.data.IterableImageDataset:
        """timm's stream, of images as in their files. ``batch_size`` and ``seed`` decide how it is cut and shuffled."""
        return _create(
            self.config,
            self.split,
            is_training=self.training,
            batch_size=batch_size,
            seed=seed,
            # TensorFlow's own decoder must know the channels.
            input_img_mode=self.mode if self.config.dataset.lower().startswith("tfds/") else "",
        )


def _is_reader(dataset: Any) -> bool:
    """Whether it is one of timm's, whose images are open files. In torchvision's CIFAR-10 ``filename`` is a text."""
    return callable(getattr(dataset, "filename", None))


@contextmanager
def _opened(dataset: Any, number: int) -> Iterator[Image.Image]:
    """The image with its file, both closed at the end."""
    if isinstance(dataset, np.ndarray):
        yield Image.fromarray(dataset[number])
    elif isinstance(dataset, Listing):
        file = io.BytesIO(dataset.read(number)) if dataset.in_tars else dataset.samples[number]
        with Image.open(file) as image:
            yield image
    elif _is_reader(dataset):
        file = dataset[number][0]
        with file, Image.open(file) as image:
            yield image
    else:
        yield dataset[number][0]


def _embedded(split: str) -> ImageSource:
    """One contact sheet of the embedded Fashion-MNIST subset: the position of a tile tells its label."""
    class_names = tuple((EMBEDDED_FOLDER / "classes.txt").read_text(encoding="utf-8").split("\n")[:-1])
    with Image.open(EMBEDDED_FOLDER / f"{split}.png") as picture:
        sheet = np.asarray(picture)
    rows, columns = sheet.shape[0] // 28, sheet.shape[1] // 28
    images = sheet.reshape(rows, 28, columns, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28)
    targets = torch.arange(len(class_names)).repeat_interleave(len(images) // len(class_names))
    return ImageSource(images, targets, class_names, torch.arange(len(images)), mode="L")


def _create(config: DataConfig, split: str, **options: Any) -> Any:
    """timm's ``create_dataset``, whose many kinds of failure become one."""
    keys = {key: getattr(config, key) for key in ("input_key", "target_key") if getattr(config, key) is not None}
    try:
        return timm.data.create_dataset(
            config.dataset, root=config.root, split=split, download=config.download, **keys, **options
        )
    except ImportError as error:
        package = {
            "hfds": "datasets",
            "hfids": "datasets",
            "tfds": "tensorflow-datasets",
            "wds": "webdataset",
        }
        prefix = config.dataset.split("/")[0].lower()
        raise ValueError(
            f"data.dataset {config.dataset!r} needs a package that is not installed ({error}); "
            f"pip install {package.get(prefix, prefix)}"
        ) from error
    except Exception as error:
        if "install webdataset" in str(error):
            raise ValueError(
                f"data.dataset {config.dataset!r} needs the package webdataset; pip install webdataset"
            ) from error
        if not config.download and "download" in str(error).lower():
            raise ValueError(
                f"data.dataset {config.dataset!r} is not in data.root {config.root!r} and data.download is off; "
                f"set data.download to true, or data.root to the folder that has it"
            ) from error
        raise ValueError(
            f"data.dataset {config.dataset!r}, split {split!r}, data.root {config.root!r}: "
            f"{error or type(error).__name__}"
        ) from error


def _find_split(root: Path, split: str) -> Path | None:
    """``root/<split>`` or ``root/<split>.tar``. Synonyms stand in for each other, and test for validation."""
    group = next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names and split != "test"), ())
    for name in (split, *group):
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or (path.is_file() and path.suffix == ".tar"):
                return path
    return None


def _split_path(root: Path, split: str) -> Path:
    path = _find_split(root, split)
    if path is not None:
        return path
    there = sorted(path.name for path in root.iterdir() if path.is_dir() or path.suffix == ".tar")
    raise ValueError(
        f"data.root {str(root)!r} has neither a folder nor a tar named {split!r}, with a folder a class in it"
        + (f"; there are: {', '.join(there[:20])}" if there else "; it has no folders at all")
    )


def _folder(config: DataConfig, key: str, split: str, known: Sequence[str] | None) -> ImageSource:
    """Args: ``known`` has classes that may lie in ``data.root`` itself, which then is the split."""
    assert config.root is not None
    root = Path(config.root)
    if not root.is_dir():
        raise ValueError(f"data.root {config.root!r} is not a folder; it must hold {split!r} with a folder a class")
    try:
        is_split = any(name and "/" not in name and (root / name).is_dir() for name in known or ())
        listing = list_pictures(root if is_split and not _find_split(root, split) else _split_path(root, split))
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from error
    return ImageSource(listing, listing.targets, listing.class_names, torch.arange(len(listing.targets)))


def _torch(config: DataConfig, key: str, split: str) -> ImageSource:
    name = config.dataset.split("/")[-1].lower()
    if name not in (*TORCH_NAMES, "inat", "folder"):
        close = difflib.get_close_matches(name, TORCH_NAMES, n=1)
        hint = f" (did you mean {'torch/' + close[0]!r}?)" if close else ""
        raise ValueError(
            f"data.dataset is {config.dataset!r}{hint}; timm knows {', '.join('torch/' + n for n in TORCH_NAMES)}"
        )
    if name in TWO_SPLITS and split not in (*TRAIN_NAMES, *EVAL_NAMES):
        raise ValueError(f"data.{key} is {split!r}; {config.dataset!r} has train and test")
    dataset = _create(config, split)
    labels = next((getattr(dataset, n) for n in ("targets", "labels", "_labels") if hasattr(dataset, n)), None)
    if labels is None:
        labels = [target for _, target in getattr(dataset, "samples", None) or getattr(dataset, "index", [])]
    # QMNIST's targets are rows whose first number is the class.
    targets = torch.as_tensor(labels).long()
    targets = targets[:, 0] if targets.ndim == 2 else targets
    names = getattr(dataset, "classes", None) or range(int(targets.max()) + 1)
    return ImageSource(dataset, targets, tuple(map(str, names)), torch.arange(len(targets)))


def _check_columns(config: DataConfig, reader: Any) -> None:
    """Refuse columns that are not there; where the image's is missing, timm makes an empty one."""
    record: dict[str, Any] = next(iter(reader.dataset), {})
    there = [name for name, value in record.items() if value is not None]
    for key, column in (("input_key", reader.image_key), ("target_key", reader.label_key)):
        if record and column not in there:
            raise ValueError(
                f"data.{key} is {getattr(config, key) or 'null'}, but {config.dataset!r} has no column {column!r}; it "
                f"has {', '.join(there)}"
            )


def _library(config: DataConfig, key: str, split: str, training: bool) -> ImageSource | StreamSource:
    in_memory = config.dataset.lower().startswith("hfds/")
    dataset = _create(config, split, **({} if in_memory else {"is_training": training}))
    reader = dataset.reader
    if in_memory:
        _check_columns(config, reader)
    class_to_index = getattr(reader, "class_to_idx", None) or {}
    names = tuple(str(name) for name in sorted(class_to_index, key=class_to_index.__getitem__))
    if not names and config.num_classes is None:
        raise ValueError(f"data.dataset {config.dataset!r} does not say its classes; set data.num_classes")
    names = names or tuple(map(str, range(config.num_classes or 0)))
    if isinstance(dataset, timm.data.IterableImageDataset):
        shards = len(reader.split_info.filenames) if config.dataset.lower().startswith("wds/") else None
        return StreamSource(config, split, training, names, reader.num_samples or len(dataset), shards)
    targets = torch.tensor(list(reader.dataset[reader.label_key]))
    return ImageSource(reader, targets, names, torch.arange(len(targets)))


def _open(
    config: DataConfig, key: str, training: bool, known: Sequence[str] | None = None
) -> ImageSource | StreamSource:
    split = getattr(config, key)
    if config.dataset == EMBEDDED:
        return _embedded("train" if training else "test")
    if config.is_folder:
        return _folder(config, key, split, known)
    if config.dataset.lower().startswith("torch/"):
        return _torch(config, key, split)
    return _library(config, key, split, training)


def class_balanced(targets: Tensor, count: int, num_classes: int, seed: int) -> Tensor:
    """Numbers of ``count`` images, as many of each class (the first classes one more if it does not divide).

    Returns:
        int64 [count], ascending.

    Raises:
        ValueError: a class has too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(num_classes):
        wanted = count // num_classes + (label < count % num_classes)
        members = (targets == label).nonzero().squeeze(1)
        if len(members) < wanted:
            raise ValueError(f"class {label} has {len(members)} images of the {wanted} that a balanced subset takes")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values


def _subset(source: ImageSource | StreamSource, key: str, count: int | None, seed: int) -> Any:
    if count is None:
        return source
    if isinstance(source, StreamSource):
        raise ValueError(f"data.{key} is {count}; a streamed data set cannot be cut; set it to null")
    targets, num_classes = source.targets, len(source.class_names)
    if key == "eval_subset":  # which need not have images of every class
        there, targets = targets.unique(return_inverse=True)
        num_classes = len(there)
    try:
        return source.select(class_balanced(targets, count, num_classes, seed))
    except ValueError as error:
        raise ValueError(f"data.{key} is {count}, but {error}") from error


def with_classes(source: ImageSource, class_names: Sequence[str], key: str) -> ImageSource:
    """The same images with the numbers that classes have in ``class_names``; some of these may have no image.

    Raises:
        ValueError: there is a class of another name.
    """
    names = tuple(class_names)
    if source.class_names == names:  # which may hold a name twice, as ImageNet's do
        return source
    odd = [name for name in source.class_names if name not in names]
    missing = [name for name in names if name not in source.class_names]
    if odd:
        raise ValueError(
            f"data.{key} has different classes: {_some(odd)} {'is' if len(odd) == 1 else 'are'} not among "
            f"the {len(names)} known ones" + (f", of which it lacks {_some(missing)}" if missing else "")
        )
    numbers = torch.tensor([names.index(name) for name in source.class_names])
    return replace(source, targets=numbers[source.targets], class_names=names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_apart(train: str, evaluation: str) -> None:
    folders = [os.path.realpath(path) for path in (train, evaluation)]
    if os.path.commonpath(folders) in folders:
        raise ValueError(
            f"data.train_split leads to {train!r} and data.eval_split to {evaluation!r}; a run must not be judged on "
            "the images it trains on, so neither may lie within the other"
        )


def open_sources(config: DataConfig) -> tuple[ImageSource | StreamSource, ImageSource | StreamSource]:
    """The images to train on and those to evaluate on, cut to the subsets that the configuration asks for.

    Raises:
        ValueError: missing or empty folders, unknown names, a needed download that is off, a missing package,
            classes to evaluate that are not trained.
    """
    train = _open(config, "train_split", training=True)
    if isinstance(train, ImageSource) and len(train.class_names) < 2:
        where = f" in {train.dataset.root!r}" if isinstance(train.dataset, Listing) else ""
        raise ValueError(
            f"data.train_split: images of {len(train.class_names)} class{where} ({train.class_names[0]}); it must have "
            "a folder a class, two at least"
        )
    evaluation = _open(config, "eval_split", training=False)
    if isinstance(train, ImageSource) and isinstance(evaluation, ImageSource):
        evaluation = with_classes(evaluation, train.class_names, "eval_split")
        if isinstance(train.dataset, Listing) and isinstance(evaluation.dataset, Listing):
            _check_apart(train.dataset.root, evaluation.dataset.root)
    elif train.class_names != evaluation.class_names:
        raise ValueError(
            f"data.train_split and data.eval_split have different classes ({_some(train.class_names)}; "
            f"{_some(evaluation.class_names)})"
        )
    _check_number(config, train)
    train = _subset(train, "train_subset", config.train_subset, config.subset_seed)
    evaluation = _subset(evaluation, "eval_subset", config.eval_subset, config.subset_seed)
    return train, evaluation


def open_eval_source(config: DataConfig, class_names: Sequence[str] | None) -> ImageSource | StreamSource:
    """The images to evaluate on alone; there need be none to train on, nor any of some class.

    Where ``data.root`` has no folder called ``data.eval_split`` but one of a class, it is that folder itself.

    Args:
        class_names: those that the model knows; None for those of the data.

    Raises:
        ValueError: as :func:`open_sources`, and where a class is not known.
    """
    source = _open(config, "eval_split", training=False, known=class_names)
    if isinstance(source, ImageSource):
        source = with_classes(source, class_names or source.class_names, "eval_split")
    _check_number(config, source)
    return _subset(source, "eval_subset", config.eval_subset, config.subset_seed)


def _check_number(config: DataConfig, source: ImageSource | StreamSource) -> None:
    if config.num_classes not in (None, len(source.class_names)):
        raise ValueError(
            f"data.num_classes is {config.num_classes}, but the data has {len(source.class_names)} classes; "
            "set it to null"
        )
