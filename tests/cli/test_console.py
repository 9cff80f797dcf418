import subprocess
import sys

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
