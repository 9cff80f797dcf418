"""Attention of short sequences is that of torch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_lightning.networks.short_attention import attend_short


def states(heads: int, *, length: int = 5, size: int = 3) -> Tensor:
    # As a projection leaves them: heads of one token lie next to each other.
    made = torch.randn(2, length, heads * size, dtype=torch.float64)
    return made.view(2, length, heads, size).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_attention_and_its_gradients_are_those_of_torch(heads: int, key_heads: int, length: int) -> None:
    torch.manual_seed(0)
    given = [states(heads, length=length), states(key_heads, length=length), states(key_heads, length=length, size=2)]
    weights = torch.randn(2, heads, length, 2, dtype=torch.float64)
    found = attend_short(*given, scaling=0.7)
    expected = scaled_dot_product_attention(*given, is_causal=True, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((attended * weights).sum(), given) for attended in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_bfloat16_is_as_precise_for_large_scores_of_attention(factor: float, key_heads: int) -> None:
    torch.manual_seed(0)
    wide = [states(heads, length=40, size=32) * x for heads, x in ((4, factor), (key_heads, factor), (key_heads, 1.0))]
    half = [x.detach().bfloat16().requires_grad_() for x in wide]
    given = [x.detach().double().requires_grad_() for x in half]
    weights = torch.randn(2, 4, 40, 32, dtype=torch.float64).bfloat16()
    found = attend_short(*half, scaling=32**-0.5)
    expected = scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 0.003
    gradients = [
        torch.autograd.grad((attended * weights).sum(), x) for attended, x in ((found, half), (expected, given))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, theirs) < 0.01


def error(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


def test_gradients_are_those_of_small_differences() -> None:
    torch.manual_seed(0)
    given = (states(2), states(1), states(1))
    assert torch.autograd.gradcheck(lambda *x: attend_short(*x, scaling=0.5), given)


def test_no_token_attends_to_one_behind_it() -> None:
    torch.manual_seed(0)
    query, key, value = (states(2, length=6).detach() for _ in range(3))
    before = attend_short(query, key, value, scaling=1.0)
    key[:, :, 4:], value[:, :, 4:] = 99.0, torch.randn(2, 2, 2, 3).double()
    after = attend_short(query, key, value, scaling=1.0)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_it_has_no_second_derivatives() -> None:
    given = (states(2), states(2), states(2))
    weighted = (attend_short(*given, scaling=1.0) * states(2)).sum()
    (first,) = torch.autograd.grad(weighted, given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
