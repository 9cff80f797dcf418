"""Tokenizers that can be read by hand, files of rows, and the place of the real data."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """One token per byte, <bos> in front, and the special tokens that are asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", **special_tokens)


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """A tokenizer with the special tokens that are asked for."""
    return byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Pad 0, begin 1, end 2; without a chat template."""
    return byte_tokenizer(pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same with a chat template that writes a line break after each end token."""
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Iterable[Mapping[str, Any]]], Path]:
    """Write rows to a file of their own."""

    def write(rows: Iterable[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that RLHF_LIGHTNING_DATA names, or that lies beside the repository."""
    beside = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ["RLHF_LIGHTNING_DATA"]) if "RLHF_LIGHTNING_DATA" in os.environ else beside
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set RLHF_LIGHTNING_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def stories_tokenizer(real_data: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece tokenizer whose end token is also its begin token."""
    return PreTrainedTokenizerFast.from_pretrained(real_data / "models" / "stories260k")
