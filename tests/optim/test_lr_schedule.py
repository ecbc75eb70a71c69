"""optim/lr_schedule.py: the factor rises to 1, decays as PyTorch's schedulers do, and depends on the step only."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from common.errors import SettingsError
from config.setting_groups import SHAPES_USING, ScheduleSettings
from optim.lr_schedule import SCHEDULES, Schedule


def factors(total: int, **settings) -> list[float]:
    schedule = Schedule(ScheduleSettings(**settings), total)
    return [schedule(step) for step in range(total)]


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.05), (100, 0.0), (7, 0.15), (1000, 0.33), (12, 0.08)])
def test_warmup_is_linear_to_one_and_the_factor_never_rises_again(shape, total, warmup):
    f, rising = factors(total, shape=shape, warmup_fraction=warmup), round(warmup * total)
    assert f[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    assert f[rising] == pytest.approx(1) and all(0 < value <= 1 for value in f)
    assert all(a >= b for a, b in zip(f[rising:], f[rising + 1 :], strict=False))


@pytest.mark.parametrize(("shape", "half"), [("cosine", 0.55), ("linear", 0.55), ("trapezoid", 1.0)])
@pytest.mark.parametrize("held", [0, 20])
def test_it_reaches_the_final_factor_at_the_last_step_and_may_hold_it(shape, half, held):
    total = 101 + held
    f = factors(total, shape=shape, warmup_fraction=0.0, final_factor=0.1, hold_fraction=held / total)
    assert f[100:] == pytest.approx([0.1] * (held + 1)) and f[99] > 0.1
    assert f[50] == pytest.approx(half)


def pytorchs(schedulers: list, total: int) -> list[float]:
    """Return the factors of PyTorch's chained schedulers in `total` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = lr_scheduler.ChainedScheduler([make(optimizer) for make in schedulers])
    factors = []
    for _ in range(total):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return factors


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"shape": "cosine", "final_factor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=89, eta_min=0.1)),
        (
            {"shape": "linear", "final_factor": 0.1},
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=89),
        ),
        ({"shape": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ({"shape": "step"}, lambda o: lr_scheduler.MultiStepLR(o, milestones=[30, 60, 80], gamma=0.1)),
        (
            {"shape": "step", "milestones": [0.5], "milestone_factor": 0.2},
            lambda o: lr_scheduler.MultiStepLR(o, milestones=[45], gamma=0.2),
        ),
        (
            {"shape": "trapezoid", "final_factor": 0.1, "cooldown_fraction": 0.5},
            lambda o: lr_scheduler.LambdaLR(o, lambda k: 1.0 if k < 44 else 1 - 0.9 * (k - 44) / 45),
        ),
    ],
)
def test_it_decays_as_pytorchs_scheduler(settings, reference):
    assert factors(90, warmup_fraction=0.0, **settings) == pytest.approx(pytorchs([reference], 90))


@pytest.mark.parametrize("start", [0.0, 0.001, 1.0])
def test_the_warmup_may_start_above_zero(start):
    f = factors(40, warmup_fraction=0.25, warmup_start_factor=start, shape="constant")
    shifted = pytorchs([lambda o: lr_scheduler.LinearLR(o, start_factor=start or 1e-12, total_iters=10)], 41)[1:]
    assert f == pytest.approx(shifted, abs=1e-9)  # ours makes no step at the start factor itself, which may be 0


def test_cosine_is_flat_at_both_ends_and_linear_is_not():
    cosine, linear = (
        factors(101, shape=shape, warmup_fraction=0.0, final_factor=0.0) for shape in ("cosine", "linear")
    )
    assert 1 - cosine[10] < (1 - linear[10]) / 3 and cosine[90] < linear[90] / 3


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_a_run_of_a_single_step_trains(warmup):
    assert factors(1, warmup_fraction=warmup) == [1.0]


def test_it_depends_on_the_step_only():
    schedule = Schedule(ScheduleSettings(warmup_fraction=0.2), 20)
    assert [schedule(step) for step in reversed(range(20))] == factors(20, warmup_fraction=0.2)[::-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "cosinus"}, "unknown schedule.shape 'cosinus'; did you mean 'cosine'"),
        (
            {"cooldown_fraction": 0.5},
            "schedule.shape=cosine does not use schedule.cooldown_fraction=0.5.* to trapezoid",
        ),
        (
            {"shape": "constant", "final_factor": 0.5},
            "schedule.shape=constant does not use schedule.final_factor=0.5.* to cosine or linear or trapezoid",
        ),
        ({"shape": "step", "hold_fraction": 0.5}, "schedule.shape=step does not use schedule.hold_fraction"),
        (
            {"shape": "trapezoid", "cooldown_fraction": 0.9, "hold_fraction": 0.1},
            "their sum must be at most 1, got 0.05, 0.9 and 0.1",
        ),
        ({"shape": "step", "milestones": [0.5, 0.3]}, "schedule.milestones must increase"),
        ({"shape": "step", "milestones": []}, "schedule.milestones must increase"),
        (
            {"shape": "step", "milestones": [0.1], "warmup_fraction": 0.2},
            "must increase, start at or after schedule.warmup_fraction=0.2",
        ),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(SettingsError, match=message):
        Schedule(ScheduleSettings(**settings), 10)


def test_every_shape_and_setting_of_the_table_of_uses_exists():
    assert all(
        hasattr(ScheduleSettings(), name) and set(shapes) <= set(SCHEDULES) for name, shapes in SHAPES_USING.items()
    )
