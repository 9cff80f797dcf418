"""`rlhf train ... replay=FILE`: an update that was skipped, once more, to see where it stops being finite."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from rlhf_lightning.cli.build import build
from rlhf_lightning.cli.checks import Config
from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class _Replayed(BaseException):
    """Ends a run that is not to train; carries what was found."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines


class _Replay(Callback):
    """Repeats the update when everything is set up and the checkpoint is loaded, and ends the run."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        module: Any = pl_module
        raise _Replayed(module.replay(self.file))


def replay(settings: Config, ckpt_path: str | None) -> None:
    """Print what is not finite in the update that the file of the setting ``replay`` holds; nothing is written.

    The weights are those of ``ckpt_path``, without one those that the run would start from.
    """
    file = settings["replay"]
    if not Path(file).exists():
        raise InputError(f"replay={file} does not exist")
    # A new object: with no callbacks of the run nothing is exported, logged or written.
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    trainer: Trainer = build("trainer", settings["trainer"] | quiet, callbacks=[_Replay(file)])
    module: LightningModule = build("module", settings["module"])
    data = build("data", settings["data"])
    # The callbacks of the run are left out on purpose.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except _Replayed as found:
        if trainer.is_global_zero:
            print("\n".join(found.lines))
