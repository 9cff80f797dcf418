"""Weights in oneDNN's own order while a rollout is sampled on a CPU.

A product with few rows, as each step of sampling has, takes about as long to bring its weights into the order in which
they are read as to multiply. In a rollout the same weights are read many times.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from rlhf_lightning.networks.compiling import is_compiled
from rlhf_lightning.networks.plain_head import is_watched

SMALLEST = 2**15
"""Weights of a layer from which on it is worth it."""

TYPES = (torch.float32, torch.bfloat16)


@contextmanager
def reordered(policy: nn.Module, *, rows: int) -> Iterator[None]:
    """Let the linear layers on a CPU make their products, of so many ``rows`` mostly, from reordered copies of weights.

    The copies are made when the block begins. Afterwards the layers are back as they were. Nothing is changed where
    torch has no oneDNN, where it is switched off (``torch.backends.mkldnn``), and in compiled networks.
    """
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    if _is_at_hand() and not is_compiled(policy):
        children = ((parent, *child) for parent in policy.modules() for child in parent.named_children())
        found = [(parent, name, layer) for parent, name, layer in children if _is_worth_it(layer)]
    for parent, name, layer in found:
        parent._modules[name] = _Reordered(layer, rows)
    try:
        yield
    finally:
        for parent, name, layer in found:
            parent._modules[name] = layer


class _Reordered(nn.Module):
    """Stands in for a linear layer, whose parameters it names as its own."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        weight = layer.weight.detach()
        # Not where there are no numbers: the memory of a run is estimated on such tensors.
        self.can_run = type(weight) is Tensor
        # What inductor reorders weights with, and multiplies by: torch has no public function that does.
        self.copy = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.can_run else weight.clone()

    def forward(self, states: Tensor) -> Tensor:
        if not self.can_run or states.dtype != self.weight.dtype:
            return nn.functional.linear(states, self.weight, self.bias)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.copy, self.bias, "none", [], "")
        return made


def _is_at_hand() -> bool:
    needed = ("_reorder_linear_weight", "_linear_pointwise")
    is_on = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return is_on and all(hasattr(torch.ops.mkldnn, name) for name in needed)


def _is_worth_it(layer: nn.Module) -> TypeGuard[nn.Linear]:
    # A layer with an adapter, or quantised, is of another class.
    if type(layer) is not nn.Linear or is_watched(layer):
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype in TYPES and weight.numel() >= SMALLEST
