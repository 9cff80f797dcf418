"""Checkpoint files: written whole or not at all, checked before they are believed, and read without unpickling."""

import logging
import os
import pickle
import shutil
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlhf_lightning.errors import InputError

log = logging.getLogger("rlhf_lightning.callbacks")

SUFFIX = ".ckpt"
PARTIAL = ".partial"
"""What the name of a file ends with that is still being written."""

LAST_OF_FOLDER = "meta.pt"
"""Strategies that keep weights in shards write a folder, and this file, which holds all else, last."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is on the disk; reads plain data only.

    Whoever finds the file finds it whole, whenever the process or the machine stopped. The weights go from memory to
    the file without a second copy. For ``Trainer(plugins=[AtomicCheckpointIO()])``; `ResumeCheckpoint` sets it itself.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file; raises `OSError` where the disk is full, and then leaves nothing of it behind."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL)
        try:
            with ctrl_c_waits(), partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            move(partial, target)
        finally:
            # It is gone where it was moved; where it was not, its place on the disk is needed.
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what the file holds; raises `InputError` where that is more than tensors and plain containers."""
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{path} holds something else than tensors and plain containers, or is no checkpoint; nothing of it "
                f"was run ({reason})"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file, or the folder."""
        target = Path(path)
        if "://" in str(path):
            with ctrl_c_waits():
                super().remove_checkpoint(path)
        elif target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block.

    For code that has its own answer to any exception: torch's writer takes one for a broken file, and fsspec's
    ``exists`` for a file that is not there, so that the run would go on.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def move(source: Path, target: Path) -> None:
    """Rename a file, and have the disk know of it."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint; None where it is whole.

    Each record of the file carries a checksum (CRC-32), which `torch.load` does not look at. Nothing is unpickled.
    """
    if checkpoint.is_dir():
        last = checkpoint / LAST_OF_FOLDER
        return fault(last) if last.exists() else f"{LAST_OF_FOLDER}, which is written last, is not there"
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        # A changed header can ask for another alphabet, a password or a compression that there is not.
        return f"torn, or no checkpoint ({error})"
    return None if broken is None else f"corrupted: the checksum of {broken} does not fit"


def is_of_a_trainer(checkpoint: Path) -> bool:
    """Return whether a whole checkpoint was written by a Trainer, and is no bare dictionary. Nothing is unpickled."""
    with zipfile.ZipFile(checkpoint / LAST_OF_FOLDER if checkpoint.is_dir() else checkpoint) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        # Pickles hold the keys of a dictionary as they are.
        return any(b"pytorch-lightning_version" in archive.read(name) for name in pickles)


def checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of a folder, the newest first, without the links to them."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if not path.is_symlink()]
    yield from sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of the folder that is whole, and say which were passed over; None without any."""
    for path in checkpoints(folder):
        reason = fault(path)
        if reason is None:
            return path
        log.warning("%s is passed over: %s", path, reason)
    return None
