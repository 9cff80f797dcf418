"""A run that was stopped and goes on equals the one that was not, whatever draws random numbers in it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import ExactResume, History, ResumeCheckpoint, newest_whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Noisy(LightningModule):
    """Draws from every global generator in training and in validation."""

    def __init__(self, *, exact: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.exact = exact

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume()] if self.exact else []

    def noise(self) -> torch.Tensor:
        return torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        noise = self.noise()
        self.log("sft/noise", noise.sum())
        return (self.weight * noise).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("sft/val_noise", self.noise().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> History:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    history = History()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[history, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, "val_check_interval": 2, **settings},
    )
    # With generators of their own: otherwise to begin an epoch is a draw, too.
    loaders: list[Any] = [DataLoader(range(n), generator=torch.Generator().manual_seed(0)) for n in (4, 2)]  # type: ignore[arg-type]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return history


@pytest.mark.parametrize("stop", [3, 5, 6, 9, 12])
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(stop: int, tmp_path: Path) -> None:
    whole, resumed = Noisy(), Noisy()
    expected = fit(whole, ResumeCheckpoint(tmp_path / "whole", every_n_train_steps=2))
    with pytest.raises(ZeroDivisionError):
        fit(Noisy(), ResumeCheckpoint(tmp_path / "half", every_n_train_steps=2), StopAt(stop))
    checkpoint = newest_whole(tmp_path / "half")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{(stop - 1) // 2 * 2}.ckpt"
    found = fit(resumed, ResumeCheckpoint(tmp_path / "half", every_n_train_steps=2), ckpt_path=checkpoint)
    assert found.rows == expected.rows
    assert torch.equal(resumed.weight, whole.weight)
    ends = [torch.load(tmp_path / name / "step-12.ckpt", weights_only=True) for name in ("whole", "half")]
    assert ends[0]["loops"] == ends[1]["loops"]


def test_without_the_callback_it_draws_something_else(tmp_path: Path) -> None:
    # What the test above is worth: Lightning alone does not go on exactly.
    saving: dict[str, Any] = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    expected = fit(Noisy(exact=False), ModelCheckpoint(tmp_path, **saving))
    found = fit(Noisy(exact=False), ModelCheckpoint(tmp_path, **saving), ckpt_path=tmp_path / "step=3.ckpt")
    assert found.rows != expected.rows


@pytest.mark.parametrize("step", [3, 5])
def test_lightnings_own_checkpoints_are_exact_too_where_no_validation_follows(step: int, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    expected = fit(Noisy(), ModelCheckpoint(tmp_path, **saving))
    found = fit(Noisy(), ModelCheckpoint(tmp_path, **saving), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert found.rows == expected.rows


def test_validation_does_not_change_what_training_draws(tmp_path: Path) -> None:
    checkpoints = [ResumeCheckpoint(tmp_path / name) for name in ("with", "without")]
    validated = fit(Noisy(), checkpoints[0]).curves
    alone = fit(Noisy(), checkpoints[1], limit_val_batches=0).curves
    assert validated["sft/noise"] == alone["sft/noise"]
    assert len(set(validated["sft/val_noise"]["value"])) > 1


def test_a_run_with_nothing_left_to_train_shows_the_metrics_of_its_end(tmp_path: Path) -> None:
    module, again = Noisy(), Noisy()
    fit(module, ResumeCheckpoint(tmp_path))
    fit(again, ResumeCheckpoint(tmp_path), ckpt_path=newest_whole(tmp_path))
    assert module.trainer.callback_metrics
    assert again.trainer.callback_metrics == module.trainer.callback_metrics


@pytest.mark.parametrize("limit", [{"max_steps": 6}, {"max_epochs": 2}])
def test_a_run_that_had_ended_trains_on_as_if_it_had_not(limit: dict[str, int], tmp_path: Path) -> None:
    expected = fit(Noisy(), ResumeCheckpoint(tmp_path / "whole"), max_steps=12)
    fit(Noisy(), ResumeCheckpoint(tmp_path / "half"), **limit)
    found = fit(Noisy(), ResumeCheckpoint(tmp_path / "half"), ckpt_path=newest_whole(tmp_path / "half"), max_steps=12)
    assert found.rows == expected.rows


def test_another_number_of_processes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(Noisy(), ResumeCheckpoint(tmp_path), max_steps=2)
    path = tmp_path / "step-2.ckpt"
    state = torch.load(path, weights_only=True)
    state["exact_resume"]["random_states"] *= 2
    torch.save(state, path)
    fit(Noisy(), ResumeCheckpoint(tmp_path), ckpt_path=path, max_steps=4)
    assert "written by 2 processes and is read by 1" in caplog.text
    assert "other batches" not in caplog.text


@pytest.mark.parametrize("batches", [3, 4])
def test_other_batches_are_said(batches: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(Noisy(), ResumeCheckpoint(tmp_path), max_steps=2, limit_train_batches=3)
    path = newest_whole(tmp_path)
    fit(Noisy(), ResumeCheckpoint(tmp_path), ckpt_path=path, max_steps=4, limit_train_batches=batches)
    said = "written where an epoch has 3 batches, and here it has 4: the run goes on with other batches"
    assert (said in caplog.text) == (batches == 4)
