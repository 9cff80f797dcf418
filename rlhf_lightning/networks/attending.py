"""Ways to attend that are put into a network of `transformers` from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer


def sees_all(network: nn.Module) -> bool:
    """Return whether each layer takes a way to attend from outside, and keeps keys and values of all tokens before."""
    if not isinstance(network, PreTrainedModel) or not network._supports_attention_backend:
        return False
    layers = DynamicCache(config=network.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@contextmanager
def attending(network: nn.Module, name: str) -> Iterator[None]:
    """Let the network attend in the block by the function that `transformers` knows by this name."""
    config: Any = network.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
