"""Chains of operations on large tensors as a few kernels, each of which reads and writes the memory once."""

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._triton import has_triton

WORTH_IT = 2**21
"""Bytes of a tensor from which on its memory takes longer than to start kernels."""

Given = ParamSpec("Given")
Found = TypeVar("Found")


def fused(chain: Callable[Given, Found]) -> Callable[Given, Found]:
    """Return a function that computes the same, by compiled kernels where `can_be_fused` says so of its first tensor.

    The chain must not change what it is given. It is compiled when it is first called, for a few seconds.
    """

    @cache
    def compiled() -> Any:
        # Not before it is needed: the compiler takes a second to be imported.
        return torch.compile(chain)

    @wraps(chain)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        found: Found = (compiled() if can_be_fused(args[0]) else chain)(*args, **kwargs)
        return found

    return call


def can_be_fused(x: Any) -> bool:
    """Return whether a tensor is large and on a CUDA device, and kernels can be compiled.

    Never where a tensor has no numbers: the memory of a run is estimated on such.
    """
    return type(x) is Tensor and x.is_cuda and x.nbytes >= WORTH_IT and can_compile()


@cache
def can_compile() -> bool:
    """Return whether Triton is at hand, for a device that is here, and a C compiler."""
    # Triton builds what starts its kernels from C.
    return has_triton() and any(map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"]))
