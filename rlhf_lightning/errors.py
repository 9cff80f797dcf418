"""The error that a user can mend, and what every part checks of a number."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

LARGEST_SEED = 2**32 - 1
"""What NumPy and Lightning take."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names it, the rule, and the value that was found."""


class NotResumable(InputError):
    """The same command would be refused again: there is nothing to go on with it."""


def check_number(name: str, value: object, *, whole: bool = False) -> None:
    """Raise `InputError` where a setting is no number: a text, true, a list."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise InputError(f"{name}={value!r} must be a {'whole ' if whole else ''}number")


def check_not_negative(name: str, value: float) -> None:
    """Raise `InputError` where a setting is no number, below 0, NaN or infinite."""
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise InputError(f"{name}={value} must be finite and not negative")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `InputError` where a setting is none of its choices."""
    if value not in choices:
        raise InputError(f"{name}={value} must be one of {', '.join(choices)}")


def check_seed(name: str, value: object) -> None:
    """Raise `InputError` where a setting cannot be a seed."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        raise InputError(f"{name}={value!r} must be a whole number from 0 to {LARGEST_SEED}")
