"""Tensors that may lie in parts on several processes."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(x: Tensor) -> Tensor:
    """Return a tensor that lies in parts on several processes as one tensor, any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def laid_out_as(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x``, which is equal on all processes, in the parts and the type of ``weight``."""
    x = x.to(weight.dtype)
    return distribute_tensor(x, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else x


def local_numel(weight: Tensor) -> int:
    """Return how many numbers of a weight this process holds."""
    return weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel()


def is_finite(x: Tensor) -> bool:
    """Return whether all numbers are finite; of a tensor in parts, those of this process."""
    own = x.to_local() if isinstance(x, DTensor) else x
    return bool(own.detach().isfinite().all())
