from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.networks import Critic
from rlhf_lightning.networks.critic import TrunkCritic, new_value_head
from rlhf_lightning.networks.scalar_head import scalar_head
from rlhf_lightning.networks.unpadded import last_states, reading_padding

TOKENS = torch.tensor([[5, 9, 7, 30, 2], [8, 4, 11, 12, 13]])
ALL = torch.ones(2, 5, dtype=torch.bool)
KINDS = ["llama", "gpt2"]


def head_inputs(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_a_fresh_critic_are_the_scores_of_its_reward_model_for_every_beginning(
    kind: str, classifier: Callable[..., Any]
) -> None:
    reward_model = classifier(kind)
    values = Critic.from_reward_model(reward_model)(TOKENS, ALL)
    assert values.shape == (2, 5)
    for length in range(1, 6):
        # No padding in TOKENS: the classifier's score is that of the last token given.
        scores = reward_model(input_ids=TOKENS[:, :length]).logits.squeeze(-1)
        torch.testing.assert_close(values[:, length - 1], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_critic_of_a_policy_has_its_body_and_a_new_head(kind: str, policy: Callable[..., Any]) -> None:
    language_model = policy(kind)
    critic = Critic.from_policy(language_model, torch.Generator().manual_seed(0))
    hidden = language_model(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(critic(TOKENS, ALL), critic.head(hidden).squeeze(-1), rtol=1e-4, atol=1e-4)
    assert critic.head.weight.shape == (1, 16)
    again = Critic.from_policy(language_model, torch.Generator().manual_seed(0))
    assert torch.equal(critic.head.weight, again.head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_cannot_change_a_value(kind: str, classifier: Callable[..., Any]) -> None:
    critic = Critic.from_reward_model(classifier(kind))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.bool), ALL], dim=1)
    torch.testing.assert_close(critic(padded, mask)[:, 3:], critic(TOKENS, ALL), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_sees_nothing_of_what_follows(kind: str, classifier: Callable[..., Any]) -> None:
    critic = Critic.from_reward_model(classifier(kind))
    other = TOKENS.clone()
    other[:, 3:] = 40
    torch.testing.assert_close(critic(other, ALL)[:, :3], critic(TOKENS, ALL)[:, :3])
    assert not torch.allclose(critic(other, ALL)[:, 3:], critic(TOKENS, ALL)[:, 3:])


@pytest.mark.parametrize("source", ["reward_model", "policy"])
def test_training_the_critic_leaves_its_source_alone(
    source: str, policy: Callable[..., Any], classifier: Callable[..., Any]
) -> None:
    model = classifier() if source == "reward_model" else policy()
    model.requires_grad_(False)
    critic = Critic.from_reward_model(model) if source == "reward_model" else Critic.from_policy(model)
    assert all(p.requires_grad for p in critic.parameters())
    before = head_inputs(model)
    torch.optim.SGD(critic.parameters(), lr=1.0).zero_grad()
    critic(TOKENS, ALL).square().sum().backward()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    assert torch.equal(head_inputs(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_every_weight_of_the_critic_takes_part(classifier: Callable[..., Any]) -> None:
    critic = Critic.from_reward_model(classifier("gpt2"))
    critic(TOKENS, ALL).square().sum().backward()
    assert [name for name, p in critic.named_parameters() if p.grad is None] == []


def test_values_are_float32_whatever_the_weights_are(classifier: Callable[..., Any]) -> None:
    assert Critic.from_reward_model(classifier().bfloat16())(TOKENS, ALL).dtype == torch.float32


def test_the_critic_keeps_a_head_with_a_bias(classifier: Callable[..., Any]) -> None:
    reward_model = classifier()
    reward_model.score = torch.nn.Linear(16, 1)
    critic = Critic.from_reward_model(reward_model)
    assert torch.equal(critic.head.bias, scalar_head(reward_model).bias)


def read(policy: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """Read the tokens as the policy's log-probabilities are read."""
    positions = mask.cumsum(dim=1) - 1
    policy(input_ids=tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_the_policys_states_has_the_values_of_a_copy_with_that_head(
    kind: str, policy: Callable[..., Any]
) -> None:
    network = policy(kind)
    copy = Critic.from_policy(network, torch.Generator().manual_seed(0))
    critic = TrunkCritic(network, new_value_head(network, torch.Generator().manual_seed(0)))
    assert [name for name, _ in critic.named_parameters()] == ["head.weight"]
    torch.testing.assert_close(critic(TOKENS, ALL), copy(TOKENS, ALL))
    read(network, TOKENS, ALL)
    torch.testing.assert_close(critic(TOKENS, ALL), copy(TOKENS, ALL))


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_taken_over_only_from_the_same_tokens_read_in_the_same_way(
    kind: str, policy: Callable[..., Any]
) -> None:
    network = policy(kind)
    critic = TrunkCritic(network, new_value_head(network))
    forwards: list[int] = []
    network.base_model.register_forward_hook(lambda *_: forwards.append(1))
    other, shorter = TOKENS.clone(), ALL.clone()
    shorter[0, 0] = False
    read(network, TOKENS, ALL)
    critic(TOKENS, ALL)
    assert len(forwards) == 1
    critic(TOKENS, ALL)  # taken over once: the weights may have moved since
    assert len(forwards) == 2
    for tokens, mask in ((other, ALL), (TOKENS, shorter)):
        read(network, TOKENS, ALL)
        expected = Critic(network.base_model, critic.head)(tokens, mask)
        forwards.clear()
        read(network, TOKENS, ALL)
        torch.testing.assert_close(critic(tokens, mask)[mask], expected[mask])
        assert len(forwards) == 2
    with torch.no_grad():
        read(network, TOKENS, ALL)
    assert critic(TOKENS, ALL).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_another_width_is_read_after_one_of_which_some_states_were(
    kind: str, policy: Callable[..., Any]
) -> None:
    network = policy(kind)
    critic = TrunkCritic(network, new_value_head(network))
    last = torch.zeros_like(ALL)
    last[:, -1] = True
    last_states(network.base_model, TOKENS, ALL, read=last)
    found = critic(TOKENS[:, :3], ALL[:, :3], ALL[:, :3])
    torch.testing.assert_close(found, Critic(network.base_model, critic.head)(TOKENS[:, :3], ALL[:, :3]))


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_taken_over_where_padding_was_left_out(kind: str, policy: Callable[..., Any]) -> None:
    network = policy(kind)
    critic = TrunkCritic(network, new_value_head(network))
    forwards: list[int] = []
    network.base_model.register_forward_hook(lambda *_: forwards.append(1))
    padded = ALL.clone()
    padded[0, 0] = False
    last_states(network.base_model, TOKENS, padded, position_ids=position_ids(padded))
    found = critic(TOKENS, padded)
    assert len(forwards) == 1
    with reading_padding():
        torch.testing.assert_close(found[padded], Critic(network.base_model, critic.head)(TOKENS, padded)[padded])


def test_the_value_loss_reaches_the_policys_body_through_a_shared_trunk(policy: Callable[..., Any]) -> None:
    network = policy()
    critic = TrunkCritic(network, new_value_head(network))
    read(network, TOKENS, ALL)
    critic(TOKENS, ALL).sum().backward()
    assert bool(network.model.layers[0].self_attn.q_proj.weight.grad.any())
    assert network.lm_head.weight.grad is None
