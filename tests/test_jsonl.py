import json
from pathlib import Path

from rlhf_lightning.jsonl import write_rows


def read(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_rows_are_read_back_as_they_were_whatever_they_hold(tmp_path: Path) -> None:
    rows = [{"prompt": 'a\nb "c" \u2028é', "n": 1}, {"prompt": None, "list": [1.5, True]}]
    file = tmp_path / "new" / "rows.jsonl"
    write_rows(file, rows)
    with file.open(encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == rows


def test_rows_replace_those_of_before_or_stand_behind_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"a": 1}])
    write_rows(file, [{"a": 2}], mode="a")
    assert read(file) == [{"a": 1}, {"a": 2}]
    write_rows(file, [{"a": 3}])
    assert read(file) == [{"a": 3}]
