"""The error that a user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names it, the rule, and the value that was found."""
