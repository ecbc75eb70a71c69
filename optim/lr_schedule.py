"""Learning rate schedule: a factor of the base learning rate that depends on the optimizer step only.

Every engine calls this function before each optimizer step, so a resumed run needs no scheduler state. A shape is a
function for the steps after the warmup. To add one, write the function and add a line to SCHEDULES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from common.errors import SettingsError
from config.own_parts import find_entry
from config.setting_groups import SHAPES_USING
from config.settings import ScheduleSettings


@dataclass(frozen=True)
class Timeline:
    """Steps of a run: `warmup` steps first; the final factor is reached at step `last` and held until `total`."""

    total: int
    warmup: int
    last: int

    def progress(self, step: int) -> float:
        """Return 0 at the first step after the warmup, rising linearly to 1 at `last`, and 1 after it."""
        return min(1.0, (step - self.warmup) / max(1, self.last - self.warmup))


@dataclass(frozen=True)
class Plan:
    """The number of steps of a run that was decided after `after_step` of them, until then `estimated_steps`."""

    after_step: int
    estimated_steps: int
    total_steps: int


def cosine(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Cosine decay from 1 to final_factor (arXiv 1608.03983)."""
    return settings.final_factor + (1 - settings.final_factor) * (1 + math.cos(math.pi * course.progress(step))) / 2


def linear(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Linear decay from 1 to final_factor."""
    return 1 - (1 - settings.final_factor) * course.progress(step)


def constant(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Constant 1."""
    return 1.0


def trapezoid(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Warmup-stable-decay (WSD): 1, then linear cooldown to final_factor (arXiv 2106.04560, 2405.18392)."""
    cooldown = round(settings.cooldown_fraction * course.total)
    fallen = min(1.0, max(0.0, (step - (course.last - cooldown)) / max(1, cooldown)))
    return 1 - (1 - settings.final_factor) * fallen


def step_decay(step: int, course: Timeline, settings: ScheduleSettings) -> float:
    """Step decay: multiplied by milestone_factor at each milestone, a share of the run (arXiv 1512.03385)."""
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


class Schedule:
    """`schedule(step)` is the factor for optimizer step 0, 1, ..., total_steps - 1.

    The warmup rises linearly over the first `warmup_fraction` of the steps and reaches 1 at its last step. The shape
    then decays from 1 to its final value, which it reaches at the last step, or `hold_fraction` of the run before it.

    A run of `--max-minutes` starts with an estimate of its steps. Its `plan` replaces the estimate after the first
    steps, which keep their factors, so the factor of a step never depends on when it is asked for.

    Raises:
        SettingsError: an unknown shape, a setting that the shape does not use, or shares that exceed the run.
    """

    def __init__(
        self,
        settings: ScheduleSettings,
        total_steps: int,
        plan: dict[str, int] | None = None,
        minutes: float | None = None,
    ):
        """Prepare the factors.

        Args:
            plan: that of `plan_facts`, where the run has one.
            minutes: training time that decides the number of steps, so that `total_steps` says little; None: nothing.
        """
        check(settings)
        self.minutes = minutes
        self.shape, self.settings, self.total = find_shape(settings.shape), settings, total_steps
        self.course = self._timeline(total_steps)
        self.plan: Plan | None = None
        if plan:
            self.set_plan(Plan(**plan))

    def set_plan(self, plan: Plan) -> None:
        """Use the estimate of a plan for the steps before it, and its total after it."""
        self.plan, self.total = plan, plan.total_steps
        self.course, self._before = self._timeline(plan.total_steps), self._timeline(plan.estimated_steps)

    def plan_facts(self) -> dict[str, int] | None:
        """Return the plan for a file; None where there is none."""
        return asdict(self.plan) if self.plan else None

    def _timeline(self, total: int) -> Timeline:
        warmup, hold = round(self.settings.warmup_fraction * total), round(self.settings.hold_fraction * total)
        return Timeline(total, warmup, total - 1 - hold)

    def __call__(self, step: int) -> float:
        course = self._before if self.plan and step < self.plan.after_step else self.course
        start = self.settings.warmup_start_factor
        if step < course.warmup:
            return start + (1 - start) * (step + 1) / course.warmup
        return self.shape(step, course, self.settings)


def find_shape(name: str) -> Callable[[int, Timeline, ScheduleSettings], float]:
    """Return an entry of SCHEDULES or a user-defined shape. Raises SettingsError for an unknown name."""
    return find_entry(SCHEDULES, "schedule.shape", name)


def check(settings: ScheduleSettings) -> None:
    """Raise SettingsError for settings that Schedule rejects."""
    find_shape(settings.shape)
    for name in settings.unused():
        if getattr(settings, name) != getattr(ScheduleSettings(), name):
            raise SettingsError(
                f"schedule.shape={settings.shape} does not use schedule.{name}={getattr(settings, name)}. "
                f"Remove it, or set schedule.shape to {' or '.join(SHAPES_USING[name])}"
            )
    cooldown = settings.cooldown_fraction if settings.shape == "trapezoid" else 0.0
    if settings.warmup_fraction + cooldown + settings.hold_fraction > 1:
        raise SettingsError(
            "schedule.warmup_fraction, cooldown_fraction and hold_fraction are shares of one run; their sum must be at "
            f"most 1, got {settings.warmup_fraction}, {cooldown} and {settings.hold_fraction}"
        )
    points = settings.milestones
    if settings.shape == "step" and (
        not points or sorted(points) != points or not settings.warmup_fraction <= points[0] <= points[-1] < 1
    ):
        raise SettingsError(
            "schedule.milestones must increase, start at or after "
            f"schedule.warmup_fraction={settings.warmup_fraction} and stay below 1, got {points}"
        )
