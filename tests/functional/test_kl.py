"""Expectations by exact enumeration: every token of a small vocabulary, weighted by its probability."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.kl import k1, k2, k3

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
