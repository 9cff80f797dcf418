from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.functional.muon import by_kind
from rlhf_lightning.modules.eight_bit import AdamW8bit
from rlhf_lightning.modules.muon import MuonWithAdamW
from rlhf_lightning.preflight.allocations import PhaseMemory
from rlhf_lightning.preflight.memory import (
    Estimate,
    RoleMemory,
    cache_bytes,
    check_memory,
    cublas_bytes,
    free_bytes,
    role_memory,
)

CPU = torch.device("cpu")
GIB = 2**30


def test_a_trained_weight_needs_a_gradient_and_two_states_a_frozen_one_nothing() -> None:
    network = torch.nn.Linear(10, 5)
    network.bias.requires_grad_(False)
    assert role_memory(network.parameters(), CPU) == RoleMemory(weights=220, gradients=200, optimizer=400, there=220)
    assert role_memory(network.parameters(), torch.device("meta")).there == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_and_states_are_as_large_as_the_optimizer_makes_them(name: str) -> None:
    network = torch.nn.Sequential(torch.nn.Embedding(96, 64), torch.nn.Linear(64, 48))
    table = network[0].weight
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters())
    if name == "muon":
        matrices, others = by_kind(network.parameters(), [table])
        optimizer = MuonWithAdamW(matrices, torch.optim.AdamW(others), lr=1.0)
    network(torch.zeros(1, dtype=torch.long)).sum().backward()
    optimizer.step()
    states = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if x.numel() > 1)
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    expected = role_memory(network.parameters(), CPU, optimizer=name, special=[table])
    assert (expected.gradients, expected.optimizer) == (gradients, states)


@pytest.mark.parametrize("settings", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}])
def test_the_cache_is_as_large_as_the_network_makes_it(settings: dict[str, int], llama: Callable[..., Any]) -> None:
    policy = llama(**settings)
    cache = policy(torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(policy, sequences=3, length=7) == size


@pytest.mark.parametrize("size", [60, 96])
def test_moments_of_8_bits_are_as_large_as_bitsandbytes_makes_them(size: int) -> None:
    # A table of 5,760 numbers that stays in 32 bits; matrices below and above the smallest in 8; a vector.
    network = torch.nn.Sequential(torch.nn.Embedding(96, 60), torch.nn.Linear(60, size))
    table = network[0].weight
    optimizer = AdamW8bit([{"params": list(network.parameters())}], [table])
    network(torch.zeros(1, dtype=torch.long)).sum().backward()
    optimizer.step()
    states = [x for s in optimizer.state.values() for name, x in s.items() if name in ("state1", "state2")]
    scales = [x for s in optimizer.state.values() for name, x in s.items() if name in ("absmax1", "absmax2")]
    expected = role_memory(network.parameters(), CPU, optimizer="adamw_8bit", special=[table])
    assert bool(scales) == (size == 96)
    assert expected.optimizer == sum(x.nbytes for x in [*states, *scales])


def test_networks_that_do_not_fit_are_an_error_and_work_that_may_not_a_warning() -> None:
    roles = {"policy": RoleMemory(weights=GIB, gradients=GIB, optimizer=2 * GIB, there=GIB)}
    work = {"sampling": PhaseMemory(cache=GIB // 2), "updating": PhaseMemory(GIB // 2, GIB // 2)}
    # Weights are there; 3 GiB of gradients and states, and the larger phase.
    assert check_memory(Estimate(roles, work), free=4 * GIB).status == "ok"
    warning = check_memory(Estimate(roles, work), free=4 * GIB - 1)
    assert (warning.status, "updating may not fit" in warning.measured) == ("warning", True)
    error = check_memory(Estimate(roles, work), free=3 * GIB - 1)
    assert (error.status, "estimate: policy 4.00 GiB" in error.measured) == ("error", True)
    assert check_memory(Estimate(roles, work), free=None).status == "note"


def test_a_network_of_seventy_billion_weights_does_not_fit_this_machine() -> None:
    with torch.device("meta"):
        network = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
                vocab_size=128256,
            )
        )
    finding = check_memory(Estimate({"policy": role_memory(network.parameters(), CPU)}, {}), free=free_bytes(CPU))
    assert finding.status == "error"
    # 70.6 billion weights of 4 bytes, four times.
    assert "policy 1051" in finding.measured


def test_free_memory_is_less_than_the_machine_has() -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert 0 < free < 2**45
    assert free_bytes(torch.device("meta")) is None


def test_the_line_says_what_each_role_and_each_phase_needs() -> None:
    roles = {"policy": RoleMemory(weights=GIB, gradients=2 * GIB, optimizer=3 * GIB, there=0)}
    work = {"sampling": PhaseMemory(cache=GIB // 4), "updating": PhaseMemory(GIB, GIB // 2)}
    said = check_memory(Estimate(roles, work), free=64 * GIB).measured
    assert "policy 6.00 GiB (weights 1.00 GiB, gradients 2.00 GiB, optimizer 3.00 GiB);" in said
    assert "sampling 0.25 GiB (cache 0.25 GiB)" in said
    assert "updating 1.50 GiB (activations 1.00 GiB, logits 0.50 GiB); still needed 7.50 GiB" in said


@pytest.mark.parametrize(("capability", "mebibytes"), [((9, 0), 32), ((8, 6), 8.125)])
def test_cublas_has_a_workspace_for_each_thread_and_stream(
    capability: tuple[int, int], mebibytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert cublas_bytes(torch.device("cuda"), workspaces=3) == 3 * mebibytes * 2**20
    assert cublas_bytes(torch.device("cpu"), workspaces=3) == 0
    # What every part of a phase counts for.
    assert PhaseMemory(1, 2, 4, kept=8, libraries=16).total == 31
