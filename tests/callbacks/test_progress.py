from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from rlhf_lightning.callbacks import ProgressBar

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


@pytest.mark.parametrize(
    ("length", "named"), [({"max_epochs": 2}, "Epoch 1/1"), ({"max_epochs": None, "max_steps": 6}, "Epoch 1")]
)
def test_a_last_epoch_is_named_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], length: dict[str, Any], named: str
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        limit_train_batches=4,
        limit_val_batches=0,
        callbacks=[ProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **length,
    )
    trainer.fit(BoringModel())
    said = capsys.readouterr().out
    assert named in said
    assert "/-2" not in said
