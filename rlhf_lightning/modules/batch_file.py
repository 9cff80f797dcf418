"""The batches of one update in a safetensors file: tensors and text, nothing that could run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.types import ComparisonBatch, Experience, Record, SFTBatch

KINDS: dict[str, type[Record]] = {kind.__name__: kind for kind in (SFTBatch, ComparisonBatch, Experience)}
"""The records that updates are made from; all of their fields are tensors."""


def write_records(records: Sequence[Record], path: Path, notes: Mapping[str, str]) -> None:
    """Write the records, and what is to be said of them; raises `OSError` where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for i, record in enumerate(records):
        for field in fields(record):
            # A copy: safetensors refuses tensors that share memory.
            tensors[f"{i}.{field.name}"] = getattr(record, field.name).detach().cpu().clone().contiguous()
    kinds = json.dumps([type(record).__name__ for record in records])
    save_file(tensors, path, {**notes, "records": kinds})


def read_records(path: Path) -> tuple[list[Record], dict[str, str]]:
    """Return what `write_records` wrote; raises `InputError` where the file is another one."""
    try:
        with safe_open(path, framework="pt") as file:
            notes: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        kinds = [KINDS[name] for name in json.loads(notes.pop("records"))]
        records = [
            kind(**{field.name: tensors[f"{i}.{field.name}"] for field in fields(kind)}) for i, kind in enumerate(kinds)
        ]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"replay={path} is no file that a skipped update left behind ({error})") from error
    return records, notes
