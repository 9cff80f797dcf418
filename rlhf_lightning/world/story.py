"""The world's data as files: what `rlhf pipeline` reads where the user brings none."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.world.corpus import demonstrations, prompts, raw_text
from rlhf_lightning.world.instructions import split
from rlhf_lightning.world.judge import ceiling, label
from rlhf_lightning.world.network import build_network, build_tokenizer

Row = Mapping[str, Any]


def write_world(
    folder: Path,
    *,
    seed: int,
    texts: int,
    demonstrations_per_instruction: int,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    **_: object,
) -> dict[str, Any]:
    """Write ``data/*.jsonl`` and, as ``initial``, a network with random weights and a tokenizer trained on the text."""
    train, held_out = split(seed)
    raw = raw_text(texts, seed=seed)
    shown = demonstrations(train * demonstrations_per_instruction, seed=seed)
    files = {
        "text": raw,
        "demonstrations": shown,
        "prompts": prompts(train),
        # The demonstrations of held-out instructions are what the policies are compared with.
        "held_out": demonstrations(held_out, seed=seed + 1),
    }
    for name, rows in files.items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    tokenizer = build_tokenizer([*(row["text"] for row in raw), *(row["response"] for row in shown)], vocab_size=vocab_size)
    network = build_network(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, seed=seed)
    network.save_pretrained(folder / "initial")
    tokenizer.save_pretrained(folder / "initial")
    return {"rows": {name: len(rows) for name, rows in files.items()}, "parameters": network.num_parameters()}
