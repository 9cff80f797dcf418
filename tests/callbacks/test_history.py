from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import History

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Counting(LightningModule):
    """Logs the number of the batch in training, and a hundred times the step in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("sft/loss", float(batch_idx))
        return (self.weight**2).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("sft/val_loss", 100.0 * self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path: Path, history: History, *callbacks: Any, **settings: Any) -> Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[history, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        **{"max_epochs": 1, **settings},
    )
    trainer.fit(Counting(), DataLoader(range(4)), DataLoader(range(2)), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_every_step_is_kept_however_seldom_the_loggers_write(tmp_path: Path) -> None:
    history = History()
    fit(tmp_path, history, log_every_n_steps=50)
    assert history.curves["sft/loss"] == {"step": [1, 2, 3, 4], "value": [0.0, 1.0, 2.0, 3.0]}


def test_validation_is_kept_where_it_happened_and_only_there(tmp_path: Path) -> None:
    history = History()
    fit(tmp_path, history, val_check_interval=2)
    assert history.curves["sft/val_loss"] == {"step": [2, 4], "value": [200.0, 400.0]}
    assert [sorted(row) for row in history.rows] == [["sft/loss", "step"], ["sft/loss", "sft/val_loss", "step"]] * 2


def test_the_sanity_check_is_not_part_of_the_run(tmp_path: Path) -> None:
    history = History()
    fit(tmp_path, history, num_sanity_val_steps=2, limit_train_batches=2)
    assert history.curves["sft/val_loss"]["step"] == [2]


def test_batches_of_one_optimizer_step_share_a_row(tmp_path: Path) -> None:
    history = History()
    fit(tmp_path, history, accumulate_grad_batches=2, limit_val_batches=0)
    assert [row["step"] for row in history.rows] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_keeps_its_beginning(tmp_path: Path) -> None:
    fit(tmp_path, History(), ModelCheckpoint(tmp_path / "first", save_last=True), max_epochs=1)
    resumed = History()
    fit(
        tmp_path,
        resumed,
        ModelCheckpoint(tmp_path / "first"),
        max_epochs=2,
        ckpt_path=tmp_path / "first" / "last.ckpt",
    )
    assert resumed.curves["sft/loss"]["step"] == list(range(1, 9))
