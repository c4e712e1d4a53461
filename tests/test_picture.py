"""One reader of pictures: what a file holds becomes upright, of 8 bits, grey or in colour, with the right values."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.data.picture import ENDINGS, UnreadableImage, is_hidden, is_picture, read_picture, to_mode

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
"""All values of 16 bits that are a whole number of 8."""
BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def through_file(image: Image.Image, format: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("mode", "format"), [("I;16", "png"), ("I;16", "tiff"), ("I;16B", "tiff"), ("I;16", "jpeg2000"), ("I", "ppm")]
)
def test_sixteen_bits_are_scaled(mode: str, format: str) -> None:
    values = RAMP.astype({"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2"))
    image = Image.fromarray(values) if mode != "I;16B" else Image.frombytes("I;16B", (16, 16), values.tobytes())
    picture = read_picture(through_file(image, format), "x")
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), BYTES)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 51, 255]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0, 13107, 65535]], dtype=np.float32), [0, 51, 255]),
        (np.array([[-1, 0, 1]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 0.2, np.nan]], dtype=np.float32), [0, 51, 0]),
        (np.array([[7e6, 7e6, 7e6]], dtype=np.float32), [0, 0, 0]),
        (np.array([[0, 13107, 65535]], dtype=np.int32), [0, 51, 255]),
        (np.array([[0, 51, 255]], dtype=np.int32), [0, 51, 255]),
        (np.array([[-1000, 0, 4000]], dtype=np.int32), [0, 51, 255]),
    ],
)
def test_thirty_two_bits_by_hand(values: np.ndarray, expected: list[int]) -> None:
    picture = read_picture(through_file(Image.fromarray(values), "tiff"), "x")
    assert np.asarray(picture)[0].tolist() == expected


def test_a_camera_of_twelve_bits() -> None:
    image = Image.fromarray(np.array([[0, 819, 4095, 60000]], dtype=np.uint16))
    assert np.asarray(to_mode(image))[0].tolist() == [0, 3, 16, 233]
    assert np.asarray(to_mode(image, white=4095))[0].tolist() == [0, 51, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGBa", "La", "RGB"])
def test_what_is_transparent_is_white_whatever_it_hides(mode: str) -> None:
    """A black square on nothing, and nothing that is black as well."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 2))
    expected = [0, 0, 255, 255]
    if mode == "P":
        image = Image.open(through_file(image.quantize(), "png"))
    elif mode == "RGB":  # one colour stands for nothing
        image = Image.new("RGB", (4, 2))
        image.paste((9, 9, 9), (2, 0, 4, 2))
        image = Image.open(through_file(image, "png", transparency=(9, 9, 9)))
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    if mode in ("P", "RGB"):
        assert "transparency" in image.info
    assert np.asarray(to_mode(image, "L"))[0].tolist() == expected
    assert np.asarray(to_mode(image, "RGB"))[1, :, 2].tolist() == expected


def test_half_transparent_is_half_white() -> None:
    assert np.asarray(to_mode(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "L")).item() == 204


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "F", "I;16", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_any_mode_becomes_grey_or_colour(mode: str) -> None:
    grey = mode in ("1", "L", "LA", "I", "F", "I;16")
    image = Image.new(mode, (3, 2))
    assert to_mode(image).mode == ("L" if grey else "RGB")
    assert [to_mode(image, wanted).mode for wanted in ("L", "RGB")] == ["L", "RGB"]


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_inks_are_colours(format: str) -> None:
    """Red is no cyan, all magenta and yellow, and no black."""
    picture = read_picture(through_file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format), "x")
    red, green, blue = np.asarray(picture).mean(axis=(0, 1))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
def test_pictures_stand_upright(format: str, orientation: int) -> None:
    """Each of the eight ways to hold a camera, undone."""
    upright = np.zeros((16, 32), dtype=np.uint8)
    upright[:8, :8] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, 3),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = through_file(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    picture = np.asarray(read_picture(file, "x", "L")).astype(int)
    assert picture.shape == upright.shape
    assert np.abs(picture - upright).mean() < 4


def test_damaged_exif_harms_no_pixel() -> None:
    picture = read_picture(through_file(Image.fromarray(BYTES), "png", exif=b"Exif\x00\x00nonsense"), "x")
    assert np.array_equal(np.asarray(picture), BYTES)


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "gif", "avif", "jp2", "ppm", "tga", "JPEG"])
def test_formats(ending: str, tmp_path: Path) -> None:
    if not is_picture(f"x.{ending}"):
        assert ending in ("avif", "webp", "jp2")  # the codecs with which a Pillow may have been built
        return
    file = tmp_path / f"x.{ending}"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file)
    assert np.abs(np.asarray(read_picture(file, "x", "RGB"))[8, 8].astype(int) - (200, 100, 50)).max() < 12


def test_of_several_frames_the_first() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    file = through_file(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_picture(file, "x", "L")).max() == 10


def test_names() -> None:
    assert all(ending == ending.lower() for ending in ENDINGS)
    assert not any(map(is_picture, ["x.txt", "x", "png", "x.pdf", "x.npy", "x.png.part"]))
    assert all(map(is_hidden, [".DS_Store", "._1.jpg", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db"]))
    assert not any(map(is_hidden, ["cat", "_cat", "n01440764", "__background__"]))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_cannot_be_read_is_named(content: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"^a file: ."):
        read_picture(io.BytesIO(content), "a file")
