"""The kernel of `attend_from_one_token` on CUDA, in Triton; imported where that is at hand."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES_AT_ONCE = 2**14
"""Of keys, and as many of values, that a step of the kernel reads; several steps are under way."""

FEWEST_ROWS = 16
"""Of a product of matrices."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    mask,
    attended,
    span,
    query_row,
    query_head,
    key_row,
    key_head,
    key_at,
    value_row,
    value_head,
    value_at,
    mask_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALING: tl.constexpr,
):
    """Attend from the GROUP query heads of a row which share a key head, reading BLOCK keys at a time."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_query = (rows[:, None] < GROUP) & (columns[None, :] < SIZE)
    query_at = row * query_row + (head * GROUP + rows[:, None]) * query_head + columns[None, :]
    query = tl.load(queries + query_at, mask=is_query, other=0.0)
    keys += row * key_row + head * key_head
    values += row * value_row + head * value_head
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, span, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        is_state = (at[:, None] < span) & (columns[None, :] < SIZE)
        key = tl.load(keys + at[:, None] * key_at + columns[None, :], mask=is_state, other=0.0)
        value = tl.load(values + at[:, None] * value_at + columns[None, :], mask=is_state, other=0.0)
        seen = tl.load(mask + row * mask_row + at, mask=at < span, other=float("-inf")).to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALING + seen[None, :]
        # The first key is always seen, so that no row is all -inf.
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        shrunk = tl.exp(largest - larger)
        total = total * shrunk + tl.sum(weights, axis=1)
        found = found * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = larger
    out_at = (row * tl.num_programs(1) * GROUP + head * GROUP + rows[:, None]) * SIZE + columns[None, :]
    tl.store(attended + out_at, (found / total[:, None]).to(attended.dtype.element_ty), mask=is_query)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return (N, heads, size): what each row's query (N, heads, 1, size) sees of keys and values (N, kv, span, size).

    ``mask`` (N, 1, 1, span) is added to the scores; the first of each row must be 0. Needs float32 or less, and values
    of the keys' size; keys and values have their numbers next to each other.
    """
    query = query.contiguous()
    rows, heads, _, size = query.shape
    groups, span = key.shape[1], key.shape[2]
    attended = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    group, columns = heads // groups, max(FEWEST_ROWS, triton.next_power_of_2(size))
    _kernel[(rows, groups)](
        query,
        key,
        value,
        mask,
        attended,
        span,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        key.stride(2),
        value.stride(0),
        value.stride(1),
        value.stride(2),
        mask.stride(0),
        GROUP=group,
        ROWS=max(FEWEST_ROWS, triton.next_power_of_2(group)),
        SIZE=size,
        COLUMNS=columns,
        BLOCK=max(FEWEST_ROWS, BYTES_AT_ONCE // (columns * key.element_size())),
        SCALING=scaling,
    )
    return attended
