"""The shapes and types in the signatures of `functional` are checked at every call that these tests make."""

import importlib
from collections.abc import Generator

import pytest
from jaxtyping import install_import_hook

FILES = ("precision", "masking", "logprobs", "head_logprobs", "kl", "rewards", "advantages", "losses", "schedules")

# Beartype with the numeric tower: an int is a float, as for a type checker.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let the test files below this folder import checked functions, and all others the plain ones."""
    with install_import_hook("rlhf_lightning.functional", CHECKER):
        _load_anew()
    try:
        return (yield)
    finally:
        _load_anew()


def _load_anew() -> None:
    for file in FILES:
        importlib.reload(importlib.import_module(f"rlhf_lightning.functional.{file}"))
