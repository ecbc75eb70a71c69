"""Checks before a run starts that progressive resizing has smaller images, which network and strategy take."""

from __future__ import annotations

import torch

from common.errors import SettingsError, UserError
from common.text import first_line
from config.settings import ResizingSettings, Settings
from model import build_model
from parallel.progressive_resizing import ProgressiveResizing
from training.console import Console

IMAGES = 2


def choose_resizing(
    settings: Settings, overrides: list[str], refusal: str | None, num_classes: int, side: int, console: Console
) -> None:
    """Turn the preset's resizing off and print why, where it has no effect, or strategy or network cannot use it.

    Args:
        overrides: the texts of --set; what they ask for is checked and never turned off.
        refusal: why the strategy cannot use it; None where it can.

    Raises:
        SettingsError: `overrides` ask for it, and `check_resizing` refuses it.
    """
    if any(text.strip().startswith("resizing.") for text in overrides):
        return check_resizing(settings, num_classes, side)
    is_on = ProgressiveResizing(settings.resizing, settings.model.patch).is_on
    if is_on and (
        problem := refusal or rounding_problem(settings, side) or network_problem(settings, num_classes, side)
    ):
        scale, settings.resizing = settings.resizing.initial_scale, ResizingSettings()
        console.print_field("resizing", f"off instead of the preset's initial_scale={scale:g}: {problem}")


def check_resizing(settings: Settings, num_classes: int, side: int) -> None:
    """Raise SettingsError where no image would be smaller, or a part of the network fits one side only."""
    remedy = ""
    if problem := rounding_problem(settings, side):
        if smaller := (side - 1) // settings.model.patch * settings.model.patch:
            remedy = f"--set resizing.initial_scale={smaller / side:.3g} ({smaller} pixels)"
    elif problem := network_problem(settings, num_classes, side):
        remedy = "components for any number of tokens"
    if problem:
        raise SettingsError(
            f"resizing.initial_scale={settings.resizing.initial_scale:g}: {problem}. Choose "
            f"{remedy and f'{remedy}, or '}--set resizing.initial_scale=1"
        )


def rounding_problem(settings: Settings, side: int) -> str | None:
    """Return why no step would have smaller images than `side` pixels; None where some have, or resizing is off."""
    resizing = ProgressiveResizing(settings.resizing, settings.model.patch)
    if not resizing.is_on or resizing.initial_side(side) < side:
        return None
    return f"in whole patches of {resizing.patch} pixels, the side nearest to it is the full one of {side} pixels"


def network_problem(settings: Settings, num_classes: int, side: int) -> str | None:
    """Run the network once on images of the first steps; return why it fails, None where it does not.

    Args:
        settings: of the run.
        num_classes: classes of the dataset.
        side: side of the images in the last steps, in pixels.
    """
    resizing = ProgressiveResizing(settings.resizing, settings.model.patch)
    small = resizing.initial_side(side)
    if small == side:
        return None
    for device in ("meta", "cpu"):  # a part that reads values has no result on the meta device
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
                build_model(settings.model, num_classes, side).eval()(torch.zeros(IMAGES, 3, small, small))
            return None
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a part raises for a size that it was not built for)
            problem = error
    return (
        f"the network was built for images of {side} pixels and fails on the {small} pixels of the first steps "
        f"({first_line(problem)})"
    )
