"""Batches of every source: exact order, exact counts, and the same batch after any jump.

Run: python -m pytest tests/test_dali_pipeline.py
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dali_pipeline
from common.errors import DatasetError, SettingsError
from config.command_line import run_cli
from config.settings import AugmentationSettings
from dali_pipeline import Batches, choose_source
from image_data.augmentation import epoch_order
from image_data.batch_plan import BatchIndex
from image_data.dataset import Dataset
from image_data.preparation.prepare import prepare
from tools.preview_augmentation import main, preview

SOURCES = ("resident", "files", "tensor")
HEAVY = AugmentationSettings(policy="rand_augment", erasing=0.5, mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """10 classes, 250 training and 70 test images of 32 pixels."""
    return prepare(
        tmp_path_factory.mktemp("data") / "shapes",
        dataset="shapes",
        shapes=dict(side=32, train_per_class=25, test_per_class=7),
    )


def fake(dataset: Dataset, num_images: int) -> Dataset:
    """Return a dataset whose test split has `num_images` images, taken from a few rows."""
    test = dataset.splits["test"]
    return replace(dataset, splits={**dataset.splits, "test": test.take(np.arange(num_images) % len(test))})


def pixels(images: torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """Convert normalized images to 0..255."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (dataset.mean, dataset.std))
    return (images * std + mean) * 255


def collect(batches: Batches, epoch: int = 0, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in batches.epoch(epoch, start)]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_pixels_equal_pillow(dataset, source):
    """Evaluation only normalizes: the pixels are those of Pillow, in the order of the list."""
    images = torch.cat([images for images, _ in Batches(dataset, "test", 32, source=source).epoch()])
    expected = [np.asarray(Image.open(dataset.root / path).convert("RGB")) for path in dataset.splits["test"].paths]
    expected = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)
    assert torch.equal(pixels(images[:70], dataset).round().to(torch.uint8), expected)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (dataset.mean, dataset.std))
    torch.testing.assert_close(images[:70], (expected / 255 - mean) / std, atol=2e-6, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("num_images", [70, 69])
def test_evaluation_counts_every_image_once(dataset, source, num_shards, num_images):
    few = fake(dataset, num_images)
    for batch_size in (7, 64, 500):
        shards = [
            collect(Batches(few, "test", batch_size, shard, num_shards, source=source)) for shard in range(num_shards)
        ]
        assert len({len(shard) for shard in shards}) == 1, "every shard has the same number of batches"
        labels = torch.cat([labels for shard in shards for _, labels in shard])
        assert (labels >= 0).sum() == num_images
        assert torch.equal(labels[labels >= 0].bincount(), torch.from_numpy(few.splits["test"].labels).bincount())


@pytest.mark.parametrize("num_images", [10_000, 9_999])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [512, 333])
def test_ten_thousand_test_images_are_counted_exactly(dataset, num_images, num_shards, batch_size):
    few = fake(dataset, num_images)
    shards = [Batches(few, "test", batch_size, shard, num_shards, source="tensor") for shard in range(num_shards)]
    seen = [sum(int((labels >= 0).sum()) for _, labels in batches.epoch()) for batches in shards]
    assert sum(seen) == num_images and len({len(batches) for batches in shards}) == 1


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_an_epoch_shows_each_image_at_most_once_in_one_order(dataset, num_shards):
    """Interleaved, the batches of all shards are those of a single shard; images are identified by their pixels."""
    plain = AugmentationSettings(crop_padding=0, flip=0.0)
    micro = 24 // num_shards
    shards = [
        collect(Batches(dataset, "train", micro, s, num_shards, seed=5, augmentation=plain, source="tensor"))
        for s in range(num_shards)
    ]
    together = torch.cat([shard[i][0] for i in range(len(shards[0])) for shard in shards])
    alone = torch.cat(
        [images for images, _ in collect(Batches(dataset, "train", 24, seed=5, augmentation=plain, source="tensor"))]
    )
    assert torch.equal(together, alone)
    assert len(together) == 240 and len(torch.unique(together.flatten(1), dim=0)) == 240


def test_the_order_depends_on_seed_and_epoch(dataset):
    batches = {
        seed: Batches(dataset, "train", 250, seed=seed, augmentation=AugmentationSettings(), source="tensor")
        for seed in (0, 1)
    }
    labels = [next(iter(batches[seed].epoch(epoch)))[1] for seed in (0, 1) for epoch in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(labels) for b in labels[:i])
    assert all(torch.equal(a.bincount(), labels[0].bincount()) for a in labels)


@pytest.mark.parametrize("source", SOURCES)
def test_any_batch_can_be_asked_for(dataset, source):
    """A pipeline that starts at a batch, or jumps to it, gives the same bits as one that read all batches before."""

    def make(**more):
        return Batches(dataset, "train", 50, seed=3, augmentation=HEAVY, source=source, **more)

    batches = make()
    epochs = [collect(batches, epoch) for epoch in range(2)]
    for start in (1, 3, 4):
        assert same(collect(make(num_threads=1), 0, start), epochs[0][start:]), (
            "a fresh pipeline, another number of threads"
        )
    assert same(collect(batches, 1, 2), epochs[1][2:]), "a jump back"
    assert same(collect(batches, 0, 4), epochs[0][4:]), "and again"
    assert same(collect(batches, 1), epochs[1]), "the end of an epoch runs into the next one"


def test_leaving_an_epoch_early_loses_nothing(dataset):
    batches = Batches(dataset, "train", 50, seed=3, augmentation=HEAVY, source="resident")
    complete = collect(batches)
    for _ in batches.epoch(0):
        break
    assert same(collect(batches), complete)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_reading_ahead_changes_nothing(dataset, prefetch, monkeypatch):
    expected = collect(Batches(dataset, "train", 50, seed=3, augmentation=HEAVY, source="resident"))
    monkeypatch.setattr("image_data.dali_backend.PREFETCH", prefetch)
    monkeypatch.setattr("dali_pipeline.AHEAD", prefetch + 1)
    assert same(collect(Batches(dataset, "train", 50, seed=3, augmentation=HEAVY, source="resident")), expected)


def test_repeated_augmentation_shows_each_image_several_times(dataset):
    batches = Batches(dataset, "train", 60, seed=0, augmentation=AugmentationSettings(repeats=3), source="tensor")
    images, labels = next(iter(batches.epoch()))
    assert torch.equal(labels[0::3], labels[1::3]) and torch.equal(labels[0::3], labels[2::3])
    assert not torch.equal(images[0::3], images[1::3])


@pytest.mark.parametrize("source", SOURCES)
def test_alternating_flips_follow_the_image_through_the_epochs(dataset, source):
    """Two epochs show every image once unchanged and once flipped, at any position."""
    few = replace(dataset, splits={"train": dataset.splits["train"].take(np.arange(40))})
    plain = AugmentationSettings(crop_padding=0, flip=0.0)
    known = next(iter(Batches(few, "train", 40, augmentation=plain, source=source).epoch(0)))[0]
    known = known[torch.from_numpy(np.argsort(epoch_order(0, 0, 40)))]
    batches = Batches(
        few, "train", 40, augmentation=AugmentationSettings(crop_padding=0, flip_mode="alternating"), source=source
    )
    seen = []
    for epoch in (0, 1):
        images = next(iter(batches.epoch(epoch)))[0][torch.from_numpy(np.argsort(epoch_order(0, epoch, 40)))]
        as_it_is, mirrored = (
            torch.isclose(images, them, atol=1e-5).flatten(1).all(dim=1) for them in (known, known.flip(-1))
        )
        assert (as_it_is | mirrored).all()
        seen.append(mirrored)
    assert torch.equal(seen[0], ~seen[1]) and 0 < seen[0].sum() < 40
    batches.close()


def test_trees_of_any_size_train_and_evaluate(tmp_path):
    """Images of different sizes: random resized crops in training, resize and center crop in evaluation."""
    from torchvision.transforms.v2 import functional as tv

    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = draw.integers(40, 160, 2)
                coarse = draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
                suffix = "png" if i % 2 else "jpg"
                Image.fromarray(coarse).resize((int(width), int(height)), Image.BILINEAR).save(
                    tmp_path / split / name / f"{i}.{suffix}"
                )
    dataset = prepare(root=tmp_path)
    with pytest.raises(DatasetError, match="differ in size. Add the input size of the network: --set image_side=128"):
        Batches(dataset, "test", 4)
    training = Batches(
        dataset,
        "train",
        8,
        augmentation=AugmentationSettings(resized_crop=True, policy="trivial_augment"),
        image_side=48,
    )
    assert [images.shape for images, _ in training.epoch()] == [(8, 3, 48, 48)] * 3
    images = torch.cat([images for images, _ in Batches(dataset, "test", 4, image_side=48).epoch()])
    for i, path in enumerate(dataset.splits["test"].paths):
        image = tv.pil_to_tensor(Image.open(dataset.root / path).convert("RGB"))
        expected = tv.center_crop(tv.resize(image, round(48 * 256 / 224), antialias=True), 48)
        assert (pixels(images[i], dataset) - expected).abs().max() < 1.5, "one level of rounding"


@pytest.mark.parametrize("source", ["resident", "files"])
def test_small_images_are_enlarged(dataset, source):
    images, _ = next(iter(Batches(dataset, "test", 8, image_side=64, source=source).epoch()))
    assert images.shape == (8, 3, 64, 64)
    with pytest.raises(DatasetError, match="does not resize"):
        Batches(dataset, "test", 8, image_side=64, source="tensor")


@pytest.mark.parametrize("damage", ["deleted", "empty", "truncated", "text"])
@pytest.mark.parametrize("training", [True, False])
def test_a_file_that_breaks_after_preparation_is_named(tmp_path, damage, training):
    dataset = prepare(tmp_path, dataset="shapes", shapes=dict(side=32, train_per_class=4, test_per_class=4))
    split = "train" if training else "test"
    path = dataset.root / dataset.splits[split].paths[7]
    content = path.read_bytes()
    path.unlink()
    if damage != "deleted":
        path.write_bytes(
            {"empty": b"", "truncated": content[: len(content) // 2], "text": b"not an image at all"}[damage]
        )
    batches = Batches(dataset, split, 10, augmentation=AugmentationSettings() if training else None, source="files")
    with pytest.raises(DatasetError, match=path.name):
        collect(batches)


def test_impossible_requests_are_errors(dataset):
    with pytest.raises(DatasetError, match="250 images, fewer than one global batch of 300"):
        Batches(dataset, "train", 150, 0, 2, augmentation=AugmentationSettings())
    with pytest.raises(DatasetError, match="unknown source 'residents'; did you mean 'resident'"):
        Batches(dataset, "test", 10, source="residents")
    with pytest.raises(SettingsError, match="unknown augmentation.policy 'randaugment'; did you mean 'rand_augment'"):
        Batches(dataset, "train", 10, augmentation=AugmentationSettings(policy="randaugment"))


def test_the_preview_shows_the_original_and_its_augmentations(dataset):
    grid = preview(
        dataset, AugmentationSettings(crop_padding=0, flip=1.0), 0, count=5, epochs=2, seed=0, source="tensor"
    )
    assert grid.shape == (5, 3, 32, 32, 3)
    assert np.array_equal(grid[:, 1], grid[:, 0][:, :, ::-1]) and np.array_equal(grid[:, 2], grid[:, 1])


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("grid.txt", "--preview ends in .png or .svg, not '.txt'"),
        ("grid", "--preview ends in .png or .svg, not ''"),
        ("no/grid.png", "--preview no/grid.png: the folder no does not exist. Create it: mkdir -p no"),
    ],
)
def test_a_preview_that_cannot_be_written_is_rejected_before_the_work(file, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dali_pipeline.py", "--preview", file, "--data-dir", "/nowhere"])
    assert run_cli(main) == 1 and capsys.readouterr().err == f"error: {sentence}\n"


def test_a_negative_seed_of_a_preview_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dali_pipeline.py", "--preview", "grid.png", "--seed", "-1"])
    with pytest.raises(SystemExit):
        main()
    assert "error: argument --seed: must be a whole number from 0 to" in capsys.readouterr().err


def test_erased_boxes_are_the_same_on_every_source(dataset):
    """The same rectangles of the same images, filled with the same noise; and all other pixels agree."""
    few = replace(dataset, splits={"train": dataset.splits["train"].take(np.arange(40))})
    for value in ("zero", "pixel"):
        settings = AugmentationSettings(erasing=0.8, erasing_value=value)
        found = {}
        for source in SOURCES:
            batches = Batches(few, "train", 40, seed=7, augmentation=settings, source=source)
            found[source] = next(iter(batches.epoch(1)))[0]
            boxes = batches.planner.plan(BatchIndex(1, 0, 1)).augmentation.erase_boxes
            batches.close()
        assert 20 < boxes.any(axis=1).sum() < 40
        for image, (y0, x0, y1, x1) in zip(found["tensor"], boxes.tolist(), strict=True):
            assert value == "pixel" or (image[:, y0:y1, x0:x1] == 0).all()
        for source in SOURCES:
            torch.testing.assert_close(found[source], found["tensor"], atol=2e-6, rtol=0)


def test_a_file_that_dali_refuses_is_named(dataset, monkeypatch):
    """Pillow decodes the file, and DALI does not; DALI's own message names no file."""
    few = replace(dataset, splits={"test": dataset.splits["test"].take(np.arange(6))})
    batches = Batches(few, "test", 6, source="files")
    bad, read = dataset.root / few.splits["test"].paths[4], batches._backend.reader._read_one
    refused = np.frombuffer(b"\x89PNG\r\n\x1a\nnothing that DALI decodes", dtype=np.uint8)
    monkeypatch.setattr(batches._backend.reader, "_read_one", lambda i: refused if i == 4 else read(i))
    with pytest.raises(DatasetError, match=f"DALI .* cannot decode .*{bad.name} .*Save the image again"):
        collect(batches)


def test_another_failure_of_dali_is_one_sentence(dataset, monkeypatch):
    batches = Batches(dataset, "test", 6, source="files")

    def fail():
        raise RuntimeError(
            "Critical error in pipeline\nError when executing:\nencountered:\n  out of memory\n  at file"
        )

    monkeypatch.setattr(batches._backend.pipeline, "share_outputs", fail)
    with pytest.raises(DatasetError, match="^DALI failed to make a batch: out of memory$"):
        collect(batches)


def test_without_dali_packed_pixels_come_from_pytorch_and_the_other_sources_say_what_is_missing(
    dataset, monkeypatch, caplog
):
    monkeypatch.setattr(dali_pipeline, "is_installed", lambda package: package != "nvidia.dali")
    dali_pipeline.note_missing_dali.cache_clear()
    split, gpu = dataset.splits["train"], torch.device("cuda")
    assert [choose_source("auto", split, True, gpu) for _ in range(2)] == ["tensor", "tensor"]
    assert caplog.text.count("source    tensor, because NVIDIA DALI is not installed") == 1
    files = replace(split, packed=None)
    for source, of, own_side in (("resident", split, True), ("files", split, True), ("auto", files, True)):
        with pytest.raises(DatasetError, match="needs NVIDIA DALI, which is not installed: pip install nvidia-dali"):
            choose_source(source, of, own_side, gpu)
    with pytest.raises(DatasetError, match="--source resident needs NVIDIA DALI"):
        choose_source("auto", split, False, gpu)
    assert choose_source("tensor", split, True, gpu) == "tensor"
