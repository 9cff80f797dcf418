"""Checkpoints to go on from: between two batches, whole or not at all, and one more when the run is told to stop."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import proxy

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.callbacks.checkpoint_file import PARTIAL, SUFFIX, AtomicCheckpointIO, move
from rlhf_lightning.callbacks.resume import ExactResume
from rlhf_lightning.errors import InputError

PENDING = ".pending"
"""What the name of the end's checkpoint ends with until everything after training is written, too."""


class ResumeCheckpoint(Checkpoint):
    """Writes ``dirpath/step-N.ckpt`` every so many steps and keeps the newest; ``last.ckpt`` leads to the newest.

    A checkpoint is written when the next batch is about to begin: the one before is done, logged and validated, so that
    a resumed run repeats and leaves out nothing. The one of the training's end counts only when the run has ended: one
    that is killed while it exports goes on from the checkpoint before, and exports the same.

    SIGTERM (and SLURM's requeue signal) is answered at the same place: all processes save and raise Lightning's
    ``SIGTERMException``. Weights & Biases are told of checkpoints as Lightning's ``ModelCheckpoint`` tells them.
    """

    def __init__(self, dirpath: str | Path, *, every_n_train_steps: int = 100, keep: int = 2) -> None:
        """Take the folder; steps are rollouts in PPO. Raises `InputError` where a number is below 1."""
        for name, number in {"every_n_train_steps": every_n_train_steps, "keep": keep}.items():
            if number < 1:
                raise InputError(f"{name}={number} must be at least 1")
        self.dirpath = Path(dirpath)
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.written: list[str] = []
        """Names of the newest files that this run wrote, the oldest first."""
        self._too_old: list[str] = []
        self.last_model_path = ""
        # Read by the logger of Weights & Biases, which uploads the newest file at the end.
        self.save_top_k = keep
        self.best_model_path = ""
        self.current_score = None
        self._saved_at = 0
        self._told_to_stop = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the writing of files, and sweep up what a killed run left unfinished."""
        if not any(isinstance(callback, ExactResume) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            found = type(pl_module).__name__
            raise InputError(f"ResumeCheckpoint needs the callback ExactResume beside it; {found} does not bring it")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit" and trainer.is_global_zero:
            for suffix in (PARTIAL, PENDING):
                for left_over in self.dirpath.glob(f"*{suffix}"):
                    trainer.strategy.checkpoint_io.remove_checkpoint(left_over)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals in place of Lightning, which talks to other processes in the midst of a computation."""
        self._saved_at = trainer.global_step
        self._told_to_stop = False
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning puts back what was there before when the run ends.
        signal.signal(signal.SIGTERM, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signal.signal(environment.requeue_signal or signal.SIGUSR1, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save between two batches where it is due, and stop there when told to.

        Raises `InputError` on all processes where the file cannot be written.
        """
        stop = trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done % trainer.accumulate_grad_batches:
            # The gradients of some batches wait for those of the next ones.
            return
        step = trainer.global_step
        if step != self._saved_at and (stop or step % self.every_n_train_steps == 0):
            self._write(trainer, self._name(step))
            self._publish(trainer, self._name(step))
        if stop:
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the end, before the module's last touch; it is for training on."""
        if trainer.global_step != self._saved_at:
            self._write(trainer, self._name(trainer.global_step), PENDING)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the checkpoint of the end count."""
        name = self._name(trainer.global_step)
        pending = self.dirpath / (name + PENDING)
        if self.written[-1:] == [name] and trainer.is_global_zero and pending.exists():
            move(pending, self.dirpath / name)
            self._publish(trainer, name)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the files that may be deleted later."""
        return {"written": self.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the files of the run before, which may have been killed before it deleted the oldest."""
        self.written = list(state_dict["written"])
        self._set_aside_oldest()

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        self._told_to_stop = True

    @staticmethod
    def _name(step: int) -> str:
        return f"step-{step}{SUFFIX}"

    def _write(self, trainer: Trainer, name: str, suffix: str = "") -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            # Otherwise a killed run takes with it what it logged before this checkpoint.
            logger.save()
        # In the file's own list, too.
        self.written = [*(other for other in self.written if other != name), name]
        failure: str | None = None
        try:
            trainer.save_checkpoint(self.dirpath / (name + suffix), weights_only=False)
        except OSError as error:
            failure = f"{self.dirpath / name} cannot be written: {error.strerror}; the checkpoints before it are whole"
            # The other processes wait at the end of save_checkpoint.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise InputError(failure)
        self._saved_at = trainer.global_step

    def _publish(self, trainer: Trainer, newest: str) -> None:
        """Lead ``last.ckpt`` to the new checkpoint, delete the oldest, tell the loggers."""
        self.last_model_path = str(self.dirpath / newest)
        self._set_aside_oldest()
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        link, new_link = self.dirpath / f"last{SUFFIX}", self.dirpath / f"last{SUFFIX}{PARTIAL}"
        new_link.unlink(missing_ok=True)
        new_link.symlink_to(newest)
        move(new_link, link)
        for name in self._too_old:
            trainer.strategy.checkpoint_io.remove_checkpoint(self.dirpath / name)
        self._too_old = []
        for logger in trainer.loggers:
            logger.after_save_checkpoint(proxy(self))

    def _set_aside_oldest(self) -> None:
        self._too_old += self.written[: -self.keep]
        self.written = self.written[-self.keep :]
