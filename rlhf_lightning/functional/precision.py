"""In what precision numbers are worked on."""

import torch
from jaxtyping import Float
from torch import Tensor

NEEDED = "_is_mkldnn_bf16_supported"
"""Of torch's operations, the one that knows the CPU."""


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return half precision as float32, and float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has products of bfloat16; elsewhere they are made of other instructions, and slower."""
    return hasattr(torch.ops.mkldnn, NEEDED) and bool(getattr(torch.ops.mkldnn, NEEDED)())
