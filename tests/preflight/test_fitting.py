"""Memory that really cannot be had: torch is asked for more than there are addresses."""

import pytest
import torch
from torch import nn

from rlhf_lightning.preflight.fitting import halvings, largest_by_estimate, largest_by_trial, with_room_for

CPU = torch.device("cpu")
TOO_MUCH = 2**60


def test_sizes_are_halved_down_to_1() -> None:
    assert halvings(12) == [12, 6, 3, 1]
    assert halvings(1) == [1]


def test_the_first_whose_need_is_free_is_taken() -> None:
    asked: list[int] = []

    def needed(size: int) -> int:
        asked.append(size)
        return 10 + size

    assert largest_by_estimate(needed, most=32, free=18) == 8
    assert asked == [32, 16, 8]
    assert largest_by_estimate(needed, most=32, free=17) == 4
    assert largest_by_estimate(needed, most=32, free=5) == 1


def test_what_is_not_known_stops_nothing() -> None:
    assert largest_by_estimate(lambda _: None, most=32, free=5) == 32
    assert largest_by_estimate(lambda size: size, most=32, free=None) == 32


def test_a_trial_that_runs_out_is_made_again_with_half() -> None:
    tried: list[int] = []

    def trial(size: int) -> None:
        tried.append(size)
        torch.empty(TOO_MUCH if size > 3 else 1)

    assert largest_by_trial(trial, most=12, device=CPU) == 3
    assert tried == [12, 6, 3]


def test_where_one_sequence_does_not_fit_the_reason_is_raised() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        largest_by_trial(lambda _: torch.empty(TOO_MUCH).zero_().sum().item(), most=2, device=CPU)


def test_another_error_is_raised_at_once() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        largest_by_trial(lambda _: torch.zeros(3).reshape(2).sum().item(), most=4, device=CPU)


def test_room_for_the_optimizer_is_taken_and_gradients_are_forgotten() -> None:
    network = nn.Linear(2, 1)
    done: list[int] = []

    def work() -> None:
        network(torch.ones(2)).sum().backward()
        done.append(1)

    with_room_for(8, [network], work, CPU)
    assert done == [1]
    assert network.weight.grad is None
    with pytest.raises(RuntimeError, match="memory"):
        with_room_for(TOO_MUCH, [network], work, CPU)
    assert done == [1]
