"""Norms, rotary positions and gates in few passes are those of their formulas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from rlhf_lightning.functional.few_passes import rms_norm, rotate, silu_gate

EPS = 0.1
"""Large enough to be seen."""


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def norm_by_formula(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS)


def rotation_by_formula(x: Tensor, angle: Tensor) -> Tensor:
    # Pairs of units as complex numbers, each times one of length 1.
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rotate_by(x: Tensor, angle: Tensor) -> Tensor:
    angles = torch.cat([angle, angle], dim=-1)
    return rotate(x, angles.cos(), angles.sin())


def of_a_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


Function = Callable[..., Tensor]


@pytest.mark.parametrize(
    ("ours", "formula", "shapes"),
    [
        (of_a_norm, norm_by_formula, [(2, 3, 5), (5,)]),
        (of_a_norm, norm_by_formula, [(7, 4), (4,)]),
        (of_a_norm, norm_by_formula, [(4,), (4,)]),
        (silu_gate, lambda gate, up: silu(gate) * up, [(2, 3, 5), (2, 3, 5)]),
    ],
)
def test_numbers_and_gradients_are_those_of_the_formula(
    ours: Function, formula: Function, shapes: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    given = [numbers(*shape) for shape in shapes]
    before = [x.detach().clone() for x in given]
    found, expected = ours(*given), formula(*given)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((made * weights).sum(), given) for made in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(ours, given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("size", [2, 6])
def test_a_rotation_multiplies_pairs_of_units_as_complex_numbers(size: int) -> None:
    torch.manual_seed(0)
    # As a projection leaves them: heads of one token lie next to each other.
    x, angle = numbers(2, 5, 3, size), torch.randn(2, 1, 5, size // 2, dtype=torch.float64)
    found, expected = rotate_by(x.transpose(1, 2), angle), rotation_by_formula(x.transpose(1, 2), angle)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((made * weights).sum(), x) for made in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: rotate_by(x, angle), [x.transpose(1, 2)])


def test_a_rotation_of_bfloat16_is_float32_and_its_gradient_bfloat16() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(1, 2, 3, 4).bfloat16().requires_grad_(), torch.randn(1, 1, 3, 2)
    rotated = rotate_by(x, angle)
    torch.testing.assert_close(rotated, rotation_by_formula(x.float(), angle))
    weights = torch.randn_like(rotated)
    (gradient,) = torch.autograd.grad((rotated * weights).sum(), x)
    (expected,) = torch.autograd.grad((rotation_by_formula(x.float(), angle) * weights).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_weight_or_input_gets_no_gradient(frozen: int) -> None:
    given = [numbers(3, 5), numbers(5)]
    given[frozen].requires_grad_(False)
    of_a_norm(*given).sum().backward()
    assert given[frozen].grad is None
    assert given[1 - frozen].grad is not None


def test_the_gradient_of_a_norm_under_autocast_is_that_of_float32() -> None:
    torch.manual_seed(0)
    x, weight = (numbers(*shape).detach().float().requires_grad_() for shape in ((40, 32), (32,)))
    expected = torch.autograd.grad(norm_by_formula(x, weight).pow(2).sum(), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(of_a_norm(x, weight).pow(2).sum(), (x, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
