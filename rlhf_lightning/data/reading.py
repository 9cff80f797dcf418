"""From a file, a folder, the hub or memory to rows, each with the place it came from."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of the data as it was found."""

    fields: Mapping[str, Any]
    origin: str
    """Where it stands, for messages: ``file:line``."""


Source = str | Path | Iterable[Mapping[str, Any] | Row]
"""A file, a folder, a hub name, or rows in memory (a list of dictionaries, a `datasets.Dataset`, rows read before)."""


def read_rows(path: Source, *, split: str = "train", setting: str = "data.path") -> list[Row]:
    """Return the rows of a .jsonl, .json, .csv or .parquet file, of such a file in a folder, of the hub, or in memory.

    ``split`` names the file in a folder (``train.jsonl``) or the split of a hub data set; ``setting`` is what messages
    call the path. Raises `InputError` where there is nothing to read, or something that is not a row.
    """
    if not isinstance(path, str | Path):
        rows = [row if isinstance(row, Row) else Row(row, f"row {i} of {setting}") for i, row in enumerate(path)]
    elif Path(path).expanduser().exists() or _looks_like_a_file(path):
        rows = list(_read_file(local_file(path, split=split, suffixes=SUFFIXES, setting=setting), setting))
    else:
        rows = list(_read_hub(str(path), split, setting))
    for row in rows:
        if not isinstance(row.fields, Mapping):
            raise InputError(f"{row.origin}: a row must be an object with named fields; found {_kind(row.fields)}")
    if not rows:
        raise InputError(f"{setting}={_shown(path)} has no rows")
    return rows


def local_file(path: str | Path, *, split: str, suffixes: Iterable[str], setting: str) -> Path:
    """Return the file that ``path`` is, or the file named after the split in the folder that it is."""
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"{setting}={path}: there is no such file or folder")
    if found.is_file():
        return found
    file = file_of_split(found, split, suffixes=suffixes)
    if file is None:
        names = sorted(p.name for p in found.iterdir() if p.suffix in SUFFIXES)
        raise InputError(
            f"{setting}={path} is a folder without a file for the split {split!r} "
            f"({', '.join(split + suffix for suffix in suffixes)}); it holds {', '.join(names) or 'no data file'}"
        )
    return file


def file_of_split(folder: Path, split: str, *, suffixes: Iterable[str] = SUFFIXES) -> Path | None:
    """Return the data file of a folder that is named after the split, if there is one."""
    return next((file for suffix in suffixes if (file := folder / f"{split}{suffix}").is_file()), None)


def _looks_like_a_file(path: str | Path) -> bool:
    # A name on the hub is `name` or `owner/name`.
    text = str(path)
    return isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(SUFFIXES)


def _read_file(file: Path, setting: str) -> Iterator[Row]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise InputError(f"{setting}={file}: the name of a data file must end with one of {', '.join(SUFFIXES)}")
    return readers[file.suffix](file)


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if line.strip():
            yield Row(_parse(line, f"{file}:{number}"), f"{file}:{number}")


def _read_json(file: Path) -> Iterator[Row]:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise InputError(
            f"{file}: a .json file must hold a list of objects; found {_kind(rows)} "
            "(a task of Super-NaturalInstructions is read with data.format=natural_instructions)"
        )
    for i, fields in enumerate(rows):
        yield Row(fields, f"{file}[{i}]")


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; raises `InputError` with the line where it is malformed."""
    text = "".join(line for _, line in _lines(file))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}:{error.lineno}: malformed JSON: {error.msg} (a file with one object per line is named .jsonl)"
        ) from None


def _read_csv(file: Path) -> Iterator[Row]:
    reader = csv.DictReader((line for _, line in _lines(file)), strict=True)
    try:
        for fields in reader:
            if None in fields or None in fields.values():
                raise InputError(f"{file}:{reader.line_num}: a row must have as many values as the header has names")
            yield Row(fields, f"{file}:{reader.line_num}")
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: malformed CSV: {error}") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file}: not a Parquet file: {error}") from None
    for i, fields in enumerate(table.to_pylist()):
        yield Row(fields, f"{file}[{i}]")


def _read_hub(name: str, split: str, setting: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    # Whatever goes wrong with a name, a connection or a split is for the user to mend.
    except Exception as error:
        raise InputError(
            f"{setting}={name} is no file or folder here, and `datasets` cannot load the split {split!r} of a data set "
            f"of that name: {type(error).__name__}: {error}"
        ) from error
    for i, fields in enumerate(rows):
        yield Row(fields, f"{name}:{split}[{i}]")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, counted from 1; a byte order mark is left out."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{file}:{number}: the text must be UTF-8: {error.reason}") from None


def _parse(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: malformed JSON: {error.msg} (column {error.colno})") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names[type(value)] if type(value) in names else f"a value of type {type(value).__name__}"


def _shown(path: Source) -> str:
    return str(path) if isinstance(path, str | Path) else "(rows in memory)"
