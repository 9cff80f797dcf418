"""What people have written in the world: raw text, and demonstrations of mixed quality."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_lightning.world.instructions import Instruction
from rlhf_lightning.world.topics import TOPICS, Topic

Row = dict[str, str]


@dataclass(frozen=True)
class Habits:
    """How often the authors of demonstrations do what was not asked for; several can happen at once."""

    too_long: float = 0.35
    off_register: float = 0.25
    other_topic: float = 0.2
    repeated: float = 0.15
    too_short: float = 0.1


def raw_text(count: int, instructions: Sequence[Instruction], *, seed: int) -> list[Row]:
    """Return documents as they stand on the web: half of them articles, half lists of instructions.

    An instruction is never followed by its answer, so that a model of this text continues one by more of its kind.
    """
    rng = random.Random(f"raw text {seed}")
    kinds: list[Callable[[random.Random], str]] = [_article, lambda rng: _list(rng, instructions)]
    return [{"text": kinds[i % 2](rng)} for i in range(count)]


def demonstrations(instructions: Sequence[Instruction], *, seed: int, habits: Habits | None = None) -> list[Row]:
    """Return a person's answer to each instruction."""
    rng = random.Random(f"demonstrations {seed}")
    return [{"prompt": i.text, "response": _answer(rng, i, habits or Habits())} for i in instructions]


def prompts(instructions: Sequence[Instruction]) -> list[Row]:
    """Return the instructions alone."""
    return [{"prompt": instruction.text} for instruction in instructions]


def _article(rng: random.Random) -> str:
    topic = rng.choice(TOPICS)
    registers = rng.choice([(topic.simple,), (topic.technical,), (topic.simple, topic.technical)])
    facts = [fact for register in registers for fact in rng.sample(register, k=rng.randint(2, 4))]
    title = f"{topic.name[0].upper()}{topic.name[1:]}\n" if rng.random() < 0.5 else ""
    return title + " ".join(facts)


def _list(rng: random.Random, instructions: Sequence[Instruction]) -> str:
    return "\n".join(i.text for i in rng.sample(instructions, k=rng.randint(3, 6)))


def _answer(rng: random.Random, instruction: Instruction, habits: Habits) -> str:
    """Start from a right answer, and do with it what people do."""
    facts = rng.sample(instruction.facts, k=instruction.sentences)
    if rng.random() < habits.too_short and len(facts) > 1:
        facts.pop()
    if rng.random() < habits.off_register:
        facts = [_in_other_register(instruction.topic, fact) if rng.random() < 0.6 else fact for fact in facts]
    if rng.random() < habits.other_topic:
        facts[rng.randrange(len(facts))] = _stray(rng, instruction)
    if rng.random() < habits.too_long:
        facts += [rng.choice(instruction.facts) for _ in range(rng.randint(1, 2))]
    if rng.random() < habits.repeated:
        facts.insert(rng.randrange(len(facts)), rng.choice(facts))
    return " ".join(facts)


def _in_other_register(topic: Topic, fact: str) -> str:
    same = {**dict(zip(topic.simple, topic.technical, strict=True)), **dict(zip(topic.technical, topic.simple, strict=True))}
    return same[fact]


def _stray(rng: random.Random, instruction: Instruction) -> str:
    other = rng.choice([topic for topic in TOPICS if topic != instruction.topic])
    return rng.choice(other.simple if instruction.register == "simple" else other.technical)
