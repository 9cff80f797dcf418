"""Roles on one backbone: equal at the start, apart in what they train, and nothing of the backbone's size twice."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import (
    Critic,
    LoRA,
    NetworkConfig,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_pretrained,
)
from rlhf_lightning.networks.adapters import read_adapter
from rlhf_lightning.networks.lora import adapter_weights, has_adapter
from rlhf_lightning.networks.roles import have_one_backbone, on_the_same_backbone, reference_of, reward_model_on

TOKENS = torch.tensor([[5, 9, 7, 30, 2], [8, 4, 11, 12, 13]])
ALL = torch.ones(2, 5, dtype=torch.bool)
BITS = ["none", "int8", "nf4"]


def moved(network: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(network).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return network


def policy_on(base: Path, quantization: str) -> Any:
    return load_policy(NetworkConfig(str(base), quantization=quantization, lora=LoRA(r=4), roles="shared"))


def storages(*networks: Any) -> dict[int, int]:
    """Bytes by the place in memory of everything that the networks hold, quantised weights and scales as well."""
    found: dict[int, int] = {}

    def add(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif type(x).__name__ in ("QuantState", "MatmulLtState"):
            for value in vars(x).values():
                add(value)

    for network in networks:
        for module in network.modules():
            for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                add(value)
                for held in vars(value).values() if isinstance(value, torch.nn.Parameter) else ():
                    add(held)
    return found


@pytest.mark.parametrize("quantization", BITS)
def test_a_copy_computes_the_same_and_holds_nothing_but_an_adapter_of_its_own(
    quantization: str, wide_model: Path
) -> None:
    policy = moved(policy_on(wide_model, quantization))
    copy = on_the_same_backbone(policy)
    assert have_one_backbone(policy, copy)
    for network in (policy, copy, policy):
        assert torch.equal(network(TOKENS).logits, policy(TOKENS).logits)
    own = sum(storages(policy, copy).values()) - sum(storages(policy).values())
    assert own == sum(p.numel() * p.element_size() for p in adapter_weights(policy).values())
    before = policy(TOKENS).logits
    moved(copy, seed=2)
    assert torch.equal(policy(TOKENS).logits, before)
    assert not torch.equal(copy(TOKENS).logits, before)


@pytest.mark.parametrize("quantization", BITS)
def test_the_reference_is_the_policy_bit_for_bit_also_after_the_policy_has_moved(
    quantization: str, wide_model: Path
) -> None:
    policy = policy_on(wide_model, quantization)
    without = reference_of(policy)
    assert not has_adapter(without)
    assert torch.equal(without(TOKENS).logits, policy(TOKENS).logits)
    at_start = moved(policy)(TOKENS).logits
    taken_over = reference_of(policy)
    assert has_adapter(taken_over)
    moved(policy, seed=2)
    assert torch.equal(taken_over(TOKENS).logits, at_start)
    assert not torch.equal(policy(TOKENS).logits, at_start)


@pytest.mark.parametrize("quantization", BITS)
def test_roles_can_be_read_in_any_order_within_one_backward(quantization: str, wide_model: Path) -> None:
    policy = moved(policy_on(wide_model, quantization))
    critic = Critic.from_policy(policy, torch.Generator().manual_seed(0), copy=on_the_same_backbone)
    moved(critic.backbone, seed=2)

    def gradients(*order: str) -> list[torch.Tensor]:
        losses = {
            "policy": lambda: policy(TOKENS).logits.square().mean(),
            "critic": lambda: critic(TOKENS, ALL).square().mean(),
        }
        policy.zero_grad()
        critic.zero_grad()
        sum(losses[role]() for role in order).backward()
        return [p.grad.clone() for p in (*policy.parameters(), *critic.parameters()) if p.grad is not None]

    one, other = gradients("policy", "critic"), gradients("critic", "policy")
    trained = [p for p in (*policy.parameters(), *critic.parameters()) if p.requires_grad]
    assert len(one) == len(trained) == 2 * 28 + 1
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("quantization", BITS)
def test_a_trained_reward_adapter_scores_on_the_policys_backbone_as_it_did_on_its_own(
    quantization: str, wide_model: Path, tmp_path: Path
) -> None:
    network = NetworkConfig(str(wide_model), quantization=quantization, lora=LoRA(r=4))
    trained = moved(load_reward_model(network))
    save_pretrained(trained, load_tokenizer(wide_model), tmp_path / "reward", export="adapter")
    policy = moved(policy_on(wide_model, quantization), seed=2)
    reward_model = load_reward_model(str(tmp_path / "reward"), trained=True, backbone=policy)
    assert have_one_backbone(reward_model, policy)
    assert torch.equal(reward_model(TOKENS).logits, trained(TOKENS).logits)
    assert not any(p.requires_grad for p in reward_model.parameters())
    critic = Critic.from_reward_model(reward_model, copy=on_the_same_backbone)
    torch.testing.assert_close(critic(TOKENS, ALL)[:, -1:], trained(TOKENS).logits)
    own = sum(storages(policy, reward_model, critic).values()) - sum(storages(policy).values())
    adapters = [*adapter_weights(reward_model).values(), *adapter_weights(critic).values()]
    assert own == sum(p.numel() * 4 for p in adapters) + 2 * critic.head.weight.numel() * 4


def test_a_reward_model_on_another_base_gets_its_own_backbone_and_that_is_said(
    wide_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    save_pretrained(load_policy(str(wide_model)), load_tokenizer(wide_model), other)
    trained = moved(load_reward_model(NetworkConfig(str(other), lora=LoRA(r=4))))
    save_pretrained(trained, load_tokenizer(wide_model), tmp_path / "reward", export="adapter")
    policy = policy_on(wide_model, "none")
    reward_model = load_reward_model(str(tmp_path / "reward"), trained=True, backbone=policy)
    assert not have_one_backbone(reward_model, policy)
    assert "gets a backbone of its own" in caplog.text


def test_an_adapter_without_a_head_is_no_reward_model(wide_model: Path, tmp_path: Path) -> None:
    policy = policy_on(wide_model, "none")
    save_pretrained(policy, load_tokenizer(wide_model), tmp_path / "adapter", export="adapter")
    adapter = read_adapter(str(tmp_path / "adapter"))
    assert adapter is not None
    with pytest.raises(InputError, match="has no scalar head"):
        reward_model_on(policy, adapter)


def test_shared_roles_need_adapters(wide_model: Path) -> None:
    with pytest.raises(InputError, match=r"network\.roles=shared needs network\.lora"):
        NetworkConfig(str(wide_model), roles="shared")
