"""Several responses to one prompt in one row: the prompt is read once, and nothing is padded between responses.

A row is the prompt's tokens and after them each response's own, all responses at the positions that follow the prompt:

    prompt prompt prompt | first first | second second second
    0      1      2        3     4       3      4      5

A token reads what stands before it in its own segment, and the prompt. So each response is read as if it stood alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class SharedPrompts:
    """Sequences (B, T) rearranged into one row for each of N prompts, S tokens long."""

    tokens: Tensor
    """(N, S) token ids; what fills up a row is 0 and read by nothing."""
    position_ids: Tensor
    """(N, S) the position that a token had in its sequence."""
    attention_mask: Tensor
    """(N, 1, S, S) bool, true where the token of the third axis reads that of the last."""
    rows: Tensor
    """(B, 1) the row that a sequence is in."""
    columns: Tensor
    """(B, T) where in its row a token of a sequence is; anywhere for padding."""


def share_prompts(
    tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], prompt_index: Int[Tensor, " B"]
) -> SharedPrompts:
    """Rearrange sequences padded on the right, those of one prompt next to each other.

    What the sequences of a prompt have in common at their beginning is kept once, but no sequence's last token.
    """
    device = tokens.device
    lengths = attention_mask.sum(dim=1)
    is_first = torch.ones_like(prompt_index, dtype=torch.bool)
    is_first[1:] = prompt_index[1:] != prompt_index[:-1]
    first = is_first.nonzero().squeeze(1)[prompt_index]
    common = (tokens == tokens[first]).int().cumprod(dim=1).sum(dim=1).minimum(lengths - 1)
    shared = common.new_full((int(is_first.sum()),), tokens.shape[1])
    shared = shared.scatter_reduce(0, prompt_index, common, reduce="amin")[prompt_index].unsqueeze(1)
    # Where the own part of a sequence begins: behind the shared part and the own parts of those before it.
    own = lengths.unsqueeze(1) - shared
    before = own.cumsum(dim=0) - own
    before = before - before[first]
    time = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    columns = torch.where(time < shared, time, time + before)
    kept = attention_mask & ((time >= shared) | is_first.unsqueeze(1))
    size = int((shared + before + own).max())
    place = prompt_index.unsqueeze(1).expand_as(tokens)[kept], columns[kept]

    def rearranged(values: Tensor, fill: int) -> Tensor:
        packed = torch.full((len(is_first.nonzero()), size), fill, dtype=torch.long, device=device)
        packed[place] = values[kept]
        return packed

    sequence = torch.arange(1, len(tokens) + 1, device=device).unsqueeze(1)
    segments = rearranged(torch.where(time < shared, 0, sequence), -1)
    reads = (segments.unsqueeze(1) == segments.unsqueeze(2)) | (segments == 0).unsqueeze(1)
    return SharedPrompts(
        tokens=rearranged(tokens, 0),
        position_ids=rearranged(time, 0),
        attention_mask=reads.tril().unsqueeze(1),
        rows=prompt_index.unsqueeze(1),
        columns=columns.clamp(max=size - 1),
    )


def last_hidden_state(body: nn.Module, shared: SharedPrompts) -> Float[Tensor, "N S H"]:
    """Return the last hidden states of a transformer's body; its attention must take a mask of four axes."""
    network: Any = body
    lowest = torch.finfo(network.dtype).min
    # As a sum and not as a choice: every implementation of attention that takes masks adds them.
    added = torch.zeros_like(shared.attention_mask, dtype=network.dtype).masked_fill(~shared.attention_mask, lowest)
    hidden: Tensor = network(
        input_ids=shared.tokens, attention_mask=added, position_ids=shared.position_ids, use_cache=False
    ).last_hidden_state
    return hidden
