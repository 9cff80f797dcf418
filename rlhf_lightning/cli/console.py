"""What a command prints: its own lines and warnings that the user can act on, not the chatter of the libraries."""

import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_lightning.types import PromptBatch

CHATTER = [
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 with torch 2.15
    r".*does not have many workers.*",  # the data sets are small and tokenised in memory
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own directory
    r".*The number of training batches .* is smaller than the logging interval.*",
]

EXPECTED_OF_A_NEW_HEAD = {("score.weight", "MISSING"), ("lm_head.weight", "UNEXPECTED")}
"""What a reward model lacks, and has no use for, when it is made from a language model."""


def quieten_libraries() -> None:
    """Let Lightning and transformers say warnings only, and of these none that is about what this package does."""
    import lightning  # noqa: F401  (its import sets the levels that are lowered here)
    from transformers.utils import logging as transformers_logging

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_a_new_head)
    # A kernel of evaluation mode, in which no layer computes here (docs/decisions/0008).
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_a_kernel)
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)


def with_bar(batches: "Sequence[PromptBatch]", what: str) -> "Iterable[PromptBatch]":
    """Return the batches one by one, under a bar named ``what`` that says how many have been taken."""
    from rich.progress import track

    return track(batches, description=what)


def _is_not_about_a_new_head(record: logging.LogRecord) -> bool:
    text = re.sub(r"\x1b\[\d*m", "", record.getMessage())
    if "LOAD REPORT" not in text:
        return True
    weights = set(re.findall(r"^(\S+) *\| *([A-Z]{2,})", text, re.MULTILINE))
    return not weights or not weights <= EXPECTED_OF_A_NEW_HEAD


def _is_not_about_a_kernel(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
