"""In what precision numbers are worked on."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return half precision as float32, and float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
