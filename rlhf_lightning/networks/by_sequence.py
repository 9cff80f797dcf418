"""Attention within each of the sequences that stand in rows without padding.

    rows        a a a b b c c c c        every layer but attention: not a token too many
    sequences   a a a . | b b . . | c c c c        attention: as if nothing had been packed

A mask over rows would compute the attention of every token to all tokens of its row, and throw most of it away.
Sequences of similar lengths attend together (`length_groups`), so that little is padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_lightning.functional.precision import at_least_float32, multiplies_bfloat16
from rlhf_lightning.networks.attending import sees_all
from rlhf_lightning.networks.checkpointing import is_checkpointed
from rlhf_lightning.networks.compiling import is_compiled
from rlhf_lightning.networks.length_groups import LengthGroups
from rlhf_lightning.networks.short_attention import LONGEST, LONGEST_IN_BFLOAT16, attend_short

BY_SEQUENCE = "by_sequence"
"""The name of `attend_by_sequence` in `transformers`."""

BESIDES = ("softcap", "position_bias")
"""What `transformers` may tell its attention besides, and `attend_short` is not made for."""

_see_all_before: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""Of each network, whether its tokens attend to all before them and to none behind."""


@dataclass(frozen=True)
class Sequences:
    """Where the M tokens of sequences, padded in groups, stand among the N * S places of rows."""

    groups: LengthGroups
    """How the tokens are numbered."""
    places: Tensor
    """(M,) the place of a token; anywhere for padding."""
    tokens: Tensor
    """(N * S,) the token at a place, the first of those that share it; anywhere for what fills up a row."""
    fill: Tensor
    """(F,) the places of what fills up a row."""
    not_kept: Tensor
    """(K,) the tokens that are not in ``tokens``: padding, and all but the first of those that share a place."""
    beginnings: "Beginnings | None" = None
    """None where no sequences share anything."""
    padded: "Padded | None" = None
    """What was given to be read, where that are sequences with padding."""
    readers: set[int] = field(default_factory=set)
    """The layers that attended by them, by `id`."""


@dataclass(frozen=True)
class Beginnings:
    """What sequences have in common at their beginning, and of which the places are those of the first sequence."""

    longest: int
    """Of how many tokens the longest is."""
    leader: Tensor
    """(B,) of the sequences, group by group, the first of those that share their beginning."""
    places: Tensor
    """(L,) the places of all L tokens of them."""
    tokens: Tensor
    """(L,) the tokens at these places, as numbers in (B * longest)."""


@dataclass(frozen=True)
class Padded:
    """Sequences (B, T) with padding on either side, of which the real tokens are read one after the other."""

    tokens: Tensor
    """(B, T) token ids."""
    attention_mask: Tensor
    """(B, T) bool, true for real tokens."""
    real: Tensor
    """(N,) the numbers of the real tokens in (B * T)."""

    def spread(self, states: Tensor) -> Tensor:
        """Return what belongs to the real tokens (1, N, H) at their places (B, T, H), and 0 at padding."""
        places = states.new_zeros(self.tokens.numel(), states.shape[-1])
        return places.index_copy(0, self.real, states[0]).view(*self.tokens.shape, -1)


class _Spread(torch.autograd.Function):
    """From places to sequences; the gradients of a place that several sequences read are added up."""

    @staticmethod
    def forward(ctx: Any, at_places: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return at_places.index_select(0, sequences.places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sequences: Sequences = ctx.sequences
        at_places = gradient.index_select(0, sequences.tokens).index_fill_(0, sequences.fill, 0)
        if (beginnings := sequences.beginnings) is not None:
            # As slices of sequences: adding up token by token takes longer than the attention.
            added = gradient.new_zeros(len(beginnings.leader), beginnings.longest, gradient.shape[1])
            if gradient.device.type != "cpu":
                # In half precision small parts of a sum over many sequences would be lost; a CPU's is float32 itself.
                added = at_least_float32(added)
            shapes, sizes = sequences.groups.shapes, sequences.groups.sizes
            leaders = beginnings.leader.split([number for number, _ in shapes])
            for leader, shape, of_group in zip(leaders, shapes, gradient.split(sizes), strict=True):
                length = min(shape[1], beginnings.longest)
                added[:, :length].index_add_(0, leader, of_group.view(*shape, -1)[:, :length].to(added.dtype))
            of_beginnings = added.flatten(0, 1).index_select(0, beginnings.tokens)
            at_places.index_copy_(0, beginnings.places, of_beginnings.to(at_places.dtype))
        return at_places, None


class _Collect(torch.autograd.Function):
    """From sequences to places, of what several sequences have at one place that of the first."""

    @staticmethod
    def forward(ctx: Any, by_token: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return by_token.index_select(0, sequences.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # That of what fills up a row is nothing, since nothing is made of it.
        sequences: Sequences = ctx.sequences
        return gradient.index_select(0, sequences.places).index_fill_(0, sequences.not_kept, 0), None


def attend_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Sequences | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from each token of (N, heads, S, size) to its own sequence, as `transformers` does without packing.

    Sequences are padded on the right, so that causal attention needs no mask. What is attended in is said by
    `attended_in`. Without ``sequences`` rows are read as they are.
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    sequences.readers.add(id(module))
    rows, _, size, _ = query.shape
    groups = sequences.groups
    kind = attended_in(query)
    states = (query, key, value)
    # Together, since each step takes some time whatever its size.
    at_places = torch.cat([x.transpose(1, 2).reshape(rows * size, -1).to(kind) for x in states], dim=1)
    spread: Tensor = _Spread.apply(at_places, sequences)
    heads = [(x.shape[1], x.shape[3]) for x in states]
    with torch.autocast("cpu", enabled=False):
        attended = [
            _attend(module, *_of_heads(part, shape, heads), **kwargs).flatten(0, 1)
            for part, shape in zip(spread.split(groups.sizes), groups.shapes, strict=True)
        ]
    by_token = attended[0] if len(attended) == 1 else torch.cat(attended)
    # What reads it under autocast multiplies in bfloat16 as well.
    if query.device.type == "cpu" and kind != torch.bfloat16:
        by_token = by_token.to(query.dtype)
    collected: Tensor = _Collect.apply(by_token.flatten(1), sequences)
    return collected.view(rows, size, *by_token.shape[1:]), None


def attended_in(states: Tensor) -> torch.dtype:
    """Return the type in which queries, keys and values are attended to that are made of a network's states or weights.

    On a CPU that is bfloat16 under autocast to it, or of such states, if the CPU multiplies it; at least float32 else.
    Other devices keep the type.
    """
    kind = states.device.type
    if kind != "cpu":
        return states.dtype
    # Autocast leaves float64 as it is.
    is_cast = torch.is_autocast_enabled(kind) and states.dtype != torch.float64
    wanted = torch.get_autocast_dtype(kind) if is_cast else states.dtype
    if wanted == torch.bfloat16 and multiplies_bfloat16():
        return wanted
    return torch.promote_types(states.dtype, torch.float32)


def _of_heads(by_token: Tensor, shape: tuple[int, int], heads: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Yield what stands side by side (B * T, ...), each as (B, heads, T, size), for a number and a size of heads."""
    parts = by_token.split([number * size for number, size in heads], dim=1)
    for part, (number, size) in zip(parts, heads, strict=True):
        yield part.view(*shape, number, size).transpose(1, 2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend within sequences, by queries, keys and values (B, heads, T, size); returns (B, T, heads, size).

    On a CPU long sequences in 16 bits are attended to in float32: the gradient of torch's attention takes up to three
    times as long in bfloat16.
    """
    is_on_cpu = query.device.type == "cpu"
    is_short = is_on_cpu and query.shape[2] <= (LONGEST_IN_BFLOAT16 if query.dtype == torch.bfloat16 else LONGEST)
    if is_short and not dropout and is_causal in (None, True) and all(kwargs.get(name) is None for name in BESIDES):
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        return attend_short(query, key, value, scaling=scaling).transpose(1, 2)
    told = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
    states = (query, key, value)
    if not is_on_cpu:
        return sdpa_attention_forward(module, *states, None, **told)[0]
    query, key, value = (at_least_float32(x) for x in states)
    return sdpa_attention_forward(module, query, key, value, None, **told)[0].to(states[0].dtype)


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)


def was_told_to_every_layer(network: nn.Module, sequences: Sequences) -> bool:
    """Return whether each layer of a network that was called with ``sequences`` attended by them.

    Where one did not, because the network keeps to itself what it is told, it never attends by sequence again.
    """
    model: Any = network
    told: bool = len(sequences.readers) == model.config.get_text_config().num_hidden_layers
    if not told:
        _see_all_before[network] = False
    return told


def attends_by_sequence(network: nn.Module) -> bool:
    """Return whether `attend_by_sequence` may stand in for the network's own attention.

    Not where blocks are run again in the backward, by then without it, or compiled, and not where tokens see less than
    all before them, or more.
    """
    model: Any = network
    if network not in _see_all_before:
        _see_all_before[network] = sees_all(network) and all(getattr(x, "is_causal", True) for x in network.modules())
    return (
        _see_all_before[network]
        and model.config.get_text_config()._attn_implementation == "sdpa"
        and not is_checkpointed(network)
        and not is_compiled(network)
    )
