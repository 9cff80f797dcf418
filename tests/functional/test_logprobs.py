import math

import pytest
import torch

from rlhf_lightning.functional.logprobs import entropy, gather_logprobs


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0)) * 5


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probabilities_are_those_of_the_softmax_of_logits_over_temperature(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> None:
    expected = torch.log_softmax(logits / temperature, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gather_logprobs(logits, tokens, temperature=temperature), expected)


def test_probabilities_of_all_tokens_sum_to_one(logits: torch.Tensor) -> None:
    each = [gather_logprobs(logits, torch.full((3, 4), v)).exp() for v in range(11)]
    torch.testing.assert_close(torch.stack(each).sum(dim=0), torch.ones(3, 4))


def test_a_probability_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert gather_logprobs(logits, torch.tensor([[1]])).exp().item() == pytest.approx(3 / 4)
    # Temperature 1/2 squares the odds: 9 to 1.
    assert gather_logprobs(logits, torch.tensor([[1]]), temperature=0.5).exp().item() == pytest.approx(9 / 10)


def test_logits_in_bfloat16_are_worked_on_in_float32(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    rounded = logits.bfloat16()
    found = gather_logprobs(rounded, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gather_logprobs(rounded.float(), tokens), rtol=0, atol=0)
    assert entropy(rounded).dtype == torch.float32
    torch.testing.assert_close(entropy(rounded), entropy(rounded.float()), rtol=0, atol=0)


def test_logits_in_float64_are_worked_on_in_float64(tokens: torch.Tensor) -> None:
    logits = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gather_logprobs(logits, tokens), chosen, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy(logits), -(logprobs.exp() * logprobs).sum(dim=-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_entropy_of_uniform_logits_is_log_v(temperature: float) -> None:
    uniform = torch.full((2, 3, 17), 4.2)
    torch.testing.assert_close(entropy(uniform, temperature=temperature), torch.full((2, 3), math.log(17)))


def test_the_entropy_of_a_certain_choice_is_0() -> None:
    assert entropy(torch.tensor([[[0.0, 200.0, 0.0]]])).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_entropy_is_that_of_the_categorical_distribution(logits: torch.Tensor, temperature: float) -> None:
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    torch.testing.assert_close(entropy(logits, temperature=temperature), expected)
