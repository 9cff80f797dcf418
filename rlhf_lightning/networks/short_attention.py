"""Causal attention of short sequences on a CPU, as products of whole batches of small matrices.

Torch's attention goes through sequences block by block, so that the weights of attention, (T, T) for each head, are
never whole in memory (Dao et al. 2022). Of short sequences they are few, and its blocks are so small that most of its
time is between them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.functional.precision import at_least_float32

LONGEST = 64
"""Tokens of a sequence up to which this is taken; of longer ones torch's attention is as fast (decision 15)."""

LONGEST_IN_BFLOAT16 = 192
"""The same of states in bfloat16: products take half as long, and the gradient of torch's attention several times."""


def attend_short(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Return softmax(scaling * Q K^T) V, (B, heads, T, size), where a token attends to itself and those before it.

    Keys and values (B, key heads, T, size) are each read by as many heads as there are for one. Of states in 16 bits
    scaling * Q K^T is float32, since large numbers would be rounded by more than others differ; all else is in their
    type.
    """
    attended: Tensor = _Attention.apply(query, key, value, scaling)
    return attended


class _Attention(torch.autograd.Function):
    """Heads that share keys are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, length, size = query.shape
        groups = heads // key.shape[1]
        queries = query.reshape(-1, groups * length, size)
        keys, values = (x.reshape(-1, length, x.shape[3]) for x in (key, value))
        precise_queries, precise_keys = at_least_float32(queries), at_least_float32(keys)
        behind = precise_queries.new_full((length, length), -torch.inf).triu(1).repeat(groups, 1)
        scores = torch.baddbmm(behind, precise_queries, precise_keys.transpose(1, 2), alpha=scaling)
        weights = torch.softmax(scores, dim=-1).to(values.dtype)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, values).view(batch, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, weights = ctx.saved_tensors
        of_attended = gradient.reshape(*queries.shape[:2], -1)
        # PPO runs its backward under autocast, too.
        with torch.autocast("cpu", enabled=False):
            of_values = torch.bmm(weights.transpose(1, 2), of_attended)
            of_weights = torch.bmm(of_attended, values.transpose(1, 2))
            # Of a softmax p with the gradient g of it: p (g - sum of p g), here in place of g.
            of_weights *= weights
            of_scores = of_weights.addcmul_(weights, of_weights.sum(dim=-1, keepdim=True), value=-1).mul_(ctx.scaling)
            of_queries, of_keys = torch.bmm(of_scores, keys), torch.bmm(of_scores.transpose(1, 2), queries)
        of_query, of_key, of_value = ctx.shapes
        return of_queries.view(of_query), of_keys.view(of_key), of_values.view(of_value), None
