"""The last block of a network: what follows its attention is computed for the states that are read, and no others.

    tokens            a  b  c  d  e
    attention         .  .  .  .  .      keys and values of all are read
    feed-forward               .  .      of the states behind d and e, which somebody reads

Blocks before the last are whole, since the attention of the next one reads all states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Parameter, signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_lightning.networks.attending import sees_all
from rlhf_lightning.networks.checkpointing import is_checkpointed
from rlhf_lightning.networks.compiling import is_compiled
from rlhf_lightning.networks.modes import evaluating
from rlhf_lightning.networks.sharding import blocks

_parts: "WeakKeyDictionary[nn.Module, nn.Module | None]" = WeakKeyDictionary()
"""Of each body, what `feed_forward` found: it looks at all layers, and bodies are called often."""

_by_token: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""Of each feed-forward part, whether what it makes of a token depends on that token alone."""

_read: ContextVar[Tensor | None] = ContextVar("_read", default=None)


@contextmanager
def reading_states(body: nn.Module, read: Bool[Tensor, "N S"] | None) -> Iterator[None]:
    """Let the body, called with tokens (N, S) in the block, make the last hidden states that are read; None: all.

    The others mean nothing, but are finite. Gradients are those of the states that are read. On a CPU, where networks
    are of few blocks; elsewhere, and where the network does not say which part of its last block reads token by token,
    all states are made.
    """
    part = None if read is None else _part_by_token(body)
    if part is None or read is None:
        yield
        return
    places = read.flatten().nonzero().squeeze(1)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        taken: Tensor = _Take.apply(args[0].flatten(0, 1), places)
        return taken.unsqueeze(0)

    def after(_: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> Tensor:
        put: Tensor = _Put.apply(made[0], places, read.numel())
        return put.view(*read.shape, -1)

    hooks = [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    token = _read.set(read)
    try:
        yield
    finally:
        _read.reset(token)
        for hook in hooks:
            hook.remove()


def makes_some_states(body: nn.Module) -> bool:
    """Return whether `reading_states` has less made."""
    return _part_by_token(body) is not None


def states_being_read() -> Bool[Tensor, "N S"] | None:
    """Return which states of the tokens are made in this block, None where all are."""
    return _read.get()


def feed_forward(network: nn.Module) -> nn.Module | None:
    """Return what the last block has beside its attention, a part that reads hidden states and nothing else.

    None where there is no such part, or several.
    """
    model: Any = network
    found = blocks(network)
    if not sees_all(network) or len(found) != model.config.get_text_config().num_hidden_layers:
        return None
    others = [part for part in found[-1].children() if _has_matrix(part) and not _is_numbered(part)]
    if len(others) != 1 or isinstance(others[0], nn.Linear) or not _reads_one(others[0]):
        return None
    return others[0]


def _part_by_token(body: nn.Module) -> nn.Module | None:
    """Return the part that may be given some of the tokens alone."""
    on_cpu = next(body.parameters()).device.type == "cpu"
    # What is compiled, or made again in the backward, is left as it is.
    if not on_cpu or is_compiled(body) or is_checkpointed(body):
        return None
    if body not in _parts:
        _parts[body] = feed_forward(body)
    part = _parts[body]
    # What lies in parts on several processes is whole when it is called, and not before.
    if part is None or any(isinstance(weight, DTensor) for weight in part.parameters()):
        return None
    if part not in _by_token and (found := _is_by_token(part, body)) is not None:
        _by_token[part] = found
    return part if _by_token.get(part) else None


@torch.no_grad()
def _is_by_token(part: nn.Module, body: Any) -> bool | None:
    """Return whether some tokens alone are made into the same as among others, None where weights are not finite."""
    size = body.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, size, generator=generator).to(body.dtype)
    with evaluating(part):
        whole, some = part(states), part(states[:, 1::2])
    if not isinstance(whole, Tensor) or whole.shape != states.shape:
        return False
    if not whole.isfinite().all():
        return None
    # Rounding differs by the number of rows of a product.
    rounding = 16 * torch.finfo(whole.dtype).eps * whole.abs().max()
    return bool((whole[:, 1::2] - some).abs().max() <= rounding)


def _has_matrix(part: nn.Module) -> bool:
    return any(weight.dim() > 1 for weight in part.parameters())


def _is_numbered(part: nn.Module) -> bool:
    """Return whether there is attention in it: that knows its place among the blocks."""
    return any(hasattr(inner, "layer_idx") for inner in part.modules())


def _reads_one(part: nn.Module) -> bool:
    needed = [p for p in signature(part.forward).parameters.values() if p.default is Parameter.empty]
    return len([p for p in needed if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]) == 1


class _Take(torch.autograd.Function):
    """Rows of a table, each once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.rows = places, len(table)
        return table.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy_(0, ctx.places, gradient), None


class _Put(torch.autograd.Function):
    """Rows at their places in a table of so many, in which all others are 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, number: int) -> Tensor:
        ctx.places = places
        return rows.new_zeros(number, rows.shape[1]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.places), None, None
