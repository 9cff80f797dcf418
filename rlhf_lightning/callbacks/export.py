"""The Hugging Face folder that a stage leaves behind."""

import os
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from rlhf_lightning.errors import InputError
from rlhf_lightning.types import Export

SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
"""Strategies under which no process may hold all weights, so that all of them have a part in writing."""

PARTS = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")
"""One of these makes a folder that of a model, also of one that has lost some of its files."""


@runtime_checkable
class Exportable(Protocol):
    """A module that writes itself as a Hugging Face folder."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, safetensors, tokenizer and generation config."""


@runtime_checkable
class AdapterExportable(Protocol):
    """A module that also writes its adapter alone."""

    def save_pretrained(self, folder: str | Path, *, export: Export = "merged") -> None:
        """Write the folder."""

    def check_export(self, export: Export) -> None:
        """Raise `InputError` where the network cannot be exported like that."""


class HuggingFaceExport(Callback):
    """Writes the model to ``dirpath`` when training has ended well: the whole folder or nothing.

    With ``export`` "merged" it is a folder that `transformers` alone loads, with "adapter" one for `peft`: what was
    trained, and the name of the network that it belongs into.
    It is written beside ``dirpath`` and moved there at once, so that whoever finds the folder finds it complete. After
    an error or an interrupt nothing is written, and what an earlier run wrote stays. It also stays where a checkpoint
    was at its end already: a module's own last touch, made when training ends, is not in the checkpoint.
    """

    def __init__(self, dirpath: str | Path, *, export: Export = "merged") -> None:
        self.dirpath = Path(dirpath)
        self.export: Export = export
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise `InputError` before training where the export could not be written after it."""
        if stage != "fit":
            return
        self._trained = False
        if not isinstance(pl_module, Exportable):
            found = type(pl_module).__name__
            raise InputError(f"HuggingFaceExport needs a module with save_pretrained(folder), found {found}")
        if self.export != "merged":
            self._with_adapter(pl_module).check_export(self.export)
        if trainer.is_global_zero:
            _check_target(self.dirpath)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there was something to train."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder; this hook is not reached by a run that failed or was interrupted."""
        partial = _beside(self.dirpath, "partial")
        if trainer.strategy.broadcast(self._trained or not self.dirpath.exists()):
            assert isinstance(pl_module, Exportable)
            if trainer.is_global_zero:
                _remove(partial)
            if trainer.is_global_zero or isinstance(trainer.strategy, SHARDING):
                if self.export == "merged":
                    pl_module.save_pretrained(partial)
                else:
                    self._with_adapter(pl_module).save_pretrained(partial, export=self.export)
            if trainer.is_global_zero:
                replace_folder(partial, self.dirpath)
        # Nobody reads the folder before it is there.
        trainer.strategy.barrier("HuggingFaceExport")

    def _with_adapter(self, pl_module: LightningModule) -> AdapterExportable:
        if not isinstance(pl_module, AdapterExportable):
            raise InputError(f"export={self.export} needs a module that can write it, found {type(pl_module).__name__}")
        return pl_module


def replace_folder(new: Path, old: Path) -> None:
    """Move the folder ``new`` to the place of ``old``, which may exist."""
    replaced = _beside(old, "replaced")
    _remove(replaced)
    if old.exists():
        # A folder that is not empty cannot be renamed over.
        old.replace(replaced)
    new.replace(old)
    _remove(replaced)


def _check_target(dirpath: Path) -> None:
    ours = any((dirpath / name).exists() for name in PARTS)
    foreign = dirpath.is_dir() and any(dirpath.iterdir()) and not ours
    if foreign or dirpath.is_file():
        raise InputError(f"dirpath={dirpath} holds something else than a model; it would be replaced: name another one")
    try:
        dirpath.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"dirpath={dirpath}: its folder cannot be made: {error.strerror}") from error
    if not os.access(dirpath.parent, os.W_OK):
        raise InputError(f"dirpath={dirpath}: {dirpath.parent} cannot be written to")


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
