"""One picture from a file: upright, of 8 bits, grey or in colour. Whoever shows a network something reads it here."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif",
    ".avifs", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
"""Of the files that are taken for pictures, where Pillow opens them."""
HIDDEN = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini",
}  # fmt: skip
"""What systems and programs leave in folders, beside all that begins with a dot."""
ORIENTATION = 0x0112
"""The tag of EXIF that says how the camera was held."""


class UnreadableImage(Exception):
    """An image that cannot be opened or decoded; ``name`` is its file."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's."""
    return name.startswith(".") or name.lower() in HIDDEN


def is_picture(name: str) -> bool:
    """Whether a file of that name is one that can be read here."""
    ending = os.path.splitext(name)[1].lower()
    return ending in ENDINGS and Image.registered_extensions().get(ending) in Image.OPEN


def is_grey(image: Image.Image) -> bool:
    """Whether the file says that there are no colours; a palette may hold some."""
    return image.mode in ("1", "L", "LA", "La") or is_deep(image)


def is_deep(image: Image.Image) -> bool:
    """Whether the values have more than 8 bits; Pillow has such images only in grey."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def read_picture(
    file: str | os.PathLike[str] | IO[bytes], name: str, mode: str = "", white: float | None = None
) -> Any:
    """The picture in ``file``, as :func:`to_mode` makes it; of several frames or pages the first.

    Args:
        file: its path, or an open file.
        name: what the user is told of it.

    Raises:
        UnreadableImage: with the reason.
    """
    try:
        with Image.open(file) as image:
            return to_mode(image, mode, white)
    # Decoders raise nearly anything on a damaged file: OSError, SyntaxError, struct.error, MemoryError ...
    except Exception as error:
        raise UnreadableImage(name, str(error) or type(error).__name__) from error


def to_mode(image: Image.Image, mode: str = "", white: float | None = None) -> Image.Image:
    """An image as a network is shown it.

    It is turned as EXIF says, values of more than 8 bits are scaled to 8 (Pillow's own ``convert`` cuts them off at
    255), and what is transparent becomes white, whatever colour it hides.

    Args:
        mode: "L" (grey), "RGB", or "" for what the image is.
        white: value that becomes 255 where there are more than 8 bits; None for :func:`range_of`.
    """
    image = _upright(image)
    grey = is_grey(image)
    if is_deep(image):
        image = _of_bytes(image, white)
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = _over_white(image)
    return image.convert(mode or ("L" if grey else "RGB"))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF harms no pixel
        return image
    return ImageOps.exif_transpose(image) if turned else image


def range_of(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The values that are black and white in an image of more than 8 bits.

    Of 16 bits they are 0 and 65,535. Whole numbers of 32 bits and fractions say nothing of their range: it is the first
    of 0..1 (for fractions), 0..255 and 0..65,535 that holds them all, else from the least to the greatest of them.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0.0, 65535.0
    low, high = float(values.min()), float(values.max())
    for white in (1.0, 255.0, 65535.0)[0 if image.mode == "F" else 1 :]:
        if low >= 0 and high <= white:
            return 0.0, white
    return low, high


def _of_bytes(image: Image.Image, white: float | None) -> Image.Image:
    """An image of more than 8 bits as one of 8."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("it holds no finite value")
    values = np.nan_to_num(values, nan=finite.min(), posinf=finite.max(), neginf=finite.min())
    low, high = range_of(image, values) if white is None else (0.0, white)
    scaled = (np.clip(values, low, high) - low) * (255 / max(high - low, 1e-30))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by alpha already
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
