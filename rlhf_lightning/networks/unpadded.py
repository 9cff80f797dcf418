"""The states of padded sequences, found without computing any of padding.

pad pad a   a   a          a a a b b b b
pad b   b   b   b    ->    the real tokens in one row, in which attention is by sequence
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids as count

if TYPE_CHECKING:
    from rlhf_lightning.networks.by_sequence import Sequences

_padding_is_read: ContextVar[bool] = ContextVar("_padding_is_read", default=False)


@contextmanager
def reading_padding() -> Iterator[None]:
    """Let networks read padding in the block, as they do elsewhere: what it changes can be seen then."""
    token = _padding_is_read.set(True)
    try:
        yield
    finally:
        _padding_is_read.reset(token)


def last_states(
    body: nn.Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    *,
    position_ids: Int[Tensor, "B T"] | None = None,
    read: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H"]:
    """Return the last hidden states of sequences; those of padding, and those that are not ``read``, mean nothing.

    On a CPU, where it is faster, the real tokens alone are read if the network attends by sequence; their positions are
    counted from 0 then. ``position_ids`` are what it is told otherwise. None reads all states.
    """
    from rlhf_lightning.networks.few_passes import in_few_passes
    from rlhf_lightning.networks.last_block import reading_states

    read = None if read is None else read & attention_mask
    if leaves_padding_out(body, attention_mask):
        found = _without_padding(body, tokens, attention_mask, read)
        if found is not None:
            return found
    network: Any = body
    inputs = {} if position_ids is None else {"position_ids": position_ids}
    with reading_states(body, read), in_few_passes(body):
        hidden: Tensor = network(
            input_ids=tokens, attention_mask=attention_mask.long(), use_cache=False, **inputs
        ).last_hidden_state
    return hidden


def _without_padding(body: nn.Module, tokens: Tensor, attention_mask: Tensor, states: Tensor | None) -> Tensor | None:
    """Return the states, None where not every layer of the network was told of the sequences."""
    from rlhf_lightning.networks.attending import attending
    from rlhf_lightning.networks.by_sequence import BY_SEQUENCE, Padded, was_told_to_every_layer
    from rlhf_lightning.networks.few_passes import in_few_passes
    from rlhf_lightning.networks.last_block import reading_states

    network: Any = body
    padded = Padded(tokens, attention_mask, attention_mask.flatten().nonzero().squeeze(1))
    sequences = replace(one_row(attention_mask.sum(dim=1)), padded=padded)
    of_row = None if states is None else states[attention_mask].unsqueeze(0)
    with attending(body, BY_SEQUENCE), reading_states(body, of_row), in_few_passes(body):
        read: Tensor = network(
            input_ids=tokens[attention_mask].unsqueeze(0),
            position_ids=count(attention_mask)[attention_mask].unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            sequences=sequences,
        ).last_hidden_state
    return padded.spread(read) if was_told_to_every_layer(body, sequences) else None


def one_row(lengths: Int[Tensor, " B"]) -> "Sequences":
    """Return where the tokens of sequences of these lengths stand in one row, in which nothing is between them."""
    from rlhf_lightning.networks.by_sequence import Sequences
    from rlhf_lightning.networks.length_groups import group_by_length

    groups = group_by_length(lengths)
    longest = max(length for _, length in groups.shapes)
    number, is_numbered = groups.numbers(longest)
    time = torch.arange(longest, device=lengths.device)
    kept = time < lengths.unsqueeze(1)
    # Anywhere for padding, of which that of the last sequence would be behind the row.
    places = ((lengths.cumsum(0) - lengths).unsqueeze(1) + time).clamp(max=int(lengths.sum()) - 1)
    return Sequences(
        groups=groups,
        places=groups.by_number(places),
        tokens=number[kept],
        fill=number[:0, 0],
        not_kept=number[is_numbered & ~kept],
    )


def leaves_something_out(body: nn.Module, attention_mask: Bool[Tensor, "B T"]) -> bool:
    """Return whether `last_states` does less than to call the body, where a part of the states is read."""
    from rlhf_lightning.networks.last_block import makes_some_states

    if _padding_is_read.get():
        return False
    return leaves_padding_out(body, attention_mask) or makes_some_states(body)


def leaves_padding_out(network: nn.Module, attention_mask: Bool[Tensor, "B T"]) -> bool:
    """Return whether `last_states` reads the real tokens alone, by a network or its body.

    So it does where there is padding; in bfloat16 also where there is none and gradients are wanted, which attention by
    sequence has in a fraction of the time.
    """
    weight = next(network.parameters())
    if _padding_is_read.get() or weight.device.type != "cpu":
        return False
    from rlhf_lightning.networks.by_sequence import attended_in, attends_by_sequence

    is_slow = torch.is_grad_enabled() and attended_in(weight) == torch.bfloat16
    return (is_slow or not bool(attention_mask.all())) and attends_by_sequence(network)
