"""Expectations by exact enumeration: every token of a small vocabulary, weighted by its probability."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.kl import adapted_beta, k1, k1_weighted, k2, k3

Estimator = Callable[[Tensor, Tensor], Tensor]
V = 6


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.fixture
def ref_logprobs() -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two vectors of log-probabilities."""
    return (p.exp() * (p - q)).sum()


def expectation(estimator: Estimator, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The mean over samples from the policy; the probabilities of the samples themselves are not differentiated."""
    found = estimator(logprobs.unsqueeze(0), ref_logprobs.unsqueeze(0)).squeeze(0)
    return (logprobs.exp().detach() * found).sum()


def gradient(of: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(of, logits)[0]


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator, logits: Tensor, ref_logprobs: Tensor) -> None:
    logprobs = logits.log_softmax(0)
    torch.testing.assert_close(expectation(estimator, logprobs, ref_logprobs), kl(logprobs, ref_logprobs))


def test_k2_is_half_the_mean_squared_log_ratio_and_biased(logits: Tensor, ref_logprobs: Tensor) -> None:
    logprobs = logits.log_softmax(0)
    found = expectation(k2, logprobs, ref_logprobs)
    torch.testing.assert_close(found, (logprobs.exp() * (logprobs - ref_logprobs) ** 2 / 2).sum())
    assert (found - kl(logprobs, ref_logprobs)).abs() > 1e-2


def test_k1_can_be_negative_and_k2_and_k3_cannot(logits: Tensor, ref_logprobs: Tensor) -> None:
    p, q = logits.log_softmax(0).unsqueeze(0), ref_logprobs.unsqueeze(0)
    assert (k1(p, q) < 0).any()
    assert (k2(p, q) >= 0).all()
    assert (k3(p, q) >= 0).all()


def test_all_are_0_where_the_policies_agree(ref_logprobs: Tensor) -> None:
    for estimator in (k1, k2, k3):
        assert (estimator(ref_logprobs.unsqueeze(0), ref_logprobs.unsqueeze(0)) == 0).all()


def test_differentiating_k1_gives_no_gradient(logits: Tensor, ref_logprobs: Tensor) -> None:
    found = gradient(expectation(k1, logits.log_softmax(0), ref_logprobs), logits)
    torch.testing.assert_close(found, torch.zeros(V, dtype=torch.float64))


def test_differentiating_k2_gives_the_gradient_of_the_kl_to_the_reference(logits: Tensor, ref_logprobs: Tensor) -> None:
    found = gradient(expectation(k2, logits.log_softmax(0), ref_logprobs), logits)
    torch.testing.assert_close(found, gradient(kl(logits.log_softmax(0), ref_logprobs), logits))


def test_differentiating_k3_gives_the_gradient_of_the_other_direction(logits: Tensor, ref_logprobs: Tensor) -> None:
    found = gradient(expectation(k3, logits.log_softmax(0), ref_logprobs), logits)
    torch.testing.assert_close(found, gradient(kl(ref_logprobs, logits.log_softmax(0)), logits))


def test_k1_as_a_reward_gives_the_gradient_of_the_kl_to_the_reference(logits: Tensor, ref_logprobs: Tensor) -> None:
    logprobs = logits.log_softmax(0)
    as_reward = k1(logprobs.unsqueeze(0), ref_logprobs.unsqueeze(0)).squeeze(0).detach()
    policy_gradient = gradient((logprobs.exp().detach() * as_reward * logprobs).sum(), logits)
    torch.testing.assert_close(policy_gradient, gradient(kl(logits.log_softmax(0), ref_logprobs), logits))


def two_steps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A policy over responses of two tokens out of three, and its reference: logits of the first and of the second."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((3,), (3, 3), (3,), (3, 3))
    first, second, ref_first, ref_second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return first.requires_grad_(), second.requires_grad_(), ref_first, ref_second


def all_responses(first: Tensor, second: Tensor) -> Tensor:
    """Log-probabilities (9, 2) of both tokens of all nine responses."""
    rows = [(first.log_softmax(0)[i], second.log_softmax(1)[i, j]) for i in range(3) for j in range(3)]
    return torch.stack([torch.stack(row) for row in rows])


def test_the_weighted_k1_has_the_gradient_of_the_kl_of_whole_responses_and_k2_lacks_the_credit_for_later_tokens() -> (
    None
):
    first, second, ref_first, ref_second = two_steps()
    logprobs, ref_logprobs = all_responses(first, second), all_responses(ref_first, ref_second)
    exact = (logprobs.sum(1).exp() * (logprobs - ref_logprobs).sum(1)).sum()
    expected = torch.autograd.grad(exact, [first, second], retain_graph=True)
    probabilities = logprobs.sum(1).exp().detach()

    def found(losses: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((probabilities * losses.sum(1)).sum(), [first, second], retain_graph=True)

    everything = torch.ones(9, 2, dtype=torch.bool)
    for gradient, exactly in zip(found(k1_weighted(logprobs, ref_logprobs, everything)), expected, strict=True):
        torch.testing.assert_close(gradient, exactly, rtol=1e-12, atol=1e-12)
    of_first, of_second = found(k2(logprobs, ref_logprobs))
    torch.testing.assert_close(of_second, expected[1], rtol=1e-12, atol=1e-12)
    assert (of_first - expected[0]).abs().max() > 1e-2


def test_the_weighted_k1_knows_nothing_of_padding() -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, 5.0]])
    found = k1_weighted(logprobs, ref_logprobs, torch.tensor([[True, True, False]]))
    # k1 is .5 and -1; to go: -.5 and -1.
    assert found.tolist() == [[0.5, 2.0, 0.0]]


def test_beta_moves_by_at_most_a_fifth_a_rollout_and_keeps_its_sign() -> None:
    assert adapted_beta(0.05, 0.0, target=6.0, horizon=100.0, episodes=512) == pytest.approx(0.04)
    assert adapted_beta(0.05, 60.0, target=6.0, horizon=1.0, episodes=6) == pytest.approx(0.06)


def test_the_adapted_beta_is_a_golden_sequence() -> None:
    betas, beta = [], 0.1
    for kl in (12.0, 9.0, 6.6, 6.0, 3.0, 0.0, -4.0):
        beta = adapted_beta(beta, kl, target=6.0, horizon=1000.0, episodes=100)
        betas.append(beta)
    # Errors 1, .5, .1, 0, -.5, -1, -1.7: clipped at a fifth, of which a tenth counts.
    factors = [1.02, 1.02, 1.01, 1.0, 0.98, 0.98, 0.98]
    assert betas == pytest.approx([0.1 * math.prod(factors[: i + 1]) for i in range(7)], rel=1e-12)


def test_rollouts_in_parts_move_beta_as_one_rollout_to_first_order() -> None:
    once = adapted_beta(1.0, 3.3, target=3.0, horizon=1e6, episodes=512)
    parts = 1.0
    for _ in range(4):
        parts = adapted_beta(parts, 3.3, target=3.0, horizon=1e6, episodes=128)
    assert parts == pytest.approx(once, rel=1e-8)
    assert once > 1.0


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_does_not_reach_beta(kl: float) -> None:
    with pytest.raises(ValueError, match=f"kl={kl} must be finite"):
        adapted_beta(0.1, kl, target=6.0, horizon=1000.0, episodes=100)
