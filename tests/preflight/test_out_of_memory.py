"""Memory that really cannot be had: torch is asked for more than there are addresses."""

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.preflight.allocations import PhaseMemory
from rlhf_lightning.preflight.memory import Estimate, RoleMemory
from rlhf_lightning.preflight.out_of_memory import is_out_of_memory, naming_phase

GIB = 2**30


def estimate() -> Estimate:
    roles = {"policy": RoleMemory(weights=GIB, gradients=2 * GIB, optimizer=3 * GIB, there=0)}
    return Estimate(roles, {"scoring": PhaseMemory(logits=GIB // 2)})


def test_phase_estimate_and_settings_are_named() -> None:
    with pytest.raises(InputError) as refused, naming_phase("scoring", estimate, helps="less of everything"):
        torch.empty(2**60)
    said = str(refused.value)
    assert said.startswith("out of memory while scoring: ")
    assert "policy: weights 1.00 GiB, gradients 2.00 GiB, optimizer 3.00 GiB\n" in said
    assert "scoring: 0.50 GiB beside them (logits 0.50 GiB)\n" in said
    assert "what helps: less of everything, a smaller network" in said


def test_other_errors_and_an_inner_phase_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), naming_phase("scoring", estimate, helps=""):
        torch.zeros(3).reshape(2)
    with (
        pytest.raises(InputError, match="out of memory while sampling"),
        naming_phase("updating", estimate, helps=""),
        naming_phase("sampling", estimate, helps=""),
    ):
        torch.empty(2**60)


def test_the_error_of_an_accelerator_counts() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
