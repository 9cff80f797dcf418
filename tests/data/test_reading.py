import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_lightning.data.reading import read_rows
from rlhf_lightning.errors import InputError

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    files = {suffix: tmp_path / f"rows{suffix}" for suffix in (".json", ".csv", ".parquet")}
    files[".json"].write_text(json.dumps(ROWS))
    with files[".csv"].open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[".parquet"])
    for file in [jsonl(ROWS), *files.values()]:
        assert [dict(row.fields) for row in read_rows(file)] == ROWS


def test_rows_in_memory_are_rows() -> None:
    from datasets import Dataset

    assert [row.fields for row in read_rows(ROWS)] == ROWS
    assert [row.fields for row in read_rows(Dataset.from_list(ROWS))] == ROWS


def test_a_row_knows_its_file_and_line_and_blank_lines_count(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.origin for row in read_rows(file)] == [f"{file}:1", f"{file}:3"]


def test_a_csv_row_knows_the_line_on_which_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text\n"two\nlines"\nb\n')
    assert [(row.fields["text"], row.origin) for row in read_rows(file)] == [
        ("two\nlines", f"{file}:3"),
        ("b", f"{file}:4"),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ä"}\n', encoding="utf-8-sig")
    assert read_rows(file)[0].fields == {"text": "ä"}


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    jsonl(ROWS[:1], "train.jsonl")
    jsonl(ROWS[1:], "validation.jsonl")
    assert [row.fields for row in read_rows(tmp_path)] == ROWS[:1]
    assert [row.fields for row in read_rows(tmp_path, split="validation")] == ROWS[1:]


def test_a_folder_without_the_split_is_an_error_that_says_what_is_there(
    tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    jsonl(ROWS, "train.jsonl")
    with pytest.raises(InputError, match=r"'test'.*train\.jsonl"):
        read_rows(tmp_path, split="test")


@pytest.mark.parametrize("name", ["rows.jsonl", "./rows", "some/folder/rows", "rows.parquet"])
def test_a_missing_file_is_an_error_that_names_path_and_setting(name: str) -> None:
    with pytest.raises(InputError, match=rf"data\.val_path={name}: there is no such file"):
        read_rows(name, setting="data.val_path")


def test_a_name_that_the_hub_does_not_give_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(InputError, match=r"data\.path=owner/no-such-data-set is no file or folder here"):
        read_rows("owner/no-such-data-set")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": "b"', "malformed JSON"),
        ('{"text": "b"} {}', "malformed JSON"),
        ('["b"]', "must be an object.*found a list"),
        ('"b"', "must be an object.*found a text"),
    ],
)
def test_a_bad_line_is_an_error_with_its_file_and_number(tmp_path: Path, line: str, rule: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "c"}}\n')
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{rule}"):
        read_rows(file)


def test_text_that_is_not_utf8_is_an_error_with_its_file_and_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"text": "a"}\n{"text": "ä"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the text must be UTF-8"):
        read_rows(file)


def test_a_csv_row_with_too_few_or_too_many_values_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    for line in ("c", "c,d,e"):
        file.write_text(f"prompt,response\na,b\n{line}\n")
        with pytest.raises(InputError, match=r"rows\.csv:3: a row must have as many values"):
            read_rows(file)


@pytest.mark.parametrize("name", ["rows.txt", "rows"])
def test_an_unknown_kind_of_file_is_an_error_that_names_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(InputError, match=r"\.jsonl, \.json, \.csv, \.parquet"):
        read_rows(tmp_path / name)


def test_a_json_file_must_hold_a_list(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"text": "a"}')
    with pytest.raises(InputError, match="must hold a list of objects; found an object"):
        read_rows(file)
    file.write_text('[{"text": "a"},\n{"text": }]')
    with pytest.raises(InputError, match=r"rows\.json:2: malformed JSON"):
        read_rows(file)


def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_text("a")
    with pytest.raises(InputError, match=r"rows\.parquet: not a Parquet file"):
        read_rows(file)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=r"rows\.jsonl has no rows"):
        read_rows(file)
