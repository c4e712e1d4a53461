"""Images per second of the two ways by which they reach a training step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from experiments.benchmarks.setting import Setting
from experiments.benchmarks.timing import Figure, paired
from experiments.data.create_data import create_data
from experiments.data.data_config import DataConfig
from experiments.errors import ConfigError

COPIES = 20
"""Files of each image."""
FILES = 100 * COPIES
"""In an epoch."""


def benchmark_data(setting: Setting) -> list[Figure]:
    """Images per second of both data paths: in memory and augmented on the device, and timm's loader from files.

    Args:
        setting: batch size, device and number of pairs.

    Raises:
        ConfigError: a batch is more than an epoch.
    """
    if setting.batch_size > FILES:
        raise ConfigError(
            f"batch_size: {setting.batch_size} is more than the {FILES:,} images that are written to files"
        )
    device = setting.on
    memory = create_data(DataConfig(batch_size=setting.batch_size), device=device, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder))
        files = create_data(
            DataConfig(
                dataset="folder", root=folder, train_split="train", eval_split="test", in_memory="never", in_chans=1,
                batch_size=setting.batch_size,
            ),
            device=device,
            seed=0,
        )  # fmt: skip

        def epoch(data: Any, epochs: int) -> Callable[[], object]:
            return lambda: [None for epoch in range(epochs) for _ in data.train.batches(epoch)]

        images = files.train.steps_per_epoch * setting.batch_size
        times = paired(epoch(files, 1), epoch(memory, 1), device=device, pairs=min(setting.pairs, 3))
        in_memory = memory.train.steps_per_epoch * setting.batch_size / times.second
    return [
        Figure(
            "in memory", in_memory, "images/s", reference=images / times.first, ratio=in_memory / (images / times.first)
        ),
        Figure("timm loader, from image files", images / times.first, "images/s"),
    ]


def _write_images(folder: Path) -> None:
    """The first images of the embedded data as PNG files, as an image folder."""
    data = create_data(DataConfig(eval_subset=FILES // COPIES), device="cpu", seed=0)
    for split in ("train", "test"):
        for index, (images, targets) in enumerate(data.eval.batches()):
            for number, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
                path = folder / split / f"{target}"
                path.mkdir(parents=True, exist_ok=True)
                pixels = ((image[0] - image.min()) / (image.max() - image.min()) * 255).to(torch.uint8)
                for copy in range(COPIES if split == "train" else 1):
                    Image.fromarray(pixels.numpy()).save(path / f"{index}-{number}-{copy}.png")
