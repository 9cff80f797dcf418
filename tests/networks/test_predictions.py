from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rlhf_lightning.functional.logprobs import entropy, gather_logprobs
from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.networks.plain_head import plain_head
from rlhf_lightning.networks.predictions import predictions

TOKENS = torch.tensor([[5, 9, 7, 30, 2, 11], [8, 4, 3, 6, 0, 0], [40, 41, 42, 1, 0, 0]])
MASK = TOKENS != 0
COUNTED = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()


def whole(network: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """From all logits, position by position."""
    logits = network(input_ids=TOKENS, attention_mask=MASK.long(), use_cache=False).logits
    kept = COUNTED[:, 1:]
    logprobs = gather_logprobs(logits[:, :-1], TOKENS[:, 1:], temperature=temperature)
    return logprobs[kept], entropy(logits[:, :-1], temperature=temperature)[kept]


def gradients(network: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture(
    params=["llama", "tied llama", "gpt2", "gemma with a cap", "cohere with a scale", "opt", "adapter in the head"]
)
def network(request: pytest.FixtureRequest, policy: Callable[..., Any], other_family: Callable[..., Any]) -> Any:
    kind = request.param
    if kind == "adapter in the head":
        model = policy()
        return inject_adapter_in_model(LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False), model)
    made = {
        "gemma with a cap": lambda: other_family("gemma", final_logit_softcapping=3.0),
        "cohere with a scale": lambda: other_family("cohere", logit_scale=0.25),
        "opt": lambda: other_family("opt"),
    }
    return made[kind]() if kind in made else policy(kind.split()[-1], tie_word_embeddings="tied" in kind)


@pytest.mark.parametrize("positions", [False, True])
def test_all_is_as_from_the_logits_of_the_whole_network(network: Any, positions: bool) -> None:
    expected, expected_entropy = whole(network, 0.7)
    expected_gradients = gradients(network, (expected * torch.arange(1, 8)).sum() + expected_entropy.sum())
    ids = position_ids(MASK) if positions else None
    predicted = predictions(network, TOKENS, MASK, COUNTED, position_ids=ids, longest=5 if positions else None)
    assert torch.equal(predicted.tokens, TOKENS[COUNTED])
    logprobs, entropies = predicted.logprobs_and_entropy(temperature=0.7)
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predicted.logprobs(temperature=0.7), logprobs)
    torch.testing.assert_close(predicted.total_logprob(), whole(network, 1.0)[0].sum(), rtol=1e-4, atol=1e-5)
    found = gradients(network, (logprobs * torch.arange(1, 8)).sum() + entropies.sum())
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_logits_are_those_that_predict_the_counted_tokens(network: Any) -> None:
    found = predictions(network, TOKENS, MASK, COUNTED).logits()
    expected = network(input_ids=TOKENS, attention_mask=MASK.long()).logits[:, :-1][COUNTED[:, 1:]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["", "lm_head"])
def test_who_waits_for_a_call_gets_it(part: str, policy: Callable[..., Any]) -> None:
    network, calls = policy(), []
    assert plain_head(network) is not None
    hook = network.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    predictions(network, TOKENS, MASK, COUNTED)
    assert calls == [1]
    hook.remove()
    assert plain_head(network) is not None


def test_a_network_that_is_no_transformer_of_the_library_is_called_as_it_is(policy: Callable[..., Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = policy()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    network = Wrapped()
    found = predictions(network, TOKENS, MASK, COUNTED)
    assert found.states is None
    torch.testing.assert_close(found.logprobs(), predictions(network.inner, TOKENS, MASK, COUNTED).logprobs())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_vocabulary_and_the_end_of_the_last_block_are_computed_at_counted_tokens_only(
    kind: str, policy: Callable[..., Any]
) -> None:
    network = policy(kind)
    # The first look at a network reads, too.
    predictions(network, TOKENS, MASK, COUNTED)

    def flops(counted: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            predictions(network, TOKENS, MASK, counted).total_logprob().backward()
        return counter.get_total_flops()

    nothing, one = torch.zeros_like(COUNTED), torch.zeros_like(COUNTED)
    one[0, 2] = True
    none = flops(nothing)
    assert flops(COUNTED) - none == COUNTED.sum() * (flops(one) - none) > 0


def test_entropies_bring_a_gradient_where_it_is_wanted(network: Any) -> None:
    predicted = predictions(network, TOKENS, MASK, COUNTED)
    assert predicted.logprobs_and_entropy()[1].requires_grad
    logprobs, entropies = predicted.logprobs_and_entropy(entropy_gradient=False)
    assert logprobs.requires_grad
    assert not entropies.requires_grad
