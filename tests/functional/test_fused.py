"""Chains that are compiled on a GPU, against the same step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_lightning.functional import fused as own
from rlhf_lightning.functional import head_logprobs as functional_head
from rlhf_lightning.functional.fused import can_be_fused, fused
from rlhf_lightning.functional.head_logprobs import head_logprobs, head_logprobs_and_entropy, total_logprob
from rlhf_lightning.rollout.draw import draw

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def doubled(x: Tensor, *, more: float) -> Tensor:
    return 2 * x + more


def test_a_cpu_takes_the_steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "WORTH_IT", 0)
    x = torch.randn(3)
    assert not can_be_fused(x)
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("it was compiled"))
    assert torch.equal(fused(doubled)(x, more=1.0), 2 * x + 1)


def test_what_has_no_numbers_is_never_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "WORTH_IT", 0)
    monkeypatch.setattr(own, "can_compile", lambda: True)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
    assert x.is_cuda
    assert not can_be_fused(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_large_tensors_on_a_gpu_are_fused_and_small_ones_are_not() -> None:
    assert [can_be_fused(torch.zeros(size, device="cuda")) for size in (2**19 - 1, 2**19)] == [False, True]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where chains are compiled if a test says so; on a CPU they are compiled in these tests alone."""
    return str(request.param)


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """``fuse(wanted)``: whether chains are compiled from now on."""

    def choose(wanted: bool) -> None:
        for module in (own, functional_head):
            monkeypatch.setattr(module, "can_be_fused", lambda x: wanted)

    return choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantity", ["total", "logprobs", "entropies"])
def test_log_probabilities_entropies_and_gradients_are_those_of_single_steps(
    quantity: str, dtype: torch.dtype, device: str, fuse: Callable[[bool], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(device) for n in (150, 2001))
    tokens = torch.randint(0, 2001, (150,), generator=generator).to(device)
    outer, bias = (torch.randn(n, generator=generator).to(device) for n in (150, 2001))
    work: dict[str, Callable[..., Any]] = {
        "total": lambda *x: total_logprob(*x, tokens),
        "logprobs": lambda *x: (head_logprobs(*x, tokens, temperature=0.7) * outer).sum(),
        "entropies": lambda *x: sum(
            (found * outer).sum() for found in head_logprobs_and_entropy(*x, tokens, temperature=0.7)
        ),
    }

    def found(fused: bool) -> list[Tensor]:
        fuse(fused)
        operands = [x.to(dtype).requires_grad_() for x in (hidden, 0.1 * weight, bias)]
        value = work[quantity](*operands)
        return [value.detach(), *torch.autograd.grad(value, operands)]

    for one, other in zip(found(True), found(False), strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        # Slopes are rounded to the type of the weights, by half of its step, before they are added up.
        assert error < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("kept", [2**27, 0])
def test_what_was_read_step_by_step_is_differentiated_so_although_its_softmax_is_larger_than_its_logits(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional_head, "KEPT_BYTES", kept)
    hidden, weight = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (20, 50))
    tokens = torch.randint(0, 50, (20,))
    functions: list[Any] = [total_logprob, lambda *x: head_logprobs(*x).sum()]

    def gradients() -> list[Tensor]:
        found = (
            torch.autograd.grad(function(hidden, weight, None, tokens), [hidden, weight]) for function in functions
        )
        return [x for pair in found for x in pair]

    expected = gradients()
    # As on a GPU, where the softmax has 4 bytes a number and the logits have 2.
    monkeypatch.setattr(functional_head, "can_be_fused", lambda x: x.element_size() == 4)
    for one, other in zip(gradients(), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "temperature"), [(4096, 1.0), (2003, 0.7)])
def test_the_same_tokens_are_drawn(
    vocabulary: int, temperature: float, dtype: torch.dtype, device: str, fuse: Callable[[bool], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(64, vocabulary, generator=generator)).to(device, dtype)
    uniform = torch.rand(64, 2, dtype=torch.float64, generator=generator).to(device)
    drawn = []
    for fused_or_not in (True, False):
        fuse(fused_or_not)
        drawn.append(draw(logits, uniform, temperature=temperature))
    (tokens, logprobs, finite), (expected, of_expected, _) = drawn
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, of_expected)
    assert finite
    fuse(True)
    logits[3, 5] = torch.nan
    assert not draw(logits, uniform, temperature=temperature)[2]
