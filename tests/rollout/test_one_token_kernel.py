"""The kernel against torch's attention: by Triton's interpreter on a CPU, and compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Heads, key heads, size of a head, keys; the padded, the odd and the usual.
SHAPES = [(14, 2, 64, 130), (4, 4, 24, 70), (32, 1, 128, 64)]

INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_one_token_kernel import SHAPES, check
for shape in SHAPES:
    check(*shape, dtype=torch.float32, device="cpu")
"""


def check(heads: int, groups: int, size: int, span: int, *, dtype: torch.dtype, device: str) -> None:
    """Raise where the kernel differs from torch's attention in float64."""
    from rlhf_lightning.rollout.one_token_kernel import attend

    torch.manual_seed(0)
    query = torch.randn(3, heads, 1, size, device=device, dtype=dtype)
    # Of a cache with room for more.
    keys, values = (torch.randn(4, groups, span + 9, size, device=device, dtype=dtype)[:3, :, :span] for _ in range(2))
    positions = torch.tensor([0, span // 2, span - 1], device=device)
    behind = torch.arange(span, device=device) > positions.unsqueeze(1)
    mask = torch.zeros(3, span, device=device, dtype=dtype).masked_fill(behind, -torch.inf)[:, None, None]
    found = attend(query, keys, values, mask, 0.3)
    shared = query.double().reshape(3, groups, heads // groups, size)
    expected = torch.nn.functional.scaled_dot_product_attention(
        shared, keys.double(), values.double(), attn_mask=mask.double(), scale=0.3
    ).reshape(3, heads, size)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype], (heads, groups, error)


def test_the_kernel_attends_as_torch_does_by_the_interpreter() -> None:
    pytest.importorskip("triton", minversion="3.7", reason="Triton 3.6's interpreter fails with NumPy 2.4 and later")
    # In a process of its own: Triton looks at the variable when it is imported.
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(Path(__file__).parent)],
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_attends_as_torch_does(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(*shape, dtype=dtype, device="cuda")
