"""prepare_dataset.py on images that are converted, varied or broken, on unusual trees, and on invalid trees."""

from __future__ import annotations

import io
import json
import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import noise, refusal, save, tree_files

from image_data.preparation.drawn_shapes import draw
from image_data.preparation.image_tree import list_tree
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
        ("LA", "1 grayscale with alpha image converted to 8-bit RGB (alpha is dropped)"),
        ("P", "1 palette image converted to 8-bit RGB"),
        ("L", "1 grayscale image converted to 8-bit RGB"),
    ],
)
def test_other_modes_are_converted_and_counted(tree, capsys, mode, said):
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
        "image sizes vary from 16x16 to 40x20: they are not packed, and training reads the files"
        in capsys.readouterr().err
    )


def test_pack_limit(tree, capsys):
    ready = prepare(root=tree, pack_limit_gib=0)
    assert ready.image_side == 16 and ready.splits["train"].packed is None
    assert "more than --pack-limit-gib 0" in capsys.readouterr().err


def test_broken_images_are_an_error_or_skipped(tree, capsys):
    (tree / "train/cat/empty.png").touch()
    (tree / "train/cat/text.png").write_text("no picture")
    intact = (tree / "train/big dog/image 1.png").read_bytes()
    (tree / "train/big dog/image 1.png").write_bytes(intact[: len(intact) // 2])
    message = refusal(capsys, "--root", tree)
    assert "3 image(s) cannot be decoded" in message and "--skip-broken" in message
    assert "train/cat/empty.png (empty file)" in message and "train/cat/text.png (not an image)" in message
    assert "train/big dog/image 1.png (" in message
    assert not (tree / "dataset.json").exists()
    ready = prepare(root=tree, skip_broken=True)
    assert "skipped 3 image(s) that cannot be decoded" in capsys.readouterr().err
    assert ready.splits["train"].paths == [
        f"train/{name}.png"
        for name in ("big dog/image 0", "big dog/image 2", "cat/image 0", "cat/image 1", "cat/image 2")
    ]
    assert np.array_equal(ready.splits["train"].pixels()[1], tree_files()["train/big dog/image 2.png"])
    assert len(ready.splits["train"].pixels()) == 5


def test_a_class_without_intact_images_is_an_error(tree, capsys):
    for path in (tree / "test/cat").iterdir():
        path.write_bytes(b"")
    assert "the test split has none of class 'cat'" in refusal(capsys, "--root", tree, "--skip-broken")


# ---- trees that are not a dataset ----


def test_classes_in_one_split_only_are_an_error(tree, capsys):
    save(tree / "train/fox/a.png", noise(70))
    save(tree / "test/owl/a.png", noise(71))
    message = refusal(capsys, "--root", tree)
    assert "only in train: 'fox'" in message and "only in test: 'owl'" in message


def test_folders_of_splits_that_differ_by_case_are_named(tree, capsys):
    (tree / "test").rename(tree / "Test")
    assert "holds no test folder (nor val, nor validation). Rename Test to test. " in refusal(capsys, "--root", tree)
    (tree / "train").rename(tree / "TRAIN")
    message = refusal(capsys, "--root", tree)
    assert message.endswith("so 0 images were found. Rename TRAIN to train and Test to test")


@pytest.mark.parametrize("fraction", [(), ("--test-fraction", 0.3)])
def test_a_single_class_is_an_error(tmp_path, capsys, fraction):
    """A root one level too low would otherwise give a network that is always right."""
    for name in ("0.png", "1.png"):
        for split in () if fraction else ("train", "test"):
            save(tmp_path / split / "cat" / name, noise(len(split)))
        save(tmp_path / ("cat" if fraction else "train/cat") / name, noise(int(name[0])))
    message = refusal(capsys, "--root", tmp_path, *fraction)
    assert (
        f"only one class ('cat') in {tmp_path}; a classifier needs two. If the class folders lie one level" in message
    )
    assert message.endswith("/<class>/*.png")
    assert not (tmp_path / "dataset.json").exists()


def test_no_images_names_the_layout(tmp_path, capsys):
    assert "holds no train folder, so 0 images were found" in refusal(capsys, "--root", tmp_path)
    for split in ("train", "test"):
        (tmp_path / "inner" / split / "cat").mkdir(parents=True)
    assert f"Did you mean {tmp_path}/inner?" in refusal(capsys, "--root", tmp_path)
    message = refusal(capsys, "--root", tmp_path / "inner")
    assert "holds 0 images in class folders" in message and "train/<class>/*.png" in message


@pytest.mark.parametrize("name", ["a\tb.png", "a\nb.png", "a\u2028b.png", "a\udcffb.png"])
def test_names_that_would_break_a_list_are_refused(tree, capsys, name):
    save(tree / "train/cat/plain.png", noise(80))
    (tree / "train/cat/plain.png").rename(tree / "train/cat" / name)
    assert ascii(name)[1:-1] in refusal(capsys, "--root", tree)


def test_skipped_files_and_empty_folders_are_named_and_system_files_are_not(tree, capsys):
    (tree / "train/cat/notes.txt").touch()
    (tree / "train/cat/.DS_Store").touch()
    (tree / "train/cat/Thumbs.db").touch()
    (tree / "train/__MACOSX/cat").mkdir(parents=True)
    (tree / "train/nothing").mkdir()
    save(tree / "train/loose.png", noise(90))
    assert len(prepare(root=tree).splits["train"]) == 6
    said = capsys.readouterr().err
    assert "skipped 1 file(s) with an unsupported suffix: 'train/cat/notes.txt'" in said
    assert "skipped 1 class folder(s) without images: 'train/nothing'" in said
    assert "skipped 1 image(s) directly in train/, outside any class folder: 'train/loose.png'" in said
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
    assert ("CIFAR recompressed as JPEG costs 2 to 3 points" in capsys.readouterr().err) == (stored != "as drawn")


# ---- unusual trees ----


@pytest.mark.parametrize("reverse", [False, True])
def test_links_to_one_class_folder_are_both_kept_in_any_order_of_the_disk(tree, capsys, monkeypatch, reverse):
    walk = os.walk

    def in_order(top, **options):
        for folder, subfolders, files in walk(top, **options):
            subfolders.sort(reverse=reverse)
            files.sort(reverse=reverse)
            yield folder, subfolders, files

    monkeypatch.setattr(os, "walk", in_order)
    for split in ("train", "test"):
        (tree / split / "kitten").symlink_to("cat")
        (tree / split / "cat/back").symlink_to("..")  # a loop: not followed
    found = list_tree(tree)
    assert found.classes == ["big dog", "cat", "kitten"] and found.labels["train"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.paths["train"] == sorted(found.paths["train"])
    assert any("classes 'cat', 'kitten' are links to one folder" in warning for warning in found.warnings)


def test_a_folder_inside_a_class_folder_is_named_as_a_separate_class(tree):
    assert not list_tree(tree).warnings
    for split in ("train", "test"):
        for name in ("cat/kitten", "wild/fox"):
            save(tree / split / name / "0.png", noise(1))
    found = list_tree(tree)
    assert found.classes == ["big dog", "cat", "cat/kitten", "wild/fox"]
    assert found.warnings == [
        "class folders that lie inside another class folder are separate classes: 'cat/kitten'. "
        "To make them one class, move their images up"
    ]


def test_hidden_folders_are_skipped(tree):
    save(tree / "train/.thumbs/a.png", noise(1))
    save(tree / "train/cat/@eaDir/a.png", noise(2))
    found = list_tree(tree)
    assert found.classes == ["big dog", "cat"] and not found.warnings


def test_class_names_that_differ_in_unicode_form_only_are_one_class(tree, capsys):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for split, name in (("train", composed), ("train", decomposed), ("test", decomposed)):
        save(tree / split / name / f"{len(name)}.png", noise(len(name) + len(split)))
    ready = prepare(root=tree)
    assert ready.classes == ["big dog", composed, "cat"] or ready.classes == ["big dog", "cat", composed]
    assert (ready.splits["train"].labels == ready.classes.index(composed)).sum() == 2
    assert "merged class folders whose names differ only in Unicode form" in capsys.readouterr().err


def test_gif_images_are_read(tree):
    Image.fromarray(noise(5)).save(tree / "train/cat/a.gif")
    assert "train/cat/a.gif" in prepare(root=tree).splits["train"].paths


@pytest.mark.parametrize("flat", [True, False])
def test_a_tree_without_a_test_split_can_be_split_by_name(tmp_path, capsys, flat):
    for i in range(20):
        for name in ("cat", "dog"):
            save(
                tmp_path / ("" if flat else "train") / name / f"{i}.png",
                noise(100 * len(name) + i + (name == "dog") * 50),
            )
    message = refusal(capsys, "--root", tmp_path)
    assert "--test-fraction 0.2" in message
    ready = prepare(root=tmp_path, test_fraction=0.2)
    splits = {name: ready.splits[name].paths for name in ("train", "test")}
    assert {name: len(paths) for name, paths in splits.items()} == {"train": 32, "test": 8}
    assert not set(splits["train"]) & set(splits["test"]) and ready.splits["test"].labels.tolist() == [0] * 4 + [1] * 4
    assert "split by file name: 8 of 40 images are the test split (--test-fraction 0.2)" in capsys.readouterr().out
    again = prepare(root=tmp_path, test_fraction=0.2, force=True)  # its own files in the folder are not classes
    assert again.fingerprint == ready.fingerprint and again.classes == ["cat", "dog"]
    assert not capsys.readouterr().err.count("skipped")


def save_classes(root, *classes):
    for seed, name in enumerate(classes):
        for i in range(3):
            save(root / name / f"{i}.png", noise(10 * seed + i))


def test_a_class_may_have_the_name_of_a_folder_that_preparing_uses(tmp_path, capsys):
    save_classes(tmp_path, "car", "packed", "train")
    for force in (False, True):  # the second time the arrays lie beside the images of the class
        ready = prepare(root=tmp_path, test_fraction=0.3, force=force)
        assert ready.classes == ["car", "packed", "train"] and len(ready.splits["train"]) == 6
    assert (tmp_path / "packed/train.npy").is_file()
    save_classes(tmp_path / "nested", "car", "packed/boxes")
    assert prepare(root=tmp_path / "nested", test_fraction=0.3).classes == ["car", "packed/boxes"]


def test_class_folders_in_train_and_beside_it_are_an_error(tmp_path, capsys):
    save_classes(tmp_path, "car", "plane", "train/steam", "train/diesel")
    message = refusal(capsys, "--root", tmp_path, "--test-fraction", 0.3)
    assert "holds class folders in train and beside it ('car', 'plane'). Rename train if it is a class" in message
    save_classes(tmp_path / "other", "car", "test")
    message = refusal(capsys, "--root", tmp_path / "other", "--test-fraction", 0.3)
    assert "already holds the folder test. Omit --test-fraction, or rename the folder if it is a class" in message


def test_a_test_fraction_that_does_not_apply_is_an_error(tree, tmp_path, capsys):
    assert "Omit --test-fraction" in refusal(capsys, "--root", tree, "--test-fraction", 0.2)
    assert "between 0 and 1, got 1.5" in refusal(capsys, "--root", tree, "--test-fraction", 1.5)
    save(tmp_path / "flat/cat/a.png", noise(0))
    assert "a single image of class 'cat'" in refusal(capsys, "--root", tmp_path / "flat", "--test-fraction", 0.2)
