"""prepare_dataset.py on images that are converted, varied or broken, and on trees that are not a dataset."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import noise, refusal, save, tree_files

from image_data.preparation.drawn_shapes import draw
from image_data.preparation.prepare import prepare

# ---- images that are converted, varied or broken ----


def png_16_bit(value: int, color_type: int, channels: int) -> bytes:
    """A PNG of 16 x 16 pixels with 16 bits a channel, all of them `value`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + struct.pack(">H", value) * 16 * channels) * 16
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, color_type, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("color_type, channels", [(0, 1), (2, 3), (6, 4)])
def test_16_bit_images_keep_the_high_byte(tree, capsys, color_type, channels):
    (tree / "train/big dog/a.png").write_bytes(png_16_bit(0x12F0, color_type, channels))
    assert np.all(prepare(root=tree).splits["train"].pixels()[0] == 0x12)
    assert "1 16-bit image converted to 8-bit RGB (the high byte is kept)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mode, said",
    [
        ("RGBA", "1 RGBA image converted to 8-bit RGB (alpha is dropped)"),
        ("LA", "1 grey with alpha image converted to 8-bit RGB (alpha is dropped)"),
        ("P", "1 palette image converted to 8-bit RGB"),
        ("L", "1 greyscale image converted to 8-bit RGB"),
    ],
)
def test_other_modes_are_converted_and_said(tree, capsys, mode, said):
    image = Image.fromarray(noise(50)).convert("RGBA" if mode == "RGBA" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(7)
    image.save(tree / "train/big dog/a.png")
    expected = np.asarray(Image.open(tree / "train/big dog/a.png").convert("RGB"))
    assert np.array_equal(prepare(root=tree).splits["train"].pixels()[0], expected)
    assert said in capsys.readouterr().err


def test_mixed_sizes_are_not_packed(tree, capsys):
    save(tree / "train/cat/wide.png", noise(60, 40)[:20])
    ready = prepare(root=tree)
    facts = json.loads((tree / "dataset.json").read_text())
    assert ready.image_side is None and ready.splits["train"].packed is None and not (tree / "packed").exists()
    assert (facts["smallest_image"], facts["largest_image"]) == ([16, 16], [40, 20])
    assert (
        "image sizes vary from 16x16 to 40x20: they are not packed, training will read the files"
        in capsys.readouterr().err
    )


def test_pack_limit(tree, capsys):
    ready = prepare(root=tree, pack_limit_gib=0)
    assert ready.image_side == 16 and ready.splits["train"].packed is None
    assert "more than --pack-limit-gib 0" in capsys.readouterr().err


def test_broken_images_are_refused_or_left_out(tree, capsys):
    (tree / "train/cat/empty.png").touch()
    (tree / "train/cat/text.png").write_text("no picture")
    whole = (tree / "train/big dog/image 1.png").read_bytes()
    (tree / "train/big dog/image 1.png").write_bytes(whole[: len(whole) // 2])
    message = refusal(capsys, "--root", tree)
    assert "3 image(s) cannot be decoded" in message and "--skip-broken" in message
    assert "train/cat/empty.png (empty file)" in message and "train/cat/text.png (not an image)" in message
    assert "train/big dog/image 1.png (" in message
    assert not (tree / "dataset.json").exists()
    ready = prepare(root=tree, skip_broken=True)
    assert "3 image(s) that cannot be decoded left out" in capsys.readouterr().err
    assert ready.splits["train"].paths == [
        f"train/{name}.png"
        for name in ("big dog/image 0", "big dog/image 2", "cat/image 0", "cat/image 1", "cat/image 2")
    ]
    assert np.array_equal(ready.splits["train"].pixels()[1], tree_files()["train/big dog/image 2.png"])
    assert len(ready.splits["train"].pixels()) == 5


def test_a_class_that_is_wholly_broken_is_refused(tree, capsys):
    for path in (tree / "test/cat").iterdir():
        path.write_bytes(b"")
    assert "the test split has none of class 'cat'" in refusal(capsys, "--root", tree, "--skip-broken")


# ---- trees that are not a dataset ----


def test_lonely_classes_are_refused(tree, capsys):
    save(tree / "train/fox/a.png", noise(70))
    save(tree / "test/owl/a.png", noise(71))
    message = refusal(capsys, "--root", tree)
    assert "only in train: 'fox'" in message and "only in test: 'owl'" in message


def test_no_images_names_the_layout(tmp_path, capsys):
    assert "holds no train folder, so 0 images were found" in refusal(capsys, "--root", tmp_path)
    for split in ("train", "test"):
        (tmp_path / "inner" / split / "cat").mkdir(parents=True)
    assert f"did you mean {tmp_path}/inner" in refusal(capsys, "--root", tmp_path)
    message = refusal(capsys, "--root", tmp_path / "inner")
    assert "holds 0 images in class folders" in message and "train/<class>/*.png" in message


@pytest.mark.parametrize("name", ["a\tb.png", "a\nb.png", "a\u2028b.png", "a\udcffb.png"])
def test_names_that_would_break_a_list_are_refused(tree, capsys, name):
    save(tree / "train/cat/plain.png", noise(80))
    (tree / "train/cat/plain.png").rename(tree / "train/cat" / name)
    assert ascii(name)[1:-1] in refusal(capsys, "--root", tree)


def test_strays_and_empty_folders_are_named_and_system_files_are_not(tree, capsys):
    (tree / "train/cat/notes.txt").touch()
    (tree / "train/cat/.DS_Store").touch()
    (tree / "train/cat/Thumbs.db").touch()
    (tree / "train/__MACOSX/cat").mkdir(parents=True)
    (tree / "train/nothing").mkdir()
    save(tree / "train/loose.png", noise(90))
    assert len(prepare(root=tree).splits["train"]) == 6
    said = capsys.readouterr().err
    assert "1 file(s) that are not images left out: 'train/cat/notes.txt'" in said
    assert "1 class folder(s) without images left out: 'train/nothing'" in said
    assert "1 image(s) directly in train/, outside any class folder left out: 'train/loose.png'" in said
    assert not any(name in said for name in (".DS_Store", "Thumbs.db", "__MACOSX"))


def test_duplicates_across_the_splits_are_named(tree, capsys):
    save(tree / "test/cat/copy.png", tree_files()["train/cat/image 1.png"], compress_level=0)
    prepare(root=tree)
    assert (
        "1 of 5 test images are exact duplicates of training images: 'train/cat/image 1.png' = 'test/cat/copy.png'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("stored", ["as drawn", "PNG after JPEG", "JPEG"])
def test_cifar_sized_images_that_went_through_jpeg_are_named(tmp_path, capsys, stored):
    for split, count in (("train", 20), ("test", 1)):
        for name in ("circle", "star"):
            for i in range(count):
                pixels, file = draw(name, 32, [7, split == "test", i]), io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=90)
                path = tmp_path / split / name / f"{i}.png"
                save(path, np.asarray(Image.open(file)) if stored == "PNG after JPEG" else pixels)
                if stored == "JPEG":
                    path.write_bytes(file.getvalue())
    prepare(root=tmp_path)
    assert ("a CIFAR recompressed as JPEG costs 2 to 3 points" in capsys.readouterr().err) == (stored != "as drawn")
