"""Rows as JSON lines."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, mode: Literal["w", "a"] = "w") -> None:
    """Write one JSON object a line, making the folder; with mode "a" behind the lines that are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
