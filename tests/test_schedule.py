"""schedule.py: the learning rate rises to 1, falls to its end, and depends on nothing but the step."""

from __future__ import annotations

import pytest

from schedule import SCHEDULES, Schedule
from settings import ScheduleSettings, SettingsError


def factors(total: int, **settings) -> list[float]:
    schedule = Schedule(ScheduleSettings(**settings), total)
    return [schedule(step) for step in range(total)]


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.05), (100, 0.0), (7, 0.3), (1000, 0.5), (3, 0.34)])
def test_it_rises_in_a_straight_line_to_one_and_never_rises_again(shape, total, warmup):
    f, rising = factors(total, shape=shape, warmup_fraction=warmup), round(warmup * total)
    assert f[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    assert f[rising] == pytest.approx(1) and all(0 < value <= 1 for value in f)
    assert all(a >= b for a, b in zip(f[rising:], f[rising + 1:], strict=False))


@pytest.mark.parametrize(("shape", "half"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_it_ends_at_the_final_factor_at_the_last_step(shape, half):
    f = factors(101, shape=shape, warmup_fraction=0.0, final_factor=0.1)
    assert f[-1] == pytest.approx(1.0 if shape == "constant" else 0.1)
    assert f[50] == pytest.approx(half)


def test_cosine_leaves_the_top_and_reaches_the_bottom_gently_while_linear_does_not():
    cosine, linear = (factors(101, shape=shape, warmup_fraction=0.0, final_factor=0.0) for shape in ("cosine", "linear"))
    assert 1 - cosine[10] < (1 - linear[10]) / 3 and cosine[90] < linear[90] / 3


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_a_run_of_a_single_step_trains(warmup):
    assert factors(1, warmup_fraction=warmup) == [1.0]


def test_it_has_no_memory():
    schedule = Schedule(ScheduleSettings(warmup_fraction=0.2), 20)
    assert [schedule(step) for step in reversed(range(20))] == factors(20, warmup_fraction=0.2)[::-1]


@pytest.mark.parametrize(("settings", "message"), [
    ({"shape": "cosinus"}, "unknown schedule.shape 'cosinus'; did you mean 'cosine'"),
    ({"warmup_fraction": 1.5}, "schedule.warmup_fraction must lie between 0 and 1, not 1.5"),
    ({"final_factor": -0.1}, "schedule.final_factor must lie between 0 and 1, not -0.1"),
])
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        Schedule(ScheduleSettings(**settings), 10)
