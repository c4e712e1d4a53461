"""Which images a run sees, and what happens to them."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from experiments.data.augmentation import Augmentation

EMBEDDED = "fashion-mnist-10k"
FOLDER_NAMES = ("", "folder")
LIBRARY_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
STREAMED_PREFIXES = ("hfids", "tfds", "wds")
MOST_PIXELS = 1 << 16
"""Of an image's side; a size with more is a slip of the finger."""

TRAINING_ONLY = (
    "train_split", "train_subset", "batch_size", "crop_padding", "crop_scale", "horizontal_flip", "color_jitter",
    "auto_augment", "random_erasing", "erasing_mode", "repeated_augmentation", "mixup", "cutmix", "mixup_prob",
    "mixup_switch_prob", "label_smoothing",
)  # fmt: skip
"""Settings of :class:`DataConfig` that mean nothing to an evaluation."""
OF_THE_MODEL = ("in_chans", "mean", "std")
"""Those that a trained model has decided."""


@dataclass(frozen=True)
class DataConfig:
    """Data set, batches and augmentation. Checked when built; all problems are reported together.

    Raises:
        ValueError: a value is out of its range, or two values exclude each other.
    """

    dataset: str = EMBEDDED
    """"fashion-mnist-10k" comes with the project. "folder": an image folder or tar files under ``root``, one top folder
    or tar a class. "torch/cifar10": a torchvision data set by its name. "hfds/...", "hfids/...", "tfds/...",
    "wds/...": Hugging Face, TensorFlow and WebDataset names as timm understands them."""
    root: str | None = None
    """Folder of the data; not for the embedded set."""
    train_split: str = "train"
    eval_split: str = "validation"
    """Name of the part to evaluate on: a folder or tar under ``root``, or a split of the library's data set."""
    input_key: str | None = None
    """Where the image is in a record of hfds, hfids, tfds or wds data; null for the column image (in shards jpg, png or
    webp)."""
    target_key: str | None = None
    """Where the class is in such a record; null for the column label (in shards cls)."""
    download: bool = False
    """Let torchvision or the data set's own library download what is missing."""
    num_classes: int | None = None
    """Only for data that does not say it itself, as WebDataset shards."""
    train_subset: int | None = None
    """Use only so many training images, the same number of every class."""
    eval_subset: int | None = None
    subset_seed: int = 0
    """Chooses the subsets. Not tied to the seed of the run, so runs with several seeds see the same images."""

    in_memory: Literal["auto", "always", "never"] = "auto"
    """Hold all images as bytes on the device and augment whole batches there. "auto" does so where they fit
    ``memory_limit`` and nothing is lost by it: no ``auto_augment``, and no resized crops from larger originals."""
    memory_limit: float = 2.0
    """GiB for the images of both splits together."""
    workers: int = 2
    """Processes that decode images where they are not held in memory."""

    batch_size: int = 128
    """Training images in a batch over all processes together, so a run means the same on one process or many."""
    eval_batch_size: int = 256
    """Images in an evaluation batch of each process."""
    image_size: int | None = None
    """Side in pixels; None is the images' own."""
    in_chans: int | None = None
    """1 or 3; None is the images' own."""
    mean: tuple[float, ...] | None = None
    """Mean per channel of values in 0 .. 1. None: measured on the training images in memory, else ImageNet's."""
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bicubic"
    crop_pct: float = 1.0
    """Evaluation resizes to image_size / crop_pct and takes the centre."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """What is not square loses its ends, gets black borders, or is squashed; a random resized crop takes its place."""
    white_level: float | None = None
    """Value that is white in pictures of more than 8 bits, as 4095 where a camera has 12; null: 65535 of 16 bits, and
    of 32 the least of 1 (for fractions), 255 and 65535 that holds the picture, else its own range."""

    crop_padding: int = 0
    """Random crop after a border of so many black pixels. A threshold selector may drop those first;
    evaluation, where there are none, then keeps more patches than training. ``crop_scale`` has no border."""
    crop_scale: float = 1.0
    """Least share of the area in a random resized crop (ImageNet: 0.08); 1 is no such crop."""
    horizontal_flip: float = 0.5
    color_jitter: float = 0.0
    """Brightness, contrast and saturation vary by 1 - this .. 1 + this."""
    auto_augment: str | None = None
    """A policy by timm's name, as "rand-m9-mstd0.5-inc1". Not for images in memory."""
    random_erasing: float = 0.0
    """Probability."""
    erasing_mode: Literal["const", "pixel"] = "pixel"
    repeated_augmentation: int = 1
    """How often an image comes in a row of batches, each time augmented anew (DeiT: 3). An epoch stays as long as
    the data set, so it then holds only one in so many of the images."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    label_smoothing: float = 0.0

    @property
    def preparation(self) -> dict[str, Any]:
        """How a picture is brought to its size, for a checkpoint to say."""
        return {key: getattr(self, key) for key in ("interpolation", "crop_pct", "fit", "white_level")}

    def __post_init__(self) -> None:
        if self.root is not None:
            object.__setattr__(self, "root", os.path.expanduser(self.root))
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(
            crop_padding=self.crop_padding,
            crop_scale=self.crop_scale,
            horizontal_flip=self.horizontal_flip,
            color_jitter=self.color_jitter,
            random_erasing=self.random_erasing,
            erasing_mode=self.erasing_mode,
        )

    @property
    def streams(self) -> bool:
        """Whether the images come in a row only, and cannot be cut to a subset."""
        return "/" in self.dataset and self.dataset.split("/")[0].lower() in STREAMED_PREFIXES

    @property
    def is_folder(self) -> bool:
        """Whether it is an image folder or tar files."""
        return self.dataset in FOLDER_NAMES or self.dataset.lower() in ("torch/folder", "torch/image_folder")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def _problems(self) -> list[str]:
        problems = self._source_problems()

        def check(key: str, good: bool, would_work: str) -> None:
            if not good:
                problems.append(f"data.{key} is {getattr(self, key)!r}; it must be {would_work}")

        for key in ("batch_size", "eval_batch_size", "repeated_augmentation"):
            check(key, getattr(self, key) >= 1, "1 or more")
        for key in ("image_size", "num_classes", "train_subset", "eval_subset"):
            value = getattr(self, key)
            check(key, value is None or value >= 1, "1 or more, or null")
        check("image_size", self.image_size is None or self.image_size <= MOST_PIXELS, f"{MOST_PIXELS:,} at most")
        for key in ("workers", "crop_padding"):
            check(key, getattr(self, key) >= 0, "0 or more")
        check("subset_seed", 0 <= self.subset_seed < 2**63, "a whole number from 0 to 2^63 - 1")
        for key in ("horizontal_flip", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            check(key, 0 <= getattr(self, key) <= 1, "a probability, 0 to 1")
        for key in ("mixup", "cutmix", "color_jitter"):
            check(key, 0 <= getattr(self, key) < math.inf, "0 (off) or a positive number")
        check("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and less than 1")
        for key in ("crop_scale", "crop_pct"):
            check(key, 0 < getattr(self, key) <= 1, "more than 0 and at most 1")
        check("memory_limit", self.memory_limit > 0, "more than 0 (GiB)")
        check("in_chans", self.in_chans in (None, 1, 3), "1 (greyscale), 3 (colour) or null")
        check("in_memory", self.in_memory in ("auto", "always", "never"), "auto, always or never")
        check("erasing_mode", self.erasing_mode in ("const", "pixel"), "const or pixel")
        interpolations = ("bilinear", "bicubic", "nearest", "lanczos")
        check("interpolation", self.interpolation in interpolations, ", ".join(interpolations))
        check("fit", self.fit in ("crop", "pad", "squash"), "crop, pad or squash")
        check("white_level", self.white_level is None or 0 < self.white_level < math.inf, "a positive number or null")
        counts = (1, 3) if self.in_chans is None else (self.in_chans,)
        check("mean", self.mean is None or len(self.mean) in counts, "null, or one number per channel")
        good_std = self.std is None or (len(self.std) in counts and min(self.std) > 0)
        check("std", good_std, "null, or one positive number per channel")
        if (self.mean is None) != (self.std is None):
            problems.append("data.mean and data.std go together: give both or neither")
        if self.crop_padding and self.crop_scale < 1:
            problems.append(
                f"data.crop_padding is {self.crop_padding} and data.crop_scale is {self.crop_scale}: an image is "
                "cropped in one way; set crop_padding to 0 or crop_scale to 1"
            )
        if self.auto_augment and self.color_jitter:
            problems.append(
                f"data.color_jitter is {self.color_jitter} beside data.auto_augment {self.auto_augment!r}, which "
                "changes colours itself; set one of the two"
            )
        if self.auto_augment and self.in_memory == "always":
            problems.append(
                f"data.auto_augment {self.auto_augment!r} works on single images, data.in_memory is 'always'; "
                "set in_memory to auto or never, or use crop_padding, crop_scale, color_jitter and random_erasing"
            )
        return problems

    def _source_problems(self) -> list[str]:
        problems = []
        name, prefix = self.dataset, self.dataset.split("/")[0].lower()
        is_library = "/" in name and prefix in LIBRARY_PREFIXES
        if name == EMBEDDED:
            if self.root is not None:
                problems.append(
                    f"data.root is {self.root!r}, but data.dataset {EMBEDDED!r} comes with the project; for your "
                    "own images set data.dataset to 'folder'"
                )
        elif not is_library and name not in FOLDER_NAMES:
            forms = [EMBEDDED, "folder", "torch/cifar10", "hfds/NAME", "hfids/NAME", "tfds/NAME", "wds/NAME"]
            close = difflib.get_close_matches(name, [*forms, f"torch/{name}"], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            problems.append(f"data.dataset is {name!r}{hint}; it must be one of {', '.join(forms)}")
        elif self.root is None and (name in FOLDER_NAMES or prefix in ("torch", "wds")):
            problems.append(f"data.dataset {name!r} needs data.root, the folder of the data")
        for key in ("input_key", "target_key"):
            if getattr(self, key) is not None and not (is_library and prefix != "torch"):
                problems.append(
                    f"data.{key} is {getattr(self, key)!r}, but images of {name!r} are no records; leave it out"
                )
        for key in ("train_split", "eval_split"):
            if not getattr(self, key):
                problems.append(f"data.{key} is empty; it must name a folder under data.root, or a split")
        if name != EMBEDDED and self.train_split == self.eval_split:
            problems.append(
                f"data.train_split and data.eval_split are both {self.train_split!r}; a run must not be judged on "
                "the images it trains on"
            )
        return problems
