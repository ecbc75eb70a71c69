"""Batch plans over sizes, shards, accumulation and resume points; archives with members of any name (Hypothesis)."""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from dataclasses import asdict
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


def step_images(cut: dict[str, int], epoch: int, step: int) -> list[int]:
    """Images of an optimizer step, over all shards and micro-batches."""
    indices = range(step * cut["accumulation"], (step + 1) * cut["accumulation"])
    planned = [
        planner(cut, shard).plan(BatchIndex(epoch, index, indices.stop))
        for shard in range(cut["shards"])
        for index in indices
    ]
    return sorted(np.concatenate([one.positions for one in planned]).tolist())


@some_examples(25)
@given(cuts(), st.integers(0, 2))
def test_an_epoch_shows_each_image_once_and_shards_are_disjoint(cut, epoch):
    shown = [image for step in range(cut["steps"]) for image in step_images(cut, epoch, step)]
    assert len(set(shown)) == len(shown) and set(shown) <= set(range(cut["num_images"]))
    if cut["num_images"] % (len(shown) // cut["steps"]) == 0:
        assert len(shown) == cut["num_images"]
    whole = {"shards": 1, "micro": len(shown) // cut["steps"], "accumulation": 1}
    last = cut["steps"] - 1
    assert step_images(cut | whole, epoch, last) == step_images(cut, epoch, last)  # however a step is cut


@some_examples(40)
@given(cuts())
def test_an_evaluation_shows_each_image_once_and_pads_at_the_end(cut):
    batches = -(-cut["num_images"] // (cut["micro"] * cut["shards"]))
    planners = [planner(cut, shard, None) for shard in range(cut["shards"])]
    shown = [one.plan(BatchIndex(0, index, batches)).positions for index in range(batches) for one in planners]
    positions = np.concatenate(shown)
    np.testing.assert_array_equal(positions[: cut["num_images"]], np.arange(cut["num_images"]))
    assert (positions[cut["num_images"] :] == -1).all()


@some_examples(15)
@given(cuts(), st.data())
def test_a_run_that_resumes_anywhere_sees_the_same_remaining_batches(cut, data):
    shard, stop = data.draw(st.integers(0, cut["shards"] - 1)), cut["steps"] * cut["accumulation"]
    start = data.draw(st.integers(0, 2 * stop - 1))
    uninterrupted, resumed = planner(cut, shard, EVERYTHING), planner(cut, shard, EVERYTHING)
    everything = [uninterrupted.plan(BatchIndex(epoch, index, stop)) for epoch in (0, 1) for index in range(stop)]
    for expected in everything[start:]:
        found = resumed.plan(expected.batch)
        np.testing.assert_equal(asdict(found), asdict(expected))


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
