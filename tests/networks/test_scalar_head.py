from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.scalar_head import (
    HiddenMoments,
    init_scalar_head,
    keep_fine,
    scalar_head,
    shift_scores,
)


def states(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Hidden states with something in common, and correlated among themselves."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing + 2 * torch.randn(size, generator=generator)


def moments(hidden: torch.Tensor) -> HiddenMoments:
    found = HiddenMoments(hidden.shape[1], hidden.device)
    found.update(hidden)
    return found


@pytest.mark.parametrize("size", [64, 4096])
@pytest.mark.parametrize(
    ("settings", "power"), [({}, 0.5), ({"head_init": "unit"}, 0.5), ({"head_init": "small"}, 1.0)]
)
def test_a_new_head_has_the_spread_that_is_asked_for(size: int, settings: Any, power: float) -> None:
    heads = [nn.Linear(size, 1, bias=False) for _ in range(40960 // size)]
    generator = torch.Generator().manual_seed(0)
    for head in heads:
        init_scalar_head(head, generator, **settings)
    weights = torch.cat([head.weight.flatten() for head in heads])
    assert weights.std().item() == pytest.approx(1 / (size + 1) ** power, rel=0.03)
    assert weights.mean().abs() < 4 * weights.std() / len(weights) ** 0.5


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_head_in_16_bits_is_held_in_32_and_so_is_its_copy(kind: torch.dtype) -> None:
    head = nn.Linear(8, 1, dtype=kind)
    before, read = head.weight.detach().clone(), states(3, 8).to(kind)
    expected = torch.nn.functional.linear(read.float(), head.weight.float(), head.bias.float())
    keep_fine(head)
    for one in (head, deepcopy(head)):
        assert one.weight.dtype == torch.float32
        assert torch.equal(one(read), expected)
    with torch.no_grad():
        head.weight += 1e-5
    assert not torch.equal(head.weight, before)
    # Where all is turned into 16 bits the head goes along.
    assert head.to(kind)(read).dtype == kind


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_head_with_more_bits_stays_as_it_is(kind: torch.dtype) -> None:
    head = nn.Linear(8, 1, dtype=kind)
    keep_fine(head)
    assert head.weight.dtype == kind
    assert not head._forward_pre_hooks


def test_a_new_head_has_a_bias_of_0_and_is_that_of_its_generator() -> None:
    one, other, third = (nn.Linear(8, 1) for _ in range(3))
    for head, seed in ((one, 3), (other, 3), (third, 4)):
        init_scalar_head(head, torch.Generator().manual_seed(seed))
    assert one.bias.item() == 0.0
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, third.weight)


def test_another_way_to_draw_a_head_is_refused() -> None:
    other: Any = "big"
    with pytest.raises(InputError, match="head_init='big' must be one of unit, small"):
        init_scalar_head(nn.Linear(2, 1), head_init=other)


def test_a_network_with_several_heads_or_none_is_no_reward_model() -> None:
    with pytest.raises(InputError, match="Sequential has 2 linear layers with one output"):
        scalar_head(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)))
    with pytest.raises(InputError, match="has 0 linear layers"):
        scalar_head(nn.Sequential(nn.Linear(3, 2)))


def test_moments_gathered_in_parts_are_those_of_the_whole() -> None:
    hidden = states(50, 5)
    parts = HiddenMoments(5, hidden.device)
    for part in hidden.split(7):
        parts.update(part)
    torch.testing.assert_close(parts.mean, hidden.double().mean(dim=0))
    torch.testing.assert_close(parts.covariance, hidden.double().T.cov(correction=0))


def test_moments_are_summed_over_ranks() -> None:
    hidden = states(20, 4)
    found = moments(hidden)
    found.sum_up(lambda x: 2 * x)
    assert found.count == 40
    torch.testing.assert_close(found.mean, moments(hidden).mean)
    torch.testing.assert_close(found.covariance, moments(hidden).covariance)


def test_with_a_bias_the_shift_is_exact_for_every_state() -> None:
    head, hidden = nn.Linear(5, 1), states(30, 5)
    before = head(hidden)
    seen = moments(hidden)
    spread = shift_scores(head, 2.5, mean=seen.mean, covariance=seen.covariance)
    torch.testing.assert_close(head(hidden), before + 2.5)
    assert spread == 0.0


@pytest.mark.parametrize("shift", [2.5, -0.3, 0.0])
def test_without_a_bias_the_mean_moves_by_exactly_the_shift_and_the_spread_is_reported(shift: float) -> None:
    head, hidden = nn.Linear(5, 1, bias=False), states(200, 5)
    before = head(hidden)
    seen = moments(hidden)
    spread = shift_scores(head, shift, mean=seen.mean, covariance=seen.covariance)
    change = (head(hidden) - before).squeeze(1)
    assert change.mean().item() == pytest.approx(shift, abs=1e-4)
    assert spread == pytest.approx(change.std(correction=0).item(), rel=1e-3, abs=1e-6)


def test_no_other_move_of_the_head_with_the_same_mean_varies_less() -> None:
    hidden = states(200, 5)
    seen = moments(hidden)
    head = nn.Linear(5, 1, bias=False)
    spread = shift_scores(head, 1.0, mean=seen.mean, covariance=seen.covariance)
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        other = torch.randn(5, generator=generator, dtype=torch.float64)
        change = hidden.double() @ (other / (other @ seen.mean))
        assert change.std(correction=0) >= spread * (1 - 1e-3)


def test_behind_a_layer_norm_with_a_bias_the_shift_is_the_same_for_every_state() -> None:
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(6), nn.Linear(6, 1, bias=False)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    nn.init.normal_(norm.bias)
    hidden = norm(states(300, 6)).detach()
    before = head(hidden)
    seen = moments(hidden)
    # The entries of a normalised state sum to 0: one direction of the head is constant. It is found up to the ridge.
    spread = shift_scores(head, 4.0, mean=seen.mean, covariance=seen.covariance)
    torch.testing.assert_close(head(hidden), before + 4.0, rtol=0, atol=0.04)
    assert spread < 0.04


def test_states_that_do_not_vary_at_all_are_shifted_too() -> None:
    head, hidden = nn.Linear(3, 1, bias=False), torch.tensor([[1.0, -2.0, 0.5]]).repeat(4, 1)
    before = head(hidden)
    seen = moments(hidden)
    shift_scores(head, 1.5, mean=seen.mean, covariance=seen.covariance)
    torch.testing.assert_close(head(hidden), before + 1.5)
