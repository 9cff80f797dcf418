import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    is_clipped,
    k_wise_loss,
    pairwise_logistic_loss,
    probability_ratio,
    ranked_pairs,
    ranking_loss,
    reinforce_loss,
)


def test_the_ratio_is_that_of_the_probabilities() -> None:
    new, old = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.3, 0.4]]), torch.tensor([[0.25, 0.4, 0.9], [0.1, 0.6, 0.5]])
    found = probability_ratio(new.log(), old.log())
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.25, 1.0], [2.0, 0.5, 0.8]]))


@pytest.mark.parametrize(
    ("clip_range", "clipped"),
    [
        (0.05, [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
        (0.2, [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        (0.4, [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_clipped_are_the_ratios_further_than_the_range_from_1(clip_range: float, clipped: list[list[float]]) -> None:
    ratio = torch.tensor([[1.0, 1.1, 1.3], [0.9, 0.7, 0.5]])
    assert is_clipped(ratio, 1.0, clip_range=clip_range).tolist() == clipped


def test_clipped_are_the_values_further_than_the_range_from_their_old_ones() -> None:
    values, old = (
        torch.tensor([[2.0, 2.5, -1.0], [0.0, 3.0, 5.0]]),
        torch.tensor([[2.25, 2.0, -0.5], [0.125, 4.0, 2.0]]),
    )
    assert is_clipped(values, old, clip_range=0.375).tolist() == [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.1, 2.0, -2.2, True),  # inside of the range
        (1.5, 2.0, -2.4, False),  # gained enough: 1.2 * 2
        (0.5, 2.0, -1.0, True),  # lost where it should gain: pulled back up
        (0.9, -2.0, 1.8, True),
        (0.5, -2.0, 1.6, False),  # lost enough: .8 * -2
        (1.5, -2.0, 3.0, True),  # gained where it should lose: pulled back down
    ],
)
def test_the_policy_loss_at_both_sides_of_the_clip_range(
    ratio: float, advantage: float, loss: float, has_gradient: bool
) -> None:
    old = torch.tensor([[-1.3]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    found = clipped_policy_loss(logprobs, old, torch.tensor([[advantage]]), clip_range=0.2)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logprobs)
    # Where the loss is not clipped its slope in log p is -ratio * advantage.
    assert gradient.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0, rel=1e-5)


def test_at_ratio_1_the_policy_loss_is_the_negative_advantage_with_the_policy_gradient() -> None:
    logprobs = torch.tensor([[-0.5, -2.0]], requires_grad=True)
    advantages = torch.tensor([[3.0, -4.0]])
    loss = clipped_policy_loss(logprobs, logprobs.detach(), advantages, clip_range=0.2)
    assert loss.tolist() == [[-3.0, 4.0]]
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == [[-3.0, 4.0]]


def test_the_reinforce_loss_has_the_advantage_as_its_slope_however_far_the_policy_has_moved() -> None:
    logprobs = torch.tensor([[-0.5, -20.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[3.0, -4.0, 0.0]])
    loss = reinforce_loss(logprobs, advantages)
    assert loss.tolist() == [[1.5, -80.0, 0.0]]
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == [[-3.0, 4.0, 0.0]]


def test_reinforce_over_all_samples_is_the_gradient_of_the_expected_reward() -> None:
    """Exact: every token of a vocabulary of five, weighted by its probability."""
    generator = torch.Generator().manual_seed(0)
    logits, rewards = (torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    expected = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)[0]
    losses = reinforce_loss(logits.log_softmax(-1), rewards)
    found = torch.autograd.grad((logits.softmax(-1).detach() * losses).sum(), logits)[0]
    torch.testing.assert_close(found, -expected)


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss"),
    [
        (1.1, 1.0, 2.0, 0.405),  # inside of the range: .9^2 / 2
        (1.5, 1.0, 2.0, 0.32),  # moved too far the right way: the clipped 1.2 is worse, .8^2 / 2
        (0.5, 1.0, 2.0, 1.125),  # moved the wrong way: its own error is worse, 1.5^2 / 2
        (1.5, 1.0, 1.2, 0.045),  # overshot: its own error counts, .3^2 / 2
    ],
)
def test_the_value_loss_takes_the_worse_of_the_value_and_the_clipped_value(
    value: float, old_value: float, target: float, loss: float
) -> None:
    found = clipped_value_loss(
        torch.tensor([[value]]), torch.tensor([[old_value]]), torch.tensor([[target]]), value_clip_range=0.2
    )
    assert found.item() == pytest.approx(loss, rel=1e-5)


def test_pairs_are_all_better_and_worse_responses_of_the_same_prompt() -> None:
    prompt_index, ranks = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 0, 1, 1, 0])
    winners, losers = ranked_pairs(prompt_index, ranks)
    assert set(zip(winners.tolist(), losers.tolist(), strict=True)) == {(1, 0), (1, 2), (2, 0), (4, 3)}


def test_responses_of_equal_rank_form_no_pair() -> None:
    winners, losers = ranked_pairs(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]))
    assert sorted(zip(winners.tolist(), losers.tolist(), strict=True)) == [(0, 1), (0, 2)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_k_ranked_responses_make_k_choose_2_pairs(sizes: list[int]) -> None:
    prompt_index = torch.tensor([prompt for prompt, size in enumerate(sizes) for _ in range(size)])
    ranks = torch.tensor([rank for size in sizes for rank in range(size)])
    winners, losers = ranked_pairs(prompt_index, ranks)
    assert len(winners) == len(losers) == sum(math.comb(size, 2) for size in sizes)


def test_the_pairwise_loss_by_hand() -> None:
    # sigmoid(log 3) = 3/4
    loss = pairwise_logistic_loss(torch.tensor([math.log(3.0), 1.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), math.log(2.0)]))


def test_the_pairwise_loss_of_far_scores_is_finite_and_their_difference() -> None:
    loss = pairwise_logistic_loss(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert loss.tolist() == [1000.0, 0.0]


def test_with_two_responses_the_ranking_loss_is_the_pairwise_loss() -> None:
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    loss = ranking_loss(scores, torch.arange(8) // 2, torch.tensor([0, 1]).repeat(4))
    torch.testing.assert_close(loss, pairwise_logistic_loss(scores[0::2], scores[1::2]).mean())


def loop_over_prompts(scores: Tensor, prompt_index: Tensor, ranks: Tensor) -> float:
    """The mean over prompts of the mean over pairs, pair by pair."""
    of_prompts = []
    for prompt in sorted(set(prompt_index.tolist())):
        own = [i for i in range(len(scores)) if prompt_index[i] == prompt]
        losses = []
        for i, j in combinations(own, 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                losses.append(math.log1p(math.exp(float(scores[worse] - scores[better]))))
        if losses:
            of_prompts.append(sum(losses) / len(losses))
    return sum(of_prompts) / len(of_prompts)


MIXED_PROMPTS = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
MIXED_RANKS = torch.tensor([0, 1, 0, 1, 2, 3, 0, 1, 2])


def test_every_prompt_weighs_the_same_however_many_responses_it_has() -> None:
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0))
    found = ranking_loss(scores, MIXED_PROMPTS, MIXED_RANKS)
    assert found.item() == pytest.approx(loop_over_prompts(scores, MIXED_PROMPTS, MIXED_RANKS), rel=1e-5)


def test_a_prompt_without_a_pair_does_not_count() -> None:
    scores = torch.tensor([1.0, 0.0, 5.0, 2.0, 3.0])
    prompts, ranks = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 0])
    expected = pairwise_logistic_loss(torch.tensor([1.0]), torch.tensor([0.0])).mean()
    torch.testing.assert_close(ranking_loss(scores, prompts, ranks), expected)


@given(st.permutations(range(9)))
def test_the_order_of_the_rows_is_irrelevant(order: list[int]) -> None:
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0))
    expected = ranking_loss(scores, MIXED_PROMPTS, MIXED_RANKS)
    torch.testing.assert_close(ranking_loss(scores[order], MIXED_PROMPTS[order], MIXED_RANKS[order]), expected)


def test_with_two_responses_the_k_wise_loss_is_the_pairwise_loss() -> None:
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    loss = k_wise_loss(scores, torch.arange(8) // 2, torch.tensor([0, 1]).repeat(4))
    torch.testing.assert_close(loss, pairwise_logistic_loss(scores[0::2], scores[1::2]).mean())


@given(st.lists(st.floats(-5, 5), min_size=9, max_size=9), st.permutations(range(9)))
def test_the_k_wise_loss_is_that_of_choosing_the_best_of_what_is_left(scores: list[float], order: list[int]) -> None:
    of_prompts = []
    for prompt in range(3):
        own = [score for score, index in zip(scores, MIXED_PROMPTS.tolist(), strict=True) if index == prompt]
        choices = [-math.log(math.exp(own[i]) / sum(map(math.exp, own[i:]))) for i in range(len(own) - 1)]
        of_prompts.append(sum(choices) / len(choices))
    found = k_wise_loss(torch.tensor(scores, dtype=torch.float64)[order], MIXED_PROMPTS[order], MIXED_RANKS[order])
    assert float(found) == pytest.approx(sum(of_prompts) / 3, rel=1e-9, abs=1e-9)


def test_the_k_wise_loss_compares_responses_that_tie_with_those_below_them_alone() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    prompts, ranks = torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1])
    expected = pairwise_logistic_loss(scores[:2], scores[2:].expand(2)).mean()
    torch.testing.assert_close(k_wise_loss(scores, prompts, ranks), expected)
    assert k_wise_loss(scores, prompts, torch.zeros(3, dtype=torch.long)) == 0
    far = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = k_wise_loss(far, torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]))
    loss.backward()
    assert (loss.item(), far.grad.tolist()) == (1000.0, [-1.0, 1.0])


def test_the_ranking_loss_sees_only_differences_of_scores() -> None:
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0))
    shifted = scores + torch.tensor([3.0, 3.0, -1.0, -1.0, -1.0, -1.0, 8.0, 8.0, 8.0])
    torch.testing.assert_close(
        ranking_loss(shifted, MIXED_PROMPTS, MIXED_RANKS), ranking_loss(scores, MIXED_PROMPTS, MIXED_RANKS)
    )
