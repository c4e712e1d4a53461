from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.update_schedule import UpdateSchedule


def test_updates_stop_before_the_stop() -> None:
    schedule = UpdateSchedule(1000, update_every=100)
    assert schedule.update_steps == (100, 200, 300, 400, 500, 600, 700)  # 800 is the stop
    assert schedule.is_update(100)
    assert not schedule.is_update(101)
    assert schedule.next_update(101) == 200
    assert schedule.next_update(701) is None


def test_drop_fraction_by_hand() -> None:
    schedule = UpdateSchedule(1000, drop_fraction=0.5, drop_fraction_end=0.1)
    assert schedule.fraction(0) == pytest.approx(0.5)
    assert schedule.fraction(400) == pytest.approx(0.3)  # half way to the stop: the mean
    assert schedule.fraction(800) == pytest.approx(0.1)
    assert schedule.fraction(1000) == pytest.approx(0.1)


def test_default_interval_is_gentle_on_short_runs() -> None:
    assert len(UpdateSchedule(1_170).update_steps) == 9
    assert UpdateSchedule(100_000).update_steps[:2] == (1000, 2000)


@given(st.integers(1, 5000), st.integers(0, 60), st.floats(0, 1))
def test_number_of_updates_is_met_exactly(total: int, updates: int, stop_at: float) -> None:
    try:
        schedule = UpdateSchedule(total, updates=updates, stop_at=stop_at)
    except ValueError as error:
        assert "do not fit" in str(error)  # noqa: PT017
        return
    steps = schedule.update_steps
    assert len(steps) == updates == len(set(steps))
    assert all(0 < step < max(stop_at * total, 1) for step in steps)


def test_half_the_epochs_have_the_same_updates() -> None:
    long, short = UpdateSchedule(1000, updates=8), UpdateSchedule(500, updates=8)
    assert len(long.update_steps) == len(short.update_steps) == 8
    assert all(abs(a / 2 - b) <= 1 for a, b in zip(long.update_steps, short.update_steps, strict=True))


def test_wrong_schedules_raise() -> None:
    with pytest.raises(ValueError, match="not both"):
        UpdateSchedule(10, updates=1, update_every=1)
    with pytest.raises(ValueError, match="not a positive"):
        UpdateSchedule(0)


def test_config_reports_all_problems_together() -> None:
    with pytest.raises(ValueError, match=r"density: 1\.5") as error:
        SparsityConfig(density=1.5, distribution="even", drop_fraction=2, updates=1, update_every=3)
    message = str(error.value)
    for word in (
        "density: 1.5 is not a share in (0, 1]",
        "distribution: 'even'",
        "drop_fraction: 2",
        "not both",
    ):
        assert word in message


@pytest.mark.parametrize("density", [0, -0.5, 1.0001, float("nan"), float("inf")])
def test_impossible_densities(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        SparsityConfig(density=density)
