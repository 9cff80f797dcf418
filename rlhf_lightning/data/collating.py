"""From tokenised rows to batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.data.tokenizing import TokenizedPrompt, TokenSequence
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch


@dataclass(frozen=True)
class RankedSequences:
    """The responses to one prompt, each with the prompt before it, the best first."""

    sequences: Sequence[TokenSequence]
    ranks: Sequence[int]
    """The place of each among them, counted from 0; equal for a tie."""
    ratings: Sequence[float]
    """How far each is rated above the worst, 0 where nobody rated."""

    def __len__(self) -> int:
        """Return the number of tokens of the longest."""
        return max(len(sequence) for sequence in self.sequences)


def sft_batch(rows: Sequence[TokenSequence], *, pad_token_id: int) -> SFTBatch:
    """Return the sequences padded on the right; the loss counts from the first token after the prompt."""
    tokens, mask = pad_right([row.tokens for row in rows], pad_token_id)
    return SFTBatch(tokens=tokens, attention_mask=mask, loss_mask=_after_prompt(rows, mask))


def comparison_batch(rows: Sequence[RankedSequences], *, pad_token_id: int) -> ComparisonBatch:
    """Return the responses of all rows, padded on the right; a row has those to its prompt."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    tokens, mask = pad_right([sequence.tokens for sequence in sequences], pad_token_id)
    return ComparisonBatch(
        tokens=tokens,
        attention_mask=mask,
        response_mask=_after_prompt(sequences, mask),
        prompt_index=torch.tensor([i for i, row in enumerate(rows) for _ in row.sequences]),
        ranks=torch.tensor([rank for row in rows for rank in row.ranks]),
        ratings=torch.tensor([rating for row in rows for rating in row.ratings]),
    )


def prompt_batch(rows: Sequence[TokenizedPrompt], *, pad_token_id: int, columns: Sequence[str]) -> PromptBatch:
    """Return the prompts padded on the left, with the named columns: None in a row that lacks one."""
    tokens, mask = pad_left([row.tokens for row in rows], pad_token_id)
    return PromptBatch(
        prompt_tokens=tokens,
        prompt_mask=mask,
        prompts=[row.example.prompt for row in rows],
        texts=[row.text for row in rows],
        columns={name: [row.example.columns.get(name) for row in rows] for name in columns},
    )


def pad_right(sequences: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T) and the mask (B, T) of those that are real, by length and never by id."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return _filled(sequences, mask, pad_token_id), mask


def pad_left(sequences: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens (B, P) and the mask (B, P) of those that are real, by length and never by id."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = int(lengths.max())
    mask = torch.arange(width) >= width - lengths.unsqueeze(1)
    return _filled(sequences, mask, pad_token_id), mask


def _after_prompt(sequences: Sequence[TokenSequence], mask: Tensor) -> Tensor:
    """Return the mask (B, T) of the real tokens that come after the prompt."""
    prompt_lengths = torch.tensor([sequence.prompt_length for sequence in sequences])
    return mask & (torch.arange(mask.shape[1]) >= prompt_lengths.unsqueeze(1))


def _filled(sequences: Sequence[Tensor], mask: Tensor, pad_token_id: int) -> Tensor:
    tokens = torch.full(mask.shape, pad_token_id)
    tokens[mask] = torch.cat(list(sequences))
    return tokens
