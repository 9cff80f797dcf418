"""What stands between a transformer's products of matrices, in fewer passes over memory than operation by operation.

Autograd makes a pass for each operation and more for its gradient, and keeps what each of them was given; on a CPU that
takes time beside products of some hundred units. There are no second derivatives.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Float[Tensor, "... H"], weight: Float[Tensor, " H"], eps: float) -> Float[Tensor, "... H"]:
    """Return w x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4), all of it in the type of x and weight."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def rotate(
    x: Float[Tensor, "B N T D"], cos: Float[Tensor, "B 1 T D"], sin: Float[Tensor, "B 1 T D"]
) -> Float[Tensor, "B N T D"]:
    """Return x cos + (-b, a) sin, of x = (a, b) in halves of D: rotary positions (Su et al. 2021, eq. 34).

    Units are paired with those half of D further, and not with their neighbours as in the paper.
    """
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


def silu_gate(gate: Float[Tensor, "... I"], up: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
    """Return silu(gate) up (SwiGLU; Shazeer 2020, eq. 6); silu(gate) is made again for the gradient, and not kept."""
    gated: Tensor = _SiLUGate.apply(gate, up)
    return gated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = x * scale
        return normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight = None, None
        normed = x * scale
        by_unit = normed * gradient
        if ctx.needs_input_grad[1]:
            of_weight = by_unit.reshape(-1, len(weight)).sum(dim=0)
        if ctx.needs_input_grad[0]:
            # PPO runs its backward under autocast, too.
            with torch.autocast(x.device.type, enabled=False):
                along = (by_unit @ weight).unsqueeze(-1)
            of_x = torch.mul(gradient, weight, out=by_unit)
            of_x.addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(scale)
        return of_x, of_weight, None


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        of_first, of_second = sin.chunk(2, dim=-1)
        return _turned(x, cos, -of_first, of_second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # What was read with one half of sin gets its gradient with it; as a rule both halves are equal.
        of_first, of_second = sin.chunk(2, dim=-1)
        return _turned(gradient, cos, of_second, -of_first).to(ctx.dtype), None, None


def _turned(x: Tensor, cos: Tensor, to_first: Tensor, to_second: Tensor) -> Tensor:
    """Return (a, b) cos + (b to_first, a to_second), of x = (a, b) in halves of D."""
    turned = x * cos
    a, b = x.to(turned.dtype).chunk(2, dim=-1)
    first, second = turned.chunk(2, dim=-1)
    first.addcmul_(b, to_first)
    second.addcmul_(a, to_second)
    return turned


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = torch.nn.functional.silu(gate).mul_(gradient)
        of_silu = gradient * up
        of_gate: Tensor = torch.ops.aten.silu_backward.grad_input(of_silu, gate, grad_input=of_silu)
        return of_gate, of_up
