from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import HuggingFaceExport
from rlhf_lightning.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Module(LightningModule):
    """Trains one number; its folder holds the number as it was when it was written."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.fails_at = fails_at
        self.note = "trained"

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fails_at:
            raise RuntimeError("out of memory")
        return (self.weight**2).sum()

    def on_train_end(self) -> None:
        self.note = "calibrated"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(f"{self.note} {float(self.weight.detach()):.3f}")


class Unwritable(Module):
    """Dies in the middle of writing."""

    def save_pretrained(self, folder: str | Path) -> None:
        super().save_pretrained(folder)
        raise OSError("disk full")


class WithoutExport(LightningModule):
    """Has no folder to write."""


def fit(
    module: LightningModule, dirpath: Path, *, ckpt_path: Path | None = None, also: Any = (), **settings: Any
) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[HuggingFaceExport(dirpath), *also],
        default_root_dir=dirpath.parent,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **settings},
    )
    trainer.fit(module, DataLoader(range(3)), ckpt_path=ckpt_path)


def test_the_folder_holds_the_model_as_on_train_end_left_it(tmp_path: Path) -> None:
    fit(Module(), tmp_path / "out" / "model")
    assert (tmp_path / "out" / "model" / "config.json").read_text() == "calibrated 0.512"  # 0.8 ** 3


@pytest.mark.filterwarnings("ignore:.*exists and is not empty.*")
def test_a_run_that_was_at_its_end_already_keeps_what_its_end_wrote(tmp_path: Path) -> None:
    def run(name: str, ckpt_path: Path | None = None) -> None:
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, enable_version_counter=False)
        fit(Module(), tmp_path / name, ckpt_path=ckpt_path, also=[checkpoints], enable_checkpointing=True)

    run("model")
    run("model", ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert (tmp_path / "model" / "config.json").read_text() == "calibrated 0.512"
    run("elsewhere", ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "trained 0.512"


def test_nothing_but_the_folder_is_left(tmp_path: Path) -> None:
    for _ in range(2):
        fit(Module(), tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_run_replaces_the_whole_folder(tmp_path: Path) -> None:
    fit(Module(), tmp_path / "model")
    (tmp_path / "model" / "adapter.safetensors").touch()
    fit(Module(), tmp_path / "model", limit_train_batches=1)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert (tmp_path / "model" / "config.json").read_text() == "calibrated 0.800"


def test_a_failed_run_writes_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    fit(Module(), tmp_path / "model", limit_train_batches=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Module(fails_at=2), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "calibrated 0.800"


def test_an_interrupted_run_writes_nothing(tmp_path: Path) -> None:
    class Interrupted(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Interrupted(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_write_that_fails_half_way_keeps_what_was_there(tmp_path: Path) -> None:
    fit(Module(), tmp_path / "model", limit_train_batches=1)
    with pytest.raises(OSError, match="disk full"):
        fit(Unwritable(), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "calibrated 0.800"
    # The half-written folder is in nobody's way.
    fit(Module(), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "calibrated 0.512"


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="something else than a model"):
        fit(Module(), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("left", ["config.json", "model.safetensors"])
def test_what_is_left_of_a_model_is_replaced(left: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / left).touch()
    fit(Module(), folder)
    assert {file.name: file.stat().st_size > 0 for file in folder.iterdir()} == {"config.json": True}


def test_a_place_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        fit(Module(fails_at=0), tmp_path / "file" / "model")


def test_a_module_without_save_pretrained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found WithoutExport"):
        HuggingFaceExport(tmp_path / "model").setup(Trainer(logger=False, accelerator="cpu"), WithoutExport(), "fit")
