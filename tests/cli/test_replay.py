"""A fine-tuning run that ends over NaN, and a look into the update that ended it, all by the command."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from rlhf_lightning.callbacks import newest_whole
from rlhf_lightning.cli.application import run_verb

QUIET = ["trainer=cpu", "callbacks.progress=null", "trainer.enable_progress_bar=false", "logger=null"]


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fine-tuning a network to which "~" is not a number, on eight rows of which six have it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    shutil.copytree(tiny_model, "spoilt")
    network = AutoModelForCausalLM.from_pretrained("spoilt")
    (token,) = AutoTokenizer.from_pretrained("spoilt").encode("~", add_special_tokens=False)
    with torch.no_grad():
        network.get_input_embeddings().weight[token] = torch.nan
    network.save_pretrained("spoilt")
    rows = [{"prompt": f"Say {i}{'~' if i > 1 else ''}.", "response": f"{i}!"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = ["data.path=rows.jsonl", "data.batch_size=1", "data.val_path=rows.jsonl"]
    return ["network.pretrained=spoilt", *data, "output_dir=out", *QUIET]


def test_a_run_that_ends_over_nan_keeps_its_checkpoint_and_its_batch_is_replayed(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # `trainer.limit_val_batches=0`: validation on "~" is not the matter.
    run = [*command, "callbacks.checkpoint.every_n_train_steps=1", "trainer.limit_val_batches=0"]
    assert run_verb("train", [*run, "module.max_bad_updates=2"]) == 2
    said = capsys.readouterr().err
    assert "max_bad_updates=2" in said
    assert "ckpt_path=last" in said
    kept = newest_whole(Path("out/checkpoints"))
    assert kept is not None
    state = torch.load(kept, weights_only=True)
    # "~" was not a number from the beginning; nothing else became so.
    assert sum(int(x.isnan().sum()) for x in state["state_dict"].values()) == 16
    assert not Path("out/model").exists()
    file = next(iter(sorted(Path("out/bad_updates").iterdir())))
    for more in ([], ["ckpt_path=last"]):
        before = sorted(Path("out").rglob("*"))
        assert run_verb("train", [*run, f"replay={file}", *more]) == 0
        said = capsys.readouterr().out
        assert "first output that is not finite: policy.model.embed_tokens (Embedding)" in said
        assert "loss: nan" in said
        assert sorted(Path("out").rglob("*")) == before


def test_a_file_that_is_not_there_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("train", [*command, "replay=nowhere.safetensors"]) == 2
    assert "replay=nowhere.safetensors does not exist" in capsys.readouterr().err
