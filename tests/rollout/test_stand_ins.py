from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.networks.lora import LoRA, adapter_weights, add_adapter
from rlhf_lightning.rollout.stand_ins import stand_ins

TOKENS = torch.tensor([[5, 9, 7, 30], [8, 4, 11, 12]])


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(TOKENS).logits
    return found


def linear(network: Any) -> dict[str, type]:
    return {name: type(layer) for name, layer in network.named_modules()}


@pytest.fixture
def adapted(policy: Callable[..., Any]) -> Any:
    network = policy()
    add_adapter(network, LoRA(r=2))
    for weight in adapter_weights(network).values():
        torch.nn.init.normal_(weight, std=0.3)
    return network


def test_an_adapter_is_merged_in_the_block_and_taken_apart_behind_it(adapted: Any) -> None:
    before, kinds, expected = dict(adapted.state_dict()), linear(adapted), logits(adapted)
    kept = {name: weight.clone() for name, weight in before.items()}
    with stand_ins(adapted):
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
        assert not adapter_weights(adapted)
    assert linear(adapted) == kinds
    after = adapted.state_dict()
    assert list(after) == list(before)
    for name, weight in after.items():
        assert weight.data_ptr() == before[name].data_ptr()
        assert torch.equal(weight, kept[name])
    assert torch.equal(logits(adapted), expected)


def test_a_stand_in_that_is_kept_follows_the_adapter_and_stays_where_it_is(adapted: Any) -> None:
    with stand_ins(adapted, keep=True):
        first, places = logits(adapted), [p.data_ptr() for p in adapted.parameters()]
    with torch.no_grad():
        for weight in adapter_weights(adapted).values():
            weight.mul_(2)
    expected = logits(adapted)
    with stand_ins(adapted, keep=True):
        assert [p.data_ptr() for p in adapted.parameters()] == places
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, expected, atol=1e-2)


def test_a_cast_computes_what_autocast_computes_bit_for_bit(policy: Callable[..., Any]) -> None:
    network = policy()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = logits(network)
        with stand_ins(network):
            assert network.lm_head.weight.dtype == torch.bfloat16
            assert torch.equal(logits(network), expected)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_nothing_stands_in_for_a_plain_layer_or_for_an_adapter_of_16_bit_weights(
    policy: Callable[..., Any], adapted: Any
) -> None:
    for network in (policy(), adapted.to(torch.bfloat16)):
        kinds = linear(network)
        with stand_ins(network):
            assert linear(network) == kinds


def test_layers_are_back_when_the_block_fails(adapted: Any) -> None:
    kinds = linear(adapted)
    with pytest.raises(ZeroDivisionError), stand_ins(adapted):
        raise ZeroDivisionError
    assert linear(adapted) == kinds
