from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.preflight.memory import (
    RoleMemory,
    cache_bytes,
    check_memory,
    free_bytes,
    role_memory,
    score_bytes,
    update_bytes,
)

CPU = torch.device("cpu")
GIB = 2**30


def test_a_trained_weight_needs_a_gradient_and_two_states_a_frozen_one_nothing() -> None:
    network = torch.nn.Linear(10, 5)
    network.bias.requires_grad_(False)
    assert role_memory(network.parameters(), CPU) == RoleMemory(weights=220, gradients=200, optimizer=400, there=220)
    assert role_memory(network.parameters(), torch.device("meta")).there == 0


def test_gradients_and_states_are_as_large_as_adamw_makes_them() -> None:
    network = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    states = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if x.numel() > 1)
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    expected = role_memory(network.parameters(), CPU)
    assert (expected.gradients, expected.optimizer) == (gradients, states)


@pytest.mark.parametrize("settings", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}])
def test_the_cache_is_as_large_as_the_network_makes_it(settings: dict[str, int], llama: Callable[..., Any]) -> None:
    policy = llama(**settings)
    cache = policy(torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(policy, sequences=3, length=7) == size


def test_an_update_needs_more_for_more_sequences_tokens_logits_and_networks(llama: Callable[..., Any]) -> None:
    policy = llama()
    least = update_bytes(policy, sequences=2, length=8, logits=4)
    assert update_bytes(policy, sequences=4, length=8, logits=4) == 2 * least
    for more in ({"length": 9}, {"logits": 5}, {"networks": 2}):
        assert update_bytes(policy, **{"sequences": 2, "length": 8, "logits": 4, **more}) > least


def test_networks_that_do_not_fit_are_an_error_and_work_that_may_not_a_warning() -> None:
    roles = {"policy": RoleMemory(weights=GIB, gradients=GIB, optimizer=2 * GIB, there=GIB)}
    work = {"sampling": GIB // 2, "updating": GIB}
    # Weights are there; 3 GiB of gradients and states, and the larger phase.
    assert check_memory(roles, work, free=4 * GIB).status == "ok"
    warning = check_memory(roles, work, free=4 * GIB - 1)
    assert (warning.status, "updating may not fit" in warning.measured) == ("warning", True)
    error = check_memory(roles, work, free=3 * GIB - 1)
    assert (error.status, "estimate: policy 4.00 GiB" in error.measured) == ("error", True)
    assert check_memory(roles, work, free=None).status == "note"


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
    work = {"updating": update_bytes(network, sequences=1, length=8, logits=8)}
    finding = check_memory({"policy": role_memory(network.parameters(), CPU)}, work, free=free_bytes(CPU))
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
    said = check_memory(roles, {"sampling": GIB // 4, "scoring": GIB // 2, "updating": GIB}, free=64 * GIB).measured
    assert "policy 6.00 GiB (weights 1.00 GiB, gradients 2.00 GiB, optimizer 3.00 GiB);" in said
    assert "sampling about 0.25 GiB, scoring about 0.50 GiB, updating about 1.00 GiB; still needed 7.00 GiB" in said


def test_scoring_holds_one_layer_at_a_time_and_no_gradient(llama: Callable[..., Any]) -> None:
    sizes = {"sequences": 4, "length": 12, "logits": 8}
    assert score_bytes(llama(num_hidden_layers=2), **sizes) == score_bytes(llama(num_hidden_layers=4), **sizes)
    assert 0 < score_bytes(llama(), **sizes) < update_bytes(llama(), **sizes)
    assert score_bytes(llama(), **{**sizes, "sequences": 8}) == 2 * score_bytes(llama(), **sizes)
