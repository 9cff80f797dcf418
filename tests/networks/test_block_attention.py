"""Attention in blocks of rows is that of torch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_lightning.networks import block_attention
from rlhf_lightning.networks.block_attention import attend_in_blocks, suits_blocks


@pytest.fixture(params=[1, 2 * 3 * 11, 2**19], autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key at a time, one or two of them, and all of them."""
    monkeypatch.setattr(block_attention, "ROWS", 3)
    monkeypatch.setattr(block_attention, "AT_ONCE", request.param)


def states(heads: int, *, length: int, size: int = 3) -> Tensor:
    # As a projection leaves them: heads of one token lie next to each other.
    made = torch.randn(2, length, heads * size, dtype=torch.float64)
    return made.view(2, length, heads, size).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 3, 4, 11])
def test_attention_and_its_gradients_are_those_of_torch(heads: int, key_heads: int, length: int) -> None:
    torch.manual_seed(0)
    given = [states(heads, length=length), states(key_heads, length=length), states(key_heads, length=length, size=2)]
    weights = torch.randn(2, heads, length, 2, dtype=torch.float64)
    found = attend_in_blocks(*given, scaling=0.7)
    expected = scaled_dot_product_attention(*given, is_causal=True, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((attended * weights).sum(), given) for attended in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_those_of_small_differences() -> None:
    torch.manual_seed(0)
    given = (states(2, length=5), states(1, length=5), states(1, length=5))
    assert torch.autograd.gradcheck(lambda *x: attend_in_blocks(*x, scaling=0.5), given)


def test_no_token_attends_to_one_behind_it() -> None:
    torch.manual_seed(0)
    query, key, value = (states(2, length=8).detach() for _ in range(3))
    before = attend_in_blocks(query, key, value, scaling=1.0)
    key[:, :, 4:], value[:, :, 4:] = 99.0, torch.randn(2, 2, 4, 3).double()
    after = attend_in_blocks(query, key, value, scaling=1.0)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_nothing_is_kept_for_the_gradient_that_grows_with_the_square_of_the_length() -> None:
    kept: list[int] = []
    given = [states(heads, length=40) for heads in (4, 2, 2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_in_blocks(*given, scaling=1.0)
    assert sum(kept) == sum(x.numel() for x in given)


def test_it_has_no_second_derivatives() -> None:
    given = [states(2, length=5) for _ in range(3)]
    weighted = (attend_in_blocks(*given, scaling=1.0) * states(2, length=5)).sum()
    (first,) = torch.autograd.grad(weighted, given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("heads", "key_heads", "fitting"), [(4, 4, {257, 512}), (4, 2, {65, 256, 257, 512, 1024}), (2, 1, {65, 1024})]
)
def test_it_is_taken_for_the_lengths_at_which_it_is_faster(heads: int, key_heads: int, fitting: set[int]) -> None:
    asked = {64, 1025, *fitting} | ({256, 513} if heads == key_heads else set())
    sizes = {length: (torch.empty(1, heads, length, 1), torch.empty(1, key_heads, length, 1)) for length in asked}
    assert {length for length, given in sizes.items() if suits_blocks(*given)} == fitting
