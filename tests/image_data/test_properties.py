"""Batch plans over sizes, shards, accumulation and resume points; archives with members of any name (Hypothesis)."""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from properties import some_examples

from config.settings import AugmentationSettings
from image_data.augmentation import Augmentation
from image_data.batch_plan import BatchIndex, BatchPlanner
from image_data.mixup import Mixer
from image_data.preparation.archives import unpack
from image_data.preparation.image_tree import PrepareError

SIDE = 8
PLAIN = AugmentationSettings(mixup=0.0, cutmix=0.0)
EVERYTHING = AugmentationSettings(policy="trivial_augment", erasing=0.5, erasing_value="pixel", mixup=0.8, cutmix=1.0)


@st.composite
def cuts(draw) -> dict[str, int]:
    """A split and the cut of its optimizer steps into shards and micro-batches, with at least one step."""
    cut = {name: draw(st.integers(1, most)) for name, most in (("shards", 4), ("micro", 6), ("accumulation", 3))}
    step = cut["shards"] * cut["micro"] * cut["accumulation"]
    num_images = draw(st.integers(step, 4 * step + 5))
    return cut | {"num_images": num_images, "steps": num_images // step, "seed": draw(st.integers(0, 3))}


def planner(cut: dict[str, int], shard: int, settings: AugmentationSettings | None = PLAIN) -> BatchPlanner:
    """A new planner, as that of a process that has just started; without settings, of an evaluation."""
    augmentation = Augmentation(settings, SIDE, cut["seed"]) if settings else None
    mixer = Mixer(settings, 10, SIDE, cut["seed"]) if settings else None
    return BatchPlanner(cut["num_images"], cut["micro"], shard, cut["shards"], cut["seed"], augmentation, mixer)


def epoch_images(cut: dict[str, int], epoch: int) -> list[int]:
    """Images of an epoch in the order of its micro-batches, over all shards."""
    planners, stop = [planner(cut, shard) for shard in range(cut["shards"])], cut["steps"] * cut["accumulation"]
    planned = [one.plan(BatchIndex(epoch, index, stop)) for index in range(stop) for one in planners]
    return np.concatenate([one.positions for one in planned]).tolist()


@some_examples(25)
@given(cuts(), st.integers(0, 50))
def test_an_epoch_shows_each_image_once_in_an_order_that_does_not_depend_on_the_cut(cut, epoch):
    shown, step = epoch_images(cut, epoch), cut["shards"] * cut["micro"] * cut["accumulation"]
    assert len(set(shown)) == len(shown) == cut["steps"] * step and set(shown) <= set(range(cut["num_images"]))
    assert shown == epoch_images(cut | {"shards": 1, "micro": step, "accumulation": 1}, epoch)


@some_examples(40)
@given(cuts())
def test_an_evaluation_shows_each_image_once_and_pads_at_the_end(cut):
    batches = -(-cut["num_images"] // (cut["micro"] * cut["shards"]))
    planners = [planner(cut, shard, None) for shard in range(cut["shards"])]
    shown = [one.plan(BatchIndex(0, index, batches)) for index in range(batches) for one in planners]
    assert all(len(one.positions) == cut["micro"] and (one.readable >= 0).all() for one in shown)
    positions = np.concatenate([one.positions for one in shown])
    np.testing.assert_array_equal(positions[: cut["num_images"]], np.arange(cut["num_images"]))
    assert (positions[cut["num_images"] :] == -1).all()


@some_examples(15)
@given(cuts(), st.data())
def test_a_run_that_resumes_anywhere_sees_the_same_remaining_batches(cut, data):
    shard, stop = data.draw(st.integers(0, cut["shards"] - 1)), cut["steps"] * cut["accumulation"]
    start = data.draw(st.integers(0, 2 * stop - 1))
    uninterrupted, resumed = planner(cut, shard, EVERYTHING), planner(cut, shard, EVERYTHING)
    everything = [uninterrupted.plan(BatchIndex(epoch, index, stop)) for epoch in (0, 1) for index in range(stop)]
    for expected in reversed(everything[start:]):  # in any order, and wherever the consumer stops
        found = resumed.plan(replace(expected.batch, stop=stop + 7))
        np.testing.assert_equal(asdict(replace(found, batch=expected.batch)), asdict(expected))


PARTS = st.sampled_from(["train", "test", "cat", "pets", "1.png", "..", ".", "", "C:", "~", "\\", "..\\..", "x" * 300])
LETTERS = st.characters(exclude_categories=["Cs"])  # halves of surrogate pairs cannot be written into a zip
NAMES = st.lists(PARTS | st.text(LETTERS, max_size=4), min_size=1, max_size=5).map("/".join)
CLIMBING = st.lists(st.sampled_from(["..", "cat"]), min_size=2, max_size=6).map(
    lambda parts: "/".join(["train", *parts])
)


def write_archive(path: Path, names: list[str], kind: str) -> None:
    """Write a zip or a tar whose members have exactly these names."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                info = zipfile.ZipInfo("x")
                info.filename = name
                file.writestr(info, b"pixels")
        return
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 6
            tar.addfile(member, BytesIO(b"pixels"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@some_examples(80)
@given(
    st.lists(NAMES | CLIMBING, max_size=3),
    st.sampled_from(["", "pets/"]),
    st.sampled_from(["zip", "tar"]),
    st.booleans(),
)
@example(["train/../../up.png"], "", "tar", True)
@example(["pets/train/../../../up.png"], "pets/", "zip", False)
@example(["pets"], "pets/", "zip", True)  # a file named as the folder of the tree
def test_no_member_of_an_archive_is_written_outside_the_folder(names, top, kind, needs_splits):
    with tempfile.TemporaryDirectory() as folder:
        archive, target = Path(folder) / "archive", Path(folder) / "a" / "b" / "images"
        target.mkdir(parents=True)
        write_archive(archive, [f"{top}train/cat/1.png", f"{top}train/dog/1.png", *names], kind)
        try:
            unpack(archive, target, needs_splits=needs_splits)
        except PrepareError as error:
            assert "\n" not in str(error)
        except OSError as error:  # prepare() names it
            assert "x" * 300 in str(error)
        outside = {path for path in Path(folder).rglob("*") if path.is_file() and not path.is_relative_to(target)}
        assert outside == {archive}
