import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning.preflight.allocations import Allocations, PhaseMemory, allocated

CPU = torch.device("cpu")
KIB = 1024


def test_what_is_there_at_once_counts_and_what_is_gone_does_not() -> None:
    known = torch.zeros(KIB)
    with Allocations([known]) as counted:
        one = torch.zeros(KIB, dtype=torch.uint8)
        view = one[:10]
        del one
        assert counted.now == KIB
        known.add_(1)
        del view
        assert counted.now == 0
        two = [torch.zeros(3 * KIB, dtype=torch.uint8) for _ in range(2)]
        del two
        torch.zeros(KIB, dtype=torch.uint8)
    assert counted.peak == PhaseMemory(activations=6 * KIB)


def test_logits_are_known_by_the_size_of_the_vocabulary() -> None:
    with Allocations(vocabulary=8) as counted:
        held = torch.zeros(16, 4, 8), torch.zeros(16, 8, dtype=torch.long), torch.zeros(8)
    assert counted.peak == PhaseMemory(activations=16 * 8 * 8 + 8 * 4, logits=16 * 4 * 8 * 4)
    assert counted.peak.total == sum(x.nbytes for x in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_without_numbers_allocates_what_work_with_numbers_does(
    dtype: torch.dtype, llama: Callable[..., Any]
) -> None:
    network = llama(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2).to(dtype)
    tokens = torch.randint(2, 258, (5, 23))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    counts = mask[:, 1:].bool()

    def work() -> None:
        logits = network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1][counts].float(), tokens[:, 1:][counts]).backward()

    found = allocated(work, [network], CPU, vocabulary=258, gradients=True)
    assert all(p.grad is None for p in network.parameters())
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    held = [x for p in network.parameters() for x in (p, p.grad) if x is not None]
    with Allocations([*held, *network.buffers()], vocabulary=258) as counted:
        work()
    assert found == counted.peak
    assert found.logits > 0


def test_gradients_that_grow_while_activations_shrink_are_counted_with_the_gradients() -> None:
    network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    x = torch.ones(2, 64)

    def work() -> None:
        network(x).square().sum().backward()

    at_once = allocated(work, [network], CPU, gradients=True).total
    growing = allocated(work, [network], CPU).total
    # Beside three gradients, the fourth while it is made; there is nothing else of that size.
    assert growing < 64 * 64 < at_once


def test_what_depends_on_a_number_cannot_be_worked_out() -> None:
    network, seen = nn.Linear(4, 1), list[float]()
    with pytest.raises(RuntimeError):
        allocated(lambda: seen.append(float(network(torch.ones(1, 4)))), [network], CPU)
    assert network(torch.ones(1, 4)).shape == (1, 1)


def test_a_weight_that_two_networks_hold_is_one() -> None:
    one, other = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    other.weight = one.weight

    def work() -> None:
        assert one.weight is other.weight
        (one(torch.ones(1, 64)) + other(torch.ones(1, 64))).sum().backward()

    allocated(work, [one, other], CPU)
    assert one.weight is other.weight


FORKED = """
import os, torch
from rlhf_lightning.preflight.allocations import allocated
network = torch.nn.Linear(2, 1)
work = lambda: network(torch.ones(1, 2)).sum().backward()
allocated(work, [network], torch.device("cpu"))
child = os.fork()
if child == 0:
    work()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_that_is_forked_afterwards_can_train() -> None:
    # In a new process: what counts is its first backward.
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=100, capture_output=True)
