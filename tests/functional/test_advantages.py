from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.advantages import (
    baselined,
    explained_variance,
    gae,
    group_normalized,
    leave_one_out,
)
from rlhf_lightning.functional.masking import masked_moments

fractions = st.floats(0, 1)
lengths = st.lists(st.integers(1, 6), min_size=2, max_size=4)


def episodes(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values, their mask, and noise where the mask is false."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.arange(6) < torch.tensor(lengths).unsqueeze(1)


def brute_force(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of Schulman et al. 2016 as it stands there: a weighted sum of all later TD errors."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@given(lengths, fractions, fractions, st.integers(0, 1000))
def test_advantages_are_the_weighted_sums_of_td_errors(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values, mask = episodes(lengths, seed)
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        expected = brute_force(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        torch.testing.assert_close(found[row, :length], torch.tensor(expected, dtype=torch.float64))
        assert (found[row, length:] == 0).all()


def test_advantages_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    # TD errors: -.25, .5, .25; each advantage adds half of the next one.
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5)
    assert found.tolist() == [[-0.25 + 0.5 * 0.625, 0.5 + 0.5 * 0.25, 0.25]]


def test_lambda_1_gives_the_returns_to_go_less_the_values() -> None:
    rewards, values, mask = episodes([6, 3], seed=0)
    found = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row, length in ((0, 6), (1, 3)):
        to_go = rewards[row, :length].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(found[row, :length], to_go - values[row, :length])


def test_lambda_0_gives_the_td_errors() -> None:
    rewards, values, mask = episodes([6], seed=0)
    after = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.0), rewards + 0.9 * after - values)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards, _, mask = episodes([6], seed=0)
    values = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=1.0, lam=0.95), torch.zeros_like(values))


@pytest.mark.parametrize("fill", [0.0, 1e6, float("nan")])
def test_padding_columns_change_nothing_whatever_they_hold(fill: float) -> None:
    rewards, values, mask = episodes([6, 2], seed=0)
    expected = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    columns = torch.full((2, 3), fill, dtype=torch.float64)
    wider = gae(
        torch.cat([rewards, columns], dim=1),
        torch.cat([values, columns], dim=1),
        torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1),
        gamma=0.9,
        lam=0.8,
    )
    torch.testing.assert_close(wider[:, :6], expected)
    assert (wider[:, 6:] == 0).all()


def rewards_of_groups(groups: int, size: int, seed: int) -> Tensor:
    return torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_leave_one_out_by_hand() -> None:
    # 3 - (1 + 2) / 2, 1 - (3 + 2) / 2, 2 - (3 + 1) / 2; 10 - (20 + 60) / 2, ...
    found = leave_one_out(torch.tensor([3.0, 1.0, 2.0, 10.0, 20.0, 60.0]), group_size=3)
    assert found.tolist() == [1.5, -1.5, 0.0, -30.0, -15.0, 45.0]


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
def test_leave_one_out_takes_off_the_mean_of_the_other_samples_of_the_prompt(groups: int, size: int, seed: int) -> None:
    rewards = rewards_of_groups(groups, size, seed)
    found = leave_one_out(rewards, group_size=size)
    for row, reward in enumerate(rewards.tolist()):
        first = row // size * size
        others = [rewards[i].item() for i in range(first, first + size) if i != row]
        assert found[row].item() == pytest.approx(reward - sum(others) / len(others), abs=1e-12)


def test_the_baseline_of_leave_one_out_does_not_hear_of_its_own_sample() -> None:
    rewards = rewards_of_groups(2, 4, seed=0)
    moved = rewards.clone()
    moved[5] += 100.0
    change = leave_one_out(moved, group_size=4) - leave_one_out(rewards, group_size=4)
    expected = [0.0] * 4 + [-100 / 3, 100.0, -100 / 3, -100 / 3]
    assert change.tolist() == pytest.approx(expected, abs=1e-9)


def test_group_normalisation_by_hand() -> None:
    # Mean 3, deviation 2; and a pair, whatever its distance.
    found = group_normalized(torch.tensor([1.0, 5.0, 1.0, 5.0]), group_size=4)
    assert found.tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0])
    assert group_normalized(torch.tensor([7.0, 700.0]), group_size=2).tolist() == pytest.approx([-1.0, 1.0])


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
def test_every_group_is_normalised_by_itself_to_mean_0_and_variance_1(groups: int, size: int, seed: int) -> None:
    rewards = rewards_of_groups(groups, size, seed)
    found = group_normalized(rewards, group_size=size)
    for first in range(0, groups * size, size):
        own = rewards[first : first + size]
        expected = (own - own.mean()) / own.var(correction=0).sqrt()
        torch.testing.assert_close(found[first : first + size], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reward", [0.1, 0.7, 10.3, 12345.678])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_a_group_whose_rewards_are_all_alike_teaches_nothing(reward: float, size: int) -> None:
    found = group_normalized(torch.full((size,), reward), group_size=size)
    assert found.abs().max() < 1e-3


@pytest.mark.parametrize("relative", [leave_one_out, group_normalized])
@given(shift=st.floats(-100, 100), seed=st.integers(0, 100))
def test_a_shift_of_the_rewards_of_a_prompt_changes_nothing(relative: Any, shift: float, seed: int) -> None:
    rewards = rewards_of_groups(2, 4, seed)
    shifted = rewards + torch.tensor([shift] * 4 + [-shift] * 4, dtype=torch.float64)
    torch.testing.assert_close(relative(shifted, group_size=4), relative(rewards, group_size=4), rtol=1e-8, atol=1e-8)


def test_the_baseline_is_a_mean_of_others_for_all_rows_or_for_each() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0])
    for_all = torch.tensor([4.0, 10.0, 99.0], dtype=torch.float64)
    assert baselined(rewards, for_all).tolist() == [-1.5, -0.5, 3.5]
    for_each = torch.tensor([[2.0, 2.0, 2.0], [8.0, 7.0, 3.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    assert baselined(rewards, for_each).tolist() == [-3.0, -1.5, 4.5]


def test_without_other_rewards_the_baseline_is_0() -> None:
    rewards = torch.tensor([1.0, 2.0])
    assert baselined(rewards, torch.zeros(3, dtype=torch.float64)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[1.0, 2.0, 6.0]], 1.0), ([[4.0, 4.0, 4.0]], 0.0), ([[2.0, 3.0, 7.0]], 1.0), ([[-1.0, -2.0, -6.0]], -3.0)],
)
def test_a_perfect_critic_explains_all_of_the_variance_and_a_constant_one_nothing(
    values: list[list[float]], expected: float
) -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1, 3, dtype=torch.bool)
    errors = masked_moments(returns - torch.tensor(values), mask)
    assert explained_variance(errors, masked_moments(returns, mask)).item() == pytest.approx(expected)
