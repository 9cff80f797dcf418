"""The body of a network as compiled kernels (`torch.compile`), where whole sequences are read."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.quantizing import is_quantized

_compiled: "WeakKeyDictionary[nn.Module, Callable[..., Any]]" = WeakKeyDictionary()

_is_off: ContextVar[bool] = ContextVar("_is_off", default=False)


def compile_body(network: nn.Module) -> None:
    """Let the network's body run compiled from its first forward on, for any number and length of sequences.

    Sampling, which reads a token at a time from a cache, stays as it is. Raises `InputError` where a compiler is
    missing, and where the network is quantised.
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
    body: Any = network.base_model
    if not is_compiled(network):
        # Copies of the network get bodies of their own with it, as they get all of its attributes.
        body.forward = partial(_forward, body.forward)


def is_compiled(network: nn.Module) -> bool:
    """Return whether `compile_body` was called on the network or on what it is a copy of."""
    forwards = [vars(part).get("forward") for part in network.modules()]
    return any(isinstance(forward, partial) and forward.func is _forward for forward in forwards)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run bodies as they are in the block: nothing is compiled for a look at a network."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def _forward(plain: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("use_cache") is not False or _is_off.get():
        return plain(*args, **kwargs)
    body = plain.__self__
    if body not in _compiled:
        # By the class: a bound method would keep the body alive for ever.
        _compiled[body] = torch.compile(type(body).forward, dynamic=True)
    return _compiled[body](body, *args, **kwargs)
