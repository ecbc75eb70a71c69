"""The learning rate over a run: a factor of the base rate, a function of the optimiser step alone.

Every engine asks this one function before each optimiser step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from settings import ScheduleSettings, SettingsError, unknown


def cosine(progress: float, final: float) -> float:
    """Half a cosine from 1 down to `final` (arXiv 1608.03983)."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, final: float) -> float:
    """A straight line from 1 down to `final`."""
    return 1 - (1 - final) * progress


def constant(progress: float, final: float) -> float:
    """1 throughout."""
    return 1.0


SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant}


class Schedule:
    """`schedule(step)` is the factor for optimiser step 0, 1, ..., total_steps - 1.

    The warm-up rises linearly over the first `warmup_fraction` of the steps and reaches 1 at its last; then the shape
    runs from 1 to `final_factor`, which it reaches at the run's last step.

    Raises:
        SettingsError: an unknown shape, or a fraction outside 0..1.
    """

    def __init__(self, settings: ScheduleSettings, total_steps: int):
        if settings.shape not in SCHEDULES:
            raise SettingsError(unknown("schedule.shape", settings.shape, list(SCHEDULES)))
        for name in ("warmup_fraction", "final_factor"):
            if not 0 <= getattr(settings, name) <= 1:
                raise SettingsError(f"schedule.{name} must lie between 0 and 1, not {getattr(settings, name)}")
        self.shape, self.final = SCHEDULES[settings.shape], settings.final_factor
        self.total = total_steps
        self.warmup = round(settings.warmup_fraction * total_steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.shape((step - self.warmup) / max(1, self.total - 1 - self.warmup), self.final)
