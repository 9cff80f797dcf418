"""A linear layer with an adapter in the least that it takes: W x, and B (A x) added onto it in place.

`peft` makes a tensor of the layer's size for each of B (A x), its product with alpha / r and the sum, in the backward
again two: where a layer is small they take as long as what is gained by not training W. Imports `peft`, so it is
imported where an adapter is put into a network.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from rlhf_lightning.networks.lora import ADAPTER


def lighten(network: nn.Module) -> None:
    """Let the network's adapters work as `AdaptedLinear` does, in layers that are neither quantised nor transposed."""
    for layer in network.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.fan_in_fan_out:
            layer.__class__ = AdaptedLinear


class AdaptedLinear(Linear):  # type: ignore[misc]
    """The same layer as its parent, and the same numbers to rounding."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + b + (alpha / r) B A x, (..., in) -> (..., out)."""
        operands = None if args or kwargs else self._operands(x)
        if operands is None:
            made: Tensor = super().forward(x, *args, **kwargs)
            return made
        added: Tensor = _Added.apply(*operands, self.scaling[ADAPTER])
        return added

    def _operands(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Return what is multiplied, in one type; None where something else is asked for than the sum alone."""
        base: Any = self.base_layer
        is_plain = not self.disable_adapters and not self.merged and self.active_adapters == [ADAPTER]
        dropout: Any = self.lora_dropout[ADAPTER]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        trains_all = any(weight.requires_grad for weight in base.parameters())
        if not is_plain or drops or trains_all or ADAPTER in self.lora_variant or torch.compiler.is_compiling():
            return None
        found: tuple[Any, ...] = (x, base.weight, base.bias, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight)
        # Factors that FSDP2 gathers by themselves are whole while their layers are called, and not before.
        if any(isinstance(tensor, DTensor) for tensor in found):
            return None
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            cast = torch.get_autocast_dtype(kind)
            found = tuple(None if tensor is None else tensor.to(cast) for tensor in found)
        return found if len({tensor.dtype for tensor in found if tensor is not None}) == 1 else None


class _Added(torch.autograd.Function):
    """y = x W' + b + s (x A') B' for x (..., in), W (out, in) without a gradient, A (r, in) and B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.T
        made = linear(rows, weight, bias).addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return made.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, inner, weight, down, up = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (gradient @ up).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_inner, down).view(ctx.shape)
        return of_x, None, None, of_inner.T @ rows, (gradient.T @ inner).mul_(ctx.scale), None
