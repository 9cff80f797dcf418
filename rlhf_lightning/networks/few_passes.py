"""Norms, rotary positions and gates of a network of `transformers`, computed as `functional.few_passes` does.

A part is taken for one of these by its names, and by what it makes of small numbers: an architecture that has
something else by the same name keeps it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, partial
from inspect import signature
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_lightning.functional.few_passes import rms_norm, rotate, silu_gate
from rlhf_lightning.networks.checkpointing import is_checkpointed
from rlhf_lightning.networks.compiling import is_compiled

ROTATION = "apply_rotary_pos_emb"
"""What the attention of `transformers` calls the function for its queries and keys."""

TOLD = ["q", "k", "cos", "sin", "unsqueeze_dim"]
"""What that function is told."""

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""The parts of a feed-forward part with a gate, and all that is read in its ``forward``."""

_found: "WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Callable[..., Any]]]]" = WeakKeyDictionary()
"""Of each body, its parts and what stands in for their ``forward``."""


@contextmanager
def in_few_passes(body: nn.Module) -> Iterator[None]:
    """Let the body make the same numbers, to rounding, in fewer passes over memory, for the block.

    On a CPU, in float32; blocks that are run again in the backward, by then outside, or compiled stay as they are.
    """
    put_in: list[nn.Module] = []
    if next(body.parameters()).device.type == "cpu" and not is_checkpointed(body) and not is_compiled(body):
        if body not in _found:
            _found[body] = [(part, forward) for part in body.modules() if (forward := _forward(part)) is not None]
        for part, forward in _found[body]:
            # Whoever put in another forward meant it.
            if "forward" not in vars(part):
                part.forward = forward
                put_in.append(part)
    try:
        yield
    finally:
        for part in put_in:
            del part.forward


def _forward(part: nn.Module) -> Callable[..., Any] | None:
    """Return what stands in for the part's ``forward``, None for what stays as it is."""
    if _is_rms_norm(part):
        return partial(_normed, part)
    if _is_gated(part):
        return partial(_gated, part)
    if (forward := _with_rotation(type(part).forward)) is not None:
        return MethodType(forward, part)
    return None


def _normed(norm: Any, states: Tensor) -> Tensor:
    weight = norm.weight
    # Half precision is normed in float32, and rounded before it is weighted.
    if not states.dtype == weight.dtype == torch.float32 or isinstance(weight, DTensor):
        made: Tensor = type(norm).forward(norm, states)
        return made
    return rms_norm(states, weight, norm.variance_epsilon)


def _gated(part: Any, states: Tensor) -> Tensor:
    gate, up = part.gate_proj(states), part.up_proj(states)
    # In bfloat16 a CPU takes longer to make it again than to read it.
    in_float32 = gate.dtype == up.dtype == torch.float32
    made: Tensor = part.down_proj(silu_gate(gate, up) if in_float32 else part.act_fn(gate) * up)
    return made


def _rotated(
    plain: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
) -> Any:
    # Some rotate a part of the units alone.
    is_whole = cos.shape[-1] == query.shape[-1]
    if more or named or not is_whole or not cos.dtype == sin.dtype == torch.float32:
        return plain(query, key, cos, sin, *more, **named)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(query, cos, sin), rotate(key, cos, sin)


@torch.no_grad()
def _is_rms_norm(part: Any) -> bool:
    """Return whether it has a weight alone, and makes of numbers what `rms_norm` does."""
    names = [name for name, _ in part.named_parameters()]
    if not type(part).__name__.endswith("RMSNorm") or names != ["weight"] or "variance_epsilon" not in vars(part):
        return False
    # Its own weight may be in parts on several processes, or without numbers.
    (size,) = part.weight.shape
    weight, states = torch.linspace(0.5, 1.5, size), _numbers(3, size)
    made = type(part).forward(_holding(part, _parameters={"weight": weight}), states)
    return torch.allclose(made, rms_norm(states, weight, part.variance_epsilon))


@torch.no_grad()
def _is_gated(part: Any) -> bool:
    """Return whether it is down(silu(gate(x)) up(x)) and nothing else."""
    forward = type(part).forward
    if not isinstance(forward, FunctionType) or set(forward.__code__.co_names) != GATED:
        return False
    if {name for name, _ in part.named_children()} != GATED:
        return False
    matrices = {
        name: _Product(_numbers(4, 4) * (i + 1)) for i, name in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    gate, up, down = matrices.values()
    states = _numbers(3, 4)
    made = type(part).forward(_holding(part, _modules={**matrices, "act_fn": part.act_fn}), states)
    return torch.allclose(made, down(silu_gate(gate(states), up(states))))


@cache
def _with_rotation(forward: Callable[..., Any]) -> FunctionType | None:
    """Return the ``forward`` of a class with `rotate` in it; None where it rotates nothing.

    It is a copy of the function that sees another one by the name of `ROTATION`: that of all others stays.
    """
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(ROTATION)
    if plain is None or [*signature(plain).parameters] != TOLD or not _rotates(plain):
        return None
    seen = {**forward.__globals__, ROTATION: partial(_rotated, plain)}
    made = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotates(plain: Callable[..., Any]) -> bool:
    """Return whether a function makes of numbers, also of bfloat16, what `rotate` does."""
    cos, sin = _numbers(1, 3, 4) + 2, _numbers(1, 3, 4) + 3
    for kind in (torch.float32, torch.bfloat16):
        query, key = _numbers(1, 2, 3, 4).to(kind), (_numbers(1, 1, 3, 4) + 1).to(kind)
        expected, made = plain(query, key, cos, sin), _rotated(plain, query, key, cos, sin)
        if any(one.dtype != other.dtype for one, other in zip(expected, made, strict=True)):
            return False
        if kind == torch.float32 and not all(torch.allclose(*pair) for pair in zip(expected, made, strict=True)):
            return False
    return True


class _Product(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.matrix


def _holding(part: nn.Module, **held: Any) -> nn.Module:
    """Return a copy that holds other parameters or modules."""
    other = copy(part)
    vars(other).update(held)
    return other


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
