import pytest
import torch

from rlhf_lightning.functional import precision
from rlhf_lightning.functional.precision import at_least_float32, multiplies_bfloat16


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


@pytest.mark.parametrize(
    ("abilities", "found"),
    [
        ({}, False),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_a_cpu_multiplies_bfloat16_where_it_says_so_and_torch_uses_it(
    abilities: dict[str, object], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_abilities", lambda: abilities)
    assert multiplies_bfloat16() == (found and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not multiplies_bfloat16()
