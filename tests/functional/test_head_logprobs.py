from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lightning.functional import head_logprobs as own
from rlhf_lightning.functional.head_logprobs import head_logprobs, head_logprobs_and_entropy, total_logprob
from rlhf_lightning.functional.logprobs import entropy, gather_logprobs

V, H, N = 13, 5, 11


@pytest.fixture(params=["one chunk", "several, all kept", "several, some made again"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one chunk":
        monkeypatch.setattr(own, "FEWEST_POSITIONS", 3)
        monkeypatch.setitem(own.CHUNK_BYTES, "cpu", 1)
    if request.param == "several, some made again":
        monkeypatch.setattr(own, "KEPT_BYTES", 2 * 3 * V * 8)


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool = True, seed: int = 0) -> tuple[Any, ...]:
    noise = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, H, generator=noise).to(dtype).requires_grad_() for n in (N, V))
    row = torch.randn(V, generator=noise).to(dtype).requires_grad_() if bias else None
    return hidden, weight, row, torch.randint(V, (N,), generator=noise)


def whole(hidden: Any, weight: Any, bias: Any, tokens: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias).unsqueeze(0)
    logprobs = gather_logprobs(logits, tokens.unsqueeze(0), temperature=temperature).squeeze(0)
    return logprobs, entropy(logits, temperature=temperature).squeeze(0)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_whole_logits(temperature: float, bias: bool) -> None:
    *operands, tokens = inputs(bias=bias)
    trained = [x for x in operands if x is not None]
    factors = torch.linspace(-1, 2, N, dtype=torch.float64)
    expected = whole(*operands, tokens, temperature)
    found = head_logprobs_and_entropy(*operands, tokens, temperature=temperature)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    losses = [(x * factors).sum() + (h * factors.flip(0)).sum() for x, h in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_log_probabilities_alone_is_right() -> None:
    *operands, tokens = inputs()
    assert torch.autograd.gradcheck(lambda *x: head_logprobs(*x, tokens, temperature=0.7), operands)


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_entropies_is_right() -> None:
    *operands, tokens = inputs()
    assert torch.autograd.gradcheck(lambda *x: head_logprobs_and_entropy(*x, tokens)[1], operands)


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_the_total_is_right_also_times_a_factor() -> None:
    *operands, tokens = inputs()
    torch.testing.assert_close(total_logprob(*operands, tokens), whole(*operands, tokens, 1.0)[0].sum())
    assert torch.autograd.gradcheck(lambda *x: -3 * total_logprob(*x, tokens), operands)


def test_a_certain_and_an_impossible_token_have_finite_values_and_gradients() -> None:
    hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[300.0, 0.0], [-300.0, 0.0]], requires_grad=True)
    logprobs, entropies = head_logprobs_and_entropy(hidden, weight, None, torch.tensor([1, 0]))
    assert logprobs.tolist() == pytest.approx([-600.0, -0.6931472])
    assert entropies.tolist() == pytest.approx([0.0, 0.6931472])
    (logprobs + entropies).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("frozen", range(2))
@pytest.mark.parametrize("function", [head_logprobs, total_logprob])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(function: Callable[..., Any], frozen: int) -> None:
    *operands, tokens = inputs(bias=False)
    function(*operands, tokens).sum().backward()
    *others, _ = inputs(bias=False)
    others[frozen].requires_grad_(False)
    function(*others, tokens).sum().backward()
    assert others[frozen].grad is None
    assert torch.equal(others[1 - frozen].grad, operands[1 - frozen].grad)


def test_logits_in_bfloat16_are_worked_on_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator).bfloat16() for rows in (9, 50))
    tokens = torch.randint(50, (9,), generator=generator)
    found, entropies = head_logprobs_and_entropy(hidden, weight, None, tokens)
    logprobs = torch.nn.functional.linear(hidden, weight).float().log_softmax(dim=1)
    assert found.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(found, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(logprobs.exp() * logprobs).sum(dim=1), rtol=1e-5, atol=1e-5)


def test_half_precision_is_worked_on_as_under_autocast() -> None:
    hidden, weight, _, tokens = inputs(torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        found, total = head_logprobs(hidden, weight, None, tokens), total_logprob(hidden, weight, None, tokens)
    expected = gather_logprobs(logits.unsqueeze(0), tokens.unsqueeze(0)).squeeze(0)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(total, expected.sum())
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    for loss in (found.sum(), total):
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert {x.dtype for x in gradients} == {torch.float32}
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("function", [lambda *x: head_logprobs(*x).sum(), total_logprob])
def test_gradients_of_a_layer_in_float32_are_added_up_over_chunks_in_float32_under_autocast(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "FEWEST_POSITIONS", 3)
    monkeypatch.setitem(own.CHUNK_BYTES, "cpu", 1)
    # What each position rounds off is little in the sum of many, unless that is rounded again; a sixteenth is exact.
    hidden = 1 + torch.rand(1000, H, generator=torch.Generator().manual_seed(0))
    layer = [torch.zeros(16, H, requires_grad=True), torch.zeros(16, requires_grad=True)]
    tokens = torch.zeros(1000, dtype=torch.long)
    expected = torch.autograd.grad(function(hidden, *layer, tokens), layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(hidden, *layer, tokens)
    for one, other in zip(torch.autograd.grad(loss, layer), expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.linalg.vector_norm(one - other) < 2**-12 * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("function", [head_logprobs, head_logprobs_and_entropy, total_logprob])
def test_states_and_layer_of_two_types_are_refused_as_by_a_linear_layer(function: Callable[..., Any]) -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        function(hidden.bfloat16(), weight, None, tokens)


def test_no_position_gives_no_log_probability_and_a_gradient_of_zero() -> None:
    hidden, weight, _, tokens = inputs(bias=False)
    none = head_logprobs(hidden[:0], weight, None, tokens[:0])
    assert none.shape == (0,)
    (none.sum() + total_logprob(hidden[:0], weight, None, tokens[:0])).backward()
    assert not weight.grad.any()


class Sizes(TorchDispatchMode):
    """The most numbers in one floating-point tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.largest = max([self.largest, *found])
        return result


@pytest.fixture
def large() -> Iterator[tuple[Any, ...]]:
    noise = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=noise).requires_grad_() for n in (1000, 20_000))
    return hidden, weight, None, torch.randint(20_000, (1000,), generator=noise)


@pytest.mark.parametrize("function", [head_logprobs, lambda *x: head_logprobs_and_entropy(*x)[1], total_logprob])
def test_no_tensor_is_as_large_as_the_logits(function: Callable[..., Any], large: tuple[Any, ...]) -> None:
    with Sizes() as sizes:
        function(*large).sum().backward()
    of_chunk, of_weight = own.FEWEST_POSITIONS * 20_000, 4 * 20_000
    assert max(of_chunk, of_weight) == sizes.largest < 1000 * 20_000 / 10


def test_the_softmaxes_that_are_kept_have_a_limit(large: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> int:
        found: Any = head_logprobs(*large)
        return sum(x.nbytes for x in found.grad_fn.saved_tensors[4:] if x is not None and x.shape[-1] == 20_000)

    monkeypatch.setattr(own, "KEPT_BYTES", 2**25)
    chunk = own.FEWEST_POSITIONS * 20_000 * 4
    assert own.KEPT_BYTES - chunk < kept() <= own.KEPT_BYTES < 1000 * 20_000 * 4
    monkeypatch.setattr(own, "KEPT_BYTES", 0)
    assert kept() == 0


def test_nothing_is_kept_without_gradient(large: tuple[Any, ...]) -> None:
    with torch.no_grad():
        assert head_logprobs(*large).grad_fn is None
