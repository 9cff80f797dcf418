"""`rlhf train`: one stage with Lightning's Trainer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rlhf_lightning.cli.build import build, build_all, trainers_refusals
from rlhf_lightning.cli.checks import Config, check, check_strategy, is_ppo, plain
from rlhf_lightning.cli.console import quieten_libraries
from rlhf_lightning.cli.interrupts import resumable, this_command
from rlhf_lightning.cli.lock import LOCK, only_run_in
from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger, WandbLogger

CHECKPOINTS = "checkpoints"
"""The folder in ``output_dir`` that conf/callbacks names."""

STEPS_BETWEEN_ROWS = 10
"""Optimizer steps from one row of the log to the next, where the trainer's log_every_n_steps is null."""

ROOT_KEYS = [
    "seed",
    "data_root",
    "output_dir",
    "ckpt_path",
    "replay",
    "module",
    "data",
    "network",
    "trainer",
    "logger",
    "callbacks",
    "experiment",
]


def run(config: DictConfig) -> float | None:
    """Train, say where everything is, and return the validation loss or score for a sweep to look at.

    Raises `InputError` where another run is at work in ``output_dir``.
    """
    settings = plain(config)
    ckpt_path = checkpoint(settings["ckpt_path"], settings["output_dir"])
    check(settings, known=ROOT_KEYS)
    check_strategy(settings["module"], settings["trainer"])
    settings["logger"] = same_wandb_run(settings["logger"], ckpt_path)

    from lightning import seed_everything

    quieten_libraries()
    seed_everything(settings["seed"], workers=True, verbose=False)
    if settings["replay"] is not None:
        from rlhf_lightning.cli.replay import replay

        replay(settings, ckpt_path)
        return None
    with only_run_in(settings["output_dir"]):
        return _fit(settings, ckpt_path)


def _fit(settings: Config, ckpt_path: str | None) -> float | None:
    # The Trainer first: a strategy that is not there is said before networks are loaded.
    trainer = build_trainer(settings)
    module: LightningModule = build("module", settings["module"])
    data: LightningDataModule = build("data", settings["data"])
    with closing_loggers(trainer.loggers):
        log_settings(trainer, settings)
        with resumable(lambda: _how_to_go_on(settings)), trainers_refusals():
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    _say_where(trainer, settings)
    return objective(trainer)


def build_trainer(settings: Config, more_callbacks: "Sequence[Callback]" = ()) -> "Trainer":
    """Return the Trainer with the callbacks and loggers of the settings, and ``more_callbacks`` behind them.

    There is a progress bar where both ``callbacks.progress`` and ``trainer.enable_progress_bar`` say so.
    """
    from lightning.pytorch.callbacks import ProgressBar

    callbacks = [*build_all("callbacks", settings["callbacks"]).values(), *more_callbacks]
    loggers = list(build_all("logger", settings["logger"]).values())
    node = settings["trainer"]
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    if not (bars and node.get("enable_progress_bar", True)):
        # Lightning would add a bar of its own, or refuse the one that is there.
        callbacks = [callback for callback in callbacks if callback not in bars]
        node = node | {"enable_progress_bar": False}
    if "log_every_n_steps" in node and node["log_every_n_steps"] is None:
        # A rollout takes as long as many steps of the other stages.
        node = node | {"log_every_n_steps": 1 if is_ppo(settings["module"]) else STEPS_BETWEEN_ROWS}
    trainer: Trainer = build("trainer", node, callbacks=callbacks, logger=loggers or False)
    return trainer


def checkpoint(ckpt_path: str | None, output_dir: str) -> str | None:
    """Return the checkpoint to go on from: ``"last"`` and ``"auto"`` are the newest whole one in ``output_dir``.

    Raises `InputError` if there is none; with ``"auto"`` the run then starts anew.
    """
    if ckpt_path is None:
        return None
    from rlhf_lightning.callbacks.checkpoint_file import fault, is_of_a_trainer, newest_whole

    if ckpt_path in ("last", "auto"):
        newest = newest_whole(Path(output_dir, CHECKPOINTS))
        if newest is None and ckpt_path == "last":
            raise InputError(f"ckpt_path=last: there is no whole checkpoint in output_dir={output_dir}")
        return None if newest is None else str(newest)
    if not Path(ckpt_path).exists():
        raise InputError(f"ckpt_path={ckpt_path} does not exist")
    reason = fault(Path(ckpt_path))
    if reason is not None:
        raise InputError(f"ckpt_path={ckpt_path}: {reason}")
    if not is_of_a_trainer(Path(ckpt_path)):
        raise InputError(
            f"ckpt_path={ckpt_path} is no checkpoint of a training run: a network to start from is a Hugging Face "
            "folder, given as network.pretrained"
        )
    return ckpt_path


def same_wandb_run(logger: Config | None, ckpt_path: str | Path | None) -> Config | None:
    """Return the node of the loggers, that of Weights & Biases with the id of the run that the checkpoint is of."""
    if logger is None or ckpt_path is None:
        return logger
    if "_target_" not in logger:
        return {name: same_wandb_run(node, ckpt_path) for name, node in logger.items()}
    if not logger["_target_"].endswith(".WandbLogger"):
        return logger
    from rlhf_lightning.callbacks.resume import wandb_ids

    ids = wandb_ids(ckpt_path)
    # W&B goes on with the run where it is online, and writes a second folder with the same id where it is offline.
    return logger | {"id": ids[0], "resume": "allow"} if ids else logger


def log_settings(trainer: "Trainer", settings: Config) -> None:
    """Give every logger the composed config, as plain containers.

    Raises `InputError` where Weights & Biases has no account to write to.
    """
    from lightning.pytorch.loggers import WandbLogger

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _log_in(logger)
        logger.log_hyperparams(settings)


@contextmanager
def closing_loggers(loggers: "Iterable[Logger]") -> Iterator[None]:
    """End the runs of Weights & Biases with the block: the next job of a sweep would write into an open one."""
    from lightning.pytorch.loggers import WandbLogger

    try:
        yield
    finally:
        if any(isinstance(logger, WandbLogger) for logger in loggers):
            import wandb

            wandb.finish()


def _log_in(logger: "WandbLogger") -> None:
    from wandb.errors import Error

    try:
        _ = logger.experiment
    except Error as error:
        raise InputError(f"logger=wandb: {error} (without an account: logger.offline=true)") from error


def objective(trainer: "Trainer") -> float | None:
    """Return the last validation score, accuracy or loss, the first of them that was logged."""
    for name in ("ppo/val_score", "reward/val_accuracy", "sft/val_loss"):
        if name in trainer.callback_metrics:
            return float(trainer.callback_metrics[name])
    return None


def _how_to_go_on(settings: Config) -> str | None:
    from rlhf_lightning.callbacks import checkpoints

    last = next(checkpoints(Path(settings["output_dir"], CHECKPOINTS)), None)
    if last is None:
        return None
    return f"the last checkpoint is {last}; go on with\n  {this_command('ckpt_path=last')}"


def _say_where(trainer: "Trainer", settings: Config) -> None:
    if trainer.is_global_zero:
        nothing = "0 steps (nothing was trained: trainer.max_steps, max_epochs or limit_train_batches is 0)"
        number = trainer.global_step
        steps = f"{number} step{'s' * (number > 1)}" if number else nothing
        print(f"\n{steps}. Written to {settings['output_dir']}")
        for entry in sorted(Path(settings["output_dir"]).iterdir()):
            if entry.name != LOCK:
                print(f"  {entry.name}{'/' if entry.is_dir() else ''}")
