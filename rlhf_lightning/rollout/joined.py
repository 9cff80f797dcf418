"""Linear layers that read the same states, as one while a rollout is sampled: a GPU starts and ends fewer products."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lightning.networks.plain_head import is_watched

SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What the networks of `transformers` call layers that read the same states, in the order in which they do."""

LARGEST = 2**26
"""Bytes of weights that are joined: above, a product takes longer than what is saved, and the copy is memory."""

_kept: "WeakKeyDictionary[nn.Module, dict[str, tuple[Any, ...]]]" = WeakKeyDictionary()
"""Of each module with such layers, what stood in for those that begin with a name."""


@contextmanager
def joined(policy: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """Let the first of neighbouring layers make the products of all of them, for the block.

    The weights are copied when the block begins; with ``keep`` the memory of the copy is kept for the next block, so
    that recorded steps find the weights where they were. Afterwards the layers are back as they were.
    """
    put_in: list[tuple[nn.Module, str, Any]] = []
    found: list[_Given] = []
    try:
        for parent in policy.modules():
            for names in SIDE_BY_SIDE:
                layers = [parent._modules.get(name) for name in names]
                if not _can_be_joined(layers):
                    continue
                parts = _parts(parent, names[0], layers, keep=keep)
                found.append(parts[0].given)
                put_in += [(parent, name, layer) for name, layer in zip(names, layers, strict=True)]
                parent._modules.update(zip(names, parts, strict=True))
        yield
    finally:
        for parent, name, layer in put_in:
            parent._modules[name] = layer
        for given in found:
            given.forget()


@dataclass
class _Given:
    """What the first layer was given last, and what it found for the others."""

    states: Tensor | None = None
    found: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        """Keep nothing of it."""
        self.states, self.found = None, ()


class _First(nn.Module):
    """Makes the products of all layers, and returns its own."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [len(layer.weight) for layer in layers]
        weights, bias = [layer.weight.detach() for layer in layers], layers[0].bias
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.bias = (
            None if bias is None else nn.Parameter(torch.cat([x.bias.detach() for x in layers]), requires_grad=False)
        )
        self.given = _Given()

    def fits(self, layers: list[nn.Linear]) -> bool:
        """Return whether the weights of the layers have room in what is here."""
        weight = layers[0].weight
        return (
            self.sizes == [len(layer.weight) for layer in layers]
            and (self.weight.shape[1], self.weight.dtype, self.weight.device)
            == (weight.shape[1], weight.dtype, weight.device)
            and (self.bias is None) == (layers[0].bias is None)
        )

    def fill(self, layers: list[nn.Linear]) -> None:
        """Take over the weights of the layers as they are now."""
        torch.cat([layer.weight.detach() for layer in layers], out=self.weight.data)
        if self.bias is not None:
            torch.cat([layer.bias.detach() for layer in layers], out=self.bias.data)

    def forward(self, states: Tensor) -> Tensor:
        own, *others = torch.split(nn.functional.linear(states, self.weight, self.bias), self.sizes, dim=-1)
        self.given.states, self.given.found = states, tuple(others)
        return own


class _Other(nn.Module):
    """Returns what the first layer found for it."""

    def __init__(self, first: _First, place: int) -> None:
        super().__init__()
        self.weight, self.bias = first.weight, first.bias
        self.begin, self.end = sum(first.sizes[:place]), sum(first.sizes[: place + 1])
        self.given, self.number = first.given, place - 1
        self.is_last = place == len(first.sizes) - 1

    def forward(self, states: Tensor) -> Tensor:
        if self.given.states is not states:
            # A network that gives it something else.
            bias = None if self.bias is None else self.bias[self.begin : self.end]
            return nn.functional.linear(states, self.weight[self.begin : self.end], bias)
        found = self.given.found[self.number]
        if self.is_last:
            self.given.forget()
        return found


def _can_be_joined(layers: list[Any]) -> bool:
    if not all(type(layer) is nn.Linear and not is_watched(layer) for layer in layers):
        return False
    alike = {(layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}
    return len(alike) == 1 and sum(layer.weight.nbytes for layer in layers) <= LARGEST


def _parts(parent: nn.Module, name: str, layers: list[Any], *, keep: bool) -> tuple[Any, ...]:
    """Return what stands in for the layers: what did before, with their weights as they are now, or new ones."""
    kept = _kept.get(parent, {}).get(name)
    if kept is not None and kept[0].fits(layers):
        kept[0].fill(layers)
        return kept
    first = _First(layers)
    parts = (first, *(_Other(first, place) for place in range(1, len(layers))))
    if keep:
        _kept.setdefault(parent, {})[name] = parts
    return parts
