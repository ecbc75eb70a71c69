"""training/resume_conditions.py: what may change between a run and its continuation."""

from __future__ import annotations

from dataclasses import fields

import pytest
from checkpoint_files import FACTS, choice

from common.errors import RunError
from config.setting_groups import ParallelSettings
from training import resume_conditions

BEFORE = {
    "processes": 2,
    "micro_batch": 32,
    "strategy": "zero",
    "stage": 1,
    "offload": "none",
    "cuts": None,
    "threads": 4,
    "device": "CPU",
    "device_name": "x86",
    "precision": "fp32",
    "compile": "off",
    "deterministic": False,
    "source": "tensor",
    "torch": "2.11",
    "commit": "abc",
}


@pytest.mark.parametrize(
    ("now", "batch_norm", "accepted", "refused"),
    [
        ({}, True, [], []),
        (
            {"processes": 1, "micro_batch": 64},
            False,
            ["processes: 2 before, 1 now", "micro-batch size: 32 before, 64 now"],
            [],
        ),
        (
            {"processes": 1, "micro_batch": 64},
            True,
            ["processes: 2 before, 1 now"],
            ["micro-batch size: 32 before, 64 now (BatchNorm"],
        ),
        (
            {"strategy": "ddp", "stage": None, "offload": None, "cuts": [0, 2, 4]},
            False,
            ["strategy: zero before, ddp now (same sums, rounded in another order)"],
            [],
        ),
        (
            {"offload": "cpu", "cuts": [0, 2, 4]},
            False,
            [
                "device of the optimizer: none before, cpu now (its kernels",
                "first layers of the pipeline's stages: None",
            ],
            [],
        ),
        (
            {"stage": 3, "threads": 1, "torch": "2.12", "commit": "def"},
            False,
            [
                "ZeRO stage: 1 before, 3 now",
                "CPU threads: 4 before, 1 now",
                "PyTorch: 2.11 before, 2.12 now",
                "commit of this project: abc before",
            ],
            [],
        ),
        (
            {"device": "GPU", "device_name": "H200", "threads": None},
            False,
            [],
            ["device type: CPU before, GPU now (other arithmetic"],
        ),
        (
            {"precision": "autocast", "deterministic": True, "source": "resident"},
            False,
            [],
            [
                "precision: fp32 before, autocast now",
                "--deterministic: False before, True now",
                "image source: tensor before, resident now",
            ],
        ),
    ],
)
def test_each_changed_condition_has_a_sentence_and_is_accepted_or_rejected(now, batch_norm, accepted, refused):
    assert BEFORE.keys() == resume_conditions.CHANGES.keys()
    found = resume_conditions.compare(BEFORE, {**BEFORE, **now}, batch_norm)
    for sentences, starts in zip(found, (accepted, refused), strict=True):
        assert len(sentences) == len(starts) and all(
            text.startswith(start) for text, start in zip(sentences, starts, strict=True)
        ), sentences


def test_a_condition_that_an_older_checkpoint_does_not_hold_is_not_compared():
    older = {key: value for key, value in BEFORE.items() if key not in ("offload", "cuts")}
    assert resume_conditions.compare(older, {**BEFORE, "offload": "cpu"}, batch_norm=False) == ([], [])


@pytest.mark.parametrize("name", [field.name for field in fields(ParallelSettings)])
def test_of_the_settings_of_a_strategy_only_those_that_distribute_the_work_may_change(tmp_path, name):
    """The others decide what is trained: gossip's topology and order, the local steps and the outer optimizer."""
    before, now = ({**FACTS, "settings": {"parallel": {name: value}}} for value in (1, 2))
    choice(tmp_path, before, name="mine").create(before)
    if name in ("stages", "partition", "patience_seconds"):
        assert choice(tmp_path, now, name="mine").folder.name == "mine"
    else:
        with pytest.raises(RunError, match=f"settings.parallel.{name} was 1, is 2"):
            choice(tmp_path, now, name="mine")
