"""Micro-batch sizes: divisors of the global batch, and the search for the largest that fits a simulated memory."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.errors import SettingsError
from config.settings import resolve
from dali_pipeline import make_batches
from image_data.mixup import check_partners
from parallel import dp
from parallel.engine import Engine
from training import micro_batch
from training.micro_batch import MicroBatch, OutOfMemory, Trial, accumulation_for, largest_that_fits, sizes


class Hungry(nn.Module):
    """A network that runs out of memory above `room` images."""

    def __init__(self, room: int):
        super().__init__()
        self.map, self.room, self.tried = nn.Linear(3 * 8 * 8, 10), room, []

    def forward(self, images):
        self.tried.append(len(images))
        if len(images) > self.room:
            raise OutOfMemory("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.map(images.flatten(1))


@pytest.mark.parametrize("possible", [[1], [1, 2, 4, 8, 16, 32, 64], sizes(512, 4), sizes(90, 1)])
def test_the_search_finds_the_largest_that_fits_with_few_tries(possible):
    for room in (0, *possible, possible[-1] + 1):
        tried = []

        def fits(size, room=room, tried=tried):
            tried.append(size)
            return size <= room

        assert largest_that_fits(possible, fits) == max((size for size in possible if size <= room), default=None)
        assert len(tried) <= len(possible).bit_length()


def test_the_global_batch_stays():
    assert sizes(12, 2) == [1, 2, 3, 6]
    for micro in sizes(96, 4):
        assert micro * accumulation_for(micro, 96, 4) * 4 == 96
    with pytest.raises(
        SettingsError,
        match=r"--micro-batch 5 does not divide a global batch of 96 on 4 process\(es\); choose 3, 4, 6 or",
    ):
        accumulation_for(5, 96, 4)
    with pytest.raises(
        SettingsError, match="train_batch_size=10 is not divisible by 4 data-parallel processes; choose a multiple of 4"
    ):
        sizes(10, 4)


def settings():
    return resolve("cpu", ["train_batch_size=64"])


def dataset():
    return SimpleNamespace(classes=list("abcdefghij"), splits={})


def test_a_trial_is_a_training_step_and_survives_running_out_of_memory():
    network = Hungry(room=20)
    trial = Trial(lambda: network, settings(), dataset(), "auto", 8, torch.device("cpu"))
    before = network.map.weight.clone()
    assert largest_that_fits(sizes(64, 1), trial.fits) == 16
    assert set(network.tried) <= set(sizes(64, 1)) and max(network.tried) > 20
    assert not torch.equal(network.map.weight, before)  # the optimizer's state counts too
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("room", "sentence"),
    [
        (
            20,
            "out of GPU memory with a micro-batch of 64 images; 16 fit. Start the same run again with "
            "--micro-batch 16: "
            "4 accumulation steps give the same global batch",
        ),
        (
            0,
            "out of GPU memory with a micro-batch of 64 images, and smaller ones do not fit either; choose a "
            "smaller network",
        ),
    ],
)
def test_the_advice_names_the_largest_size_that_fits(room, sentence):
    chosen = MicroBatch(Engine, settings(), lambda: Hungry(room), dataset(), "auto", 8)
    assert sentence in chosen.advice()


def test_a_micro_batch_of_one_image_is_neither_chosen_nor_advised_where_images_are_mixed():
    mixing = resolve("cpu", ["train_batch_size=64", "augmentation.mixup=0.8"])
    mixing.engine["gradient_accumulation_steps"] = 32
    assert MicroBatch(Engine, settings(), lambda: Hungry(1), dataset(), "auto", 8)._possible()[0] == 1
    said = MicroBatch(Engine, mixing, lambda: Hungry(1), dataset(), "auto", 8).advice()
    assert said.startswith("out of GPU memory with a micro-batch of 2 images; choose a smaller network")


class NoRoom:
    """A trial on a GPU where not even the network fits."""

    def __init__(self, *arguments):
        raise OutOfMemory("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("engine", "accumulation", "sentence"),
    [
        (Engine, 1, "of 64 images; 32 is the next smaller size. Start the same run again with --micro-batch 32: 2 acc"),
        (Engine, 64, "of 1 image; choose a smaller network, --set bf16.enabled=true, or --strategy fsdp"),
        (dp.Engine, 2, "of 32 images; 16 is the next smaller size. Start the same run again with --micro-batch 16: 4"),
    ],
)
def test_the_advice_claims_only_what_was_tried(monkeypatch, engine, accumulation, sentence):
    """Strategies dp and pipeline divide a micro-batch or the network, so that a trial on one GPU shows nothing."""
    chosen = MicroBatch(engine, settings(), lambda: Hungry(64), dataset(), "auto", 8)
    chosen.settings.engine["gradient_accumulation_steps"] = accumulation
    if engine.fits_one_device:
        monkeypatch.setattr(micro_batch, "Trial", NoRoom)
    assert sentence in chosen.advice()


def test_auto_reports_a_network_that_does_not_fit_on_the_gpu_of_one_process(monkeypatch):
    """This process takes part in the collective with 0, so that the others do not wait for it."""
    gathered = []
    chosen = MicroBatch(Engine, settings(), lambda: Hungry(64), dataset(), "auto", 8)
    monkeypatch.setattr(micro_batch, "Trial", NoRoom)
    monkeypatch.setattr(micro_batch.process_group, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(
        micro_batch.process_group, "all_gather_objects", lambda value: gathered.append(value) or [value, 16]
    )
    with pytest.raises(SettingsError, match="^out of GPU memory with a micro-batch of 1 image; choose a smaller"):
        chosen.choose("auto")
    assert gathered == [0]


@pytest.mark.parametrize(("source", "held"), [("auto", 600), ("resident", 600), ("tensor", 600), ("files", 0)])
def test_a_trial_holds_the_pixels_that_the_source_keeps_on_the_gpu(source, held):
    split = SimpleNamespace(packed="train.npy", pixels=lambda: SimpleNamespace(nbytes=600))
    data = SimpleNamespace(classes=list("ab"), splits={"train": split, "test": SimpleNamespace(packed=None)})
    assert Trial(lambda: Hungry(1), settings(), data, source, 8, torch.device("cpu")).ballast.nbytes == held


def test_auto_uses_the_smallest_size_over_all_gpus(monkeypatch):
    chosen = MicroBatch(Engine, settings(), lambda: Hungry(40), dataset(), "auto", 8)
    chosen.new_trial = lambda: Trial(lambda: Hungry(40), settings(), dataset(), "auto", 8, torch.device("cpu"))
    monkeypatch.setattr(micro_batch.process_group, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(
        micro_batch.process_group, "all_gather_objects", lambda value: [value, 16]
    )  # another process has less
    assert "16 images per micro-batch" in chosen.choose("auto")
    assert chosen.settings.engine["gradient_accumulation_steps"] == 4
    assert chosen.choose("8") == "" and chosen.settings.engine["gradient_accumulation_steps"] == 8


def test_mixing_in_micro_batches_of_one_image_is_refused():
    mixing = resolve("cpu", ["augmentation.cutmix=1"])
    with pytest.raises(SettingsError, match="a single image has no partner. Choose --micro-batch 2 or more"):
        make_batches(dataset(), mixing, (0, 1), 1, 0, torch.device("cpu"), "tensor", False, ExitStack())
    check_partners(mixing.augmentation, 2)
    check_partners(settings().augmentation, 1)
