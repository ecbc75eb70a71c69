"""Several runs as one predictor: their averaged weights (a model soup) and their averaged predictions (an ensemble).

    python evaluate.py runs/a runs/b runs/c --soup --ensemble

A soup costs as much as one network. It works for runs that started from the same weights, such as fine-tuning runs with
`--init-weights` (Wortsman et al., https://arxiv.org/abs/2203.05482); the average of runs with different random
initialization is usually at chance level. An ensemble works for any runs, and costs as much as all of them together.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from common.errors import RunError
from inference.trained_model import TrainedModel

if TYPE_CHECKING:
    from torch import nn


def check_same_input(runs: list[TrainedModel], split: str) -> None:
    """Raise RunError unless all runs have the same classes, image size, normalization and, if evaluated, validation."""
    first = runs[0]
    for other in runs[1:]:
        for what, mine, theirs in (
            ("classes", first.classes, other.classes),
            ("image size", first.side, other.side),
            ("mean of the images", list(first.facts["dataset"]["mean"]), list(other.facts["dataset"]["mean"])),
            ("std of the images", list(first.facts["dataset"]["std"]), list(other.facts["dataset"]["std"])),
        ):
            if mine != theirs:
                raise RunError(
                    f"{first.record.folder} and {other.record.folder} differ in the {what}. "
                    "Name runs that were trained on the same dataset"
                )
        if split == "validation" and _validation(first) != _validation(other):
            raise RunError(
                f"{first.record.folder} and {other.record.folder} have different validation splits (another dataset or "
                "--hold-out), so one was trained on images of the other's. Add --split test"
            )


def _validation(run: TrainedModel) -> tuple[str, float | None]:
    """Return what the validation split depends on."""
    return run.facts["dataset"]["fingerprint"], run.facts["hold_out"]


def average_weights(networks: list[nn.Module], runs: list[TrainedModel]) -> tuple[nn.Module, bool]:
    """Return a network with the mean of the weights, and whether the mean includes BatchNorm statistics.

    The mean is taken in float64. Integer tensors, such as BatchNorm's batch counter, are those of the first network.

    Raises:
        RunError: the networks do not have the same tensors.
    """
    import torch

    states = [network.state_dict() for network in networks]
    for state, run in zip(states[1:], runs[1:], strict=True):
        difference = _difference(states[0], state)
        if difference:
            raise RunError(
                f"the weights of {runs[0].record.folder} and {run.record.folder} cannot be averaged: {difference}. "
                "Leave out --soup, or name runs of the same network"
            )
    mean = {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    soup = copy.deepcopy(networks[0])
    soup.load_state_dict(mean)
    return soup, any(name.endswith("running_mean") for name in mean)


def _difference(first: dict, other: dict) -> str:
    """Return the first difference between the tensors of two networks, or nothing."""
    for name in sorted(first.keys() | other.keys()):
        if name not in first or name not in other:
            return f"only one of them has the tensor {name}"
        if first[name].shape != other[name].shape:
            return f"{name} has the shapes {tuple(first[name].shape)} and {tuple(other[name].shape)}"
    return ""
