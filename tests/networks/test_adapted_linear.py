"""A layer with an adapter computes what `peft` computes, in fewer steps."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy
from rlhf_lightning.networks.adapted_linear import AdaptedLinear
from rlhf_lightning.networks.lora import ADAPTER, adapted_layers, adapter_weights, add_adapter, merged_weights
from rlhf_lightning.networks.sharding import shard

IN, OUT = 12, 20


def layer(*, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    """A network of the layer alone, whose adapter is not new, and the layer."""
    torch.manual_seed(0)
    network: Any = Network(bias=bias).to(dtype)
    add_adapter(network, LoRA(r=3, alpha=5.0, dropout=dropout, targets=["inner"]))
    for weight in adapter_weights(network).values():
        weight.data = torch.randn_like(weight).to(dtype)
    return network.inner


class Network(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(IN, OUT, bias=bias)
        self.config: dict[str, Any] = {}

    def get_output_embeddings(self) -> None:
        return None


def factors(one: Any) -> list[nn.Parameter]:
    return [one.lora_A[ADAPTER].weight, one.lora_B[ADAPTER].weight]


def as_peft_makes_it(own: Any) -> Any:
    theirs = deepcopy(own)
    theirs.__class__ = Linear
    return theirs


def outcome(one: Any, states: Tensor, *, weight: Tensor) -> list[Tensor]:
    read = states.clone().requires_grad_()
    made = one(read)
    (made * weight.to(made.dtype)).sum().backward()
    found = [made.detach(), read.grad, *(w.grad for w in factors(one))]
    one.zero_grad()
    return found


class Counts(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(found, Tensor) and found.data_ptr() not in given:
            self.made.append(found.numel())
        return found


@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN), (0, IN), (3, 0, IN)])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...]) -> None:
    own = layer(bias=bias)
    assert type(own) is AdaptedLinear
    states, weight = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], OUT)
    expected = outcome(as_peft_makes_it(own), states, weight=weight)
    for one, other in zip(outcome(own, states, weight=weight), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_tensor_of_the_layers_size_is_made_once_in_each_direction() -> None:
    own = layer()
    states = torch.randn(50, IN, dtype=torch.float64, requires_grad=True)
    counts = []
    for one in (own, as_peft_makes_it(own)):
        with Counts() as forward:
            made = one(states)
        with Counts() as backward:
            made.sum().backward()
        counts.append((forward.made.count(50 * OUT), backward.made.count(50 * IN)))
    assert counts[0][0] == counts[0][1] == 1
    assert min(counts[1]) > 1


def test_a_new_adapter_adds_nothing_at_all() -> None:
    own = layer(dtype=torch.float32)
    own.lora_B[ADAPTER].weight.data.zero_()
    states = torch.randn(9, IN)
    assert torch.equal(own(states), own.base_layer(states))


def test_under_autocast_it_is_rounded_as_there() -> None:
    own, states, weight = layer(dtype=torch.float32), torch.randn(30, IN), torch.randn(30, OUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (outcome(one, states, weight=weight) for one in (own, as_peft_makes_it(own)))
    assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("what", ["off", "merged", "dropout", "16 bits", "trained"])
def test_what_is_asked_for_beside_the_sum_is_done(what: str) -> None:
    own = layer(dropout=0.5 if what == "dropout" else 0.0)
    states = torch.randn(6, IN, dtype=torch.float64)
    plain = own.base_layer(states)
    if what == "off":
        own.enable_adapters(False)
        assert torch.equal(own(states), plain)
    elif what == "merged":
        expected = own(states)
        own.merge()
        torch.testing.assert_close(own(states), expected)
        assert not torch.equal(own.base_layer(states), plain)
    elif what == "dropout":
        expected = own(states)
        own.train()
        assert not torch.allclose(own(states), expected)
        own.eval()
        assert torch.equal(own(states), expected)
    elif what == "16 bits":
        own.base_layer.to(torch.bfloat16)
        for weight in factors(own):
            weight.data = weight.data.float()
        assert torch.equal(own(states.bfloat16()), as_peft_makes_it(own)(states.bfloat16()))
    else:
        own.base_layer.weight.requires_grad_(True)
        own(states).sum().backward()
        assert own.base_layer.weight.grad.abs().sum() > 0


def test_quantised_and_transposed_layers_are_left_to_peft(wide_model: Any, policy: Callable[..., Any]) -> None:
    quantised = load_policy(NetworkConfig(str(wide_model), quantization="nf4", lora=LoRA(r=2)))
    transposed = policy("gpt2")
    add_adapter(transposed, LoRA(r=2))
    plain = policy("llama")
    add_adapter(plain, LoRA(r=2))
    for network, is_own in ((quantised, False), (transposed, False), (plain, True)):
        layers = [one for _, _, one in adapted_layers(network)]
        assert layers
        assert all((type(one) is AdaptedLinear) is is_own for one in layers)


def test_a_network_is_what_it_is_with_its_adapter_merged(policy: Callable[..., Any]) -> None:
    network, merged = policy("llama"), policy("llama")
    add_adapter(network, LoRA(r=2))
    for weight in adapter_weights(network).values():
        weight.data = torch.randn_like(weight) * 0.1
    merged.load_state_dict(merged_weights(network))
    tokens = torch.tensor([[5, 9, 7, 30, 2]])
    found, expected = (one(input_ids=tokens).logits for one in (deepcopy(network), merged))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - policy("llama")(input_ids=tokens).logits).abs().max() > 0.01


def test_factors_in_shards_of_their_own_are_gathered(
    policy: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    def made() -> Any:
        network = policy("llama").to(torch.bfloat16)
        add_adapter(network, LoRA(r=2))
        for weight in adapter_weights(network).values():
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.1
        return network

    def read(network: Any) -> Tensor:
        # In one type, as the layers' own weights are.
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return network(input_ids=torch.tensor([[5, 9, 7, 30, 2]]), use_cache=False).logits.float()

    def work(rank: int) -> Tensor:
        distributed.init_process_group("gloo")
        network = made()
        shard(network, init_device_mesh("cpu", (2,)))
        assert all(isinstance(weight, DTensor) for weight in adapter_weights(network).values())
        return read(network)

    expected, without = read(made()), read(policy("llama").to(torch.bfloat16))
    assert (expected - without).abs().max() > 1
    for logits in processes(2, work):
        torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.1)
