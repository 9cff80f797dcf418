from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import MambaConfig, MambaForCausalLM

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.sharding import gathered, shard
from rlhf_lightning.rollout.generate import Sampled
from rlhf_lightning.types import PromptBatch

KINDS = ["llama", "gpt2", "mistral"]


@pytest.fixture
def by_transformers(sampled: Callable[..., Sampled]) -> Callable[..., Sampled]:
    """`sampled` by the sampler of `transformers`."""
    return partial(sampled, sampler="transformers")


def logprobs_of_one_forward(
    network: Any, prompt: torch.Tensor, response: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Those of a response (R,) behind a prompt (P,), without padding."""
    with torch.no_grad():
        logits = network(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, response.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_responses_are_those_of_the_built_in_sampler(
    kind: str,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    sampled: Callable[..., Sampled],
    by_transformers: Callable[..., Sampled],
) -> None:
    network, batch = policy(kind), prompts(pads=2)
    free = sampled(network, batch, [0], temperature=0.0).tokens
    stops = [int(free[0, 3]), int(free[1, 6])]
    ours = sampled(network, batch, stops, temperature=0.0)
    theirs = by_transformers(network, batch, stops, temperature=0.0)
    assert torch.equal(theirs.tokens, ours.tokens)
    assert not theirs.logprobs.any()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_one_forward_over_the_temperature(
    kind: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], by_transformers: Callable[..., Sampled]
) -> None:
    network, batch = policy(kind), prompts(pads=2)
    found = by_transformers(network, batch, [0], temperature=0.7)
    assert found.tokens.shape[1] == 12
    for tokens, mask, response, logprobs in zip(
        batch.prompt_tokens, batch.prompt_mask, found.tokens, found.logprobs, strict=True
    ):
        expected = logprobs_of_one_forward(network, tokens[mask], response, 0.7)
        assert torch.allclose(logprobs, expected, atol=1e-5)


def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_temperature(
    policy: Callable[..., Any], by_transformers: Callable[..., Sampled]
) -> None:
    network, count = policy("llama", vocab_size=12), 6000
    # What a generation config says is no part of the policy that is trained.
    network.generation_config.update(repetition_penalty=3.0, top_k=2, top_p=0.5, temperature=0.1)
    prompt = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        probabilities = torch.softmax(network(prompt).logits[0, -1].double() / 0.5, dim=0)
    batch = PromptBatch(prompt.repeat(count, 1), torch.ones(count, 3, dtype=torch.bool), [], [], {})
    tokens = by_transformers(network, batch, [0], max_new_tokens=1, temperature=0.5).tokens.flatten()
    expected = count * probabilities
    common = expected >= 5
    chi_square = ((tokens.bincount(minlength=12) - expected).square() / expected)[common].sum().item()
    # 99.9 % of the chi-square distribution with eleven degrees of freedom; fewer have a lower bound.
    assert common.sum() >= 5
    assert chi_square < 31.26
    assert network.generation_config.top_k == 2


def test_the_same_generator_gives_the_same_tokens_and_the_global_one_stays_where_it_was(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], by_transformers: Callable[..., Sampled]
) -> None:
    network, batch = policy(), prompts()
    first = by_transformers(network, batch, [0], seed=7).tokens
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(by_transformers(network, batch, [0], seed=7).tokens, first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(by_transformers(network, batch, [0], seed=8).tokens, first)


def test_a_network_without_a_cache_of_keys_and_values_is_sampled_from(
    prompts: Callable[..., PromptBatch], by_transformers: Callable[..., Sampled]
) -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=258, pad_token_id=0, initializer_range=0.5
    )
    network = MambaForCausalLM(config).eval()
    batch = prompts([[8, 4, 5]])
    found = by_transformers(network, batch, [0])
    expected = logprobs_of_one_forward(network, batch.prompt_tokens[0], found.tokens[0], 1.0)
    assert torch.allclose(found.logprobs[0], expected, atol=1e-5)


def test_logits_that_are_not_finite_are_refused(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], by_transformers: Callable[..., Sampled]
) -> None:
    network = policy()
    with torch.no_grad():
        network.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        by_transformers(network, prompts(), [0])


def test_weights_that_lie_in_parts_are_refused_until_they_are_gathered(
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    processes: Callable[..., list[Any]],
    by_transformers: Callable[..., Sampled],
) -> None:
    expected = by_transformers(policy(), prompts(), [0], temperature=0.0).tokens

    def work(rank: int) -> tuple[str, torch.Tensor]:
        distributed.init_process_group("gloo")
        network = policy()
        shard(network, init_device_mesh("cpu", (2,)))
        with pytest.raises(InputError) as refusal:
            by_transformers(network, prompts(), [0])
        with gathered(network):
            return str(refusal.value), by_transformers(network, prompts(), [0], temperature=0.0).tokens

    for message, tokens in processes(2, work):
        assert "set sampler=builtin, or gather_weights=always" in message
        assert torch.equal(tokens, expected)
