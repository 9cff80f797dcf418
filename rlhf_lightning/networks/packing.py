"""Sequences of unequal length in rows with no padding between them.

    first first first second second | third third third third fill
    0     1     2     0      1      | 0     1     2     3     0

Attention reads each sequence by itself (`by_sequence`) or, of FlashAttention, is told the lengths, and then all of
them stand in one row. Other ways to attend get a mask in blocks. `transformers` makes it of the positions, which begin
anew with every sequence, and within it a sliding window stays what it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.attending import attending
from rlhf_lightning.networks.by_sequence import BY_SEQUENCE, Beginnings, Sequences, attends_by_sequence
from rlhf_lightning.networks.few_passes import in_few_passes
from rlhf_lightning.networks.last_block import reading_states
from rlhf_lightning.networks.length_groups import group_by_length

LARGEST_MOVE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.02}
"""What reading several sequences in one row may move scores and log-probabilities by, by the precision."""


@dataclass(frozen=True)
class Packed:
    """Sequences (B, T) rearranged into N rows of S tokens."""

    tokens: Tensor
    """(N, S) token ids; what fills up a row is 0 and read by nothing."""
    position_ids: Tensor
    """(N, S) the position that a token had in its sequence."""
    kept: Tensor
    """(B, T) bool, true for the tokens that are in a row: all real ones, but of what sequences share one of them."""
    rows: Tensor
    """(B, 1) the row that a sequence is in."""
    columns: Tensor
    """(B, T) where in its row a token of a sequence is; anywhere for padding."""
    shared: Tensor | None = None
    """(B, 1) how many tokens at its beginning a sequence shares with the others of its prompt."""
    leader: Tensor | None = None
    """(B,) the first sequence of the prompt, whose tokens these are."""

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """(N, 1, S, S) bool, where the token of the third axis reads that of the last; None if positions say it."""
        if self.shared is None or self.leader is None:
            return None
        batch, length = self.kept.shape
        sequence = torch.arange(1, batch + 1, device=self.kept.device).unsqueeze(1).expand(batch, length)
        time = torch.arange(length, device=self.kept.device)
        segments = self.arranged(torch.where(time < self.shared, 0, sequence), fill=-1)
        prompts = self.arranged(self.leader.unsqueeze(1).expand(batch, length), fill=-1)
        reads = (segments.unsqueeze(1) == segments.unsqueeze(2)) | (segments == 0).unsqueeze(1)
        reads &= prompts.unsqueeze(1) == prompts.unsqueeze(2)
        return reads.tril().unsqueeze(1)

    @cached_property
    def sequences(self) -> Sequences:
        """Where the tokens of the sequences stand."""
        batch, length = self.kept.shape
        time = torch.arange(length, device=self.kept.device)
        groups = group_by_length(((time + 1) * self.kept).amax(dim=1))
        number, is_numbered = groups.numbers(length)
        tokens = self.arranged(number, fill=-1).view(-1)
        places = groups.by_number(self.rows * self.tokens.shape[1] + self.columns)
        beginnings = None
        if self.shared is not None and self.leader is not None:
            longest = int(self.shared.max())
            is_shared = self.kept & (time < self.shared)
            in_order = torch.empty_like(groups.order)
            in_order[groups.order] = torch.arange(batch, device=self.kept.device)
            sequence, step = is_shared.nonzero(as_tuple=True)
            beginnings = Beginnings(
                longest,
                leader=in_order[self.leader[groups.order]],
                places=places[number[is_shared]],
                tokens=in_order[sequence] * longest + step,
            )
        return Sequences(
            groups=groups,
            places=places,
            tokens=tokens.clamp(min=0),
            fill=(tokens < 0).nonzero().squeeze(1),
            not_kept=number[is_numbered & ~self.kept],
            beginnings=beginnings,
        )

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
        kept=attention_mask,
        rows=of_row,
        columns=columns.clamp(max=size - 1),
    )


def pack_for(network: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Packed:
    """Return `pack` as the network's attention reads it fastest: in one row where that costs attention nothing."""
    return pack(tokens, attention_mask, in_one_row=takes_lengths(network) or attends_by_sequence(network))


def takes_lengths(network: nn.Module) -> bool:
    """Return whether the network's attention is told lengths, and takes no masks of its own (FlashAttention)."""
    config: Any = network.config
    return "flash" in (config.get_text_config()._attn_implementation or "")


@contextmanager
def reading(network: nn.Module, packed: Packed) -> Iterator[dict[str, Any]]:
    """Yield what the network is told besides the tokens of rows, in a block in which it is called with it."""
    told: dict[str, Any] = {"attention_mask": None, "position_ids": packed.position_ids}
    if attends_by_sequence(network):
        with attending(network, BY_SEQUENCE):
            yield {**told, "sequences": packed.sequences}
        return
    if packed.attention_mask is not None:
        model: Any = network
        # As a sum and not as a choice: every implementation of attention that takes masks adds them.
        added = torch.zeros_like(packed.attention_mask, dtype=model.dtype)
        told["attention_mask"] = added.masked_fill_(~packed.attention_mask, torch.finfo(model.dtype).min)
    elif takes_lengths(network):
        # `FlashAttentionKwargs` of `transformers`.
        lengths = packed.kept.sum(dim=1)
        ends = torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
        longest = int(lengths.max())
        told |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    yield told


def last_hidden_state(
    body: nn.Module, packed: Packed, *, read: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "N S H"]:
    """Return the last hidden states of a body; those that are not ``read`` mean nothing, None reads all."""
    places = None
    if read is not None:
        places = torch.zeros_like(packed.tokens, dtype=torch.bool)
        places[packed.rows.expand_as(packed.columns)[read], packed.columns[read]] = True
    with reading(body, packed) as told, reading_states(body, places), in_few_passes(body):
        hidden: Tensor = body(input_ids=packed.tokens, use_cache=False, **told).last_hidden_state
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
