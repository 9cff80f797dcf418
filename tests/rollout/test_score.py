from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.functional.rewards import value_mask
from rlhf_lightning.networks import Critic
from rlhf_lightning.rollout.reward import FunctionReward, WeightedSum, load_reward
from rlhf_lightning.rollout.score import response_predictions, response_values, score_rollout
from rlhf_lightning.types import Rollout, ScoredRollout

KINDS = ["llama", "gpt2"]
PROMPTS = [[5, 9, 7, 30, 2], [8, 4], [40, 41, 42]]
RESPONSES = [[11, 1], [12, 13, 14, 15, 16, 17], [20, 21, 22, 1]]


def score(rollout: Rollout, policy: Any, reference: Any = None, critic: Any = None, **settings: Any) -> ScoredRollout:
    return score_rollout(
        rollout,
        policy=policy,
        reference=reference or policy,
        critic=critic or Critic.from_policy(policy, torch.Generator().manual_seed(0)),
        reward=FunctionReward(lambda prompts, responses: [float(len(r)) for r in responses]),
        **{"temperature": 1.0, "micro_batch_size": 8, **settings},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_at_t_is_predicted_by_the_logits_at_t_minus_1(kind: str, policy: Callable[..., Any]) -> None:
    network, tokens = policy(kind), torch.tensor([[5, 9, 7, 30, 2, 11]])
    mask = torch.ones_like(tokens).bool()
    whole = network(tokens).logits[0]
    found = response_predictions(network, tokens, mask, torch.tensor([4]), torch.ones(1, 2).bool())
    assert found.tokens.tolist() == [2, 11]
    torch.testing.assert_close(found.logits(), whole[3:5])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_each_sequence_by_itself(
    kind: str, policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    network = policy(kind)
    scored = score(rollout(PROMPTS, RESPONSES, left=2), network, temperature=0.7)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logprobs = (network(torch.tensor([prompt + response])).logits[0] / 0.7).log_softmax(-1)
        expected = [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response)]
        torch.testing.assert_close(scored.logprobs[row, : len(response)], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_value_reads_the_state_before_its_token() -> None:
    class PositionCritic(torch.nn.Module):
        """Its value after each token is the position of that token."""

        def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            return torch.arange(tokens.shape[1]).float().expand(tokens.shape).masked_fill(~read, torch.nan)

    tokens = torch.ones(2, 7, dtype=torch.long)
    found = response_values(PositionCritic(), tokens, tokens.bool(), torch.tensor([4, 2]), length=3)
    # The responses stand at 4, 5, 6 and at 2, 3, 4.
    # The last value is that of the state after it.
    assert found.tolist() == [[3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0]]


def test_everything_outside_of_the_response_mask_is_0(
    policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    scored = score(rollout(PROMPTS, RESPONSES, right=2), policy("llama"), policy("llama", seed=1))
    outside = ~scored.response_mask
    states = value_mask(scored.response_mask, after_end=True)
    assert (scored.values[~states] == 0).all()
    assert (scored.values[states] != 0).all()
    for found in (scored.logprobs, scored.ref_logprobs):
        assert (found[outside] == 0).all()
        assert (found[~outside] != 0).all()
        assert found.dtype == torch.float32


def test_a_critic_is_not_read_where_its_values_are_known(
    policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    class Unread(torch.nn.Module):
        def forward(self, *_: Any) -> torch.Tensor:
            raise AssertionError

    sequences = rollout(PROMPTS, RESPONSES, right=2)
    states = value_mask(sequences.response_mask, after_end=True)
    known = torch.arange(1.0, 1 + states.numel()).view(states.shape)
    found = score(sequences, policy(), critic=Unread(), values=known.where(states, torch.nan)).values
    assert torch.equal(found[states], known[states])
    assert (found[~states] == 0).all()


def test_the_kl_is_exactly_0_while_policy_and_reference_are_equal(
    policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    scored = score(rollout(PROMPTS, RESPONSES), policy(), policy(), temperature=0.7)
    assert torch.equal(scored.logprobs, scored.ref_logprobs)
    other = score(rollout(PROMPTS, RESPONSES), policy(), policy(seed=1))
    assert not torch.allclose(other.logprobs, other.ref_logprobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 3)])
def test_padding_on_either_side_changes_no_number(
    kind: str, left: int, right: int, policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    network = policy(kind)
    narrow, wide = (score(rollout(PROMPTS, RESPONSES, left=a, right=b), network) for a, b in ((0, 0), (left, right)))
    width = narrow.response_mask.shape[1]
    torch.testing.assert_close(wide.logprobs[:, :width], narrow.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide.values[:, : width + 1], narrow.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_micro_batch_changes_no_number(
    kind: str, policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    network, sequences = policy(kind), rollout(PROMPTS, RESPONSES)
    one, two, all_at_once = (score(sequences, network, micro_batch_size=size) for size in (1, 2, 8))
    for other in (two, all_at_once):
        torch.testing.assert_close(other.logprobs, one.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.values, one.values, rtol=1e-5, atol=1e-5)


def test_scores_are_what_the_reward_says_and_nothing_has_a_gradient(
    policy: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    sequences = rollout(PROMPTS, RESPONSES)
    scored = score(sequences, policy())
    assert scored.scores.tolist() == [float(len(text)) for text in sequences.responses]
    assert not any(x.requires_grad for x in vars(scored).values() if isinstance(x, torch.Tensor))
    assert scored.score_parts == {}


def test_what_a_reward_is_made_of_is_kept_beside_its_scores(
    policy: Callable[..., Any], rollout: Callable[..., Rollout], tokenizer: Any
) -> None:
    sequences, network = rollout(PROMPTS, RESPONSES), policy()
    rewards = {"ones": lambda prompts, responses: [1.0] * 3, "places": lambda prompts, responses: range(3)}
    scored = score_rollout(
        sequences,
        policy=network,
        reference=network,
        critic=Critic.from_policy(network),
        reward=load_reward(WeightedSum(rewards, {"ones": 2.0, "places": 10.0}), tokenizer),
        temperature=1.0,
        micro_batch_size=8,
    )
    assert scored.scores.tolist() == [2.0, 12.0, 22.0]
    assert {name: part.tolist() for name, part in scored.score_parts.items()} == {
        "ones": [2.0, 2.0, 2.0],
        "places": [0.0, 10.0, 20.0],
    }
    assert scored.rows(torch.tensor([2, 0])).score_parts["places"].tolist() == [20.0, 0.0]
