"""The blocks of a network as compiled kernels (`torch.compile`), where whole sequences are read."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.quantizing import is_quantized
from rlhf_lightning.networks.sharding import blocks

MOST_KINDS = 64
"""How many compilations of a block may be kept: for gradients wanted or not, of weights or of states, and so on."""

_compiled: dict[type[nn.Module], Callable[..., Any]] = {}

_is_off: ContextVar[bool] = ContextVar("_is_off", default=False)


def compile_blocks(network: nn.Module) -> None:
    """Let the network's blocks run compiled from its first forward on, for any number and length of sequences.

    One compilation serves all blocks of all networks of an architecture. Sampling, which reads a token at a time from
    a cache, stays as it is. Raises `InputError` where a compiler is missing, where the network is quantised, and where
    the architecture does not say what its blocks are.
    """
    if is_quantized(network):
        raise InputError(
            "network.compile=true with network.quantization: the kernels of quantised layers are no compiler's matter; "
            "set network.compile=false"
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"network.compile=true needs a C++ compiler, and there is no {compiler}: install one, name it in the "
            "environment variable CXX, or set network.compile=false"
        )
    found = _outermost(blocks(network))
    if not found:
        raise InputError(
            f"network.compile=true: {type(network).__name__} does not say what its blocks are (_no_split_modules); "
            "leave it at false"
        )
    if is_compiled(network):
        return
    if any("forward" in vars(block) for block in found):
        raise InputError("network.compile=true: a block's forward was replaced, and the compiler takes its class's")
    for block in found:
        # Copies of the network get blocks of their own with it, as they get all of its attributes.
        block.forward = partial(_forward, block.forward)


def is_compiled(network: nn.Module) -> bool:
    """Return whether `compile_blocks` was called on the network or on what it is a copy of."""
    return any(_is_compiled(vars(block).get("forward")) for block in blocks(network))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run blocks as they are in the block: nothing is compiled for a look at a network."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


@contextmanager
def as_the_first(block: nn.Module) -> Iterator[None]:
    """Let a block take itself for the first of its network: its number would need a compilation of its own."""
    parts = numbered(block)
    numbers = [part.layer_idx for part in parts]
    before = torch._dynamo.config.cache_size_limit
    torch._dynamo.config.cache_size_limit = max(before, MOST_KINDS)
    for part in parts:
        part.layer_idx = 0
    try:
        yield
    finally:
        torch._dynamo.config.cache_size_limit = before
        for part, number in zip(parts, numbers, strict=True):
            part.layer_idx = number


def numbered(block: nn.Module) -> list[Any]:
    """Return what knows its place among the blocks, and asks the cache for its states."""
    return [part for part in block.modules() if hasattr(part, "layer_idx")]


def _outermost(found: list[nn.Module]) -> list[nn.Module]:
    """Return the blocks that are in no other one (Mamba's mixers are)."""
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in found if id(block) not in inner]


def _is_compiled(forward: Any) -> bool:
    """Return whether it is `_forward`, or what another function was put around."""
    while isinstance(forward, partial):
        if forward.func is _forward:
            return True
        forward = forward.args[0] if forward.args else None
    return False


def _forward(plain: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_off.get() or any(isinstance(x, Cache) for x in (*args, *kwargs.values())):
        return plain(*args, **kwargs)
    block = plain.__self__
    if type(block) not in _compiled:
        # By the class: a bound method would keep the block alive for ever.
        _compiled[type(block)] = torch.compile(type(block).forward, dynamic=True)
    with as_the_first(block):
        return _compiled[type(block)](block, *args, **kwargs)
