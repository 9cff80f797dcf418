from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.networks import LoRA
from rlhf_lightning.networks.critic import Critic, TrunkCritic, new_value_head
from rlhf_lightning.networks.flops import Flops, Reading, flops_of
from rlhf_lightning.networks.lora import add_adapter, train_adapter

SEQUENCES, LENGTH = 3, 20
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama(**settings: Any) -> Any:
    """Attention in matrix products, which the counter counts; heads wider than their share of the hidden size."""
    sizes = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**(sizes | settings), attn_implementation="eager"))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_inner=128, n_positions=LENGTH, attn_implementation="eager"))


def product(_: Any, one: tuple[int, int], other: tuple[int, int], **__: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


def counted(work: Callable[[], Any]) -> int:
    # The counter does not know products that are added in place, as those of adapters are.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        work()
    return counter.get_total_flops()


def everything() -> Reading:
    ones = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    return Reading.of(ones, ones)


def logits(network: Any) -> Tensor:
    return network(torch.zeros(SEQUENCES, LENGTH, dtype=torch.long), use_cache=False).logits


def sizes(network: nn.Module) -> Flops:
    found = flops_of(network)
    assert found is not None
    return found


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True)])
def test_forward_and_backward_are_what_torch_counts(make: Callable[[], Any]) -> None:
    network = make()
    with torch.no_grad():
        forward = counted(lambda: logits(network))
    # The counter also counts the angles of rotary positions.
    assert int(sizes(network).forward(everything())) == pytest.approx(forward, rel=2e-3)
    training = counted(lambda: logits(network).sum().backward())
    assert int(sizes(network).training(everything())) == pytest.approx(training, rel=2e-3)


def test_weights_below_adapters_have_no_gradient_of_their_own() -> None:
    network = llama()
    whole = int(sizes(network).training(everything()))
    add_adapter(network, LoRA(r=2))
    train_adapter(network)
    training = counted(lambda: logits(network).sum().backward())
    found = int(sizes(network).training(everything()))
    # The first layer's query, key and value also do without the gradient of what they read.
    assert found == pytest.approx(training, rel=0.04)
    assert found < 0.8 * whole


def test_a_frozen_network_has_the_backward_of_what_it_read_alone() -> None:
    network = llama()
    found = sizes(network.requires_grad_(False))
    assert (found.trained_weights, found.trained_head) == (0, 0)
    assert found.weights == sizes(llama()).trained_weights


def test_padding_and_tokens_that_are_not_predicted_take_less() -> None:
    network = sizes(llama())
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    read = Reading.of(mask, mask[:, 2:])
    assert [int(x) for x in vars(read).values()] == [8, 25 + 9, 4, 4]
    by_hand = 2 * (8 * network.weights + 4 * (network.last + network.head)) + 4 * network.attention * 34
    assert int(network.forward(read)) == by_hand
    assert network.last == 3 * 32 * 128
    scored = Reading.of(mask, mask[:, 2:], ends_are_read=True)
    assert int(network.forward(scored)) == by_hand + 2 * 2 * network.last
    trained = 2 * (8 * network.weights + 6 * network.last + 4 * network.head)
    assert int(network.training(scored)) == 2 * int(network.forward(scored)) + trained + 4 * network.attention * 34


def test_a_critic_is_its_body_and_one_on_the_policys_trunk_next_to_nothing() -> None:
    policy = llama()
    body, head = sizes(policy.base_model), SIZES["hidden_size"]
    critic = sizes(Critic.from_policy(policy))
    assert critic == replace(body, weights=body.weights + head, trained_weights=body.weights + head)
    assert critic.head == 0
    trunk = sizes(TrunkCritic(policy, new_value_head(policy)))
    assert trunk == Flops(head, head, last=0, trained_last=0, head=0, trained_head=0, attention=0)


def test_quantised_layers_are_as_large_as_they_compute(wide_model: Any) -> None:
    from rlhf_lightning.networks import NetworkConfig, load_policy

    plain = sizes(load_policy(str(wide_model)))
    quantised = sizes(load_policy(NetworkConfig(str(wide_model), quantization="nf4", lora=LoRA(r=2))))
    adapter = quantised.trained_weights
    assert 0 < adapter < plain.weights
    assert 0 < quantised.trained_last < plain.last
    assert quantised == replace(
        plain,
        weights=plain.weights + adapter,
        trained_weights=adapter,
        last=plain.last + quantised.trained_last,
        trained_last=quantised.trained_last,
        trained_head=0,
    )


def test_what_experts_take_is_not_known() -> None:
    network = llama()
    network.model.layers[0].mlp.experts = nn.Parameter(torch.zeros(2, 3, 4))
    assert flops_of(network) is None
