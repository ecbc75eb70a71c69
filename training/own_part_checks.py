"""Runs every user-defined part of a run once, so that a wrong one ends in a sentence before any data is fetched.

Parts of the network get one forward pass of two images on the meta device, which computes shapes alone. A part that
reads values, or uses a kernel of its own, has no result there, and gets the pass on the device that trains. A small
pass on the CPU follows (own_part_pass.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import SettingsError, UserError
from common.paths import DATA
from config.own_parts import OwnPart, describe, own_parts_of
from config.settings import Settings
from image_data.augmentation import Augmentation
from image_data.auto_augment import OperationBatch
from image_data.dataset import DEFAULT, Dataset
from model import TABLES, build_model, dimensions
from models.cost import count_parameters
from models.parts import UnusablePart, make_part
from models.registration import check_registered
from optim.lr_schedule import Schedule
from optim.optimizers import build_optimizer
from parallel.process_group import pick_device
from parallel.topologies import rounds_of
from training.own_part_pass import is_small, warnings_of

IMAGES = 2  # in the forward pass: BatchNorm needs more than one
STEPS = 100  # of the schedule that is tried
DOWNLOADED = {"cifar100": (100, 32), "cifar10": (10, 32)}  # classes and image side of datasets before they are fetched


def check_before_data(settings: Settings, data_dir: Path | None, dataset: str | None) -> list[str]:
    """Check the user-defined parts with the sizes of the dataset, as far as they are known before it is prepared.

    Returns:
        Warnings, one sentence each.

    Raises:
        SettingsError: a part cannot be used; the message names it, the file and the line.
    """
    if not own_parts_of(settings.as_dict()):
        return []
    folder = data_dir or DATA / (dataset or DEFAULT)
    if Dataset.is_prepared(folder):
        opened = Dataset.open(folder)
        sizes: tuple[int, int | None] = len(opened.classes), opened.image_side
    else:
        sizes = DOWNLOADED.get(dataset or ("" if data_dir else DEFAULT), (10, None))
    side = settings.image_side or sizes[1]
    if side is None and settings.model.architecture == "vit":
        side = 8 * settings.model.patch  # the dataset decides; the ViT takes any multiple of the patch
    return check_own_parts(settings, sizes[0], side)


def check_own_parts(settings: Settings, num_classes: int, image_side: int | None) -> list[str]:
    """Run every user-defined part once and return warnings. An `image_side` of None leaves the network out.

    Raises:
        SettingsError: as `check_before_data`.
    """
    if not own_parts_of(settings.as_dict()):
        return []
    warnings = [] if image_side is None else _check_network(settings, num_classes, image_side)
    for setting, name, attempt in (
        ("optimizer.type", settings.engine["optimizer"]["type"], _try_optimizer),
        ("schedule.shape", settings.schedule.shape, _try_schedule),
        ("augmentation.policy", settings.augmentation.policy, _try_augmentation),
        ("augmentation.flip_mode", settings.augmentation.flip_mode, _try_augmentation),
        ("parallel.topology", settings.parallel.topology, _try_topology),
    ):
        own = OwnPart.parse(name)
        if own is None:
            continue
        try:
            attempt(settings)
        except UserError as error:
            raise _named(setting, name, str(error)) from error
        except (Exception, SystemExit) as error:
            raise _named(setting, name, describe(error, own)) from error
    return warnings


def _named(setting: str, name: str, text: str) -> SettingsError:
    return SettingsError(text if text.startswith((f"{setting}={name}", name)) else f"{setting}={name}: {text}")


# --- the network ----------------------------------------------------------------------------------------------------


def _check_network(settings: Settings, num_classes: int, image_side: int) -> list[str]:
    model = settings.model
    if not own_parts_of(vars(model)):
        return []
    images, scores = (IMAGES, 3, image_side, image_side), (IMAGES, num_classes)
    meaning = "images (B, 3, S, S) to class scores (B, K)"
    is_marked = True

    def build() -> nn.Module:
        nonlocal is_marked
        network = build_model(model, num_classes, image_side)
        is_marked = any(hasattr(module, "is_input_or_output_layer") for module in network.modules())
        return network

    own = OwnPart.parse(model.architecture)
    if own is not None:
        label = f"model.architecture={model.architecture}"
        warnings = _try_forward(label, own, build, images, scores, meaning)
        if settings.engine["optimizer"]["type"] == "Muon" and not is_marked:
            warnings.append(
                f"{label}: optimizer.type=Muon trains its first and last layer too, which AdamW should; set "
                "is_input_or_output_layer = True on both"
            )
        return warnings
    if model.architecture != "vit":
        return []  # it does not use parts; `build_layers` says so
    dims = dimensions(model, num_classes, image_side)
    tokens = (IMAGES, dims.num_tokens, dims.width)
    warnings = []
    for kind, shape, expected, maps in (
        ("patch_embedding", images, (IMAGES, dims.grid**2, dims.width), "images (B, 3, S, S) to tokens (B, T, C)"),
        ("position", tokens, tokens, "tokens (B, T, C) to tokens of the same shape"),
        ("attention", tokens, tokens, "tokens (B, T, C) to tokens of the same shape"),
        ("feed_forward", tokens, tokens, "tokens (B, T, C) to tokens of the same shape"),
        ("pooling", tokens, (IMAGES, dims.width), "tokens (B, T, C) to one vector per image (B, C)"),
    ):
        name = getattr(model, kind)
        if own := OwnPart.parse(name):
            make = partial(make_part, TABLES[kind], kind, name, dims, getattr(model, f"{kind}_options"))
            warnings += _try_forward(f"model.{kind}={name}", own, make, shape, expected, maps)
    first = next((kind for kind in ("block", *TABLES) if own_parts_of(getattr(model, kind))), "feed_forward")
    own = next(iter(own_parts_of(vars(model))))
    label = f"model.{first}={getattr(model, first)}, in the whole network"
    return warnings + _try_forward(label, own, build, images, scores, meaning, only_shapes=first != "block")


def _try_forward(
    label: str,
    own: OwnPart,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    meaning: str,
    only_shapes: bool = False,
) -> list[str]:
    """Make a module and call it; return warnings. Raises SettingsError where it fails or its result does not fit."""

    def check(module: nn.Module, found: Any) -> None:
        _check_result(f"{label}{_line_of(module, own)}", module, found, shape, expected, meaning)

    def failed(problem: BaseException) -> SettingsError:
        return SettingsError(
            f"{label}: a forward pass with an input of shape {shape} failed: {describe(problem, own)}; "
            f"it must map {meaning}"
        )

    problem: BaseException | None = None
    for device in (torch.device("meta"), pick_device()):
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device, torch.no_grad():
                module = make()
                check_registered(label, module)
                found = module(torch.zeros(shape))
        except UnusablePart as error:
            problem = error
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a user's code raises)
            problem = error
        else:
            break
    else:
        assert problem is not None  # every device had one
        if isinstance(problem, UnusablePart):
            raise problem
        raise failed(problem) from problem
    check(module, found)
    if only_shapes or not is_small(count_parameters(module), shape):
        return []
    try:
        return warnings_of(f"{label}{_line_of(module, own)}", make, shape, check)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if pick_device().type != "cpu":
            return []  # it may have a kernel for GPUs alone
        raise failed(error) from error


def _line_of(module: nn.Module, own: OwnPart) -> str:
    """Return where the file defines the module's `forward`; empty where that is elsewhere."""
    code = getattr(type(module).forward, "__code__", None)
    is_there = code is not None and Path(code.co_filename) == own.file
    return f" (forward in line {code.co_firstlineno})" if code is not None and is_there else ""


def _check_result(
    label: str, module: nn.Module, found: Any, shape: tuple[int, ...], expected: tuple[int, ...], meaning: str
) -> None:
    if not isinstance(found, Tensor):
        raise SettingsError(f"{label}: it must return one tensor, not {type(found).__name__}")
    if tuple(found.shape) != expected:
        raise SettingsError(
            f"{label}: an input of shape {shape} became {tuple(found.shape)}, expected {expected}; "
            f"it must map {meaning}"
        )
    if found.dtype != torch.float32:
        dtype = str(found.dtype).removeprefix("torch.")
        raise SettingsError(f"{label}: it returned {dtype} for a float32 input; end its forward with .to(x.dtype)")
    if len(shape) == 4 and len(expected) == 2 and not count_parameters(module):  # a whole network
        raise SettingsError(f"{label}: the network has no trainable parameters")


# --- everything else ------------------------------------------------------------------------------------------------


def _try_optimizer(settings: Settings) -> None:
    """Make one step on a small layer."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        layer = nn.Linear(4, 4)
        optimizer = build_optimizer(settings.engine["optimizer"], layer, fused=False)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise SettingsError(f"it must return a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if not all("initial_lr" in group for group in optimizer.param_groups):  # the schedule multiplies it
            raise SettingsError(
                "it must keep the parameter groups that it is given: pass them to the optimizer as they are"
            )
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise SettingsError("one step from gradients of 1 made weights that are not finite")


def _try_schedule(settings: Settings) -> None:
    schedule = Schedule(settings.schedule, STEPS)
    for step in range(STEPS):
        factor = schedule(step)
        if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise SettingsError(f"the factor of step {step} of {STEPS} must be a number >= 0, got {factor!r}")


def _try_augmentation(settings: Settings) -> None:
    drawn = Augmentation(settings.augmentation, 32)
    if not all(draws > 0 and draws % 4 == 0 for draws in (policy.num_draws for _, policy in drawn.policies)):
        raise SettingsError("num_draws must be a multiple of 4")
    plan = drawn.plan(0, 0, IMAGES)
    if np.shape(plan.flip) != (IMAGES,):
        raise SettingsError(f"it must return one flip for each of {IMAGES} images, got the shape {np.shape(plan.flip)}")
    for operation in plan.operations:
        if not isinstance(operation, OperationBatch) or len(operation.kind) != IMAGES:
            raise SettingsError("operations(u) must return a list of OperationBatch with one row for each row of u")


def _try_topology(settings: Settings) -> None:
    workers, here = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rounds_of(settings.parallel.topology, workers, here)
