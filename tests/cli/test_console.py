import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.cli.console import with_bar

TALK = """
import logging, warnings
from rlhf_lightning.cli.console import quieten_libraries
quieten_libraries()
logging.getLogger("lightning.pytorch").info("GPU available")
logging.getLogger("lightning.pytorch").warning("a warning")
warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.")
warnings.warn("the user's own warning")
"""


def test_chatter_is_silent_and_warnings_are_heard() -> None:
    # In a process of its own: levels and filters are those of the whole interpreter.
    said = subprocess.run([sys.executable, "-c", TALK], capture_output=True, text=True, check=True).stderr
    assert "a warning" in said
    assert "the user's own warning" in said
    assert "GPU available" not in said
    assert "many workers" not in said


LOADING = """
import logging, sys
from transformers import AutoModelForSequenceClassification
from rlhf_lightning.cli.console import quieten_libraries
quieten_libraries()
for folder in sys.argv[1:]:
    print("===", folder, file=sys.stderr, flush=True)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", "there")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("another fault")
"""


@pytest.mark.proof
def test_a_new_head_is_no_news_and_any_other_missing_weight_is(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lacking = tmp_path / "lacking"
    shutil.copytree(tiny_model, lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", LOADING, str(tiny_model), str(lacking)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    of_whole, of_lacking = said.split("===")[1:]
    assert "LOAD REPORT" not in of_whole
    assert "model.norm.weight" in of_lacking
    assert "gemm_4bit_forward" not in said
    assert "another fault" in said


def test_a_bar_says_what_it_follows_and_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_bar(["first", "second"], "responses")) == ["first", "second"]  # type: ignore[list-item]
    said = capsys.readouterr().out
    assert "responses" in said
    assert "100%" in said
