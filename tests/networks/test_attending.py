"""Ways to attend are put in for a block, into networks that take them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralModel

from rlhf_lightning.networks.attending import attending, sees_all


def test_networks_that_forget_do_not_see_all(policy: Callable[..., Any]) -> None:
    assert sees_all(policy("llama"))
    assert sees_all(policy("gpt2"))
    window: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "sliding_window": 3}
    assert not sees_all(MistralModel(MistralConfig(**window, num_attention_heads=2, num_key_value_heads=2)))
    assert not sees_all(torch.nn.Linear(2, 2))


def test_the_way_to_attend_is_put_back_also_after_a_failure(policy: Callable[..., Any]) -> None:
    network = policy()
    before = network.config._attn_implementation
    with attending(network, "another"):
        assert network.config._attn_implementation == "another"
    with pytest.raises(ZeroDivisionError), attending(network, "another"):
        raise ZeroDivisionError
    assert network.config._attn_implementation == before
