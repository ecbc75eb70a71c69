"""The decoder rule: a table of formats, modes and orientations against every reader of image files.

Run: python -m pytest tests/image_data/test_image_file.py
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from trees import refusal

from config.settings import AugmentationSettings
from dali_pipeline import Batches
from image_data.image_file import UPRIGHT, as_dali_input, decode_image, upright_size
from image_data.preparation.prepare import prepare
from image_data.readers import FileReader
from inference.predict_images import read_image

SIDE = 16
INVERSE = {6: 8, 8: 6}  # every other orientation is its own inverse
ORIENTATION, XMP = 0x0112, '<x:xmpmeta tiff:Orientation="{}"/>'


def picture(height: int = SIDE, width: int = SIDE, seed: int = 0) -> np.ndarray:
    """Coarse noise without symmetry: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def stored(pixels: np.ndarray, orientation: int) -> Image.Image:
    """The image as a camera stores it that writes this orientation."""
    return Image.fromarray(np.ascontiguousarray(UPRIGHT[INVERSE.get(orientation, orientation)](pixels)))


def encode(image: Image.Image, file_format: str, orientation: int = 1, **options) -> bytes:
    file = io.BytesIO()
    if orientation != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(file, file_format, **options)
    return file.getvalue()


def png_with_xmp(orientation: int) -> bytes:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    return encode(stored(picture(), orientation), "PNG", pnginfo=info)


def in_mode(mode: str) -> Image.Image:
    image = Image.fromarray(picture()).convert(mode)
    if "A" in mode and mode != "LAB":
        image.putalpha(Image.fromarray(picture(seed=1)[..., 0]))
    return image


def palette_with_transparency() -> bytes:
    image = in_mode("P")
    return encode(image, "PNG", transparency=bytes(range(256)))


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
FILES = {  # name -> content; the pixels are those of `picture` or what Pillow makes of them
    **{
        f"{name} orientation {orientation}": encode(stored(picture(), orientation), name, orientation, **options)
        for name, options in (*LOSSLESS.items(), ("JPEG", {"quality": 95}))
        for orientation in range(1, 9)
    },
    **{f"{name} {mode}": encode(in_mode(mode), name) for name, mode in [
        ("PNG", "1"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("TIFF", "CMYK"), ("JPEG", "CMYK"),
        ("JPEG", "L"), ("TIFF", "RGBA"), ("TIFF", "LAB"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB"), ("WEBP",
        "RGBA"), ("JPEG2000", "RGB"),
    ]},
    "PNG palette with transparency": palette_with_transparency(),
    "PNG RGB with transparent color": encode(in_mode("RGB"), "PNG", transparency=(1, 2, 3)),
    "PNG XMP orientation": png_with_xmp(6),
    "PNG gray 16 bits": encode(Image.fromarray(picture()[..., 0].astype(np.uint16) * 257), "PNG"),
    "TIFF gray 16 bits": encode(Image.fromarray(picture()[..., 0].astype(np.uint16) * 257), "TIFF"),
    "PNG gray 16 bits sideways": encode(
        Image.fromarray(np.ascontiguousarray(np.rot90(picture()[..., 0])).astype(np.uint16) * 257), "PNG", 6
    ),
    "JPEG2000 gray 16 bits": encode(Image.fromarray(picture()[..., 0].astype(np.uint16) * 257), "JPEG2000"),
    "PGM 16 bits": b"P5 16 16 65535\n" + (picture()[..., 0].astype(">u2") * 257).tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", LOSSLESS)
def test_orientations_are_applied_in_every_format(tmp_path, file_format, orientation):
    """An image that is not square: width and height, too."""
    pixels = picture(12, 20)
    file = tmp_path / "a.png"
    file.write_bytes(encode(stored(pixels, orientation), file_format, orientation, **LOSSLESS[file_format]))
    assert np.array_equal(decode_image(file)[0], pixels)
    assert upright_size(file) == (12, 20)
    assert np.array_equal(FileReader([file], 1, tmp_path).sizes(np.array([0])), [[12, 20]])


@pytest.mark.parametrize("name", [name for name in FILES if "16 bits" in name])
def test_of_16_bits_the_high_byte_is_kept(name):
    pixels, kind, _ = decode_image(FILES[name])
    assert kind == "16-bit" and np.array_equal(pixels, np.repeat(picture()[..., :1], 3, axis=2))


def test_xmp_orientation_is_applied():
    assert np.array_equal(decode_image(FILES["PNG XMP orientation"])[0], picture())


def test_alpha_is_dropped():
    for name in ("PNG RGBA", "TIFF RGBA"):
        assert np.array_equal(decode_image(FILES[name])[0], picture())


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """A tree with every file of the table, in both splits, all named .png: the content decides."""
    root = tmp_path_factory.mktemp("formats")
    for split in ("train", "test"):
        for i, content in enumerate(FILES.values()):
            path = root / split / f"class {2 * i // len(FILES)}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def test_every_reader_gives_the_same_pixels(everything):
    """Preparation, packed arrays, DALI on files, whole tensors, --predict, and the statistics."""
    dataset = prepare(root=everything, workers=1)
    train = dataset.splits["train"]
    expected = np.stack([decode_image(everything / path)[0] for path in train.paths])
    assert np.array_equal(train.pixels(), expected)
    assert np.allclose(dataset.mean, expected.mean((0, 1, 2)) / 255, atol=1e-6)
    assert np.allclose(dataset.std, expected.std((0, 1, 2)) / 255, atol=1e-6)
    assert all(
        np.array_equal(read_image(everything / path), pixels)
        for path, pixels in zip(train.paths, expected, strict=True)
    )
    mean, std = (255 * torch.tensor(value).view(3, 1, 1) for value in (dataset.mean, dataset.std))
    for source in ("tensor", "resident", "files"):
        batches = Batches(dataset, "test", len(train), source=source)
        images = next(iter(batches.epoch()))[0]
        batches.close()
        found = (images * std + mean).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
        wrong = [name for name, a, b in zip(FILES, found, expected, strict=True) if not np.array_equal(a, b)]
        assert not wrong, f"{source}: {wrong}"


def test_the_fingerprint_depends_on_the_pixels_only(tmp_path):
    found = set()
    for name, options in LOSSLESS.items():
        for orientation in (1, 6, 7):
            root = tmp_path / f"{name}{orientation}"
            for i, split in enumerate(("train", "test")):
                for j, class_name in enumerate(("cat", "dog")):
                    path = root / split / class_name / "a.png"
                    path.parent.mkdir(parents=True)
                    pixels = picture(seed=2 * i + j)
                    path.write_bytes(encode(stored(pixels, orientation), name, orientation, **options))
            found.add(prepare(root=root, workers=1).fingerprint)
    assert len(found) == 1


def test_resized_crops_are_those_of_the_upright_image(tmp_path):
    """The crop boxes are planned from the upright sizes."""
    images = {}
    for orientation in (1, 6):
        root = tmp_path / str(orientation)
        for split in ("train", "test"):
            for i in range(4):
                path = root / split / f"class {i // 2}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(stored(picture(40, 30 + 20 * i, i), orientation), "PNG", orientation))
        dataset = prepare(root=root, workers=1)
        crops = AugmentationSettings(resized_crop=True, flip=0.0)
        batches = Batches(dataset, "train", 4, augmentation=crops, source="files", image_side=24)
        images[orientation] = next(iter(batches.epoch()))[0]
        batches.close()
    assert torch.equal(images[1], images[6])


@pytest.mark.parametrize("name", FILES)
def test_dali_gets_only_what_it_decodes_exactly(name):
    """8-bit RGB and grayscale PNG and JPEG stay as they are: decoding by Pillow would cost time for nothing."""
    plain = {"PNG orientation 1", "JPEG orientation 1", "PNG L", "JPEG L"}
    assert (as_dali_input(FILES[name]) is None) == (name in plain)


def test_large_images_are_refused_before_they_are_decoded(tree, capsys):
    """13,000 x 13,000 black pixels are a file of 0.5 MB and an array of 0.5 GB."""
    content = encode(Image.new("1", (13_000, 13_000)), "PNG")
    assert len(content) < 1e6
    with pytest.raises(ValueError, match="13000x13000 pixels exceed the limit of 90 megapixels"):
        decode_image(content)
    Image.new("L", (200, 100)).save(tree / "train/cat/large.png")
    message = refusal(capsys, "--root", tree, "--max-megapixels", 0.01)
    assert "large.png (200x100 pixels exceed the limit of 0.01 megapixels)" in message
    assert message.endswith("or use prepare_dataset.py --skip-broken or --max-megapixels N")
    assert len(prepare(root=tree, max_megapixels=0.02).splits["train"]) == 7


def test_damaged_metadata_does_not_make_an_image_broken():
    content = encode(Image.fromarray(picture()), "JPEG", 6)
    at = content.index(b"Exif\0\0") + 6
    assert decode_image(content[:at] + b"XXXXXXXX" + content[at + 8 :])[0].shape == (SIDE, SIDE, 3)
