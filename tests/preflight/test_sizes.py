import math
from dataclasses import replace
from typing import Any

import pytest

from rlhf_lightning.preflight.sizes import (
    PPOSizes,
    check_ppo_sizes,
    check_supervised_sizes,
    number,
    planned_steps,
    supervised_table,
)

# 16 prompts x 3 = 48 sequences; 4 minibatches of 12, each in 3 micro-batches (5, 5, 2); 2 passes = 8 steps.
SIZES = PPOSizes(
    prompts=16, samples_per_prompt=3, minibatch_size=12, micro_batch_size=5, ppo_epochs=2, rollouts=10, processes=2
)


def test_the_numbers_of_ppo_follow_from_each_other() -> None:
    numbers = {size.name: size.number for size in SIZES.table()}
    assert numbers == {
        "prompts of a rollout": 16,
        "samples per prompt": 3,
        "sequences of a rollout": 48,
        "processes": 2,
        "sequences of a rollout, all processes": 96,
        "minibatches of a pass": 4,
        "micro-batches of a minibatch": 3,
        "optimizer steps of a rollout": 8,
        "rollouts": 10,
        "optimizer steps in total: the learning rate's schedule": 80,
    }


def test_a_budget_of_tokens_may_make_more_micro_batches() -> None:
    origins = {size.name: size.origin for size in replace(SIZES, micro_batch_tokens=64).table()}
    assert origins["micro-batches of a minibatch"].endswith(
        "more where module.micro_batch_tokens=64 are fewer sequences"
    )


def test_batch_sizes_that_divide_are_right() -> None:
    assert check_ppo_sizes(replace(SIZES, micro_batch_size=4)).status == "ok"
    assert check_ppo_sizes(replace(SIZES, micro_batch_size=64)).status == "ok"
    uneven = check_ppo_sizes(SIZES)
    assert (uneven.status, "has 2 of 5" in uneven.measured) == ("note", True)


def test_a_minibatch_that_does_not_divide_the_rollout_is_an_error() -> None:
    finding = check_ppo_sizes(replace(SIZES, minibatch_size=10))
    assert finding.status == "error"
    assert "48 sequences" in finding.measured
    assert "module.minibatch_size" in finding.remedy


def test_fewer_rows_than_a_rollout_are_an_error() -> None:
    assert check_ppo_sizes(replace(SIZES, rollouts=0)).status == "error"


def test_the_rows_of_a_supervised_step_are_those_of_all_processes() -> None:
    table = supervised_table(rows=100, batch_size=4, accumulate=2, steps=13, processes=3)
    assert {size.name: size.number for size in table}["rows of an optimizer step"] == 24
    assert check_supervised_sizes(table).measured == "24 rows a step, 13 optimizer steps in total"
    assert check_supervised_sizes(supervised_table(rows=1, batch_size=1, accumulate=1, steps=0, processes=1)).remedy


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 20),
        ({"max_epochs": 3}, 60),
        ({"max_epochs": 3, "max_steps": 50}, 50),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": -1}, math.inf),
        ({"batches_a_step": 3}, 7),
        ({"limit": 4}, 4),
        ({"limit": 0.25}, 5),
        ({"batches": 0, "max_epochs": -1}, 0),
    ],
)
def test_the_steps_are_those_that_lightning_estimates(settings: dict[str, Any], steps: float) -> None:
    given = {"batches": 20, "batches_a_step": 1, "max_epochs": 1, "max_steps": -1, "limit": 1.0, **settings}
    assert planned_steps(**given) == steps


def test_an_endless_number_is_said_in_words() -> None:
    assert [number(math.inf), number(1234.0)] == ["endless", "1,234"]
