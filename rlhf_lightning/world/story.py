"""The world's data as files: what `rlhf pipeline` reads where the user brings none."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.jsonl import write_rows
from rlhf_lightning.world.corpus import demonstrations, prompts, raw_text
from rlhf_lightning.world.instructions import Instruction, split
from rlhf_lightning.world.judge import ceiling, label

Row = Mapping[str, Any]

Sampler = Callable[[Sequence[Row], int], list[str]]
"""``sample(rows, seed)``: one response of a policy to the prompt of each row."""


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
    from rlhf_lightning.world.network import build_network, build_tokenizer

    train, held_out = split(seed)
    raw = raw_text(texts, train, seed=seed)
    shown = demonstrations(train * demonstrations_per_instruction, seed=seed)
    # The policies are compared with what people answered to the held-out instructions.
    compared = demonstrations(shuffled(held_out, seed), seed=seed + 1)
    files = {"text": raw, "demonstrations": shown, "prompts": prompts(train), "held_out": compared}
    for name, rows in files.items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    written = [*(row["text"] for row in raw), *(row["response"] for row in shown)]
    tokenizer = build_tokenizer(written, vocab_size=vocab_size)
    network = build_network(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, seed=seed)
    network.save_pretrained(folder / "initial")
    tokenizer.save_pretrained(folder / "initial")
    return {"rows": {name: len(rows) for name, rows in files.items()}, "parameters": network.num_parameters()}


def write_comparisons(
    folder: Path,
    sample: Sampler,
    *,
    seed: int,
    comparisons: int,
    held_out_comparisons: int,
    responses: int,
    agreement: float,
    **_: object,
) -> dict[str, Any]:
    """Write what the judge, with a person's noise, prefers among responses that ``sample`` draws from a policy.

    Held-out comparisons are of held-out instructions. The result holds the share of their labels that the judge
    without noise agrees with, which is the most that a reward model can reach.
    """
    train, held_out = split(seed)
    asked = {
        "comparisons": shuffled(train, seed)[:comparisons],
        "comparisons_held_out": shuffled(held_out, seed)[:held_out_comparisons],
    }
    result: dict[str, Any] = {}
    for offset, (name, instructions) in enumerate(asked.items()):
        sampled = sample([row for row in prompts(instructions) for _ in range(responses)], seed + offset)
        rows = [
            {"prompt": instruction.text, "responses": sampled[responses * i : responses * (i + 1)]}
            for i, instruction in enumerate(instructions)
        ]
        labelled = label(rows, agreement=agreement, seed=seed + offset)
        write_rows(folder / f"{name}.jsonl", labelled)
        result[name] = len(labelled)
    return result | {"ceiling": ceiling(labelled)}


def shuffled(instructions: Sequence[Instruction], seed: int) -> list[Instruction]:
    """Return the instructions in an order that depends on the seed."""
    return random.Random(f"order {seed}").sample(instructions, k=len(instructions))
