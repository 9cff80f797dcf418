"""What several benchmarks need; imports nothing but the standard library until it is called."""

from pathlib import Path
from typing import Any

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that trains and does nothing beside."""


def word_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer of so many words, w0 and on, of which the first two ids are padding and the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(vocabulary - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def with_layers_of_peft(network: Any) -> None:
    """Let the adapters of a network work as `peft` has them."""
    from peft.tuners.lora import Linear

    from rlhf_lightning.networks.adapted_linear import AdaptedLinear

    for layer in network.modules():
        if isinstance(layer, AdaptedLinear):
            layer.__class__ = Linear


def begin_peak() -> float:
    """Let `peak` count from now on; return the memory of this process in MiB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """Return the most memory that this process had since `begin_peak`, in MiB."""
    # Not resource.getrusage, whose maximum a process inherits from the one that started it.
    return _status("VmHWM")


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
