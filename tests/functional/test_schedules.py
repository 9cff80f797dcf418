import math
from itertools import pairwise

import pytest

from rlhf_lightning.functional.schedules import Schedule, learning_rate_factor

SCHEDULES: list[Schedule] = ["constant", "linear", "cosine"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_a_schedule_starts_at_1(schedule: Schedule) -> None:
    assert learning_rate_factor(0, 10, schedule=schedule) == 1.0


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_a_schedule_ends_where_it_says_and_stays_there(schedule: Schedule, end: float) -> None:
    assert learning_rate_factor(10, 10, schedule=schedule) == pytest.approx(end)
    assert learning_rate_factor(25, 10, schedule=schedule) == pytest.approx(end)


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("linear", 3, 0.7),
        ("linear", 9, 0.1),
        ("cosine", 5, 0.5),
        ("cosine", 2, (1 + math.cos(math.pi / 5)) / 2),
        ("constant", 9, 1.0),
    ],
)
def test_points_of_a_schedule_of_ten_steps(schedule: Schedule, step: int, factor: float) -> None:
    assert learning_rate_factor(step, 10, schedule=schedule) == pytest.approx(factor)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_and_never_starts_at_0(schedule: Schedule) -> None:
    found = [learning_rate_factor(step, 20, schedule=schedule, warmup_steps=4) for step in range(5)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_from_a_share_begins_there_and_rises_in_equal_steps(schedule: Schedule) -> None:
    found = [learning_rate_factor(step, 20, schedule=schedule, warmup_steps=4, warmup_from=0.2) for step in range(5)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_without_a_warm_up_there_is_nothing_to_begin_at() -> None:
    assert learning_rate_factor(0, 20, schedule="linear", warmup_from=0.2) == 1.0


def test_after_the_warm_up_the_rest_of_the_steps_takes_it_to_the_end() -> None:
    assert learning_rate_factor(12, 20, schedule="linear", warmup_steps=4) == pytest.approx(0.5)
    assert learning_rate_factor(20, 20, schedule="linear", warmup_steps=4) == 0.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_floor_is_reached_and_never_undercut(schedule: Schedule) -> None:
    found = [learning_rate_factor(step, 10, schedule=schedule, floor=0.1) for step in range(15)]
    assert found[10] == pytest.approx(0.1)
    assert min(found) == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(found))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_an_end_the_learning_rate_stays(schedule: Schedule) -> None:
    assert learning_rate_factor(1_000_000, math.inf, schedule=schedule) == 1.0
