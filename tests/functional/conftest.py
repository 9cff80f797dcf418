"""The shapes and types in the signatures of `functional` are checked at every call of these tests."""

import importlib

from hypothesis import settings
from jaxtyping import install_import_hook

FILES = ("masking", "logprobs", "kl", "rewards", "advantages", "losses", "schedules")

# Beartype with the numeric tower: an int is a float, as for a type checker.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

# Another test may have imported them without the checks, so they are loaded anew.
with install_import_hook("rlhf_lightning.functional", CHECKER):
    for _file in FILES:
        importlib.reload(importlib.import_module(f"rlhf_lightning.functional.{_file}"))

# The first call of a torch function takes longer than hypothesis allows; the same examples every time.
settings.register_profile("torch", deadline=None, derandomize=True, database=None)
settings.load_profile("torch")
