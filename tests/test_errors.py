from typing import Any

import numpy as np
import pytest

from rlhf_lightning.errors import InputError, check_not_negative, check_number, check_seed


def test_an_input_error_is_a_value_error_with_its_message() -> None:
    with pytest.raises(ValueError, match="beta=-1 must not be negative"):
        raise InputError("beta=-1 must not be negative")


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_what_is_negative_or_not_finite_is_refused_with_its_name(value: float) -> None:
    check_not_negative("rate", 0)
    with pytest.raises(InputError, match=f"^rate={value} must be finite and not negative$"):
        check_not_negative("rate", value)


@pytest.mark.parametrize("value", ["1", True, None, [1.0], 1j])
def test_what_is_no_number_is_refused_with_its_name(value: Any) -> None:
    for whole, kind in ((False, "number"), (True, "whole number")):
        with pytest.raises(InputError, match=f"^rate=.* must be a {kind}$"):
            check_number("rate", value, whole=whole)


def test_numbers_of_python_and_of_numpy_are_numbers() -> None:
    for value in (1, 1.5, float("inf"), np.float32(0.5), np.int64(3)):
        check_number("rate", value)
    for value in (1, np.int64(3)):
        check_number("size", value, whole=True)
    with pytest.raises(InputError, match=r"size=1\.5 must be a whole number"):
        check_number("size", 1.5, whole=True)


def test_a_seed_is_what_numpy_and_lightning_take() -> None:
    for seed in (0, 2**32 - 1):
        check_seed("seed", seed)
        np.random.default_rng(seed)
    wrong: list[Any] = [-1, 2**32, 1.0, True, None]
    for seed in wrong:
        with pytest.raises(InputError, match=r"data\.seed=.* must be a whole number from 0 to 4294967295"):
            check_seed("data.seed", seed)
