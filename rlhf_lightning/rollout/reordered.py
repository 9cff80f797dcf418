"""Weights in oneDNN's own order while a rollout is sampled on a CPU.

A product with few rows, as each step of sampling has, takes about as long to bring its weights into the order in which
they are read as to multiply. In a rollout the same weights are read many times.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.precision import has_onednn, multiplies_bfloat16
from rlhf_lightning.networks.compiling import is_compiled
from rlhf_lightning.networks.plain_head import is_watched
from rlhf_lightning.rollout.stand_ins import plain_layers

SMALLEST = 2**15
"""Numbers of the smallest weight that is copied: with fewer a call costs more than what is saved."""

LARGEST = 2**30
"""Bytes of all copies together: networks with more would rather have the memory."""

NEEDED = ("_reorder_linear_weight", "_linear_pointwise")
"""Operations of torch that its compiler uses for the same: there are no public ones."""


@contextmanager
def reordered(policy: nn.Module, *, rows: int) -> Iterator[None]:
    """Let the linear layers on a CPU make their products, of so many ``rows`` mostly, from reordered copies of weights.

    For use without gradients. The copies are made when the block begins, up to `LARGEST`; afterwards the layers are
    back as they were. Nothing is changed where torch has no oneDNN, where it is switched off
    (``torch.backends.mkldnn``), and in compiled networks.
    """
    put_in: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        for parent, name, layer in _layers(policy):
            parent._modules[name] = _Reordered(layer, rows)
            put_in.append((parent, name, layer))
        yield
    finally:
        for parent, name, layer in put_in:
            parent._modules[name] = layer


class _Reordered(nn.Module):
    """Stands in for a linear layer, whose parameters it names as its own."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        weight = layer.weight.detach()
        # Not where there are no numbers: the memory of a run is estimated on such tensors.
        self.can_run = type(weight) is Tensor
        self.copy = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.can_run else weight.clone()

    def forward(self, states: Tensor) -> Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        if not self.can_run or kind != self.weight.dtype:
            return nn.functional.linear(states, self.weight, self.bias)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(states.to(kind), self.copy, self.bias, "none", [], "")
        return made


def _layers(policy: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    if not _is_at_hand() or is_compiled(policy):
        return []
    # Adapters multiply by their layer's weight themselves.
    found = [(parent, name, layer) for parent, name, layer in plain_layers(policy) if _is_worth_it(layer)]
    return found if sum(layer.weight.nbytes for _, _, layer in found) <= LARGEST else []


def _is_at_hand() -> bool:
    return has_onednn() and all(hasattr(torch.ops.mkldnn, name) for name in NEEDED)


def _is_worth_it(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_large = weight.device.type == "cpu" and weight.numel() >= SMALLEST
    return is_large and not is_watched(layer) and _can_multiply(weight.dtype)


def _can_multiply(kind: torch.dtype) -> bool:
    return kind == torch.float32 or (kind == torch.bfloat16 and multiplies_bfloat16())
