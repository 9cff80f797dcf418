from typing import Any

import pytest
import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    XLNetConfig,
)

from rlhf_lightning.networks.configs import Heads, heads_of, setting_of

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def gemma4() -> Gemma4ForCausalLM:
    """A network whose last layer sees everything, with wider heads than the windows of the others."""
    layers = ["sliding_attention", "full_attention"]
    config = Gemma4TextConfig(
        **SIZES,
        intermediate_size=32,
        layer_types=layers,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=0,
        pad_token_id=0,
    )
    return Gemma4ForCausalLM(config).eval()


def test_heads_have_equal_shares_of_the_hidden_state_unless_the_config_says_otherwise() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(**SIZES))
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32))
    shared = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, head_dim=16))
    assert heads_of(gpt2) == heads_of(plain) == [Heads(number=4, of_keys=4, width=8)] * 2
    assert heads_of(shared) == [Heads(number=4, of_keys=2, width=16)] * 2


def test_layers_may_have_heads_of_different_width() -> None:
    network = gemma4()
    assert heads_of(network) == [Heads(4, 1, 8), Heads(4, 1, 16)]
    cache = network(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    assert [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers] == [(1, 8), (1, 16)]


@pytest.mark.parametrize(
    ("config", "name", "found"),
    [
        (LlamaConfig(max_position_embeddings=99), "max_position_embeddings", 99),
        (GPT2Config(n_positions=77), "max_position_embeddings", 77),
        (T5Config(d_kv=5), "head_dim", 5),
        (GPT2Config(), "num_key_value_heads", None),
        # It stands for positions without end by -1.
        (XLNetConfig(), "max_position_embeddings", None),
    ],
)
def test_a_setting_is_found_under_the_name_that_a_family_has_for_it(config: Any, name: str, found: int | None) -> None:
    assert setting_of(config, name) == found
