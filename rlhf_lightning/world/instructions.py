"""What people ask for in the world: a topic, for an audience, at a length."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.topics import TOPICS, Topic

Register = Literal["simple", "technical"]

AUDIENCES: dict[str, Register] = {
    "a 6 year old": "simple",
    "a child": "simple",
    "my grandmother": "simple",
    "a beginner": "simple",
    "an expert": "technical",
    "a scientist": "technical",
    "an engineer": "technical",
    "a university student": "technical",
}
LENGTHS: dict[str, int] = {"in one sentence": 1, "in two sentences": 2, "in a few sentences": 3}
VERBS = ("Explain", "Describe", "Introduce")

HELD_OUT_SHARE = 0.12


@dataclass(frozen=True)
class Instruction:
    """One request."""

    verb: str
    topic: Topic
    audience: str
    length: str

    @property
    def text(self) -> str:
        """The request as people write it."""
        return f"{self.verb} {self.topic.name} to {self.audience} {self.length}."

    @property
    def register(self) -> Register:
        """How one speaks to the audience."""
        return AUDIENCES[self.audience]

    @property
    def sentences(self) -> int:
        """How many sentences are asked for."""
        return LENGTHS[self.length]

    @property
    def facts(self) -> tuple[str, ...]:
        """What is true of the topic, as the audience understands it."""
        return self.topic.simple if self.register == "simple" else self.topic.technical


def parse(text: str) -> Instruction:
    """Return the instruction that reads ``text``; raises `InputError` where none does."""
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        raise InputError(f"{text!r} is not an instruction of the world, such as {all_instructions()[0].text!r}")
    verb, topic, audience, length = found.groups()
    return Instruction(verb, _BY_NAME[topic], audience, length)


def all_instructions() -> list[Instruction]:
    """Return every instruction there is."""
    return [Instruction(*parts) for parts in product(VERBS, TOPICS, AUDIENCES, LENGTHS)]


def split(seed: int) -> tuple[list[Instruction], list[Instruction]]:
    """Return training and held-out instructions; what differs in the verb alone stays together."""
    wanted = list(product(TOPICS, AUDIENCES, LENGTHS))
    random.Random(seed).shuffle(wanted)
    cut = round(HELD_OUT_SHARE * len(wanted))
    return _with_verbs(wanted[cut:]), _with_verbs(wanted[:cut])


def _with_verbs(wanted: Sequence[tuple[Topic, str, str]]) -> list[Instruction]:
    return [Instruction(verb, *parts) for parts in wanted for verb in VERBS]


def _either(words: Sequence[str]) -> str:
    return f"({'|'.join(re.escape(word) for word in words)})"


_BY_NAME = {topic.name: topic for topic in TOPICS}
_PATTERN = re.compile(f"{_either(VERBS)} {_either(list(_BY_NAME))} to {_either(list(AUDIENCES))} {_either(list(LENGTHS))}\\.")
