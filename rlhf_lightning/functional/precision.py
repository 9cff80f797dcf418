"""In what precision numbers are worked on."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")
"""What torch calls a CPU's products of bfloat16, x86's and ARM's."""


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return half precision as float32, and float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def has_onednn() -> bool:
    """Return whether torch has oneDNN and it is switched on (``torch.backends.mkldnn``)."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has products of bfloat16 and torch uses them, by oneDNN.

    Elsewhere they are made of others, and slower than those of float32. Not known before torch can say it.
    """
    return has_onednn() and any(_abilities().get(name, False) for name in PRODUCTS)


@cache
def _abilities() -> dict[str, object]:
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found
