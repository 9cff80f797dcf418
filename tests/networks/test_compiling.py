from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy, load_reward_model
from rlhf_lightning.networks import compiling as own
from rlhf_lightning.networks.checkpointing import checkpoint_blocks
from rlhf_lightning.networks.compiling import compile_blocks, is_compiled, uncompiled
from rlhf_lightning.networks.plain_head import plain_head
from rlhf_lightning.networks.sharding import blocks

TOKENS = torch.randint(2, 258, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to the compiler, which is left out."""
    given: list[Any] = []

    def keep(function: Any, **settings: Any) -> Any:
        given.append((function, settings))
        return function

    monkeypatch.setattr(torch, "compile", keep)
    monkeypatch.setattr(own, "_compiled", {})
    return given


def test_whole_sequences_are_read_compiled_and_steps_from_a_cache_and_looks_are_not(
    compiled: list[Any], policy: Callable[..., Any]
) -> None:
    network = policy()
    compile_blocks(network)
    assert is_compiled(network)
    network(TOKENS)
    network(TOKENS, use_cache=True)
    assert plain_head(network) is network.lm_head
    with uncompiled():
        network(TOKENS, use_cache=False)
    assert compiled == []
    for _ in range(2):
        network(TOKENS, use_cache=False)
    # Once for all blocks.
    assert compiled == [(type(network.model.layers[0]).forward, {"dynamic": True})]
    assert [block.self_attn.layer_idx for block in network.model.layers] == [0, 1]


def test_a_copy_reads_its_own_weights(compiled: list[Any], policy: Callable[..., Any]) -> None:
    network = policy()
    compile_blocks(network)
    before = network(TOKENS, use_cache=False).logits
    other = deepcopy(network)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    assert is_compiled(other)
    assert not torch.equal(other(TOKENS, use_cache=False).logits, before)
    assert torch.equal(network(TOKENS, use_cache=False).logits, before)
    assert len(compiled) == 1


def test_blocks_may_be_made_again_in_the_backward_too(compiled: list[Any], policy: Callable[..., Any]) -> None:
    plain, network = policy(), policy()
    compile_blocks(network)
    checkpoint_blocks(network)
    assert is_compiled(network)
    gradients = [
        torch.autograd.grad(n(TOKENS, use_cache=False).logits.square().mean(), list(n.parameters()))
        for n in (plain, network)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert len(compiled) == 1


def test_the_setting_reaches_policy_critic_and_reward_model(tiny_model: Path) -> None:
    settings = NetworkConfig(str(tiny_model), compile=True)
    assert is_compiled(load_reward_model(settings))
    module = PPOModule(settings, reward=load_reward_model(str(tiny_model)), critic="shared_trunk", preflight=False)
    assert is_compiled(module.policy)
    assert is_compiled(module.reference)
    assert not is_compiled(load_policy(str(tiny_model)))


def test_what_cannot_be_compiled_is_an_error(
    tiny_model: Path, policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"network.compile=true with network.quantization"):
        load_policy(NetworkConfig(str(tiny_model), compile=True, quantization="int8", lora=LoRA()))
    with pytest.raises(InputError, match="Linear does not say what its blocks are"):
        compile_blocks(torch.nn.Linear(2, 2))
    checkpointed = policy()
    checkpoint_blocks(checkpointed)
    with pytest.raises(InputError, match="a block's forward was replaced"):
        compile_blocks(checkpointed)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        compile_blocks(policy())


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # torch's own, of the compiler
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiled_is_as_plain_at_any_shape_and_compiles_no_more_after_two(
    kind: str, policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    plain, network = policy(kind), policy(kind)
    compile_blocks(network)
    (block,) = {type(block) for block in blocks(network)}
    monkeypatch.setitem(own._compiled, block, torch.compile(block.forward, dynamic=True, backend=counter))
    frames = []
    for rows, length in ((4, 24), (3, 17), (2, 9)):
        found, expected = (n(TOKENS[:rows, :length], use_cache=False).logits for n in (network, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        gradients = [
            torch.autograd.grad(logits.square().mean(), list(n.parameters()))
            for n, logits in ((network, found), (plain, expected))
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        frames.append(counter.frame_count)
    # A second shape may show the compiler that a size varies; no further one costs anything.
    assert 1 <= frames[0] <= frames[1] == frames[2]
