"""evaluate.py --predict: the predictions of the evaluation for any kind of image, and unreadable files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import run

from dali_pipeline import Batches
from image_data.dataset import Dataset
from image_data.image_file import FORMATS, decode_image
from image_data.preparation.prepare import prepare
from inference.predict_images import find_images, fit, for_screen, read_image, table
from inference.trained_model import TrainedModel
from records.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(unbroken, tmp_path_factory) -> RunFolder:
    """A finished run on a machine without its dataset."""
    folder = Path(
        shutil.copytree(
            unbroken.folder, tmp_path_factory.mktemp("runs") / "trained", ignore=shutil.ignore_patterns("state")
        )
    )
    facts = json.loads((folder / "run.json").read_text())
    facts["dataset"]["folder"] = "data/that/is/elsewhere"
    (folder / "run.json").write_text(json.dumps(facts))
    return RunFolder(folder)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return coarse noise, which survives resizing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def test_a_folder_of_test_images_gives_the_counts_of_the_evaluation(trained, unbroken, shapes, tmp_path):
    done = run(
        "evaluate.py",
        trained.folder,
        "--predict",
        Dataset.open(shapes).root / "test",
        "--batch-size",
        8,
        "--output",
        tmp_path / "found.csv",
    )
    found = rows((tmp_path / "found.csv").read_text())
    true = [Path(row["path"]).parent.name for row in found]
    five = ["class", *(f"class_{i}" for i in range(2, 6))]
    last = unbroken.metrics()[-1]
    assert len(found) == last["test_seen"] and "70 images" in done.out
    assert sum(row["class"] == name for row, name in zip(found, true, strict=True)) == last["test_correct"]
    assert sum(name in [row[i] for i in five] for row, name in zip(found, true, strict=True)) == round(
        last["test_top5_accuracy"] * last["test_seen"]
    )
    assert [row["path"] for row in found] == sorted(row["path"] for row in found)


def test_the_screen_shows_the_five_most_probable_classes(trained, tmp_path):
    photograph(80, 50).save(tmp_path / "my photo.jpg")
    out = run("evaluate.py", trained.folder, "--predict", tmp_path / "my photo.jpg").out.splitlines()
    assert out[0] == str(tmp_path / "my photo.jpg") and len(out) == 6
    shares = [float(line.split("%")[0]) for line in out[1:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.01
    assert {line.split("%")[1].strip() for line in out[1:]} <= set(trained.facts()["dataset"]["classes"])


def write_all_kinds(folder: Path) -> Iterable[str]:
    image = photograph(50, 70)
    for name, mode in (
        ("rgb.png", "RGB"),
        ("alpha.png", "RGBA"),
        ("gray.png", "L"),
        ("bits.png", "1"),
        ("palette.gif", "P"),
        ("print.jpg", "CMYK"),
        ("deep/one.webp", "RGB"),
        ("deep/er/two.BMP", "RGB"),
        ("lab.tif", "LAB"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.convert(mode).save(folder / name)
        yield name
    Image.fromarray(np.full((40, 30), 40_000, dtype=np.uint16)).save(folder / "16 bits.png")
    image.resize((1, 1)).save(folder / "a pixel.png")
    image.resize((300, 2)).save(folder / "thin.png")
    yield from ("16 bits.png", "a pixel.png", "thin.png")


def test_every_kind_of_image_is_read_and_a_broken_one_does_not_stop_the_others(trained, tmp_path):
    names = set(write_all_kinds(tmp_path / "in"))
    intact = (tmp_path / "in" / "rgb.png").read_bytes()
    (tmp_path / "in" / "broken.png").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "in" / "empty.jpg").touch()
    (tmp_path / "in" / "notes.txt").write_text("not an image: skipped silently")
    (tmp_path / "in" / "._rgb.png").write_text("left by another operating system")
    done = run("evaluate.py", trained.folder, "--predict", tmp_path / "in", code=1)
    assert {str(Path(row["path"]).relative_to(tmp_path / "in")) for row in rows(done.out)} == names
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (
        len(said) == 2
        and "broken.png cannot be read (image file is truncated" in said[0]
        and "empty.jpg cannot be read (empty file)" in said[1]
    )


def test_a_photo_of_any_size_is_read(tmp_path, monkeypatch):
    Image.new("RGB", (3, 2)).save(tmp_path / "photo.png")
    monkeypatch.setattr(decode_image, "__defaults__", (FORMATS, 1e-6))  # a limit of one pixel
    assert read_image(tmp_path / "photo.png").shape == (2, 3, 3)


def test_a_missing_file_or_one_without_an_image_is_named_and_skipped(trained, tmp_path):
    photograph(9, 9).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("hello")
    done = run(
        "evaluate.py",
        trained.folder,
        "--predict",
        tmp_path / "text.png",
        tmp_path / "none.png",
        tmp_path / "a.png",
        code=1,
    )
    assert done.err.splitlines() == [
        f"error: {tmp_path}/text.png cannot be read (not an image); skipped",
        f"error: {tmp_path}/none.png cannot be read (No such file or directory); skipped",
    ]
    assert done.out.startswith(f"{tmp_path}/a.png\n")


def test_a_folder_without_images_is_refused(trained, tmp_path):
    done = run("evaluate.py", trained.folder, "--predict", tmp_path, code=1)
    assert done.err == f"error: {tmp_path} holds no images\n"


@pytest.mark.parametrize(
    ("sizes", "image_side"),
    [([(32, 32)], 24), ([(40, 60), (90, 31), (24, 24)], 24), ([(32, 32)], 0)],
    ids=["one size, another side", "any size", "one size"],
)
def test_images_reach_the_network_as_in_evaluation(tmp_path, sizes, image_side):
    for i, split in enumerate(("train", "train", "test")):
        for j, (height, width) in enumerate(sizes):
            for k, name in enumerate(("cat", "dog")):
                path = tmp_path / split / name / f"{i}{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph(height, width, seed=100 * k + 10 * i + j).save(path)
    dataset = prepare(root=tmp_path, workers=1)
    facts = {
        "settings": {"image_side": image_side},
        "dataset": {"image_side": dataset.image_side, "mean": dataset.mean, "std": dataset.std},
    }
    trained = TrainedModel(RunFolder(tmp_path), facts)
    test = dataset.splits["test"]
    batches = Batches(replace(dataset, splits={"test": test}), "test", len(test), source="files", image_side=image_side)
    ((theirs, _),) = batches.epoch()
    batches.close()
    ours = trained.normalize(np.stack([fit(read_image(dataset.root / path), trained) for path in test.paths]))
    assert ours.shape == theirs.shape
    level = 1 / (255 * torch.tensor(dataset.std).view(3, 1, 1))  # one level of 255, in normalized units
    # DALI and PyTorch round differently when they resize.
    assert ((ours - theirs).abs() / level).max() < (2.01 if image_side else 1e-3)


def test_odd_names_cost_no_other_result(trained, tmp_path, monkeypatch):
    """A name that is not UTF-8, a line break, and a screen without the letters of a name."""
    folder = tmp_path / "in"
    folder.mkdir()
    photograph(9, 9).save(folder / "a.png")
    for name in (b"caf\xe9.png", "\u732b.png".encode(), b"two\nlines.png"):
        shutil.copy(folder / "a.png", os.fsencode(folder) + b"/" + name)
    run("evaluate.py", trained.folder, "--predict", folder, "--output", tmp_path / "found.csv")
    found = rows((tmp_path / "found.csv").read_text(encoding="utf-8"))
    assert {Path(row["path"]).name for row in found} == {"a.png", r"caf\xe9.png", "\u732b.png", r"two\nlines.png"}
    found = rows(run("evaluate.py", trained.folder, "--predict", folder).out)
    assert len(found) == 4
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict"))
    print(for_screen("caf\u00e9"), flush=True)
    assert sys.stdout.buffer.getvalue() == rb"caf\xe9" + b"\n"


def test_cells_that_a_spreadsheet_would_run_are_text():
    text = table([(Path("=cmd|x.png"), [("+1", 0.5), ("a-b", 0.25)])], shown=2)
    assert text.splitlines()[1] == "'=cmd|x.png,'+1,0.500000,a-b,0.250000"


def test_images_are_found_as_in_training(tmp_path):
    """Links are followed, hidden folders are skipped, and the suffixes are those of the preparation."""
    for name in ("a.png", "deep/b.JPG", "c.gif", ".hidden/d.png", "e.txt", "@eaDir/f.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/g.png").touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    found = [path.relative_to(tmp_path / "in").as_posix() for path in find_images([tmp_path / "in"])]
    assert found == ["a.png", "c.gif", "deep/b.JPG", "link/g.png"]


@pytest.mark.parametrize(("name", "message"), [("none/found.csv", "does not exist"), ("", "is a folder")])
def test_an_impossible_output_is_refused_before_the_work(trained, tmp_path, name, message):
    photograph(9, 9).save(tmp_path / "a.png")
    done = run("evaluate.py", trained.folder, "--predict", tmp_path, "--output", tmp_path / name, code=1)
    assert message in done.err and "Traceback" not in done.err and "images" not in done.err
