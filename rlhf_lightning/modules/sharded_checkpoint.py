"""Checkpoints of which each process wrote its part, read without running anything that a file says.

`torch.distributed.checkpoint` unpickles the list of parts, and every number that is no tensor.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from rlhf_lightning.callbacks.checkpoint_file import LAST_OF_FOLDER
from rlhf_lightning.errors import InputError

PARTS = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}
"""What a list of parts is made of, by module."""


class ListOfParts(pickle.Unpickler):
    """Builds what `PARTS` names and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class; raises `InputError` for one that does not belong into a list of parts."""
        if name not in PARTS.get(module, ()):
            raise InputError(f"the checkpoint names {module}.{name}, which no checkpoint holds: it is not loaded")
        return super().find_class(module, name)


class Planner(DefaultLoadPlanner):
    """Takes numbers and texts, but no objects."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Pass on what is plain; raises `pickle.UnpicklingError` for anything else."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether a path is a folder with the parts of a checkpoint."""
    return path.is_dir() and (path / LAST_OF_FOLDER).is_file()


def load_sharded(path: Path, module: nn.Module, optimizers: Mapping[str, Optimizer], *, strict: bool) -> dict[str, Any]:
    """Load weights and optimizer states, from however many processes, and return all else; all processes must call.

    Raises `InputError` where the folder holds anything that would have to be unpickled, and where it is not whole.
    """
    ListOfParts(io.BytesIO((path / ".metadata").read_bytes())).load()
    state = {"state_dict": get_model_state_dict(module)}
    _load(state, path)
    module.load_state_dict(state["state_dict"], strict=strict)
    for name, optimizer in optimizers.items():
        found = {name: get_optimizer_state_dict(module, optimizer)}
        _load(found, path)
        set_optimizer_state_dict(
            module, optimizer, optim_state_dict=found[name], options=StateDictOptions(cpu_offload=True)
        )
    rest: dict[str, Any] = torch.load(path / LAST_OF_FOLDER, weights_only=True)
    return rest


def _load(state: dict[str, Any], path: Path) -> None:
    try:
        load(state, storage_reader=FileSystemReader(path), planner=Planner())
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise InputError(f"the checkpoint {path} cannot be loaded: {type(first).__name__}: {first}") from error
