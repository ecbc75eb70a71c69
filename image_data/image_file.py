"""The decoder rule: image file -> upright 8-bit RGB pixels, the same in preparation, training and prediction.

    pixels, kind, file_format = decode_image(Path("cat.jpg"))       # uint8 (height, width, 3)

Pillow defines the pixels. DALI decodes only the files for which it gives the same pixels: upright 8-bit grayscale
or RGB in PNG or JPEG (`as_dali_input`). Every other file is decoded by Pillow before DALI gets it.

The rule: EXIF and XMP orientations are applied. Alpha is dropped. Palettes and other color spaces are converted. Of 16
bits per channel the high byte is kept. Of animations and multi-page files the first frame is used.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from common.text import first_line

if TYPE_CHECKING:
    from PIL import Image, ImageFile

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".webp", ".jp2", ".j2k", ".gif", ".avif"),
}
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "PPM", "WEBP", "JPEG2000", "GIF", "AVIF")  # Pillow's names
KINDS = {
    "1": "grayscale",
    "L": "grayscale",
    "LA": "grayscale with alpha",
    "La": "grayscale with alpha",
    "P": "palette",
    "PA": "palette",
}
MAX_MEGAPIXELS = 90.0  # default limit, Pillow's own warning level
TOO_LARGE = "exceed the limit of"  # part of the message about larger images

ORIENTATION_TAG = 0x0112  # of EXIF
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> function of pixels (height, width, 3)
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels, 1),
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
# Byte strings of which one occurs in every file with an orientation. Pillow reads a whole PNG to find its EXIF data.
METADATA_MARKS = {"PNG": (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type"), "JPEG": (b"Exif\0", b"tiff:Orientation")}


@cache
def pillow() -> ModuleType:
    """Return PIL.Image, imported late because runs on packed pixels open no image file.

    Its own size limit is off: `decode_image` has one that an option can raise.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    return Image


def decode_image(
    source: Path | bytes, formats: tuple[str, ...] | None = FORMATS, max_megapixels: float | None = MAX_MEGAPIXELS
) -> tuple[np.ndarray, str, str]:
    """Decode an image file.

    Args:
        source: path or content of the file.
        formats: names of the accepted formats; None accepts every format of Pillow.
        max_megapixels: larger images are rejected before they are decoded; None accepts any size.

    Returns:
        Pixels, uint8 (height, width, 3), contiguous; kind ("RGB", "16-bit", ...); format ("PNG", ...).

    Raises:
        Exception: some part of the file cannot be decoded. Pillow raises OSError, SyntaxError, ValueError, struct.error
            and others on damaged files.
    """
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")  # to read a pipe or a device may never end
    encoded = source if isinstance(source, bytes) else source.read_bytes()
    if not encoded:
        raise ValueError("empty file")
    with pillow().open(io.BytesIO(encoded), formats=formats) as image:
        _check_size(image, max_megapixels)
        is_16_bit = _is_16_bit(image)  # known only before loading: Pillow then has 8-bit RGB
        image.load()
        kind, name = "16-bit" if is_16_bit else KINDS.get(image.mode, image.mode), image.format
        assert name is not None  # only images that were not read from a file have no format
        return np.ascontiguousarray(UPRIGHT[_orientation(image, encoded)](_to_rgb(image, is_16_bit))), kind, name


def as_dali_input(encoded: bytes) -> bytes | None:
    """Return the file as a PNG of Pillow's pixels, or None if DALI decodes the file itself to the same pixels.

    Raises:
        Exception: the file cannot be decoded (see `decode_image`).
    """
    with pillow().open(io.BytesIO(encoded), formats=FORMATS) as image:
        is_plain = (
            image.format in METADATA_MARKS
            and image.mode in ("L", "RGB")
            and not _is_16_bit(image)
            and "transparency" not in image.info
            and image.info.get("adobe_transform") != 0  # JPEG that stores RGB instead of YCbCr
            and _orientation(image, encoded) == 1
        )
    if is_plain:
        return None
    png = io.BytesIO()
    pillow().fromarray(decode_image(encoded, max_megapixels=None)[0]).save(png, "PNG", compress_level=0)
    return png.getvalue()


def upright_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image as it is decoded, from its header. Raises what `decode_image` raises."""
    encoded = path.read_bytes()
    with pillow().open(io.BytesIO(encoded), formats=FORMATS) as image:
        width, height = image.size
        return (width, height) if _orientation(image, encoded) in SIDEWAYS else (height, width)


def reason(error: Exception) -> str:
    """Return in a few words why an image cannot be decoded."""
    if isinstance(error, pillow().UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or first_line(error)


def _check_size(image: Image.Image, max_megapixels: float | None) -> None:
    width, height = image.size
    if max_megapixels is not None and width * height > max_megapixels * 1e6:
        raise ValueError(f"{width}x{height} pixels {TOO_LARGE} {max_megapixels:g} megapixels")


def _is_16_bit(image: ImageFile.ImageFile) -> bool:
    # Pillow opens a JPEG 2000 with more than 8 bits in mode I;16, and a PGM in mode I, both scaled to 16 bits.
    is_deep = image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")
    return is_deep or any(";16" in str(tile[3]) for tile in image.tile)


def _orientation(image: Image.Image, encoded: bytes) -> int:
    """Return the EXIF orientation that is left to apply, 1 to 8."""
    if image.format == "TIFF":  # Pillow 12 and 13 apply the orientation of a TIFF when they load it
        return 1
    if image.format in METADATA_MARKS and not any(mark in encoded for mark in METADATA_MARKS[image.format]):
        return 1
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata of an intact image
        return 1
    return value if value in UPRIGHT else 1


def _to_rgb(image: Image.Image, is_16_bit: bool) -> np.ndarray:
    """Convert a loaded image to RGB: uint8 (height, width, 3)."""
    if is_16_bit and image.mode.startswith("I"):
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel")
    if image.mode == "P":  # a palette may carry transparency, which Pillow drops without a warning only this way
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
