import pytest

from rlhf_lightning.errors import InputError


def test_an_input_error_is_a_value_error_with_its_message() -> None:
    with pytest.raises(ValueError, match="beta=-1 must not be negative"):
        raise InputError("beta=-1 must not be negative")
