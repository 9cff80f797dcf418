import pytest
import torch

from rlhf_lightning.functional.precision import at_least_float32


@pytest.mark.parametrize(
    ("given", "worked_on"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_becomes_float32_and_nothing_becomes_less_precise(
    given: torch.dtype, worked_on: torch.dtype
) -> None:
    x = torch.tensor([1 / 3, -2.5], dtype=given)
    found = at_least_float32(x)
    assert found.dtype == worked_on
    assert found.tolist() == x.tolist()
