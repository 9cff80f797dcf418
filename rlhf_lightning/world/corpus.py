"""What is written in the world: raw text as it lies on the web, demonstrations as people write them, prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.world.instructions import Instruction
from rlhf_lightning.world.topics import TOPICS, Register, Topic, other

LISTS = 0.5
"""Share of the raw texts that are lists of instructions; the others are articles."""
SAME_TOPIC = 0.5
"""Share of these lists that stay with one topic."""
TITLED = 0.7
"""Share of the articles under a title line."""
MIXED = 0.2
"""Share of the articles that use both registers."""
TITLES: dict[Register, tuple[str, ...]] = {
    "simple": ("All about {topic}", "{topic} for children"),
    "technical": ("Notes on {topic}", "The science of {topic}"),
}


@dataclass(frozen=True)
class Flaws:
    """How probable it is that a person who answers makes each mistake; several can meet in one demonstration."""

    too_long: float = 0.30
    """One or two facts more than asked for."""
    too_short: float = 0.10
    """One fact less, where more than one was asked for; never together with too many."""
    off_register: float = 0.40
    """One or more sentences in the register of another audience."""
    off_topic: float = 0.22
    """A fact of another topic in place of one."""
    repeated: float = 0.12
    """One fact told again in place of another, where there are two."""


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
    """Return three or four facts of a topic, mostly in one register, mostly under a title."""
    register: Register = generator.choice(("simple", "technical"))
    numbers = generator.sample(range(len(topic.simple)), k=generator.randint(3, 4))
    told = topic.told(register)
    sentences = [told[number] for number in numbers]
    if generator.random() < MIXED:
        _change_register(sentences, numbers, topic.told(other(register)), generator)
    paragraph = " ".join(sentences)
    if generator.random() >= TITLED:
        return paragraph
    title = generator.choice(TITLES[register]).format(topic=topic.name)
    return f"{title[0].upper()}{title[1:]}\n{paragraph}"


def _answer(instruction: Instruction, flaws: Flaws, generator: random.Random) -> str:
    """Return facts of the topic in random order, changed by each flaw in turn that the writer falls into."""
    topic, register = instruction.topic, instruction.register
    told = topic.told(register)
    count = _length(instruction.sentences, len(told), flaws, generator)
    numbers = generator.sample(range(len(told)), k=count)
    if count > 1 and generator.random() < flaws.repeated:
        first, second = generator.sample(range(count), k=2)
        numbers[second] = numbers[first]
    sentences = [told[number] for number in numbers]
    if generator.random() < flaws.off_register:
        _change_register(sentences, numbers, topic.told(other(register)), generator)
    if generator.random() < flaws.off_topic:
        stranger = generator.choice([one for one in TOPICS if one != topic])
        sentences[generator.randrange(count)] = generator.choice(stranger.told(register))
    return " ".join(sentences)


def _length(asked: int, known: int, flaws: Flaws, generator: random.Random) -> int:
    drawn = generator.random()
    if drawn < flaws.too_long:
        return min(asked + generator.randint(1, 2), known)
    return asked - 1 if asked > 1 and drawn < flaws.too_long + flaws.too_short else asked


def _change_register(
    sentences: list[str], numbers: Sequence[int], told: Sequence[str], generator: random.Random
) -> None:
    """Put one or more of the sentences, in place, into the register of ``told``."""
    for place in generator.sample(range(len(sentences)), k=generator.randint(1, len(sentences))):
        sentences[place] = told[numbers[place]]
