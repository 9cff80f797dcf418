from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.networks import Critic
from rlhf_lightning.networks.sharding import (
    blocks,
    gathered,
    is_sharded,
    largest_on_any_process,
    set_gradient_sync,
    shard,
    under,
    waits_for_others,
    whole_state,
)

# torch's counter of communication hangs hooks on every module, and takes linear layers to pieces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:For backward hooks to be called"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view"),
]

TOKENS = torch.tensor([[3, 5, 7, 9], [4, 6, 8, 2]])


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, **settings)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=3, n_head=2, n_positions=16)).eval()


def meet() -> Any:
    distributed.init_process_group("gloo")
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def units(network: nn.Module) -> int:
    return sum(isinstance(part, FSDPModule) for part in network.modules())


def test_blocks_are_the_layers_that_the_architecture_does_not_split() -> None:
    network = llama()
    assert blocks(network) == list(network.model.layers)
    assert [type(block).__name__ for block in blocks(gpt2())] == ["GPT2Block"] * 3
    critic = Critic.from_policy(network)
    assert blocks(critic) == list(critic.backbone.layers)
    assert blocks(nn.Linear(2, 2)) == []


def test_a_network_of_one_process_waits_for_nobody() -> None:
    network = llama()
    assert not is_sharded(network)
    assert not waits_for_others(network)
    with gathered(network):
        assert network(TOKENS).logits.shape == (2, 4, 31)
    set_gradient_sync(network, False)


def test_layers_of_another_type_than_the_rest_are_gathered_by_themselves(
    processes: Callable[..., list[Any]],
) -> None:
    def made() -> LlamaForCausalLM:
        network = llama()
        for layer in (network.lm_head, network.model.layers[1].mlp.down_proj):
            layer.double().register_forward_pre_hook(lambda _, states: states[0].double())
        return network

    def loss(network: nn.Module) -> Tensor:
        return network(TOKENS).logits.square().mean()

    def work(rank: int) -> tuple[int, dict[str, Tensor]]:
        network = made()
        shard(network, meet())
        loss(network).backward()
        return units(network), {name: p.grad.full_tensor() for name, p in network.named_parameters()}

    alone = made()
    loss(alone).backward()
    for count, gradients in processes(2, work):
        # Two blocks, what lies outside of them, and the two layers.
        assert count == 5
        for name, weight in alone.named_parameters():
            assert gradients[name].dtype == weight.dtype
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-5, atol=1e-8)


def test_entries_below_a_prefix() -> None:
    assert under("a.", {"a.x": 1, "b.a.x": 2, "ab": 3}) == {"x": 1}


def test_each_of_two_processes_holds_half_of_every_block(processes: Callable[..., list[Any]]) -> None:
    def work(rank: int) -> dict[str, Any]:
        mesh, network = meet(), llama()
        whole = {name: weight.clone() for name, weight in network.state_dict().items()}
        shard(network, mesh)
        shard(network, mesh)
        found = {"units": units(network), "sharded": is_sharded(network), "waits": waits_for_others(network)}
        found["parts"] = all(isinstance(p, DTensor) for p in network.parameters())
        found["held"] = sum(p.to_local().numel() for p in network.parameters())
        found["all"] = sum(p.numel() for p in network.parameters())
        with torch.no_grad():
            found["logits"] = network(TOKENS).logits
        # After a forward nothing stays whole.
        found["held after"] = sum(p.to_local().numel() for p in network.parameters())
        state = whole_state(network)
        assert not state or all(torch.equal(state[name], weight) for name, weight in whole.items())
        return found | {"names": sorted(state), "largest": largest_on_any_process(rank, torch.device("cpu"))}

    first, second = processes(2, work)
    with torch.no_grad():
        expected = llama()(TOKENS).logits
    for found in (first, second):
        assert (found["units"], found["sharded"], found["waits"], found["parts"]) == (3, True, True, True)
        assert found["largest"] == 1
        assert found["held after"] == found["held"]
        torch.testing.assert_close(found["logits"], expected)
    assert first["held"] + second["held"] == first["all"]
    assert first["held"] == pytest.approx(first["all"] / 2, rel=0.05)
    assert first["names"] == sorted(llama().state_dict())
    assert second["names"] == []


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_a_gathered_network_runs_on_one_process_alone(kind: str, processes: Callable[..., list[Any]]) -> None:
    def made() -> Any:
        network = llama()
        return network if kind == "policy" else Critic.from_policy(network, torch.Generator().manual_seed(0)).eval()

    def read(network: Any, tokens: Tensor) -> Tensor:
        return network(tokens).logits if kind == "policy" else network(tokens, torch.ones_like(tokens).bool())

    def work(rank: int) -> list[Tensor]:
        mesh, network = meet(), made()
        shard(network, mesh)
        with gathered(network), torch.no_grad(), CommDebugMode() as communication:
            assert not waits_for_others(network)
            # One process reads three times, the other once.
            found = [read(network, TOKENS + n) for n in range(3 if rank == 0 else 1)]
        assert communication.get_total_counts() == 0
        assert waits_for_others(network)
        assert all(isinstance(p, DTensor) for p in network.parameters())
        # The weights move, and what was gathered before is not read again.
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(1.5)
            return [*found, read(network, TOKENS)]

    first, second = processes(2, work)
    network = made()
    with torch.no_grad():
        expected = [read(network, TOKENS + n) for n in range(3)]
        for weight in network.parameters():
            weight.mul_(1.5)
        moved = read(network, TOKENS)
    for found, wanted in zip(first, [*expected, moved], strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(second[-1], moved)
    assert not torch.allclose(moved, expected[0])


def test_gradients_are_sent_with_the_backward_that_is_to_send_them(processes: Callable[..., list[Any]]) -> None:
    def work(rank: int) -> tuple[list[int], dict[str, Tensor]]:
        mesh, network = meet(), llama()
        shard(network, mesh)
        sent = []
        for part in range(3):
            set_gradient_sync(network, part == 2)
            with CommDebugMode() as communication:
                network(TOKENS + rank + part).logits.square().sum().backward()
            counts = communication.get_comm_counts()
            sent.append(sum(count for kind, count in counts.items() if "reduce_scatter" in str(kind)))
        return sent, {name: p.grad.full_tensor() for name, p in network.named_parameters()}

    first, second = processes(2, work)
    network = llama()
    for rank in (0, 1):
        for part in range(3):
            (network(TOKENS + rank + part).logits.square().sum() / 2).backward()
    for sent, gradients in (first, second):
        assert sent == [0, 0, 3]
        for name, weight in network.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad)
