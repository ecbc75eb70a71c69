"""Values of part options that no network can have, such as a negative number of channels, named in one sentence.

The range of an option is known to its part alone, so a value is judged once building the network with it has failed.
"""

from __future__ import annotations

from common.errors import SettingsError
from common.text import first_line
from config.settings import ModelSettings

LARGEST = 10**6  # channels, kernels, depths; more is a typing mistake


def blame_options(settings: ModelSettings, error: Exception) -> None:
    """Raise SettingsError with the options that explain `error`, which building the network raised; else return."""
    smallest = 1 if isinstance(error, ArithmeticError) else 0  # a division by 0
    odd = [
        f"model.{group}.{option}={value}"
        for group, options in vars(settings).items()
        if group.endswith("_options")
        for option, value in options.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not smallest <= value <= LARGEST
    ]
    if odd:
        raise SettingsError(f"the network cannot be built with {' and '.join(odd)}: {first_line(error)}") from error
