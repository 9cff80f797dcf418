import pytest
import torch
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.rollout.draw import BLOCK, draw, noise, require_finite


def drawn(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    uniform = noise(len(logits), 1, torch.Generator().manual_seed(0)).squeeze(1)
    return draw(logits, uniform, temperature=temperature)[0]


def test_a_vocabulary_of_several_blocks_is_drawn_from_as_a_whole() -> None:
    count, vocabulary = 40_000, 2 * BLOCK + 7
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    logits[[0, BLOCK, vocabulary - 1]] = -torch.inf
    tokens = drawn(logits.repeat(count, 1))
    expected = count * torch.softmax(logits.double(), dim=0)
    seen = tokens.bincount(minlength=vocabulary).double()
    assert (seen[expected == 0] == 0).all()
    possible = expected > 0
    # 99.9 % of the chi-square distribution with 131 degrees of freedom.
    assert ((seen - expected).square() / expected)[possible].sum().item() < 186


def test_the_uniform_numbers_alone_decide() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]]).repeat(3, 1)
    uniform = torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.5, 0.99]], dtype=torch.float64)
    assert draw(logits, uniform, temperature=1.0)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_probabilities_are_those_of_the_scaled_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    uniform = noise(6, 1, torch.Generator().manual_seed(0)).squeeze(1)
    tokens, logprobs, finite = draw(logits, uniform, temperature=0.7)
    expected = gather_logprobs(logits.unsqueeze(1), tokens.unsqueeze(1), temperature=0.7).squeeze(1)
    torch.testing.assert_close(logprobs, expected)
    assert finite


def test_logits_that_are_not_finite_are_told_and_draw_some_token_of_the_vocabulary() -> None:
    logits = torch.full((2, 5), torch.nan)
    tokens, _, finite = draw(logits, torch.full((2, 2), 0.9, dtype=torch.float64), temperature=1.0)
    assert tokens.max() < 5
    with pytest.raises(InputError, match="logits are not finite"):
        require_finite(finite)


def test_temperature_0_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    assert drawn(logits, temperature=0.0).tolist() == [1, 0]


def test_a_low_temperature_comes_near_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).repeat(200, 1)
    assert (drawn(logits, temperature=0.05) == 1).all()
