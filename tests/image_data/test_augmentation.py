"""Augmentation plans and their application, compared with torchvision.

Run: python -m pytest tests/image_data/test_augmentation.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from common.errors import SettingsError
from config.settings import AugmentationSettings
from image_data import auto_augment as policies
from image_data import torch_backend
from image_data.augmentation import ERASING, Augmentation, epoch_order, resized_crop_boxes, uniform_rows
from image_data.mixup import Mixer, erase, erasing_noise
from image_data.readers import PaddedPackedReader

SIDE = 32
NAMES = ["Identity", *policies.COMMON, "Invert"]
NUMBER = 4000


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth ramps with noise and a rectangle: uint8 (B, 3, 32, 32)."""
    return pictures(64)


def pictures(count: int) -> torch.Tensor:
    noise = np.random.default_rng(1)
    ramp = np.linspace(0, 1, SIDE)
    made = []
    for i in range(count):
        smooth = ramp[:, None, None] * noise.uniform(0, 200, 3) + ramp[None, :, None] * noise.uniform(0, 55, 3)
        made.append((smooth + noise.uniform(0, 20 + i % 40, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8))
        made[-1][8:24, 10 : 12 + i % 20] = noise.integers(0, 256, 3)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def torchvision_reference(images: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    augment = v2.RandAugment()
    return augment._apply_image_or_video_transform(
        images, name, magnitude, interpolation=v2.InterpolationMode.NEAREST, fill=augment._fill
    )


def torchvision_magnitude(space: dict, name: str, bins: int, bin: int, negative: bool) -> float:
    values, signed = space.get(name, (lambda *_: None, False))
    magnitudes = values(bins, SIDE, SIDE)
    return 0.0 if magnitudes is None else float(magnitudes[bin]) * (-1 if signed and negative else 1)


def one_operation(
    space: policies.OperationSpace, name: str, bin: int, negative: bool, count: int
) -> policies.OperationBatch:
    return space.batch(np.full(count, space.names.index(name)), np.full(count, bin), np.full(count, negative))


SPACES = {
    "RandAugment": (v2.RandAugment._AUGMENTATION_SPACE, 31, policies.RandAugment(SIDE, 2, 9).space),
    "TrivialAugment": (v2.TrivialAugmentWide._AUGMENTATION_SPACE, 31, policies.TrivialAugment(SIDE).space),
    "AutoAugment": (v2.AutoAugment._AUGMENTATION_SPACE, 10, policies.AutoAugment(SIDE).space),
}
CASES = [(family, name) for family, (_, _, space) in SPACES.items() for name in space.names]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tensor_operations_equal_torchvision(images, family, name):
    """Every pixel, at every magnitude, with both signs; blends of floats may differ by one level."""
    theirs, bins, space = SPACES[family]
    for bin in range(bins):
        for negative in (False, True):
            expected = torchvision_reference(images, name, torchvision_magnitude(theirs, name, bins, bin, negative))
            ours = torch_backend.apply_operation(images, one_operation(space, name, bin, negative, len(images)))
            difference = (ours.int() - expected.int()).abs()
            if name in ("Rotate", "ShearX", "ShearY"):  # a point on the border of two pixels may fall to either
                assert (difference > 0).float().mean() < 0.08
            else:
                assert difference.max() <= (1 if name in policies.BLENDS else 0)


@pytest.fixture(scope="module")
def dali():
    """A function that applies one operation with the DALI graph: (images, operation) -> uint8 images."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    from image_data.dali_backend import Graph

    pipeline = Graph(side=SIDE, source_side=SIDE, decode=False, training=True, num_operations=1).build(
        64, 2, None, prefetch=1
    )

    def apply(images: torch.Tensor, operation: policies.OperationBatch) -> torch.Tensor:
        inputs = {
            "images": images.permute(0, 2, 3, 1).contiguous().numpy(),
            "flip": np.zeros(64, np.int32),
            "kind0": operation.kind,
            "value0": operation.magnitude,
            "matrix0": operation.matrix,
        }
        for key, value in inputs.items():
            pipeline.feed_input(key, value)
        pipeline.schedule_run()
        (output,) = pipeline.share_outputs()
        made = torch.empty(64, 3, SIDE, SIDE)
        feed_ndarray(output.as_tensor(), made)
        pipeline.release_outputs()
        return (made * 255).round().to(torch.uint8)

    return apply


@pytest.mark.parametrize("name", NAMES)
def test_dali_operations_equal_the_tensor_ones(images, dali, name):
    space = policies.OperationSpace(
        NAMES, SIDE, bins=31, shear=0.99, translation=32, rotation=135, color=0.99, posterize=6
    )
    for bin in (0, 5, 13, 22, 30):
        for negative in (False, True):
            operation = one_operation(space, name, bin, negative, 64)
            difference = (dali(images, operation).int() - torch_backend.apply_operation(images, operation).int()).abs()
            if name in policies.WARPS:
                assert (difference > 0).float().mean() < 0.05
            else:
                assert difference.max() <= 1, "one level of rounding"


def test_dali_equalizes_images_of_few_values_as_pillow_does(dali):
    """Fewer than 255 pixels below the largest value leave the image as it is; a few more spread it coarsely."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((64, 3, SIDE, SIDE), 200, dtype=torch.uint8)
    for i, image in enumerate(images):
        image.flatten(1)[:, : 12 * i] = torch.randint(0, 200, (3, 12 * i), dtype=torch.uint8, generator=generator)
    space = policies.OperationSpace(
        NAMES, SIDE, bins=31, shear=0.99, translation=32, rotation=135, color=0.99, posterize=6
    )
    operation = one_operation(space, "Equalize", 0, False, 64)
    expected = torch_backend.apply_operation(images, operation)
    assert (dali(images, operation).int() - expected.int()).abs().max() <= 1
    assert [torch.equal(image, made) for image, made in zip(images, expected, strict=True)].count(True) == 22


@pytest.mark.parametrize("bins", [10, 31])
def test_linspace_is_that_of_pytorch_bit_for_bit(bins):
    tops = [0.3, 0.9, 0.99, 4, 6, 30, 32, 135, *(150 / 331 * side for side in range(8, 257))]
    for start, stop in [(0, top) for top in tops] + [(1, 0)]:
        assert (policies.linspace(start, stop, bins) == torch.linspace(start, stop, bins).double().numpy()).all(), (
            start,
            stop,
        )


def test_the_cifar_policy_is_that_of_torchvision():
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
    ours = [((a, p, m), (b, q, n)) for a, p, m, b, q, n in policies.AutoAugment.PAIRS]
    assert [tuple((name, chance, bin or 0) for name, chance, bin in pair) for pair in theirs] == ours


TRANSFORMS = {
    "crop and flip": (AugmentationSettings(), v2.Compose([v2.RandomCrop(SIDE, padding=4), v2.RandomHorizontalFlip()])),
    "resized crop": (AugmentationSettings(resized_crop=True, flip=0.0), v2.RandomResizedCrop(SIDE, antialias=True)),
    "rand augment": (AugmentationSettings(crop_padding=0, flip=0.0, policy="rand_augment"), v2.RandAugment()),
    "trivial augment": (
        AugmentationSettings(crop_padding=0, flip=0.0, policy="trivial_augment"),
        v2.TrivialAugmentWide(),
    ),
    "auto augment": (
        AugmentationSettings(crop_padding=0, flip=0.0, policy="auto_augment"),
        v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    ),
    "color jitter": (
        AugmentationSettings(crop_padding=0, flip=0.0, brightness=0.4, contrast=0.3, saturation=0.5),
        v2.ColorJitter(0.4, 0.3, 0.5),
    ),
    "erasing": (AugmentationSettings(crop_padding=0, flip=0.0, erasing=0.7), v2.RandomErasing(0.7)),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_statistics_agree_with_torchvision(name):
    """A few images, augmented many times: mean and spread of every statistic agree within chance."""
    settings, transform = TRANSFORMS[name]
    few = pictures(4)
    many = few.repeat(NUMBER // 4, 1, 1, 1)
    plan = Augmentation(settings, SIDE, seed=11).plan(0, 0, NUMBER)
    reader = PaddedPackedReader(
        many.permute(0, 2, 3, 1).numpy(), np.arange(NUMBER), torch.device("cpu"), settings.crop_padding
    )
    ours = torch_backend.augment(reader.read_crops(np.arange(NUMBER), plan.crop_offset), plan)
    if plan.erase_boxes is not None:
        ours = erase(ours, plan.erase_boxes, None)
    torch.manual_seed(0)
    theirs = torch.stack([transform(image) for image in many])
    for statistic in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x == 0).float().mean((1, 2, 3)),
        lambda x: x[:, :, :8].mean((1, 2, 3)),
        lambda x: x[:, :, :, :8].mean((1, 2, 3)),
        lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
    ):
        a, b = statistic(ours.float()), statistic(theirs.float())
        error = ((a.var() + b.var()) / NUMBER).sqrt() + 1e-3
        assert (a.mean() - b.mean()).abs() < 4.5 * error
        assert (a.std() - b.std()).abs() < 0.12 * b.std() + 0.05


def test_crops_and_flips_are_uniform():
    """All 81 crop offsets and both flips are equally likely (chi-squared test, 161 degrees of freedom)."""
    plan = Augmentation(AugmentationSettings(), SIDE).plan(0, 0, 16_200)
    cell = (plan.crop_offset[:, 0] + 4) * 18 + (plan.crop_offset[:, 1] + 4) * 2 + plan.flip
    counts = np.bincount(cell, minlength=162)
    chi2 = ((counts - 100) ** 2 / 100).sum()
    assert len(counts) == 162 and 100 < chi2 < 235


def test_alternating_flips_mirror_each_image_in_every_second_epoch():
    """A function of (seed, epoch, image), not of the position in the epoch; half of the images in each epoch."""
    alternating = Augmentation(AugmentationSettings(flip_mode="alternating"), SIDE, seed=5)
    images = np.arange(4000)
    flips = [alternating.plan(epoch, 0, 4000, images=images).flip for epoch in range(4)]
    assert (
        np.array_equal(flips[0], 1 - flips[1])
        and np.array_equal(flips[0], flips[2])
        and np.array_equal(flips[1], flips[3])
    )
    assert abs(flips[0].mean() - 0.5) < 0.03
    some = np.array([7, 3999, 7, 12])
    assert alternating.plan(2, 100, 4, images=some).flip.tolist() == flips[0][some].tolist()
    other = (
        Augmentation(AugmentationSettings(flip_mode="alternating"), SIDE, seed=6).plan(0, 0, 4000, images=images).flip
    )
    assert 0.4 < (other != flips[0]).mean() < 0.6
    random = Augmentation(AugmentationSettings(), SIDE, seed=5).plan(0, 0, 4000)
    assert np.array_equal(random.crop_offset, alternating.plan(0, 0, 4000).crop_offset), "other draws do not change"


@pytest.mark.parametrize(("ratio", "moves", "full"), [(4.0, 0, 1), (0.25, 1, 0)])
def test_a_resized_crop_as_wide_or_high_as_the_image_lies_anywhere(ratio, moves, full):
    u = np.random.default_rng(0).random((200, 24))
    boxes = resized_crop_boxes(u, [0.25, 0.25], [ratio, ratio], None)
    assert (boxes[:, full] == 0).all() and (boxes[:, full + 2] == 1).all()
    assert boxes[:, moves].min() < 0.05 and boxes[:, moves].max() > 0.7  # of 0 .. 0.75
    assert np.allclose(boxes[:, moves + 2] - boxes[:, moves], 0.25)


def test_erased_rectangles_follow_their_settings():
    settings = AugmentationSettings(erasing=0.25, erasing_scale=[0.1, 0.2], erasing_ratio=[0.5, 2.0])
    boxes = Augmentation(settings, SIDE).plan(0, 0, 8000).erase_boxes
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 0.02
    area = (height * width)[erased] / SIDE**2
    assert area.min() > 0.08 and area.max() < 0.22 and abs(area.mean() - 0.15) < 0.005
    assert boxes.min() >= 0 and boxes.max() <= SIDE


def test_draws_depend_on_the_position_alone():
    whole = uniform_rows(3, 5, ERASING, 0, 1000, 24)
    assert np.array_equal(uniform_rows(3, 5, ERASING, 417, 100, 24), whole[417:517])
    assert not np.array_equal(uniform_rows(3, 6, ERASING, 0, 1000, 24), whole)
    assert not np.array_equal(uniform_rows(4, 5, ERASING, 0, 1000, 24), whole)
    assert sorted(epoch_order(0, 0, 1001)) == list(range(1001))


def test_the_words_of_the_stream_are_fixed():
    """Another version of NumPy must not change the batches: these numbers were recorded once."""
    assert epoch_order(0, 0, 8).tolist() == EXPECTED_ORDER
    np.testing.assert_allclose(uniform_rows(1, 2, ERASING, 3, 1, 4)[0], EXPECTED_DRAWS, rtol=0, atol=1e-12)


EXPECTED_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]
EXPECTED_DRAWS = [0.452406180005242, 0.33425340218616495, 0.7167133977174408, 0.23499363533276774]


def mixed(settings: AugmentationSettings, count: int = 4000):
    mixer = Mixer(settings, 10, SIDE, seed=0)
    return mixer, mixer.draw(0, 0, count)


def test_mixup_blends_images_and_labels_with_the_same_weight():
    mixer, mixing = mixed(AugmentationSettings(mixup=0.8))
    share, boxes = mixing.share, mixing.boxes
    assert not boxes.any() and abs(share.mean() - 0.5) < 0.02
    assert abs(share.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.005, "the variance of Beta(0.8, 0.8)"
    images, labels = torch.randn(4000, 3, 4, 4), torch.arange(4000) % 10
    out, soft = mixer(images, labels, mixing)
    weight = torch.from_numpy(share)
    torch.testing.assert_close(
        out, images * weight[:, None, None, None] + images.flip(0) * (1 - weight)[:, None, None, None]
    )
    hard = torch.nn.functional.one_hot(labels, 10).float()
    torch.testing.assert_close(soft, hard * weight[:, None] + hard.flip(0) * (1 - weight)[:, None])


def test_cutmix_labels_follow_the_pixels():
    mixer, mixing = mixed(AugmentationSettings(cutmix=1.0))
    share = mixing.share
    labels = torch.arange(4000) % 10
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE).contiguous()
    out, soft = mixer(images, labels, mixing)
    differs = labels != labels.flip(0)
    own_pixels = (out == images).float().mean((1, 2, 3))
    torch.testing.assert_close(own_pixels[differs], torch.from_numpy(share)[differs])
    own_label = soft.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(own_label[differs], own_pixels[differs], atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.sum(1), torch.ones(4000))
    # Boxes are clipped at the edge of the image, so more than half of the image is left on average.
    assert 0.5 < share.mean() < 0.75


def test_mixing_shares():
    both = AugmentationSettings(mixup=0.8, cutmix=1.0, mix_probability=0.6, cutmix_share=0.25)
    mixing = mixed(both)[1]
    share, cut = mixing.share, mixing.boxes[:, 2] > mixing.boxes[:, 0]
    assert abs((share < 1).mean() - 0.6) < 0.04
    assert abs(cut.mean() - 0.15) < 0.03
    assert Mixer(AugmentationSettings(), 10, SIDE, 0).is_on is False


def test_noise_fills_the_boxes_and_nothing_else():
    images = torch.full((2, 3, 8, 8), 5.0)
    boxes = np.array([[2, 3, 6, 5], [0, 0, 0, 0]])
    out = erase(images, boxes, erasing_noise(boxes, seed=0, epoch=0, start=0))
    assert (out[0, :, 2:6, 3:5] != 5).all() and (out == 5).sum() == images.numel() - 3 * 4 * 2
    assert (erase(images, boxes, None)[0, :, 2:6, 3:5] == 0).all()


def test_noise_depends_on_the_position_in_the_epoch_alone():
    """The boxes of four images at once, and in two pairs, as two shards have them."""
    boxes = np.array([[0, 0, 4, 4], [1, 2, 3, 8], [0, 0, 0, 0], [2, 2, 6, 6]])
    images = torch.zeros(4, 3, 8, 8)
    whole = erase(images, boxes, erasing_noise(boxes, seed=3, epoch=5, start=100))
    halves = [
        erase(images[i : i + 2], boxes[i : i + 2], erasing_noise(boxes[i : i + 2], 3, 5, 100 + i)) for i in (0, 2)
    ]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole[0, :, :4, :4], whole[3, :, 2:6, 2:6]), "two positions have different noise"
    for seed, epoch, start in ((4, 5, 100), (3, 6, 100), (3, 5, 101)):
        assert not torch.equal(whole[0], erase(images, boxes, erasing_noise(boxes, seed, epoch, start))[0])
    inside = whole[0, :, :4, :4]
    assert abs(inside.mean()) < 0.5 and 0.7 < inside.std() < 1.3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(resized_crop_scale=[0.9, 0.5]), r"resized_crop_scale must be a range .* got \[0.9, 0.5\]"),
        (dict(flip_mode="alternate"), "unknown augmentation.flip_mode 'alternate'; did you mean 'alternating'"),
        (dict(flip_mode="alternating", repeats=3), "would flip all 3 copies of an image"),
        (dict(flip_mode="alternating", flip=0.25), "does not use augmentation.flip=0.25. Set augmentation.flip=0.5"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(change, sentence):
    with pytest.raises(SettingsError, match=sentence):
        Augmentation(AugmentationSettings(**change), SIDE)
