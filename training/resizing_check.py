"""Checks before a run starts that the network takes the smaller images of progressive resizing."""

from __future__ import annotations

import torch

from common.errors import SettingsError, UserError
from config.settings import Settings
from model import build_model
from parallel.progressive_resizing import ProgressiveResizing

IMAGES = 2


def check_resizing(settings: Settings, num_classes: int, side: int) -> None:
    """Run the network once on images of the first steps of a run; `side` is that of the last ones, in pixels.

    Raises:
        SettingsError: a part of the network has sizes that fit one side only.
    """
    resizing = ProgressiveResizing(settings.resizing, settings.model.patch)
    small = resizing.initial_side(side)
    if small == side:
        return
    for device in ("meta", "cpu"):  # a part that reads values has no result on the meta device
        try:
            with torch.random.fork_rng(), torch.device(device), torch.no_grad():
                build_model(settings.model, num_classes, side).eval()(torch.zeros(IMAGES, 3, small, small))
            return
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a part raises for a size that it was not built for)
            problem = error
    text = str(problem).strip().partition("\n")[0] or type(problem).__name__
    raise SettingsError(
        f"resizing.initial_scale={settings.resizing.initial_scale:g}: the network was built for images of {side} "
        f"pixels and fails on the {small} pixels of the first steps ({text}). Choose components for any number of "
        "tokens, or --set resizing.initial_scale=1"
    )
