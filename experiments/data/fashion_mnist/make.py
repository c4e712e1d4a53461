"""Makes ``train.png`` and ``test.png`` from the full Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747).

    python experiments/data/fashion_mnist/make.py --source /usr/share/datasets/fashion-mnist

The source is the folder with the four ``*-ubyte.gz`` files of Debian's package ``dataset-fashion-mnist`` or of
https://github.com/zalandoresearch/fashion-mnist. It needs numpy and Pillow.

Each file is a contact sheet: 100 tiles of 28 x 28 in a row, greyscale, lossless, sorted by class. So the
position tells the label (10 rows a class in ``train.png``, 2 rows a class in ``test.png``; ``classes.txt`` names
the classes in that order), and any picture viewer shows the whole data set. Within each class a fixed seed chose
the images without replacement; they keep the order of the source.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SEED = 2017
SIDE = 28  #: pixels of a tile
COLUMNS = 100  #: tiles in a row
CLASSES = 10


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes: magic number 0 0 8 rank, then the sizes as big-endian 32-bit numbers."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(*shape)


def choose(labels: NDArray[np.uint8], per_class: int, seed: int) -> NDArray[np.int64]:
    """Numbers of ``per_class`` images of each class, sorted by class, then by number."""
    generator = np.random.default_rng(seed)
    chosen = [np.sort(generator.permutation(np.flatnonzero(labels == label))[:per_class]) for label in range(CLASSES)]
    return np.concatenate(chosen)


def sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tiles [N, 28, 28] as one picture [N / 100 * 28, 2800]."""
    rows = len(images) // COLUMNS
    tiles = images.reshape(rows, COLUMNS, SIDE, SIDE)
    return tiles.transpose(0, 2, 1, 3).reshape(rows * SIDE, COLUMNS * SIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded subset of Fashion-MNIST.")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for name, source, per_class in (("train", "train", 1000), ("test", "t10k", 200)):
        images = read_idx(arguments.source / f"{source}-images-idx3-ubyte.gz")
        labels = read_idx(arguments.source / f"{source}-labels-idx1-ubyte.gz")
        chosen = images[choose(labels, per_class, SEED)]
        path = arguments.output / f"{name}.png"
        Image.fromarray(sheet(chosen)).save(path, optimize=True)
        digest = hashlib.sha256(chosen.tobytes()).hexdigest()
        print(f"{path}: {len(chosen)} images, {path.stat().st_size} bytes, SHA-256 of the pixels {digest}")


if __name__ == "__main__":
    main()
