import torch

from rlhf_lightning.data.collating import RankedSequences, comparison_batch, prompt_batch, sft_batch
from rlhf_lightning.data.formats import PromptExample
from rlhf_lightning.data.tokenizing import TokenizedPrompt, TokenSequence

PAD = 9


def sequence(*tokens: int, prompt_length: int = 1) -> TokenSequence:
    return TokenSequence(torch.tensor(tokens), prompt_length)


def test_the_loss_counts_from_the_first_response_token_through_the_last() -> None:
    batch = sft_batch([sequence(1, 3, 4, 5, 2, prompt_length=3), sequence(1, 6, 2, prompt_length=2)], pad_token_id=PAD)
    assert batch.tokens.tolist() == [[1, 3, 4, 5, 2], [1, 6, 2, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert batch.tokens[batch.loss_mask].tolist() == [5, 2, 2]


def test_the_first_token_of_a_text_is_never_a_target() -> None:
    batch = sft_batch([sequence(3, 4, 2)], pad_token_id=PAD)
    assert batch.loss_mask.tolist() == [[False, True, True]]


def test_a_token_that_looks_like_padding_counts() -> None:
    batch = sft_batch([sequence(1, PAD, 3, PAD), sequence(1, PAD)], pad_token_id=PAD)
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [False, True, False, False]]


def test_responses_of_one_prompt_are_neighbours_with_their_ranks_and_ratings() -> None:
    rows = [
        RankedSequences([sequence(1, 2), sequence(1, 3, 4)], ranks=[0, 1], ratings=[0.5, 0.0]),
        RankedSequences([sequence(5), sequence(6), sequence(7)], ranks=[0, 0, 1], ratings=[3.0, 3.0, 0.0]),
    ]
    batch = comparison_batch(rows, pad_token_id=PAD)
    assert batch.tokens.tolist() == [[1, 2, PAD], [1, 3, 4], [5, PAD, PAD], [6, PAD, PAD], [7, PAD, PAD]]
    assert batch.attention_mask.sum(dim=1).tolist() == [2, 3, 1, 1, 1]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1, 1]
    assert batch.ranks.tolist() == [0, 1, 0, 0, 1]
    assert batch.ratings.tolist() == [0.5, 0.0, 3.0, 3.0, 0.0]


def test_prompts_end_at_the_right_edge() -> None:
    rows = [
        TokenizedPrompt(torch.tensor([PAD, 4]), "Q: a", PromptExample("a", {"answer": 5}, "")),
        TokenizedPrompt(torch.tensor([1, 2, 3]), "Q: b", PromptExample("b", {"other": 6}, "")),
    ]
    batch = prompt_batch(rows, pad_token_id=PAD, columns=["answer", "other"])
    assert batch.prompt_tokens.tolist() == [[PAD, PAD, 4], [1, 2, 3]]
    assert batch.prompt_mask.tolist() == [[False, True, True], [True, True, True]]
    assert (batch.prompts, batch.texts) == (["a", "b"], ["Q: a", "Q: b"])
    assert batch.columns == {"answer": [5, None], "other": [None, 6]}
