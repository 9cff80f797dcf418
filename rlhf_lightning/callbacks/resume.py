"""What Lightning's own resuming leaves out, so that a resumed run equals the uninterrupted one bit for bit."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from rlhf_lightning.callbacks.checkpoint_file import LAST_OF_FOLDER
from rlhf_lightning.random_states import random_state, set_random_state

log = logging.getLogger("rlhf_lightning.callbacks")

KEY = "exact_resume"


class ExactResume(Callback):
    """Keeps in every checkpoint the random states of all processes, the last metrics and the place between two batches.

    They are put back when the first batch after the checkpoint begins: what was drawn before that, by setting up the
    run, then does not count. Validation gives the random states back as it found them, so that training is the same
    whether it was there or not. The three modules bring this callback with them.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states; on all processes, since each has its own."""
        loops = checkpoint["loops"]["fit_loop"]
        between = stand_between_batches(loops, batches_of_epoch=trainer.num_training_batches)
        checkpoint[KEY] = {
            "random_states": of_all_ranks(random_state(pl_module.device), trainer.world_size),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "batches_that_stepped": loops["epoch_loop.state_dict"]["_batches_that_stepped"] if between else None,
            "batches_of_epoch": trainer.num_training_batches,
            "wandb": [logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what is to be put back; a checkpoint that was written without this callback has nothing."""
        self._loaded = checkpoint.get(KEY)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put everything back, once."""
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if len(state["random_states"]) == trainer.world_size:
            set_random_state(state["random_states"][trainer.global_rank], pl_module.device)
            now = trainer.num_training_batches
            before = state.get("batches_of_epoch", now)
            if before != now:
                log.warning(
                    "the checkpoint was written where an epoch has %s batches, and here it has %s: the run goes on "
                    "with other batches, and skips as many of this epoch as had been read",
                    before,
                    now,
                )
        else:
            log.warning(
                "the checkpoint was written by %d processes and is read by %d: the run goes on, but not bit for bit",
                len(state["random_states"]),
                trainer.world_size,
            )
        _show_metrics(trainer, state["metrics"])
        if state["batches_that_stepped"] is not None:
            # Lightning counts one more where a validation would have followed the last batch.
            trainer.fit_loop.epoch_loop._batches_that_stepped = state["batches_that_stepped"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the metrics of a checkpoint after which there was nothing left to train."""
        if self._loaded is not None:
            _show_metrics(trainer, self._loaded["metrics"])
            self._loaded = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the random states."""
        self._before_validation = random_state(pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random states back."""
        if self._before_validation is not None:
            set_random_state(self._before_validation, pl_module.device)
            self._before_validation = None


def _show_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    trainer._logger_connector._callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def stand_between_batches(loops: dict[str, Any], *, batches_of_epoch: float) -> bool:
    """Change the loops' state of a checkpoint to: so many batches are done, and the next has not begun.

    Returns False, and changes nothing, where the last batch is not done: Lightning goes on from there by its own rules.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    now = batches["current"]
    if not now["started"] == now["processed"] == now["completed"]:
        return False
    # The next batch may have been fetched, and is fetched again.
    for counter in (batches["total"], now):
        counter["ready"] = counter["completed"]
    batches["is_last_batch"] = False
    if epochs["current"]["ready"] == epochs["current"]["completed"]:
        # Training has ended. Lightning counts an epoch that `max_steps` cut short as a whole one.
        whole = now["completed"] >= batches_of_epoch
        if whole:
            now.update(dict.fromkeys(now, 0))
        for counter in () if whole else (epochs["total"], epochs["current"]):
            counter["processed"] -= 1
            counter["completed"] -= 1
    return True


def of_all_ranks(state: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Return the states of all processes in the order of their ranks."""
    if world_size == 1:
        return [state]
    states: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(states, state)
    return states


def wandb_ids(checkpoint: str | Path) -> list[str]:
    """Return the ids of the Weights & Biases runs that a checkpoint belongs to; weights are not read for it."""
    # A folder of shards keeps what is not a weight in a file of its own.
    file = Path(checkpoint, LAST_OF_FOLDER) if Path(checkpoint).is_dir() else Path(checkpoint)
    state: dict[str, Any] = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    return [] if KEY not in state else [identifier for identifier in state[KEY]["wandb"] if identifier]
