"""Batch plans: what is drawn for an image, and on what it depends. Of any sizes and shards: test_properties.py.

Run: python -m pytest tests/image_data/test_batch_plan.py
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from config.settings import AugmentationSettings
from image_data import auto_augment as policies
from image_data import mixup
from image_data.augmentation import ERASING, Augmentation, random_stream, resized_crop_boxes, uniform_rows
from image_data.batch_plan import BatchIndex, BatchPlanner, PlannedBatch
from image_data.mixup import Mixer
from image_data.torch_backend import resized_crop

SIDE = 32
EVERYTHING = AugmentationSettings(
    policy="trivial_augment",
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    erasing=0.9,
    erasing_value="pixel",
    mixup=0.8,
    cutmix=1.0,
)


def planner(
    num_images: int, batch_size: int, shard: int = 0, num_shards: int = 1, seed: int = 0, **more
) -> BatchPlanner:
    settings = more.pop("settings", EVERYTHING)
    augmentation = Augmentation(settings, SIDE, seed) if settings is not None else None
    mixer = Mixer(settings, 10, SIDE, seed) if settings is not None else None
    return BatchPlanner(num_images, batch_size, shard, num_shards, seed, augmentation, mixer, **more)


def arrays_of(planned: PlannedBatch) -> dict[str, np.ndarray]:
    """Every array of a plan, one row per image; the noise of erasing has its own rows."""
    plan = planned.augmentation
    found = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "operations"}
    for i, operation in enumerate(plan.operations):
        found |= {f"{name} {i}": getattr(operation, name) for name in ("kind", "magnitude", "matrix")}
    found |= {"positions": planned.positions, "noise": planned.erasing_noise}
    if planned.mixing is not None:
        found |= {"share": planned.mixing.share, "boxes": planned.mixing.boxes}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("half", [1, 7, 32])
def test_augmentation_does_not_depend_on_the_cut_into_shards_and_micro_batches(half):
    """One batch of B images, or its halves as two shards or as two micro-batches: the same rows."""
    settings = replace(EVERYTHING, mixup=0.0, cutmix=0.0)  # partners of MixUp are those of the micro-batch
    together = arrays_of(planner(4 * half, 2 * half, settings=settings).plan(BatchIndex(5, 1, 2)))
    shards = [planner(4 * half, half, i, 2, settings=settings).plan(BatchIndex(5, 1, 2)) for i in (0, 1)]
    micro = [planner(4 * half, half, settings=settings).plan(BatchIndex(5, k, 4)) for k in (2, 3)]
    for halves in (map(arrays_of, shards), map(arrays_of, micro)):
        first, second = halves
        for name, rows in together.items():
            assert np.array_equal(rows, np.concatenate([first[name], second[name]])), name


@pytest.mark.parametrize("other", [BatchIndex(4, 2, 9), BatchIndex(3, 3, 9), BatchIndex(4, 3, 9)])
def test_epochs_and_neighboring_batches_differ_in_every_draw(other):
    """Crop, operations, boxes, noise, mixing and order of batch 2 of epoch 3 occur in no neighbor."""
    plan = planner(1000, 100)
    ours, theirs = arrays_of(plan.plan(BatchIndex(3, 2, 9))), arrays_of(plan.plan(other))
    assert {"flip", "crop_offset", "erase_boxes", "kind 0", "share", "boxes", "noise", "positions"} <= set(ours)
    for name, value in ours.items():
        if name == "noise":
            assert (value[:9000] == theirs["noise"][:9000]).mean() < 0.01
        elif name not in ("matrix 1", "matrix 2", "matrix 3"):  # color jitter has no matrices
            assert not np.array_equal(value, theirs[name]), name
    if other.epoch == 3:
        assert not set(ours["positions"]) & set(theirs["positions"])


def test_draws_of_neighboring_batches_are_independent():
    """Correlation of the uniform numbers of consecutive batches, epochs and seeds: none beyond chance."""
    batch = uniform_rows(1, 5, ERASING, 0, 2000, 24)
    for other in (
        uniform_rows(1, 5, ERASING, 2000, 2000, 24),
        uniform_rows(1, 6, ERASING, 0, 2000, 24),
        uniform_rows(2, 5, ERASING, 0, 2000, 24),
        uniform_rows(1, 5, ERASING + 1, 0, 2000, 24),
    ):
        assert abs(np.corrcoef(batch.ravel(), other.ravel())[0, 1]) < 4.5 / np.sqrt(batch.size)


def test_mixing_and_noise_of_an_image_use_words_of_the_stream_that_no_other_uses(monkeypatch):
    begins, streams = [], []

    def counter(stream: np.random.Philox) -> int:
        return sum(int(word) << (64 * i) for i, word in enumerate(stream.state["state"]["counter"]))

    def remembered(*arguments: int) -> np.random.Philox:
        streams.append(random_stream(*arguments))
        begins.append(counter(streams[-1]))
        return streams[-1]

    monkeypatch.setattr(mixup, "random_stream", remembered)
    for start in (0, 64):
        Mixer(EVERYTHING, 10, SIDE, seed=0).draw(0, start, 64)
    mixup.erasing_noise(np.array([[0, 0, SIDE, SIDE]] * 2), 0, 0, 0)
    ends = [counter(stream) for stream in streams]
    assert len(streams) == 4 and begins[0] < ends[0] < begins[1] and begins[2] < ends[2] < begins[3]


def test_a_resized_crop_that_cannot_fit_is_the_largest_center_crop():
    """A ratio of 10 x 200 pixels is outside 3/4 to 4/3, and the smallest crop is half of the area."""
    u = np.random.default_rng(0).random((50, 24))
    for height, width in ((10, 200), (200, 10)):
        box = resized_crop_boxes(u, [0.5, 1.0], [3 / 4, 4 / 3], np.tile([height, width], (50, 1)))
        pixels = box * [height, width, height, width]
        long = 10 * 4 / 3  # pixels along the long side, all 10 along the other
        expected = (
            [0, 100 - long / 2, 10, 100 + long / 2] if width > height else [100 - long / 2, 0, 100 + long / 2, 10]
        )
        np.testing.assert_allclose(pixels, np.tile(expected, (50, 1)), atol=1e-4)


def test_resized_crops_lie_inside_images_of_any_size_and_follow_the_settings():
    draw = np.random.default_rng(4)
    sizes = draw.integers(20, 400, (3000, 2))
    scale, ratio = [0.2, 0.6], [0.8, 1.25]
    box = resized_crop_boxes(draw.random((3000, 24)), scale, ratio, sizes).astype(float)
    assert box.min() >= 0 and box.max() <= 1 + 1e-6
    height, width = (box[:, 2] - box[:, 0]) * sizes[:, 0], (box[:, 3] - box[:, 1]) * sizes[:, 1]
    area, aspect = height * width / sizes.prod(1), width / height
    assert aspect.min() > 0.8 - 1e-3 and aspect.max() < 1.25 + 1e-3
    square = (sizes.max(1) / sizes.min(1)) < 1.25
    assert 0.2 - 1e-3 < area[square].min() and area[square].max() < 0.6 + 1e-3


def test_a_resized_crop_of_a_constant_image_is_constant():
    """No crop samples pixels outside of the image, whose value would be 0."""
    settings = AugmentationSettings(resized_crop=True, resized_crop_scale=[0.05, 1.0])
    plan = Augmentation(settings, SIDE).plan(0, 0, 500)
    images = torch.arange(500).remainder(255).add(1).to(torch.uint8)[:, None, None, None].expand(500, 3, SIDE, SIDE)
    assert torch.equal(resized_crop(images.contiguous(), plan.crop_box), images)


@pytest.mark.parametrize("policy", ["rand_augment", "trivial_augment", "auto_augment"])
def test_all_operations_and_magnitudes_of_a_policy_occur(policy):
    """TrivialAugment uses each of 31 bins with both signs, RandAugment one bin, AutoAugment all of its 25 pairs."""
    settings = AugmentationSettings(crop_padding=0, flip=0.0, policy=policy)
    operations = Augmentation(settings, SIDE).plan(0, 0, 40_000).operations
    kinds = np.concatenate([operation.kind for operation in operations])
    assert set(kinds) == set(range(10)), "every kind"
    factors = np.concatenate([operation.magnitude[operation.kind == policies.CONTRAST] for operation in operations])
    steps = np.unique(np.abs(factors - 1).round(5))
    assert len(steps) == {"rand_augment": 1, "trivial_augment": 31, "auto_augment": 2}[policy]
    assert (factors < 1).any() and (factors > 1).any()
    if policy == "trivial_augment":
        (operation,) = operations
        matrices = operation.matrix[operation.kind == policies.WARP]
        shears = matrices[(matrices[:, 1, 0] == 0) & (matrices[:, 0, 1] != 0)][:, 0, 1]
        assert len(np.unique(shears)) == 60, "30 magnitudes besides 0, with both signs"
        bits = operation.magnitude[operation.kind == policies.POSTERIZE]
        assert set(bits) == {2, 3, 4, 5, 6, 7, 8}


def test_jitter_factors_above_1_go_both_ways():
    """brightness=1.5 scales by 0 to 2.5: never negative, and the whole range occurs in every channel of the jitter."""
    settings = AugmentationSettings(crop_padding=0, flip=0.0, brightness=1.5, contrast=0.5)
    operations = Augmentation(settings, SIDE).plan(0, 0, 5000).operations
    for kind, low, high in ((policies.BRIGHTNESS, 0, 2.5), (policies.CONTRAST, 0.5, 1.5)):
        factors = np.concatenate([operation.magnitude[operation.kind == kind] for operation in operations])
        assert len(factors) == 5000, "each image once"
        assert low <= factors.min() < low + 0.01 and high - 0.01 < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.03
        first = (operations[0].kind == kind).mean()
        assert 0.3 < first < 0.37, "in random order, with saturation as the identity"
    assert all(operation.magnitude[operation.kind == policies.COLOR].size == 0 for operation in operations)


def test_partners_and_boxes_of_mixing_differ_between_images():
    planned = planner(1000, 200).plan(BatchIndex(0, 0, 5))
    cut = planned.mixing.boxes[:, 2] > planned.mixing.boxes[:, 0]
    assert 60 < cut.sum() < 140 and len(np.unique(planned.mixing.boxes[cut], axis=0)) > 0.9 * cut.sum()
    assert len(np.unique(planned.mixing.share[~cut])) > 0.9 * (~cut).sum()


@pytest.mark.parametrize(("num_images", "batch_size", "repeats"), [(50, 7, 2), (23, 4, 3), (8, 8, 4)])
def test_repeats_show_each_image_in_consecutive_rows(num_images, batch_size, repeats):
    repeated = planner(num_images, batch_size, settings=replace(EVERYTHING, repeats=repeats))
    steps = num_images // batch_size
    seen = np.concatenate([repeated.plan(BatchIndex(2, k, steps)).positions for k in range(steps)])
    order = planner(num_images, num_images).plan(BatchIndex(2, 0, 1)).positions
    assert np.array_equal(seen, np.repeat(order, repeats)[: len(seen)])
