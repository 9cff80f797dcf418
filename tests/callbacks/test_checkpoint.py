import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.utilities import _scan_checkpoints
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import ExactResume, HuggingFaceExport, ResumeCheckpoint, newest_whole
from rlhf_lightning.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Module(LightningModule):
    """Multiplies its weight after training, and writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume()]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch).sum()

    def on_train_end(self) -> None:
        self.weight.data *= 100

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(str(self.weight.item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class At(Callback):
    """Calls a function behind a step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step = step
        self.function = function

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx + 1 == self.step:
            self.function()


def fit(*callbacks: Callback, module: LightningModule | None = None, **settings: Any) -> Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **settings},
    )
    loader = DataLoader(torch.ones(8, 1))  # type: ignore[arg-type]
    trainer.fit(module or Module(), loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_last_one_is_linked(tmp_path: Path) -> None:
    fit(ResumeCheckpoint(tmp_path, every_n_train_steps=2, keep=3))
    assert names(tmp_path) == ["last.ckpt", "step-4.ckpt", "step-6.ckpt", "step-8.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step-8.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


def test_a_resumed_run_deletes_what_the_run_before_it_wrote_and_nothing_else(tmp_path: Path) -> None:
    fit(ResumeCheckpoint(tmp_path, every_n_train_steps=2))
    (tmp_path / "mine.ckpt").write_text("kept by hand")
    fit(ResumeCheckpoint(tmp_path, every_n_train_steps=2), ckpt_path=tmp_path / "step-8.ckpt", max_epochs=2)
    assert names(tmp_path) == ["last.ckpt", "mine.ckpt", "step-14.ckpt", "step-16.ckpt"]


@pytest.mark.parametrize(("told", "saved"), [(3, ["last.ckpt", "step-3.ckpt"]), (8, ["last.ckpt", "step-8.ckpt"])])
def test_a_run_that_is_told_to_stop_saves_between_two_batches(told: int, saved: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = At(told, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SIGTERMException):
        fit(ResumeCheckpoint(tmp_path), stop, max_epochs=2)
    assert names(tmp_path) == saved
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_checkpoint_is_written_while_gradients_wait_for_more_of_them(tmp_path: Path) -> None:
    stop = At(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SIGTERMException):
        fit(ResumeCheckpoint(tmp_path), stop, accumulate_grad_batches=3)
    (checkpoint,) = tmp_path.glob("step-*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 6


def test_the_checkpoint_of_the_end_counts_only_when_the_model_is_exported(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class KilledBeforeExport(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise Killed

    export, folder = HuggingFaceExport(tmp_path / "model"), tmp_path / "checkpoints"
    with pytest.raises(Killed):
        fit(KilledBeforeExport(), export, ResumeCheckpoint(folder, every_n_train_steps=3))
    assert newest_whole(folder) == folder / "step-6.ckpt"
    assert not (tmp_path / "model").exists()
    fit(export, ResumeCheckpoint(folder, every_n_train_steps=3), ckpt_path=newest_whole(folder))
    assert names(folder) == ["last.ckpt", "step-6.ckpt", "step-8.ckpt"]
    assert float((tmp_path / "model" / "config.json").read_text()) == pytest.approx(100 * (1 - 8 * 0.1), rel=1e-5)


def test_what_a_killed_run_left_unfinished_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / "step-3.ckpt.partial").touch()
    (tmp_path / "step-8.ckpt.pending").mkdir()  # a folder of shards
    fit(ResumeCheckpoint(tmp_path))
    assert names(tmp_path) == ["last.ckpt", "step-8.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint_whole(tmp_path: Path) -> None:
    full = At(5, lambda: (tmp_path / "step-6.ckpt.partial").symlink_to("/dev/full"))
    message = r"step-6\.ckpt cannot be written: No space left on device; the checkpoints before it are whole"
    with pytest.raises(InputError, match=message):
        fit(ResumeCheckpoint(tmp_path, every_n_train_steps=2), full)
    assert names(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-4.ckpt"]
    assert newest_whole(tmp_path) == tmp_path / "step-4.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_module_that_does_not_bring_exact_resume_is_an_error(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_callbacks(self) -> list[Callback]:
            return []

    with pytest.raises(InputError, match="needs the callback ExactResume beside it; Plain does not bring it"):
        fit(ResumeCheckpoint(tmp_path), module=Plain())
    fit(ResumeCheckpoint(tmp_path), ExactResume(), module=Plain())


def test_weights_and_biases_find_the_newest_file_to_upload(tmp_path: Path) -> None:
    checkpoint = ResumeCheckpoint(tmp_path, every_n_train_steps=2)
    fit(checkpoint)
    assert [path for _, path, _, _ in _scan_checkpoints(checkpoint, {})] == [str(tmp_path / "step-8.ckpt")]
    checkpoint_read_by_lightning: Any = checkpoint
    WandbLogger(offline=True, log_model=False).after_save_checkpoint(checkpoint_read_by_lightning)
    assert checkpoint.save_top_k != -1  # each one would be uploaded at once
    assert checkpoint.best_model_path != checkpoint.last_model_path


@pytest.mark.parametrize("setting", ["every_n_train_steps", "keep"])
def test_a_number_below_one_is_an_error(setting: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{setting}=0 must be at least 1"):
        ResumeCheckpoint(tmp_path, **{setting: 0})
