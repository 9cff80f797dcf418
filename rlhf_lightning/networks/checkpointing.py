"""Activations that are made again in the backward instead of kept, block by block (Chen et al. 2016)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.sharding import blocks


def checkpoint_blocks(network: nn.Module) -> None:
    """Let each block keep its input alone for the backward, which then costs another forward; once is enough.

    Raises `InputError` where the architecture does not say what its blocks are. Unlike that of `transformers` it works
    in evaluation mode too, in which reward models and PPO are trained.
    """
    found = blocks(network)
    if not found:
        raise InputError(
            f"network.gradient_checkpointing=true: {type(network).__name__} does not say what its blocks are "
            "(_no_split_modules); leave it at false"
        )
    for block in found:
        if not _is_checkpointed(block):
            # Copies of the network get blocks of their own with it, as they get all of its attributes.
            block.forward = partial(_forward, block.forward)


def is_checkpointed(network: nn.Module) -> bool:
    """Return whether blocks are made again, by `checkpoint_blocks`, also of what it is a copy of, or `transformers`."""
    by_transformers = any(getattr(part, "gradient_checkpointing", False) for part in network.modules())
    return by_transformers or any(_is_checkpointed(block) for block in blocks(network))


def _is_checkpointed(block: nn.Module) -> bool:
    forward = vars(block).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _forward(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    return checkpoint(plain, *args, use_reentrant=False, **kwargs)
