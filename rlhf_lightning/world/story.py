"""The world's data as files: what `rlhf pipeline` reads where the user brings none."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError
from rlhf_lightning.jsonl import write_rows
from rlhf_lightning.world.corpus import demonstrations, prompts, raw_text
from rlhf_lightning.world.instructions import Instruction, split
from rlhf_lightning.world.judge import ceiling, label
from rlhf_lightning.world.topics import Register

RARE: Register = "technical"
"""The register that few audiences want."""

RARE_TIMES = 3
"""How often comparisons ask for it where they ask for the other once."""

Row = Mapping[str, Any]

Sampler = Callable[[Sequence[Row], int], list[str]]
"""``sample(rows, seed)``: one response of a policy to the prompt of each row."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The sizes of the world; raises `InputError` where one is out of its range."""

    texts: int
    """Documents of raw text to pre-train on."""
    demonstrations_per_instruction: int
    comparisons: int
    """Prompts whose responses the judge ranks, for training."""
    held_out_comparisons: int
    """The same for measuring the reward model."""
    responses: int
    """Responses of a comparison."""
    agreement: float
    """Share of pairs that the judge orders as it would without noise."""
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, size in vars(self).items():
            if name != "agreement" and size < 1:
                raise InputError(f"{name}={size} must be at least 1")
        if self.responses < 2:
            raise InputError(f"responses={self.responses} must be at least 2: fewer cannot be compared")
        if not 0.5 < self.agreement < 1:
            raise InputError(f"agreement={self.agreement} must lie between 0.5 (at random) and 1 (without noise)")


def write_world(folder: Path, world: World, *, seed: int) -> dict[str, Any]:
    """Write ``data/*.jsonl`` and, as ``initial``, a network with random weights and a tokenizer trained on the text."""
    from rlhf_lightning.world.network import build_network, build_tokenizer

    train, held_out = split(seed)
    raw = raw_text(world.texts, train, seed=seed)
    shown = demonstrations(train * world.demonstrations_per_instruction, seed=seed)
    # The policies are compared with what people answered to the held-out instructions.
    compared = demonstrations(shuffled(held_out, seed), seed=seed + 1)
    files = {"text": raw, "demonstrations": shown, "prompts": prompts(train), "held_out": compared}
    for name, rows in files.items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    written = [*(row["text"] for row in raw), *(row["response"] for row in shown)]
    tokenizer = build_tokenizer(written, vocab_size=world.vocab_size)
    network = build_network(tokenizer, hidden_size=world.hidden_size, layers=world.layers, heads=world.heads, seed=seed)
    network.save_pretrained(folder / "initial")
    tokenizer.save_pretrained(folder / "initial")
    return {"rows": {name: len(rows) for name, rows in files.items()}, "parameters": network.num_parameters()}


def write_comparisons(folder: Path, world: World, sample: Sampler, *, seed: int) -> dict[str, Any]:
    """Write what the judge, with a person's noise, prefers among responses that ``sample`` draws from a policy.

    Instructions of the register that few audiences want are asked `RARE_TIMES` times as often as others: what is right
    for most is wrong there, which a reward model learns last. Where there are more comparisons than that, each is
    answered anew.
    Held-out ones are of held-out instructions, all equally often. The result holds the share of their labels that the
    judge without noise agrees with, which is the most that a reward model can reach.
    """
    train, held_out = split(seed)
    rare = [instruction for instruction in train if instruction.register == RARE]
    asked = {
        "comparisons": list(islice(cycle(shuffled([*train, *(RARE_TIMES - 1) * rare], seed)), world.comparisons)),
        "comparisons_held_out": list(islice(cycle(shuffled(held_out, seed)), world.held_out_comparisons)),
    }
    result: dict[str, Any] = {}
    for offset, (name, instructions) in enumerate(asked.items()):
        sampled = sample([row for row in prompts(instructions) for _ in range(world.responses)], seed + offset)
        rows = [
            {"prompt": instruction.text, "responses": sampled[world.responses * i : world.responses * (i + 1)]}
            for i, instruction in enumerate(instructions)
        ]
        labelled = label(rows, agreement=world.agreement, seed=seed + offset)
        write_rows(folder / f"{name}.jsonl", labelled)
        result[name] = len(labelled)
    return result | {"ceiling": ceiling(labelled)}


def shuffled(instructions: Sequence[Instruction], seed: int) -> list[Instruction]:
    """Return the instructions in an order that depends on the seed."""
    return random.Random(f"order {seed}").sample(instructions, k=len(instructions))
