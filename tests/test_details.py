"""docs/details.md names functions, settings, metrics and tests that exist."""

import importlib
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PPOModule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "details.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)
]
DETAILS = [row for row in ROWS if len(row) == 6]
FAULTS = [row for row in ROWS if len(row) == 4]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def found(path: str) -> Any:
    """What a dotted path below the package means: modules first, then attributes."""
    words = path.split(".")
    for split in range(len(words), 0, -1):
        try:
            thing = importlib.import_module(".".join(["rlhf_lightning", *words[:split]]))
        except ModuleNotFoundError:
            continue
        for word in words[split:]:
            thing = inspect.getattr_static(thing, word)
        return thing
    raise LookupError(path)


def test_every_detail_has_its_row() -> None:
    assert [int(row[0]) for row in DETAILS] == list(range(1, 61))


@pytest.mark.parametrize("row", DETAILS, ids=lambda row: row[0])
def test_what_a_row_names_exists(row: list[str]) -> None:
    _, _, functions, settings, metrics, tests = row
    assert all(found(name) is not None for name in names(functions))
    for setting in names(settings):
        owner, _, name = setting.partition("=")[0].rpartition(".")
        target = {"": PPOModule}.get(owner) or getattr(importlib.import_module("rlhf_lightning"), owner)
        assert name in inspect.signature(target).parameters, setting
    pages = "".join((ROOT / "docs" / page).read_text("utf-8") for page in ("ppo.md", "sft.md", "reward.md"))
    assert all(f"`{metric}`" in pages for metric in names(metrics))
    for test in names(tests):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), test


def test_the_table_of_faults_is_that_of_the_script() -> None:
    mutants = runpy.run_path(str(ROOT / "tests" / "mutants.py"))["MUTANTS"]
    expected = [[str(m.detail), m.name, f"`{Path(m.file).stem}`", "killed"] for m in mutants]
    assert expected == FAULTS
    assert f"all {len(mutants)} are killed" in PAGE
