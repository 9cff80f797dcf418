"""A step of sampling with its blocks compiled: one compilation for all of them, where Triton is at hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.functional.fused import can_compile
from rlhf_lightning.networks.compiling import as_the_first, numbered
from rlhf_lightning.networks.sharding import blocks

CACHE = "past_key_values"
"""How the blocks of `transformers` call their cache."""

_compiled: dict[type[nn.Module], Any] = {}


def can_be_compiled(policy: nn.Module) -> bool:
    """Return whether the architecture says that it can be, and all its linear layers are plain ones."""
    linear = (layer for block in blocks(policy) for layer in block.modules() if hasattr(layer, "in_features"))
    return (
        can_compile()
        and isinstance(policy, PreTrainedModel)
        and policy._can_compile_fullgraph
        and bool(blocks(policy))
        and all(len(numbered(block)) == 1 for block in blocks(policy))
        and all(CACHE in signature(type(block).forward).parameters for block in blocks(policy))
        and all(type(layer) is nn.Linear for layer in linear)
    )


@contextmanager
def compiled_blocks(policy: nn.Module) -> Iterator[None]:
    """Let the blocks read one token a row by compiled code, whose kernels each do what many do otherwise."""
    before = {block: vars(block).get("forward") for block in blocks(policy)}
    for block in before:
        vars(block)["forward"] = _Compiled(block)
    try:
        yield
    finally:
        for block, forward in before.items():
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


class _Compiled:
    """The forward of a block, with a cache of its one layer."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        (self.attention,) = numbered(block)
        self.signature = signature(type(block).forward)
        self.forward = _compiled.setdefault(type(block), torch.compile(type(block).forward))

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        given = self.signature.bind(self.block, *arguments, **settings)
        given.arguments[CACHE] = given.arguments[CACHE].alone[self.attention.layer_idx]
        with as_the_first(self.block):
            return self.forward(*given.args, **given.kwargs)
