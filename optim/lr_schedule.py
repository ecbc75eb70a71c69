"""The learning rate over a run: a factor of the base rate, a function of the optimiser step alone.

Every engine asks this one function before each optimiser step, so a resumed run needs no scheduler state. A shape is a
function of what comes after the warm-up; to add one, write it and add a line to SCHEDULES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import SettingsError, unknown
from config.settings import ScheduleSettings


@dataclass(frozen=True)
class Timeline:
    """A run in optimiser steps: `warmup` of them first, the final factor reached at step `last` and held to the end."""

    total: int
    warmup: int
    last: int

    def progress(self, step: int) -> float:
        """From 0 at the first step after the warm-up to 1 at `last`, and after it."""
        return min(1.0, (step - self.warmup) / max(1, self.last - self.warmup))


def cosine(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Half a cosine from 1 down to final_factor (arXiv 1608.03983)."""
    return settings.final_factor + (1 - settings.final_factor) * (1 + math.cos(math.pi * course.progress(step))) / 2


def linear(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """A straight line from 1 down to final_factor."""
    return 1 - (1 - settings.final_factor) * course.progress(step)


def constant(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """1 throughout."""
    return 1.0


def trapezoid(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """1 until the cool-down, which falls in a straight line to final_factor (arXiv 2106.04560, 2405.18392)."""
    cooldown = round(settings.cooldown_fraction * course.total)
    fallen = min(1.0, max(0.0, (step - (course.last - cooldown)) / max(1, cooldown)))
    return 1 - (1 - settings.final_factor) * fallen


def step_decay(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Times milestone_factor at each of the milestones, which are shares of the whole run (arXiv 1512.03385)."""
    return settings.milestone_factor ** sum(
        step >= round(milestone * course.total) for milestone in settings.milestones
    )


SCHEDULES: dict[str, Callable[[int, Timeline, ScheduleSettings], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "trapezoid": trapezoid,
    "step": step_decay,
}
# The settings that some shapes use, and which; all use those of the warm-up.
USED_BY = {
    "final_factor": ("cosine", "linear", "trapezoid"),
    "hold_fraction": ("cosine", "linear", "trapezoid"),
    "cooldown_fraction": ("trapezoid",),
    "milestones": ("step",),
    "milestone_factor": ("step",),
}
FRACTIONS = (
    "warmup_fraction",
    "warmup_start_factor",
    "final_factor",
    "hold_fraction",
    "cooldown_fraction",
    "milestone_factor",
)


class Schedule:
    """`schedule(step)` is the factor for optimiser step 0, 1, ..., total_steps - 1.

    The warm-up rises in a straight line over the first `warmup_fraction` of the steps and reaches 1 at its last; then the
    shape runs from 1 to its end, which it reaches at the run's last step, or `hold_fraction` of the run before it.

    Raises:
        SettingsError: an unknown shape, a setting that the shape would not use, or shares that do not fit into the run.
    """

    def __init__(self, settings: ScheduleSettings, total_steps: int):
        check(settings)
        self.shape, self.settings, self.total = SCHEDULES[settings.shape], settings, total_steps
        warmup, hold = round(settings.warmup_fraction * total_steps), round(settings.hold_fraction * total_steps)
        self.course = Timeline(total_steps, warmup, total_steps - 1 - hold)

    def __call__(self, step: int) -> float:
        course, start = self.course, self.settings.warmup_start_factor
        if step < course.warmup:
            return start + (1 - start) * (step + 1) / course.warmup
        return self.shape(step, course, self.settings)


def check(settings: ScheduleSettings) -> None:
    """Raises SettingsError; see Schedule."""
    if settings.shape not in SCHEDULES:
        raise SettingsError(unknown("schedule.shape", settings.shape, list(SCHEDULES)))
    for name in FRACTIONS:
        if not 0 <= getattr(settings, name) <= 1:
            raise SettingsError(f"schedule.{name} must lie between 0 and 1, not {getattr(settings, name)}")
    for name, shapes in USED_BY.items():
        if settings.shape not in shapes and getattr(settings, name) != getattr(ScheduleSettings(), name):
            raise SettingsError(
                f"schedule.shape={settings.shape} would not use schedule.{name}={getattr(settings, name)}; "
                f"{' and '.join(shapes)} would"
            )
    cooldown = settings.cooldown_fraction if settings.shape == "trapezoid" else 0.0
    if settings.warmup_fraction + cooldown + settings.hold_fraction > 1:
        raise SettingsError(
            "schedule.warmup_fraction, cooldown_fraction and hold_fraction are shares of one run; together they must "
            f"not exceed 1, and are {settings.warmup_fraction}, {cooldown} and {settings.hold_fraction}"
        )
    points = settings.milestones
    if settings.shape == "step" and (
        not points or sorted(points) != points or not settings.warmup_fraction <= points[0] <= points[-1] < 1
    ):
        raise SettingsError(
            f"schedule.milestones must rise, from schedule.warmup_fraction={settings.warmup_fraction} or later to below 1, "
            f"not {points}"
        )
