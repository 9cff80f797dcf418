"""What is written in the world: raw text as it lies on the web, demonstrations as people write them, prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.world.instructions import AUDIENCES, Instruction
from rlhf_lightning.world.topics import TOPICS, Register, Topic, other

LISTS = 0.4
"""Share of the raw texts that are lists of instructions; the others are articles."""
SAME_TOPIC = 0.5
"""Share of these lists that stay with one topic."""
TITLED = 0.5
"""Share of the articles under a title that says for whom they are written; the others say it below, in brackets."""
TITLES = ("{topic} for {audience}", "{topic}, told to {audience}")


@dataclass(frozen=True)
class Flaws:
    """How probable it is that a person who answers makes each mistake; several can meet in one demonstration."""

    too_long: float = 0.55
    """One or two sentences more than asked for; where nothing is left to tell, they drift to another topic."""
    too_short: float = 0.05
    """One sentence less, where more than one was asked for; never together with too many."""
    off_register: float = 0.40
    """All of it in the register of another audience."""
    off_topic: float = 0.25
    """A fact of another topic in place of one."""


def raw_text(n: int, instructions: Sequence[Instruction], *, seed: int) -> list[dict[str, str]]:
    """Return ``n`` rows ``{text}`` of text to pre-train on: lists of some of the instructions, and articles.

    No instruction is ever followed by its answer: a model of this text continues an instruction with another one.
    """
    generator = random.Random(seed)
    by_topic = {topic.name: [one for one in instructions if one.topic == topic] for topic in TOPICS}
    rows = []
    for _ in range(n):
        topic = generator.choice(TOPICS)
        if generator.random() >= LISTS:
            rows.append({"text": _article(topic, generator)})
        elif generator.random() < SAME_TOPIC:
            rows.append({"text": _list(by_topic[topic.name], generator)})
        else:
            rows.append({"text": _list(instructions, generator)})
    return rows


def demonstrations(instructions: Sequence[Instruction], *, seed: int, flaws: Flaws = Flaws()) -> list[dict[str, str]]:
    """Return one row ``{prompt, response}`` per instruction, answered as people do: rightly, or with flaws."""
    generator = random.Random(seed)
    return [{"prompt": one.text, "response": _answer(one, flaws, generator)} for one in instructions]


def prompts(instructions: Sequence[Instruction]) -> list[dict[str, str]]:
    """Return one row ``{prompt}`` per instruction."""
    return [{"prompt": one.text} for one in instructions]


def _list(instructions: Sequence[Instruction], generator: random.Random) -> str:
    return "\n".join(one.text for one in generator.sample(instructions, k=generator.randint(3, 6)))


def _article(topic: Topic, generator: random.Random) -> str:
    """Return one to four facts of a topic in the register of an audience, with a title that names both."""
    audience, register = generator.choice(list(AUDIENCES.items()))
    sentences = _some(topic.told(register), generator.randint(1, 4), generator)
    paragraph = " ".join(sentences)
    title = generator.choice(TITLES).format(topic=topic.name, audience=audience)
    title = f"{title[0].upper()}{title[1:]}"
    return f"{title}\n{paragraph}" if generator.random() < TITLED else f"{paragraph}\n({title})"


def _answer(instruction: Instruction, flaws: Flaws, generator: random.Random) -> str:
    """Return facts of the topic in their order, changed by each flaw that the writer falls into."""
    topic, register = instruction.topic, instruction.register
    if generator.random() < flaws.off_register:
        register = other(register)
    told = topic.told(register)
    count = _length(instruction, flaws, generator)
    sentences = _some(told, min(count, len(told)), generator)
    sentences += [_stray(topic, register, generator) for _ in range(count - len(sentences))]
    if generator.random() < flaws.off_topic:
        sentences[generator.randrange(count)] = _stray(topic, register, generator)
    return " ".join(sentences)


def _length(instruction: Instruction, flaws: Flaws, generator: random.Random) -> int:
    """Return how many sentences a person writes."""
    least, most = instruction.sentences[0], instruction.sentences[-1]
    drawn = generator.random()
    if drawn < flaws.too_long:
        return most + generator.randint(1, 2)
    if least > 1 and drawn < flaws.too_long + flaws.too_short:
        return least - 1
    return generator.randint(least, most)


def _some(told: Sequence[str], count: int, generator: random.Random) -> list[str]:
    """Return ``count`` of the sentences, in their order."""
    return [told[number] for number in sorted(generator.sample(range(len(told)), k=count))]


def _stray(topic: Topic, register: Register, generator: random.Random) -> str:
    """Return a fact of another topic."""
    return generator.choice(generator.choice([one for one in TOPICS if one != topic]).told(register))
