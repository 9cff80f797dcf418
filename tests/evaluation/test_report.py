import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.evaluation.report import DIGITS, report_figures, rounded, write_report


def read(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def test_the_numbers_for_programs_keep_their_keys_and_order(report: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    found = read(page.with_name("report.json"))
    assert list(found) == list(report)
    assert found["win_rate"] == report["win_rate"]
    assert found["ppo"]["score"] == report["ppo"]["score"]


def test_what_is_not_a_number_becomes_null(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read(tmp_path / "report.json")["curves"]["ppo"]["ppo/explained_variance"]["value"] == [None, 0.1, 0.2]


def test_floats_are_rounded_to_significant_digits_and_nothing_else_is_touched() -> None:
    third = 1 / 3
    assert rounded({"a": (third, 1e6 * third, -math.inf), "b": [True, 7, "x", None]}) == {
        "a": [0.333333, 333333.0, None],
        "b": [True, 7, "x", None],
    }
    assert DIGITS == 6


def test_the_same_report_is_the_same_files(report: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(report, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_each_figure_is_a_picture_in_the_folder(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path)
    pictures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert pictures == {"win_rate", "reward", "ppo", "distance", "training", "time"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


@pytest.mark.parametrize(
    ("missing", "figure"),
    [
        ("win_rate", "win_rate"),
        ("reward", "reward"),
        ("curves", "ppo"),
        ("curves", "distance"),
        ("curves", "training"),
        ("throughput", "time"),
    ],
)
def test_a_stage_that_was_not_run_has_no_figure(report: dict[str, Any], missing: str, figure: str) -> None:
    assert figure in report_figures(report)
    assert figure not in report_figures({**report, missing: {}})
