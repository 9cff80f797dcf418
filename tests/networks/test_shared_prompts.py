"""Several responses in one row are read as if each stood alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.networks.packing import last_hidden_state
from rlhf_lightning.networks.shared_prompts import share_prompts

# Two prompts; the first two responses begin alike, and one sequence is the beginning of another.
SEQUENCES = [[[50, 60, 61, 1], [50, 60, 62, 63, 1]], [[70, 71, 30, 31], [70, 71, 30, 31, 32, 1], [70, 71, 1]]]


def padded(pads: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = [row for of_prompt in SEQUENCES for row in of_prompt]
    width = max(map(len, rows)) + pads
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return tokens, mask, torch.tensor([i for i, of_prompt in enumerate(SEQUENCES) for _ in of_prompt])


def test_a_row_is_the_prompt_and_after_it_what_each_response_has_of_its_own() -> None:
    shared = share_prompts(*padded(0))
    assert shared.tokens.tolist() == [[50, 60, 61, 1, 62, 63, 1, 0, 0], [70, 71, 30, 31, 30, 31, 32, 1, 1]]
    assert shared.position_ids[0, :7].tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert shared.position_ids[1].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 2]


def test_a_token_reads_the_prompt_and_its_own_response_up_to_itself() -> None:
    reads = share_prompts(*padded(0)).attention_mask[0, 0]
    assert reads[3].nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
    assert reads[6].nonzero().squeeze(1).tolist() == [0, 1, 4, 5, 6]
    # Nothing that counts reads what fills up the row.
    assert not reads[:7, 7:].any()


@pytest.mark.parametrize("pads", [0, 3])
def test_every_token_is_found_in_its_row(pads: int) -> None:
    tokens, mask, prompt_index = padded(pads)
    shared = share_prompts(tokens, mask, prompt_index)
    assert torch.equal(shared.tokens[shared.rows, shared.columns][mask], tokens[mask])
    assert torch.equal(
        shared.position_ids[shared.rows, shared.columns][mask], torch.arange(tokens.shape[1]).expand_as(tokens)[mask]
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_hidden_states_are_those_of_each_sequence_alone(
    kind: str, attn_implementation: str, classifier: Callable[..., Any]
) -> None:
    network = classifier(kind, attn_implementation=attn_implementation)
    tokens, mask, prompt_index = padded(2)
    shared = share_prompts(tokens, mask, prompt_index)
    found = last_hidden_state(network.base_model, shared)[shared.rows, shared.columns]
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = network.base_model(input_ids=tokens[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(found[row, :length], alone, rtol=1e-4, atol=1e-5)


def test_one_response_is_a_row_as_it_is() -> None:
    tokens = torch.tensor([[5, 6, 7, 0]])
    shared = share_prompts(tokens, tokens > 0, torch.tensor([0]))
    assert shared.tokens.tolist() == [[5, 6, 7]]
    assert shared.attention_mask[0, 0].tolist() == torch.ones(3, 3).tril().bool().tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_several_prompts_with_their_responses_may_be_in_one_row(kind: str, classifier: Callable[..., Any]) -> None:
    network = classifier(kind)
    tokens, mask, prompt_index = padded(1)
    # A third prompt as long as the first two together.
    tokens = torch.cat([torch.nn.functional.pad(tokens, (0, 8)), torch.tensor([[90] + [91] * 12 + [1] * 2] * 2)])
    mask, prompt_index = tokens > 0, torch.cat([prompt_index, torch.tensor([2, 2])])
    alone, packed = (share_prompts(tokens, mask, prompt_index, packing=packing) for packing in (False, True))
    assert alone.tokens.shape == (3, 16)
    assert packed.tokens.shape == (2, 16)
    expected, found = (last_hidden_state(network.base_model, x)[x.rows, x.columns][mask] for x in (alone, packed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
