"""Sequences of unequal length in rows with no padding between them.

    first first first second second | third third third third fill
    0     1     2     0      1      | 0     1     2     3     0

Positions begin anew with every sequence, and by them `transformers` finds where one ends: attention that takes masks
gets one in blocks, within which a sliding window stays what it is, and FlashAttention is told the lengths. It reads
all sequences in one row, which costs it nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError

LARGEST_MOVE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.02}
"""What reading several sequences in one row may move scores and log-probabilities by, by the precision."""


@dataclass(frozen=True)
class Packed:
    """Sequences (B, T) rearranged into N rows of S tokens."""

    tokens: Tensor
    """(N, S) token ids; what fills up a row is 0 and read by nothing."""
    position_ids: Tensor
    """(N, S) the position that a token had in its sequence."""
    attention_mask: Tensor | None
    """(N, 1, S, S) bool, true where the token of the third axis reads that of the last; None where positions say it."""
    kept: Tensor
    """(B, T) bool, true for the tokens that are in a row: all real ones, but of what sequences share one of them."""
    rows: Tensor
    """(B, 1) the row that a sequence is in."""
    columns: Tensor
    """(B, T) where in its row a token of a sequence is; anywhere for padding."""

    def arranged(self, values: Tensor, fill: int = 0) -> Tensor:
        """Return what belongs to the tokens (B, T) in the rows (N, S)."""
        return arranged(values, self.kept, self.rows, self.columns, self.tokens.shape, fill)


def arranged(
    values: Tensor, kept: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int], fill: int = 0
) -> Tensor:
    """Return values (B, T), those that are kept, at their places in rows of the shape (N, S)."""
    packed = values.new_full(tuple(shape), fill)
    packed[rows.expand_as(columns)[kept], columns[kept]] = values[kept]
    return packed


def first_fit(lengths: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Return the row of each sequence and where it begins there; a row has room for ``size`` tokens.

    The longest come first, each into the first row with room (first-fit decreasing; Johnson 1973).
    """
    used: list[int] = []
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, taken in enumerate(used) if taken + lengths[i] <= size), len(used))
        if row == len(used):
            used.append(0)
        rows[i], starts[i] = row, used[row]
        used[row] += lengths[i]
    return rows, starts


def pack(tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], *, in_one_row: bool = False) -> Packed:
    """Rearrange sequences padded on the right, in their order in one row, or in rows as long as the longest of them."""
    lengths = attention_mask.sum(dim=1).tolist()
    if in_one_row:
        size, rows, starts = sum(lengths), [0] * len(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    else:
        size = max(lengths)
        rows, starts = first_fit(lengths, size)
    of_row = torch.tensor(rows, device=tokens.device).unsqueeze(1)
    time = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    columns = time + torch.tensor(starts, device=tokens.device).unsqueeze(1)
    place = (attention_mask, of_row, columns, (max(rows) + 1, size))
    return Packed(
        tokens=arranged(tokens, *place),
        position_ids=arranged(time, *place),
        attention_mask=None,
        kept=attention_mask,
        rows=of_row,
        columns=columns.clamp(max=size - 1),
    )


def pack_for(network: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Packed:
    """Return `pack` as the network's attention reads it fastest: in one row where it takes lengths."""
    return pack(tokens, attention_mask, in_one_row=takes_lengths(network))


def takes_lengths(network: nn.Module) -> bool:
    """Return whether the network's attention is told lengths, and takes no masks of its own (FlashAttention)."""
    config: Any = network.config
    return "flash" in (config.get_text_config()._attn_implementation or "")


def lengths_for(network: nn.Module, packed: Packed) -> dict[str, Any]:
    """Return what attention that takes lengths is told of one row (`FlashAttentionKwargs` of `transformers`)."""
    if not takes_lengths(network):
        return {}
    lengths = packed.kept.sum(dim=1)
    ends = torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def last_hidden_state(body: nn.Module, packed: Packed) -> Float[Tensor, "N S H"]:
    """Return the last hidden states of a transformer's body."""
    network: Any = body
    added = None
    if packed.attention_mask is not None:
        # As a sum and not as a choice: every implementation of attention that takes masks adds them.
        added = torch.zeros_like(packed.attention_mask, dtype=network.dtype)
        added.masked_fill_(~packed.attention_mask, torch.finfo(network.dtype).min)
    hidden: Tensor = network(
        input_ids=packed.tokens,
        attention_mask=added,
        position_ids=packed.position_ids,
        use_cache=False,
        **lengths_for(network, packed),
    ).last_hidden_state
    return hidden


def shortest_two(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, " 2"]:
    """Return the two shortest sequences, the shorter one first: what a look at two in one row costs least for."""
    return attention_mask.sum(dim=1).argsort(stable=True)[:2]


def largest_move(network: nn.Module) -> float:
    """Return by how much rounding may move a score or a log-probability, as the network computes now."""
    model: Any = network
    kind = model.device.type
    half = torch.is_autocast_enabled(kind) and model.dtype != torch.float64
    return LARGEST_MOVE[torch.get_autocast_dtype(kind) if half else model.dtype]


def check_moved(setting: str, what: str, moved: Tensor, largest: float, network: nn.Module) -> None:
    """Raise `InputError` where a setting that puts several sequences into one row moves what a network says of them."""
    if not moved < largest:
        raise InputError(
            f"{setting}=True moves {what} of {type(network).__name__} by {float(moved):.2g}, more than {largest}: it "
            f"does not keep apart what stands in one row; set {setting}=False, or try another "
            "network.attn_implementation (sdpa, eager)"
        )
