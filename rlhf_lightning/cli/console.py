"""What a command prints: its own lines and warnings that the user can act on, not the chatter of the libraries."""

import logging
import warnings

CHATTER = [
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 with torch 2.15
    r".*does not have many workers.*",  # the data sets are small and tokenised in memory
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own directory
    r".*The number of training batches .* is smaller than the logging interval.*",
]


def quieten_libraries() -> None:
    """Let Lightning and transformers say warnings only."""
    import lightning  # noqa: F401  (its import sets the levels that are lowered here)
    from transformers.utils import logging as transformers_logging

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)
