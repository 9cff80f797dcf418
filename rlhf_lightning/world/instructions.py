"""What can be asked in the world: "Explain the moon landing to a 6 year old in a few sentences."."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.topics import TOPICS, Register, Topic

VERBS = ("Explain", "Describe", "Please explain", "Please describe")

AUDIENCES: Mapping[str, Register] = MappingProxyType(
    {
        "a 6 year old": "simple",
        "a child": "simple",
        "my grandmother": "simple",
        "a beginner": "simple",
        "my neighbour": "simple",
        "a tourist": "simple",
        "my boss": "simple",
        "an expert": "technical",
    }
)
"""Who asks, and the register in which they want to be told."""

LENGTHS: Mapping[str, range] = MappingProxyType({"briefly": range(1, 3), "in a few sentences": range(2, 4)})
"""How long the answer is to be: the numbers of sentences that are right."""

HELD_OUT = 0.12
"""Share of the ways to ask about each topic (audience and length) that are kept for evaluation."""


@dataclass(frozen=True)
class Instruction:
    """One request."""

    verb: str
    topic: Topic
    audience: str
    length: str

    @property
    def text(self) -> str:
        """The request as it is put to a model."""
        return f"{self.verb} {self.topic.name} to {self.audience} {self.length}."

    @property
    def register(self) -> Register:
        """How the audience wants to be told."""
        return AUDIENCES[self.audience]

    @property
    def sentences(self) -> range:
        """How many sentences are right."""
        return LENGTHS[self.length]


def all_instructions() -> list[Instruction]:
    """Return everything that can be asked, in a fixed order."""
    return [Instruction(*parts) for parts in product(VERBS, TOPICS, AUDIENCES, LENGTHS)]


def parse(text: str) -> Instruction:
    """Return the instruction that reads like this; raises `InputError` for text that is not one."""
    by_text = _by_text()
    if text not in by_text:
        raise InputError(f"text must be an instruction of the world such as {next(iter(by_text))!r}; found {text!r}")
    return by_text[text]


def split(seed: int) -> tuple[list[Instruction], list[Instruction]]:
    """Return the instructions for training and the held-out ones, in the order of `all_instructions`.

    Of every topic the same share of (audience, length) is held out, with all verbs: so that no held-out instruction
    is a training one in other words, and every topic is both learnt and evaluated.
    """
    generator = random.Random(seed)
    ways = list(product(AUDIENCES, LENGTHS))
    held_out = {(topic.name, *way) for topic in TOPICS for way in generator.sample(ways, k=round(HELD_OUT * len(ways)))}
    sides: tuple[list[Instruction], list[Instruction]] = ([], [])
    for one in all_instructions():
        sides[(one.topic.name, one.audience, one.length) in held_out].append(one)
    return sides


@cache
def _by_text() -> dict[str, Instruction]:
    return {one.text: one for one in all_instructions()}
