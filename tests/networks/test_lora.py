"""Adapters: they start as nothing, they alone are trained, and merging them changes no logit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.lora import (
    LoRA,
    adapter_weights,
    add_adapter,
    adds_nothing,
    has_adapter,
    linear_layers,
    merge_adapter,
    merged_weights,
    remove_adapter,
    target_layers,
    train_adapter,
)

TOKENS = torch.tensor([[5, 9, 7, 30, 2], [8, 4, 11, 12, 13]])
KINDS = ["llama", "gpt2"]


def moved(network: Any) -> Any:
    """The network with an adapter that adds something."""
    generator = torch.Generator().manual_seed(1)
    for weight in adapter_weights(network).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_adds_nothing_bit_for_bit(kind: str, policy: Callable[..., Any]) -> None:
    network = policy(kind)
    before = network(TOKENS).logits
    add_adapter(network, LoRA(r=4))
    assert torch.equal(network(TOKENS).logits, before)
    assert adds_nothing(network)
    assert not adds_nothing(moved(network))
    assert not torch.allclose(network(TOKENS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(kind: str, policy: Callable[..., Any]) -> None:
    network = policy(kind)
    assert not has_adapter(network)
    add_adapter(network, LoRA(r=4))
    assert {name for name, p in network.named_parameters() if p.requires_grad} == adapter_weights(network).keys()
    network.requires_grad_(True)
    train_adapter(network)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == adapter_weights(network).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_no_logit(kind: str, policy: Callable[..., Any]) -> None:
    network = policy(kind)
    add_adapter(network, LoRA(r=4, alpha=3.0))
    unmerged = moved(network)(TOKENS).logits
    state = merged_weights(network)
    merge_adapter(network)
    assert not has_adapter(network)
    torch.testing.assert_close(network(TOKENS).logits, unmerged, rtol=1e-4, atol=1e-4)
    assert state.keys() == network.state_dict().keys()
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(state[name], weight)


def test_a_removed_adapter_leaves_the_network_as_it_was(policy: Callable[..., Any]) -> None:
    network = policy()
    before = network(TOKENS).logits
    add_adapter(network, LoRA(r=4))
    moved(network)
    remove_adapter(network)
    assert torch.equal(network(TOKENS).logits, before)
    assert not has_adapter(network)


def test_rank_and_scale_are_those_of_the_settings(policy: Callable[..., Any]) -> None:
    for lora, scale in ((LoRA(r=4, alpha=8.0), 2.0), (LoRA(r=4, alpha=8.0, rslora=True), 4.0)):
        network = policy()
        add_adapter(network, lora)
        layer = network.model.layers[0].self_attn.q_proj
        assert layer.lora_A["default"].weight.shape == (4, 16)
        moved(network)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = layer.base_layer.weight + scale * delta
        torch.testing.assert_close(merged_weights(network)["model.layers.0.self_attn.q_proj.weight"], expected)


def test_dropout_acts_in_training_mode_only(policy: Callable[..., Any]) -> None:
    network = policy()
    add_adapter(network, LoRA(r=4, dropout=0.5))
    moved(network)
    assert torch.equal(network(TOKENS).logits, network(TOKENS).logits)
    network.train()
    assert not torch.equal(network(TOKENS).logits, network(TOKENS).logits)


def test_a_new_adapter_depends_on_nothing_drawn_before_and_draws_nothing(policy: Callable[..., Any]) -> None:
    found = []
    for seed in (1, 2):
        network = policy()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        add_adapter(network, LoRA(r=4))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(adapter_weights(network))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_an_adapter_of_a_half_precision_network_is_float32(policy: Callable[..., Any]) -> None:
    network = policy().bfloat16()
    add_adapter(network, LoRA(r=4))
    assert {weight.dtype for weight in adapter_weights(network).values()} == {torch.float32}
    assert network(TOKENS).logits.dtype == torch.bfloat16


def test_targets_are_the_linear_layers_of_the_blocks(
    policy: Callable[..., Any], classifier: Callable[..., Any]
) -> None:
    llama = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert target_layers(policy("llama"), None) == llama
    assert target_layers(classifier("llama"), None) == llama
    assert target_layers(policy("gpt2"), None) == ["c_attn", "c_fc", "c_proj"]
    assert len(linear_layers(policy("llama"))) == 14
    network = policy()
    add_adapter(network, LoRA(r=4, targets=["q_proj", "v_proj"]))
    assert {name.split(".")[4] for name in adapter_weights(network)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", [["q_proj", "query"], ["lm_head"], []])
def test_a_target_that_is_not_there_is_refused_with_those_that_are(
    targets: list[str], policy: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=r"network\.lora\.targets=.*down_proj, gate_proj, .*v_proj"):
        add_adapter(policy(), LoRA(targets=targets))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"r": 0}, "r=0"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"r": 1.5}, r"r=1\.5 must be a whole number"),
        ({"alpha": "16"}, "alpha='16' must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=rf"network\.lora\.{name}"):
        LoRA(**settings)
