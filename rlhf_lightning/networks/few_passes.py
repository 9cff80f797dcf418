"""Norms, rotary positions and gates of a network of `transformers`, computed as `functional.few_passes` does.

A part is taken for one of these by its names, and by what it makes of small numbers: an architecture that has
something else by the same name keeps it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.few_passes import rms_norm, rotate, silu_gate
from rlhf_lightning.networks.checkpointing import is_checkpointed
from rlhf_lightning.networks.compiling import is_compiled

ROTATION = "apply_rotary_pos_emb"
"""What the attention of `transformers` calls the function for its queries and keys."""

ROTATION_ARGUMENTS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
"""What that function is given."""

GATED_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""The parts of a feed-forward part with a gate, and the only names that its ``forward`` uses."""

_found: "WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Callable[..., Any]]]]" = WeakKeyDictionary()
"""Of each body, its parts and what stands in for their ``forward``."""


@contextmanager
def in_few_passes(body: nn.Module) -> Iterator[None]:
    """Let the body make the same numbers, to rounding, in fewer passes over memory, for the block.

    On a CPU, in float32; blocks that are run again in the backward, by then outside, or compiled stay as they are. What
    its parts are is looked at once; attention sees the names of its module as they were then.
    """
    put_in: list[nn.Module] = []
    if _may_be_replaced(body):
        if body not in _found:
            _found[body] = _replacements(body)
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


def _may_be_replaced(body: nn.Module) -> bool:
    on_cpu = next(body.parameters()).device.type == "cpu"
    return on_cpu and not is_checkpointed(body) and not is_compiled(body)


@torch.no_grad()
def _replacements(body: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return the parts of the body of which something is known to stand in for their ``forward``, and that."""
    parts = [part for part in body.modules() if part is not body]
    # What is found must not depend on who reads first.
    with torch.autocast("cpu", enabled=False):
        return [(part, forward) for part in parts if (forward := _replacement(part)) is not None]


def _replacement(part: Any) -> Callable[..., Any] | None:
    if _is_rms_norm(part):
        return partial(_normed, part)
    if _is_gated(part):
        return partial(_gated, part, part.act_fn)
    if (forward := _with_rotation(type(part).forward)) is not None:
        return MethodType(forward, part)
    return None


def _normed(norm: Any, states: Tensor) -> Tensor:
    weight = norm.weight
    # Half precision is normed in float32, and rounded before it is weighted.
    if not states.dtype == weight.dtype == torch.float32:
        made: Tensor = type(norm).forward(norm, states)
        return made
    return rms_norm(states, weight, norm.variance_epsilon)


def _gated(part: Any, activation: nn.Module, states: Tensor) -> Tensor:
    gate, up = part.gate_proj(states), part.up_proj(states)
    # In bfloat16 a CPU takes longer to make it again than to read it.
    is_known = gate.dtype == up.dtype == torch.float32 and part.act_fn is activation
    made: Tensor = part.down_proj(silu_gate(gate, up) if is_known else part.act_fn(gate) * up)
    return made


def _rotated(plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
    if named or len(args) != 4 or not _are_rotated_whole(*args):
        return plain(*args, **named)
    query, key, cos, sin = args
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(query, cos, sin), rotate(key, cos, sin)


def _are_rotated_whole(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether each token and unit of query and key, (B, heads, T, D), has its own angle, which is not learnt."""
    shapes = {(x.shape[-2], x.shape[-1]) for x in (query, key, cos, sin)}
    return len(shapes) == 1 and cos.dtype == sin.dtype == torch.float32 and not (cos.requires_grad or sin.requires_grad)


def _is_rms_norm(part: Any) -> bool:
    """Return whether it has a weight alone, and makes of numbers what `rms_norm` does."""
    names = [name for name, _ in part.named_parameters()]
    if not type(part).__name__.endswith("RMSNorm") or names != ["weight"] or "variance_epsilon" not in vars(part):
        return False
    if not _takes_states_alone(part):
        return False
    # Its own weight may be in parts on several processes, or without numbers.
    (size,) = part.weight.shape
    weight = torch.linspace(0.5, 1.5, size, dtype=torch.float32, device="cpu")
    # Of small states epsilon is most of what they are divided by.
    states = _numbers(3, size) * torch.logspace(0, -5, 3, dtype=torch.float32, device="cpu").unsqueeze(1)
    made = type(part).forward(_holding(part, _parameters={"weight": weight}), states)
    return torch.allclose(made, rms_norm(states, weight, part.variance_epsilon), atol=0)


def _is_gated(part: Any) -> bool:
    """Return whether it is down(silu(gate(x)) up(x)) and nothing else."""
    forward = type(part).forward
    if not isinstance(forward, FunctionType) or set(forward.__code__.co_names) != GATED_PARTS:
        return False
    if {name for name, _ in part.named_children()} != GATED_PARTS or not _takes_states_alone(part):
        return False
    gate, up, down = (_Product(_numbers(4, 4) * factor) for factor in (1, 2, 3))
    stand_ins = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": part.act_fn}
    states = _numbers(3, 4)
    made = forward(_holding(part, _modules=stand_ins), states)
    return torch.allclose(made, down(silu_gate(gate(states), up(states))))


def _takes_states_alone(part: nn.Module) -> bool:
    """Return whether states are all that its ``forward`` may be given."""
    return len(signature(type(part).forward).parameters) == 2


@cache
def _with_rotation(forward: Callable[..., Any]) -> FunctionType | None:
    """Return the ``forward`` of a class with `rotate` in it; None where it rotates nothing.

    It is a copy of the function that finds another one by the name of `ROTATION`: that of all others stays.
    """
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(ROTATION)
    if plain is None or [*signature(plain).parameters] != ROTATION_ARGUMENTS or not _rotates(plain):
        return None
    names = {**forward.__globals__, ROTATION: partial(_rotated, plain)}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotates(plain: Callable[..., Any]) -> bool:
    """Return whether a function makes of numbers, also of bfloat16, what `rotate` does."""
    cos, sin = _numbers(1, 3, 4) + 2, _numbers(1, 3, 4) + 3
    for kind in (torch.float32, torch.bfloat16):
        query, key = _numbers(1, 2, 3, 4).to(kind), (_numbers(1, 1, 3, 4) + 1).to(kind)
        try:
            expected = plain(query, key, cos, sin)
        except RuntimeError:
            # Others by that name take other shapes.
            return False
        for one, other in zip(expected, _rotated(plain, query, key, cos, sin), strict=True):
            if one.dtype != other.dtype or (kind == torch.float32 and not torch.allclose(one, other)):
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
    # What FSDP2 shards makes another module where it is made, and copied.
    other: nn.Module = object.__new__(type(part))
    vars(other).update(vars(part), **held)
    return other


def _numbers(*shape: int) -> Tensor:
    # Whatever type and device are those of new tensors.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
