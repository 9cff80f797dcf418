from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy, load_reward_model
from rlhf_lightning.networks.checkpointing import checkpoint_blocks, is_checkpointed
from rlhf_lightning.networks.unpadded import last_states

TOKENS = torch.randint(2, 258, (4, 24), generator=torch.Generator().manual_seed(0))


def kept_and_gradients(network: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Numbers that wait for the backward, weights left out, and what the backward finds."""
    weights, kept = {id(p) for p in network.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in weights and x._base is None:
            kept[id(x)] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        torch.manual_seed(0)
        loss = network(input_ids=TOKENS, use_cache=False).logits.square().mean()
    found = sum(x.numel() for x in kept.values())
    loss.backward()
    return found, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_same_and_less_is_kept_also_with_dropout_and_in_evaluation_mode(
    kind: str, training: bool, policy: Callable[..., Any]
) -> None:
    settings = {"attention_dropout": 0.3} if kind == "llama" else {"resid_pdrop": 0.3}
    plain, network = (policy(kind, **settings).train(training) for _ in range(2))
    checkpoint_blocks(network)
    kept, gradients = kept_and_gradients(network)
    kept_before, expected = kept_and_gradients(plain)
    assert kept < 0.5 * kept_before
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_copy_works_with_its_own_weights_and_twice_is_as_once(policy: Callable[..., Any]) -> None:
    network = policy()
    checkpoint_blocks(network)
    other = deepcopy(network)
    checkpoint_blocks(other)
    assert is_checkpointed(other)
    assert not is_checkpointed(policy())
    with torch.no_grad():
        other.get_submodule("model.layers.0").mlp.down_proj.weight.zero_()
    assert not torch.equal(other(TOKENS).logits, network(TOKENS).logits)
    plain = policy()
    assert torch.equal(network(TOKENS).logits, plain(TOKENS).logits)
    kept_and_gradients(other)
    assert network.lm_head.weight.grad is None
    assert all(p.grad is not None for p in other.parameters())


def test_the_setting_reaches_policy_critic_and_reward_model(tiny_model: Path) -> None:
    settings = NetworkConfig(str(tiny_model), gradient_checkpointing=True, lora=LoRA(r=2))
    assert is_checkpointed(load_policy(settings))
    assert is_checkpointed(load_reward_model(settings))
    assert not is_checkpointed(load_policy(str(tiny_model)))
    reward = load_reward_model(str(tiny_model))
    for critic in ("separate", "shared_trunk"):
        module = PPOModule(
            NetworkConfig(str(tiny_model), gradient_checkpointing=True), reward=reward, critic=critic, preflight=False
        )
        assert is_checkpointed(module.policy)
        assert is_checkpointed(module.critic) == (critic == "separate")


def test_a_network_without_named_blocks_is_an_error() -> None:
    with pytest.raises(InputError, match="gradient_checkpointing=true: Linear does not say"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_blocks_that_transformers_makes_again_are_read_as_they_are(policy: Callable[..., Any]) -> None:
    plain, network = policy().train(), policy().train()
    for block in network.base_model.layers:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    assert is_checkpointed(network)
    mask = torch.arange(24) < torch.tensor([[24], [9], [20], [3]])
    gradients = []
    for read in (plain, network):
        # What is put into a network while it is read is gone when blocks are made again.
        last_states(read.base_model, TOKENS, mask)[mask].square().mean().backward()
        gradients.append([weight.grad for weight in read.base_model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
