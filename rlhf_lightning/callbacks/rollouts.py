"""Looking at rollouts while PPO trains: samples to read, and scores that training does not see."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from rlhf_lightning.errors import InputError
from rlhf_lightning.jsonl import write_rows
from rlhf_lightning.types import RewardFunction, ScoredRollout

COLUMNS = ["step", "prompt", "response", "score"]

Row = tuple[int, str, str, float]


@runtime_checkable
class RolloutModule(Protocol):
    """A module that shows its last rollout; None before the first one."""

    scored_rollout: ScoredRollout | None


class SampleTable(Callback):
    """Logs prompts, responses and scores of the first rollout and of every n-th one, to read what the curves mean.

    They go to Weights & Biases as the table ``samples``, to TensorBoard as text, and always to ``samples.jsonl`` in the
    folder of the first logger. Modules without rollouts are left alone.
    """

    def __init__(self, *, every_n_steps: int = 10, num_samples: int = 4) -> None:
        if every_n_steps < 1 or num_samples < 1:
            raise InputError(
                f"every_n_steps={every_n_steps} and num_samples={num_samples} must be at least 1; "
                "leave the callback out to log no samples"
            )
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the samples of this rollout where it is one to be shown."""
        step = trainer.global_step
        if not isinstance(pl_module, RolloutModule) or (step != 1 and step % self.every_n_steps):
            return
        # On every rank: the folder is agreed on between them.
        folder = trainer.log_dir
        rollout = pl_module.scored_rollout
        if rollout is None or not trainer.is_global_zero:
            return
        rows = sample_rows(rollout, step=step, num_samples=self.num_samples)
        file = Path(folder or trainer.default_root_dir) / "samples.jsonl"
        write_rows(file, [dict(zip(COLUMNS, row, strict=True)) for row in rows], mode="a")
        for logger in trainer.loggers:
            log_samples(logger, rows, step=step)


class ScoreMonitor(Callback):
    """Logs the mean score that ``function(prompts, responses, **columns)`` gives each rollout as ``ppo/<name>``.

    Nothing of it reaches the updates: it is how a judge looks on. Modules without rollouts are left alone.
    """

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name = name
        self.function = function

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score the rollout of this batch."""
        if not isinstance(pl_module, RolloutModule) or pl_module.scored_rollout is None:
            return
        rollout = pl_module.scored_rollout
        scores = self.function(rollout.prompts, rollout.responses, **rollout.columns)
        mean = fmean(float(score) for score in scores)
        pl_module.log(f"ppo/{self.name}", mean, on_step=True, on_epoch=False, sync_dist=True, batch_size=len(rollout))


def sample_rows(rollout: ScoredRollout, *, step: int, num_samples: int) -> list[Row]:
    """Return `COLUMNS` of the first responses of a rollout; prompts as the policy reads them."""
    found = zip(rollout.texts, rollout.responses, rollout.scores.tolist(), strict=True)
    return [(step, prompt, response, score) for prompt, response, score in list(found)[:num_samples]]


def log_samples(logger: Logger, rows: Sequence[Row], *, step: int) -> None:
    """Send the rows to a logger that can show text; others are passed by."""
    if isinstance(logger, WandbLogger):
        logger.log_table("samples", columns=COLUMNS, data=[list(row) for row in rows], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("samples", markdown_table(rows), step)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table; a pipe or a line break of a text does not break it."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for step, prompt, response, score in rows:
        lines.append(" | ".join([str(step), _cell(prompt), _cell(response), f"{score:.3f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
