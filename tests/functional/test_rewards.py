import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.rewards import missing_eos_part, repeated_share, token_rewards, value_mask

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
KL = torch.tensor([[0.5, -0.25, 1.0, 8.0], [0.1, 0.2, 0.3, 0.4], [2.0, float("nan"), 8.0, 8.0]])
SCORES = torch.tensor([10.0, -3.0, 1.0])


def placed(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float, after_end: bool) -> Tensor:
    return token_rewards(scores, kl, mask, value_mask(mask, after_end=after_end), beta=beta)


def test_the_score_comes_at_the_last_response_token_and_the_kl_at_every_one() -> None:
    rewards = placed(SCORES, KL, MASK, beta=2.0, after_end=False)
    expected = [[-1.0, 0.5, 8.0, 0.0, 0.0], [-0.2, -0.4, -0.6, -3.8, 0.0], [-3.0, 0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_the_score_comes_at_a_step_of_its_own_after_the_end() -> None:
    rewards = placed(SCORES, KL, MASK, beta=2.0, after_end=True)
    expected = [[-1.0, 0.5, -2.0, 10.0, 0.0], [-0.2, -0.4, -0.6, -0.8, -3.0], [-4.0, 1.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


@given(st.floats(0, 2), st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 100), st.booleans())
def test_rewards_summed_over_a_response_are_the_score_less_beta_times_its_kl(
    beta: float, lengths: list[int], seed: int, after_end: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, generator=generator, dtype=torch.float64)
    kl = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    sums = placed(scores, kl, mask, beta=beta, after_end=after_end).sum(dim=1)
    torch.testing.assert_close(sums + beta * (kl * mask).sum(dim=1), scores)


def test_beta_0_leaves_the_score_alone() -> None:
    assert placed(SCORES, KL, MASK, beta=0.0, after_end=True).sum(dim=1).tolist() == SCORES.tolist()


def test_arguments_are_left_as_they_were() -> None:
    kl, scores = torch.ones(3, 4), SCORES.clone()
    placed(scores, kl, MASK, beta=1.0, after_end=True)
    assert (kl == 1).all()
    assert scores.tolist() == SCORES.tolist()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("replace", [True, False])
def test_only_a_response_without_an_end_token_pays_the_penalty(penalty: float, replace: bool) -> None:
    ended = torch.tensor([True, False, True])
    found = SCORES + missing_eos_part(SCORES, ended, penalty=penalty, replace=replace)
    assert found.tolist() == [10.0, -penalty if replace else -3.0 - penalty, 1.0]


def test_the_repeated_share_counts_runs_that_stood_there_before() -> None:
    tokens = torch.tensor([[1, 2, 1, 2, 1, 2], [5, 5, 5, 5, 0, 0], [1, 2, 3, 4, 5, 6], [7, 0, 0, 0, 0, 0]])
    mask = torch.arange(6) < torch.tensor([[6], [4], [6], [1]])
    # 12 21 12 21 12; 55 55 55; 12 23 34 45 56; none.
    assert repeated_share(tokens, mask, length=2).tolist() == pytest.approx([3 / 5, 2 / 3, 0.0, 0.0])


def test_padding_is_no_repetition() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[True] * 5 + [False] * 5])
    assert repeated_share(tokens, mask, length=2).tolist() == [0.0]
