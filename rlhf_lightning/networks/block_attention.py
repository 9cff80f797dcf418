"""Causal attention of sequences of some hundred tokens on a CPU, as products of matrices, one block of rows at a time.

    keys         a b c d e f
    rows a b c   # # #               the weights of a block reach up to its own end, and are made again in the backward,
    rows d e f   # # # # # #         so that they are never whole (Dao et al. 2022)

Torch's attention does the same in blocks of 32 tokens, head by head; here a block is one product for all sequences and
heads, and those heads that share keys read them together.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.networks.short_attention import softmax_gradient_

ROWS = 64
"""Tokens of a block at most."""

AT_ONCE = 2**19
"""Weights of attention at once: more are no longer in a cache when they are read again, fewer take more calls."""

ALONE = range(257, 513)
"""Tokens of sequences for which this is faster than torch's attention, forward and backward, on one thread and on two,
where each head has keys of its own."""

SHARED = range(65, 1025)
"""The same where heads share keys: torch's attention reads a copy of them for each head."""


def suits_blocks(query: Tensor, key: Tensor) -> bool:
    """Return whether attention of (B, heads, T, size) is faster this way, as far as was tried (decision 15)."""
    return query.shape[2] in (ALONE if query.shape[1] == key.shape[1] else SHARED)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Return softmax(scaling * Q K^T) V, (B, heads, T, size), where a token attends to itself and those before it.

    Keys and values (B, key heads, T, size) are each read by as many heads as there are for one.
    """
    attended: Tensor = _Attention.apply(query, key, value, scaling)
    return attended


class _Attention(torch.autograd.Function):
    """Queries as (B * key heads, heads of a key, T, size), keys and values as (B * key heads, T, size)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, length, size = query.shape
        queries = query.reshape(batch * key.shape[1], -1, length, size)
        keys, values = (x.reshape(-1, length, x.shape[3]) for x in (key, value))
        ctx.save_for_backward(queries, keys, values)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        attended = values.new_empty(*queries.shape[:3], values.shape[2])
        for some, start, end in _blocks(queries):
            of_block = torch.bmm(_weights(queries[some, :, start:end], keys[some, :end], scaling), values[some, :end])
            attended[some, :, start:end] = of_block.view(len(of_block), -1, end - start, values.shape[2])
        return attended.view(batch, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        of_attended = gradient.reshape(*queries.shape[:3], -1)
        # PPO runs its backward under autocast, too.
        with torch.autocast("cpu", enabled=False):
            for some, start, end in _blocks(queries):
                rows, seen = queries[some, :, start:end], keys[some, :end]
                weights = _weights(rows, seen, ctx.scaling)
                of_block = of_attended[some, :, start:end].flatten(1, 2)
                of_values[some, :end].baddbmm_(weights.transpose(1, 2), of_block)
                of_weights = torch.bmm(of_block, values[some, :end].transpose(1, 2))
                changes = softmax_gradient_(weights, of_weights).mul_(ctx.scaling)
                of_queries[some, :, start:end] = torch.bmm(changes, seen).view_as(rows)
                of_keys[some, :end].baddbmm_(changes.transpose(1, 2), rows.flatten(1, 2))
        of_query, of_key, of_value = ctx.shapes
        return of_queries.view(of_query), of_keys.view(of_key), of_values.view(of_value), None


def _blocks(queries: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Yield, of queries (N, heads, T, size), some of N, and start and end of a block of their rows."""
    number, heads, length = queries.shape[:3]
    rows = -(-length // -(-length // ROWS))
    at_once = max(1, AT_ONCE // (heads * rows * length))
    for first in range(0, number, at_once):
        for start in range(0, length, rows):
            yield slice(first, first + at_once), start, min(start + rows, length)


def _weights(rows: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return the weights (N, heads * R, T) with which the last R of T tokens (N, heads, R, size) attend to all."""
    heads, number, length = rows.shape[1], rows.shape[2], keys.shape[1]
    behind = rows.new_full((number, length), -torch.inf).triu(length - number + 1).repeat(heads, 1)
    return torch.softmax(torch.baddbmm(behind, rows.flatten(1, 2), keys.transpose(1, 2), alpha=scaling), dim=-1)
