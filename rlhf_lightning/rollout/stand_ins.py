"""Plain linear layers that stand in for others while a rollout is sampled: adapters merged, weights cast once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lightning.networks.lora import ADAPTER, adapted_layers

_kept: "WeakKeyDictionary[nn.Module, nn.Linear]" = WeakKeyDictionary()


@contextmanager
def stand_ins(policy: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """Let plain layers stand in for those that would work more in each of many steps than once before them.

    A linear layer with an adapter is read as W + (alpha / r) B A; one in float32 under autocast, whose weight each
    forward would cast, as its cast. Afterwards the layers are back as they were: nothing of them was changed. Quantised
    layers stay, and so do adapters of 16-bit weights, in whose steps the small changes of an adapter would be lost.
    With ``keep`` their memory is kept for the next block, so that recorded steps find the weights where they were.
    """
    replaced = [
        (parent, name, layer, weight)
        for parent, name, layer in [*adapted_layers(policy), *plain_layers(policy)]
        if (weight := _weight(layer)) is not None
    ]
    for parent, name, layer, weight in replaced:
        parent._modules[name] = _stand_in(layer, weight, keep=keep)
    try:
        yield
    finally:
        for parent, name, layer, _ in replaced:
            parent._modules[name] = layer


def plain_layers(network: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return each linear layer that is no part of a layer with an adapter, its parent, and its name there."""
    inside = {id(part) for _, _, layer in adapted_layers(network) for part in layer.modules()}
    return [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and id(layer) not in inside
    ]


def _weight(layer: Any) -> Tensor | None:
    """Return the weight that the stand-in of a layer has, None where the layer itself is as good."""
    base = getattr(layer, "base_layer", layer)
    if type(base) is not nn.Linear or base.weight.dtype not in (torch.float32, torch.float64):
        return None
    kind = base.weight.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
    if base is not layer:
        with torch.autocast(kind, enabled=False):
            whole: Tensor = base.weight + layer.get_delta_weight(ADAPTER)
        return whole.to(cast)
    return None if cast == base.weight.dtype else base.weight.to(cast)


def _stand_in(layer: Any, weight: Tensor, *, keep: bool) -> nn.Linear:
    """Return the plain layer that stood in before, with the weight as it is now, or a new one."""
    kept = _kept.get(layer)
    if kept is None or kept.weight.dtype != weight.dtype or kept.weight.device != weight.device:
        bias = getattr(layer, "base_layer", layer).bias
        kept = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        kept.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            kept.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        if keep:
            _kept[layer] = kept
    else:
        kept.weight.copy_(weight)
        if kept.bias is not None:
            kept.bias.copy_(getattr(layer, "base_layer", layer).bias)
    return kept
