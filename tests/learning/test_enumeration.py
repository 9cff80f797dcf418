"""The mean of every gradient estimator over all rollouts that there can be, and autograd's gradient of what is meant.

A policy over an end token and two others has 15 responses of at most three tokens. Its logits are a free table with a
row for each state, so that what holds for them holds for any network, by the chain rule. Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.kl import k1, k1_weighted, k2, k3
from rlhf_lightning.functional.losses import clipped_policy_loss, reinforce_loss
from rlhf_lightning.functional.masking import masked_moments, masked_sum, variance
from rlhf_lightning.functional.rewards import token_rewards, value_mask
from rlhf_lightning.rollout import estimate_advantages
from rlhf_lightning.rollout.experience import AdvantageSettings
from rlhf_lightning.rollout.shaping import RunningMoments
from rlhf_lightning.types import ScoredRollout

END, LONGEST, BETA = 0, 3, 0.3
SETTINGS: dict[str, Any] = {
    "beta": BETA,
    "gamma": 1.0,
    "lam": 1.0,
    "samples_per_prompt": 1,
    "baseline": "batch",
    "score_placement": "after_end",
    "learn_from_cut_off": True,
}
Loss = Callable[[ScoredRollout, Tensor], Tensor]


def all_responses(start: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(start) == LONGEST or END in start:
        return [start]
    return [response for token in range(3) for response in all_responses((*start, token))]


RESPONSES = all_responses()
STATES = sorted({response[:t] for response in RESPONSES for t in range(len(response) + 1)}, key=lambda s: (len(s), s))


def padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOKENS = padded([list(response) for response in RESPONSES], LONGEST)
MASK = torch.tensor([[t < len(response) for t in range(LONGEST)] for response in RESPONSES])
STATE = padded([[STATES.index(response[:t]) for t in range(len(response) + 1)] for response in RESPONSES], LONGEST + 1)
SCORES = random(2, len(RESPONSES))
REFERENCE = random(1, len(STATES), 3)


def logprobs_of(logits: Tensor) -> Tensor:
    """(N, R) log-probabilities of the tokens of all N responses, 0 after their end."""
    return logits.log_softmax(-1)[STATE[:, :-1], TOKENS].masked_fill(~MASK, 0.0)


REF_LOGPROBS = logprobs_of(REFERENCE)


@dataclass(frozen=True)
class Policy:
    """The policy at which gradients are taken."""

    logits: Tensor
    logprobs: Tensor

    @property
    def probabilities(self) -> Tensor:
        """(N,) of all responses, not to be differentiated."""
        return self.logprobs.sum(dim=1).exp().detach()

    def gradient(self, of: Tensor) -> Tensor:
        return torch.autograd.grad(of, self.logits, retain_graph=True)[0]

    def kl(self) -> Tensor:
        """KL(policy || reference) of responses."""
        logprobs = self.logprobs.sum(dim=1)
        return (logprobs.exp() * (logprobs - REF_LOGPROBS.sum(dim=1))).sum()

    def objective(self) -> Tensor:
        """J: the mean score less beta times the KL to the reference (Ouyang et al. 2022, eq. 2)."""
        return (self.logprobs.sum(dim=1).exp() * SCORES).sum() - BETA * self.kl()

    def rollout(self, rows: tuple[int, ...], values: Tensor | None = None) -> ScoredRollout:
        """These responses as the policy would have sampled them; ``values`` are of states."""
        index = torch.tensor(rows)
        prompts = torch.ones(len(rows), 1, dtype=torch.int64)
        states = value_mask(MASK[index], after_end=True)
        return ScoredRollout(
            prompt_tokens=prompts,
            prompt_mask=prompts.bool(),
            prompts=["" for _ in rows],
            texts=["" for _ in rows],
            columns={},
            tokens=torch.cat([prompts, TOKENS[index]], dim=1),
            attention_mask=torch.cat([prompts.bool(), MASK[index]], dim=1),
            response_mask=MASK[index],
            ended=torch.tensor([END in RESPONSES[row] for row in rows]),
            responses=["" for _ in rows],
            logprobs=self.logprobs[index].detach(),
            ref_logprobs=REF_LOGPROBS[index],
            values=(torch.zeros(len(STATES)).double() if values is None else values)[STATE[index]] * states,
            scores=SCORES[index],
        )

    def mean_gradient(self, loss: Loss, *, size: int = 1, values: Tensor | None = None) -> Tensor:
        """The mean of the loss's gradient over all rollouts of ``size`` responses to one prompt."""
        total = torch.zeros(())
        for rows in product(range(len(RESPONSES)), repeat=size):
            probability = self.probabilities[list(rows)].prod()
            total = total + probability * loss(self.rollout(rows, values), self.logprobs[list(rows)])
        return self.gradient(total)


@pytest.fixture
def policy() -> Policy:
    logits = random(0, len(STATES), 3).requires_grad_()
    return Policy(logits, logprobs_of(logits))


def per_sequence(losses: Tensor, mask: Tensor) -> Tensor:
    """``loss_mean="sequences"``: the number of tokens of a rollout is random, and a quotient with it is biased."""
    return masked_sum(losses, mask).mean()


def exact_values(policy: Policy, placement: str) -> Tensor:
    """The mean of all that is still to come, in every state; the score is still to come where it is placed."""
    penalties = -BETA * (policy.logprobs.detach() - REF_LOGPROBS)
    values = []
    for state in STATES:
        through = [row for row, response in enumerate(RESPONSES) if response[: len(state)] == state]
        weights = policy.probabilities[through]
        to_come = SCORES[through] + penalties[through, len(state) :].sum(dim=1)
        over = state in RESPONSES and placement == "end_token"
        values.append(torch.zeros(()).double() if over else (weights * to_come).sum() / weights.sum())
    return torch.stack(values)


def test_the_probabilities_of_all_responses_add_up_to_1(policy: Policy) -> None:
    assert len(RESPONSES) == 15
    torch.testing.assert_close(policy.probabilities.sum(), torch.ones(()).double())


# Estimators without a critic -------------------------------------------------


def of_responses(advantage: str, seen: RunningMoments | None = None, **settings: Any) -> Loss:
    """The loss of an estimator that has one advantage for each response."""
    chosen = AdvantageSettings(advantage=advantage, **{**SETTINGS, **settings})  # type: ignore[arg-type]

    def loss(scored: ScoredRollout, logprobs: Tensor) -> Tensor:
        before = RunningMoments(**vars(seen)) if seen else RunningMoments()
        found = estimate_advantages(scored, scored.scores, chosen, before, sum_over_ranks=lambda x: x)
        if advantage == "reinforce":
            return per_sequence(reinforce_loss(logprobs, found.advantages), scored.response_mask)
        losses = clipped_policy_loss(logprobs, scored.logprobs, found.advantages, clip_range=0.2)
        return per_sequence(losses, scored.response_mask)

    return loss


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"advantage": "reinforce"}, 1),
        ({"advantage": "reinforce"}, 2),
        ({"advantage": "reinforce", "baseline": "running", "seen": RunningMoments(4.0, 2.0, 9.0)}, 1),
        ({"advantage": "reinforce", "baseline": "running", "seen": RunningMoments(4.0, 2.0, 9.0)}, 2),
        ({"advantage": "rloo", "samples_per_prompt": 2}, 2),
    ],
    ids=["reinforce alone", "reinforce batch", "reinforce running", "reinforce running pairs", "rloo"],
)
def test_estimators_without_a_critic_are_unbiased(
    settings: dict[str, Any], size: int, placement: str, policy: Policy
) -> None:
    found = policy.mean_gradient(of_responses(**settings, score_placement=placement), size=size)
    torch.testing.assert_close(-found, policy.gradient(policy.objective()))


def test_grpo_with_two_samples_climbs_the_rate_of_wins_against_itself(policy: Policy) -> None:
    """Of two rewards the normalised ones are 1 and -1: only which of them is higher counts, not by how much."""
    found = -policy.mean_gradient(of_responses("grpo", samples_per_prompt=2), size=2)
    rewards = (SCORES - BETA * (policy.logprobs - REF_LOGPROBS).sum(dim=1)).detach()
    wins_less_losses = (rewards.unsqueeze(1) - rewards.unsqueeze(0)).sign() @ policy.probabilities
    win_rate = (policy.logprobs.sum(dim=1).exp() * wins_less_losses).sum()
    # 1e-8 is added to the standard deviation.
    torch.testing.assert_close(found, policy.gradient(win_rate), rtol=0.0, atol=1e-6)


def test_grpo_goes_uphill_though_not_along_the_gradient(policy: Policy) -> None:
    found = -policy.mean_gradient(of_responses("grpo", samples_per_prompt=2), size=2).flatten()
    uphill = policy.gradient(policy.objective()).flatten()
    cosine = torch.cosine_similarity(found, uphill, dim=0)
    assert 0.8 < cosine < 0.999


def test_grpo_of_large_groups_is_the_gradient_divided_by_the_standard_deviation_of_the_rewards(policy: Policy) -> None:
    """A group without end is the distribution itself: here each response stands in it 10^5 times its probability."""
    counts = (policy.probabilities * 1e5).round().long()
    rows = tuple(torch.arange(len(RESPONSES)).repeat_interleave(counts).tolist())
    logprobs = policy.logprobs[list(rows)]
    loss = of_responses("grpo", samples_per_prompt=len(rows))(policy.rollout(rows), logprobs)
    rewards = SCORES - BETA * (policy.logprobs - REF_LOGPROBS).sum(dim=1)
    mean = (policy.probabilities * rewards).sum()
    deviation = (policy.probabilities * (rewards - mean).square()).sum().sqrt()
    # The counts are rounded: to 1e-5 of the rollout for each of the 15 responses.
    expected = policy.gradient(policy.objective()) / deviation.detach()
    torch.testing.assert_close(-policy.gradient(loss), expected, rtol=0.0, atol=1e-3)


# PPO -------------------------------------------------------------------------


def ppo(lam: float, placement: str) -> Loss:
    """The clipped loss before anything has moved: every ratio is 1; advantages as they are before they are scaled."""

    def loss(scored: ScoredRollout, logprobs: Tensor) -> Tensor:
        mask = scored.response_mask
        states = value_mask(mask, after_end=placement == "after_end")
        kl = k1(scored.logprobs, scored.ref_logprobs)
        rewards = token_rewards(scored.scores, kl, mask, states, beta=BETA)
        advantages = gae(rewards, scored.values, states, gamma=1.0, lam=lam)[:, :-1]
        return per_sequence(clipped_policy_loss(logprobs, scored.logprobs, advantages, clip_range=0.2), mask)

    return loss


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
def test_ppo_is_unbiased_at_lambda_1_whatever_the_critic_says(placement: str, policy: Policy) -> None:
    found = policy.mean_gradient(ppo(1.0, placement), values=random(3, len(STATES)))
    torch.testing.assert_close(-found, policy.gradient(policy.objective()))


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_ppo_is_unbiased_at_any_lambda_with_an_exact_critic(lam: float, placement: str, policy: Policy) -> None:
    found = policy.mean_gradient(ppo(lam, placement), values=exact_values(policy, placement))
    torch.testing.assert_close(-found, policy.gradient(policy.objective()))


def test_a_wrong_critic_biases_ppo_below_lambda_1(policy: Policy) -> None:
    found = policy.mean_gradient(ppo(0.5, "after_end"), values=random(3, len(STATES)))
    assert (found + policy.gradient(policy.objective())).abs().max() > 0.01


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
def test_centring_and_scaling_divides_the_gradient_of_large_rollouts_by_one_number(
    placement: str, policy: Policy
) -> None:
    """Centring takes off a constant, which has no part in a mean gradient. In a small rollout it is biased."""
    values = random(3, len(STATES))
    settings = AdvantageSettings(advantage="gae", **{**SETTINGS, "score_placement": placement})
    everything = policy.rollout(tuple(range(len(RESPONSES))), values)
    states = value_mask(MASK, after_end=placement == "after_end")
    kl = k1(everything.logprobs, everything.ref_logprobs)
    rewards = token_rewards(SCORES, kl, MASK, states, beta=BETA)
    raw = gae(rewards, everything.values * states, states, gamma=1.0, lam=1.0)[:, :-1]
    weights = policy.probabilities
    of_each = torch.stack([masked_moments(raw[i : i + 1], MASK[i : i + 1]) for i in range(len(RESPONSES))])
    # The moments of the distribution in place of those of a rollout.
    moments = weights @ of_each

    def loss(scored: ScoredRollout, logprobs: Tensor) -> Tensor:
        found = estimate_advantages(
            scored, scored.scores, settings, RunningMoments(), sum_over_ranks=lambda _: moments
        ).advantages
        losses = clipped_policy_loss(logprobs, scored.logprobs, found, clip_range=0.2)
        return per_sequence(losses, scored.response_mask)

    expected = policy.gradient(policy.objective()) / variance(moments).sqrt()
    found = -policy.mean_gradient(loss, values=values)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # 1e-8 is added to the standard deviation


def test_a_mean_over_the_tokens_of_a_small_rollout_goes_elsewhere(policy: Policy) -> None:
    """A response's tokens count by its length there: of rollouts of one response, those of a short one count more."""
    whole = of_responses("reinforce")
    found = policy.mean_gradient(lambda scored, logprobs: whole(scored, logprobs) / scored.response_mask.sum())
    cosine = torch.cosine_similarity(-found.flatten(), policy.gradient(policy.objective()).flatten(), dim=0)
    assert cosine < 0.98


# The KL penalty --------------------------------------------------------------


def of_tokens(estimator: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """An estimator of single tokens, differentiated and added up over a response."""
    return lambda scored, logprobs: per_sequence(estimator(logprobs, scored.ref_logprobs), scored.response_mask)


def of_whole(estimator: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """An estimator of whole responses: their log-probabilities as if they were one token."""
    return lambda scored, logprobs: estimator(
        logprobs.sum(dim=1, keepdim=True), scored.ref_logprobs.sum(dim=1, keepdim=True)
    ).mean()


def kl_of_states(policy: Policy, direction: str) -> Tensor:
    """The KL of the next token in every state, as often as the policy comes there: how often is not differentiated."""
    p, q = policy.logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    one, other = (p, q) if direction == "reverse" else (q, p)
    kl = (one.exp() * (one - other)).sum(dim=-1)
    return (policy.probabilities @ kl[STATE[:, :-1]].masked_fill(~MASK, 0.0)).sum()


@pytest.mark.parametrize("of", [of_tokens, of_whole])
def test_k1_differentiated_is_no_penalty(of: Callable[..., Loss], policy: Policy) -> None:
    torch.testing.assert_close(policy.mean_gradient(of(k1)), torch.zeros(len(STATES), 3).double())


def test_k1_in_the_reward_is_the_kl_of_responses(policy: Policy) -> None:
    def loss(scored: ScoredRollout, logprobs: Tensor) -> Tensor:
        mask, states = scored.response_mask, value_mask(scored.response_mask, after_end=False)
        kl = k1(scored.logprobs, scored.ref_logprobs)
        rewards = token_rewards(torch.zeros(len(scored)).double(), kl, mask, states, beta=1.0)
        return per_sequence(reinforce_loss(logprobs, rewards.sum(dim=1, keepdim=True).expand_as(mask)), mask)

    torch.testing.assert_close(policy.mean_gradient(loss), policy.gradient(policy.kl()))


def test_k1_as_the_weight_of_the_score_function_is_the_kl_of_responses(policy: Policy) -> None:
    found = policy.mean_gradient(
        lambda scored, logprobs: per_sequence(
            k1_weighted(logprobs, scored.ref_logprobs, scored.response_mask), scored.response_mask
        )
    )
    torch.testing.assert_close(found, policy.gradient(policy.kl()))


def test_k2_of_tokens_is_the_kl_in_each_state_and_gives_no_credit_for_where_they_lead(policy: Policy) -> None:
    found = policy.mean_gradient(of_tokens(k2))
    torch.testing.assert_close(found, policy.gradient(kl_of_states(policy, "reverse")))
    assert (found - policy.gradient(policy.kl())).abs().max() > 0.01


def test_k2_of_whole_responses_is_their_kl(policy: Policy) -> None:
    torch.testing.assert_close(policy.mean_gradient(of_whole(k2)), policy.gradient(policy.kl()))


def test_k3_of_tokens_is_the_other_direction_in_each_state(policy: Policy) -> None:
    torch.testing.assert_close(policy.mean_gradient(of_tokens(k3)), policy.gradient(kl_of_states(policy, "forward")))


def test_k3_of_whole_responses_is_the_kl_of_the_other_direction(policy: Policy) -> None:
    logprobs, ref_logprobs = policy.logprobs.sum(dim=1), REF_LOGPROBS.sum(dim=1)
    forward = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum()
    torch.testing.assert_close(policy.mean_gradient(of_whole(k3)), policy.gradient(forward))


@pytest.mark.parametrize("advantage", ["reinforce", "rloo"])
def test_the_penalty_in_the_loss_and_that_in_the_reward_have_one_gradient(advantage: str, policy: Policy) -> None:
    scores_only = of_responses(advantage, samples_per_prompt=2, beta=0.0)

    def loss(scored: ScoredRollout, logprobs: Tensor) -> Tensor:
        penalty = k1_weighted(logprobs, scored.ref_logprobs, scored.response_mask)
        return scores_only(scored, logprobs) + BETA * per_sequence(penalty, scored.response_mask)

    torch.testing.assert_close(-policy.mean_gradient(loss, size=2), policy.gradient(policy.objective()))
