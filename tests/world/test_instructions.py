from collections import Counter

import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.instructions import (
    AUDIENCES,
    HELD_OUT,
    LENGTHS,
    VERBS,
    Instruction,
    all_instructions,
    parse,
    split,
)
from rlhf_lightning.world.topics import TOPICS


def ways(instructions: list[Instruction]) -> set[tuple[str, str, str]]:
    return {(one.topic.name, one.audience, one.length) for one in instructions}


def test_an_instruction_reads_as_a_person_would_write_it() -> None:
    one = Instruction("Explain", TOPICS[0], "a 6 year old", "in a few sentences")
    assert one.text == "Explain the moon landing to a 6 year old in a few sentences."
    assert (one.register, list(one.sentences)) == ("simple", [2, 3])


def test_everything_can_be_asked_in_every_way_once() -> None:
    instructions = all_instructions()
    assert len(set(instructions)) == len(instructions) == len(VERBS) * len(TOPICS) * len(AUDIENCES) * len(LENGTHS)


def test_parsing_is_the_inverse_of_writing() -> None:
    for one in all_instructions():
        assert parse(one.text) == one


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Explain the moon landing to a 6 year old in a few sentences",
        "Explain Mars to a child briefly.",
        "Explain rain to a child briefly. Rain is water that falls from clouds.",
    ],
)
def test_other_text_is_refused_and_shown(text: str) -> None:
    with pytest.raises(InputError, match="text must be an instruction of the world") as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_the_split_puts_every_instruction_on_one_side() -> None:
    train, held_out = split(0)
    assert Counter([*train, *held_out]) == Counter(all_instructions())


def test_all_verbs_of_a_way_to_ask_are_on_the_same_side() -> None:
    train, held_out = split(0)
    assert not ways(train) & ways(held_out)


def test_about_the_intended_share_of_every_topic_is_held_out() -> None:
    _, held_out = split(0)
    counts = Counter(topic for topic, _, _ in ways(held_out))
    assert set(counts) == {topic.name for topic in TOPICS}
    for count in counts.values():
        assert count / (len(AUDIENCES) * len(LENGTHS)) == pytest.approx(HELD_OUT, abs=0.02)


def test_the_seed_decides_what_is_held_out() -> None:
    assert split(3) == split(3)
    assert ways(split(3)[1]) != ways(split(4)[1])
