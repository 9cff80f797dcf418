import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.rewards import subtract_missing_eos, token_rewards

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
KL = torch.tensor([[0.5, -0.25, 1.0, 8.0], [0.1, 0.2, 0.3, 0.4], [2.0, float("nan"), 8.0, 8.0]])
SCORES = torch.tensor([10.0, -3.0, 1.0])


def test_the_score_comes_at_the_last_response_token_and_the_kl_at_every_one() -> None:
    rewards = token_rewards(SCORES, KL, MASK, beta=2.0)
    expected = [[-1.0, 0.5, 8.0, 0.0], [-0.2, -0.4, -0.6, -3.8], [-3.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


@given(st.floats(0, 2), st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 100))
def test_rewards_summed_over_a_response_are_the_score_less_beta_times_its_kl(
    beta: float, lengths: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, generator=generator, dtype=torch.float64)
    kl = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    sums = token_rewards(scores, kl, mask, beta=beta).sum(dim=1)
    torch.testing.assert_close(sums + beta * (kl * mask).sum(dim=1), scores)


def test_beta_0_leaves_the_score_alone() -> None:
    assert token_rewards(SCORES, KL, MASK, beta=0.0).sum(dim=1).tolist() == SCORES.tolist()


def test_arguments_are_left_as_they_were() -> None:
    kl, scores = torch.ones(3, 4), SCORES.clone()
    token_rewards(scores, kl, MASK, beta=1.0)
    assert (kl == 1).all()
    assert scores.tolist() == SCORES.tolist()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_only_a_response_without_an_end_token_pays_the_penalty(penalty: float) -> None:
    ended = torch.tensor([True, False, True])
    found = subtract_missing_eos(SCORES, ended, penalty=penalty)
    assert found.tolist() == [10.0, -3.0 - penalty, 1.0]
