"""Whether an optional package is installed, without importing it, and whether PyTorch is new enough."""

from __future__ import annotations

import importlib.util

from common.errors import SettingsError


def is_installed(package: str) -> bool:
    """Return whether a package, such as nvidia.dali, is installed; only the parents of a dotted name are imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent of a dotted name
        return False


def require(package: str, what: str) -> None:
    """Raise SettingsError where `what`, such as --wandb, needs a package that is not installed."""
    if not is_installed(package):
        raise SettingsError(f"{what} needs the package {package}, which is not installed: pip install {package}")


def check_torch(what: str, version: tuple[int, int]) -> None:
    """Raise SettingsError where `what`, such as --log-gradients, needs a newer PyTorch than the installed one."""
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < version:
        raise SettingsError(
            f"{what} needs PyTorch {'.'.join(map(str, version))} or newer, not {torch.__version__}; "
            "leave it out, or install a newer PyTorch"
        )
