import re

from rlhf_lightning.world.topics import TOPICS, facts, other

STEMS = {"the moon landing": ("moon", "lunar"), "volcanoes": ("volcan",), "airplanes": ("airplane",)}


def stems(name: str) -> tuple[str, ...]:
    """What a sentence about the topic must contain: its word without "the", and without what a plural adds."""
    word = name.removeprefix("the ").removesuffix("s").removesuffix("er").removesuffix("ity")
    return STEMS.get(name, (word,))


def test_there_are_enough_topics_with_as_many_facts_in_either_register() -> None:
    assert len({topic.name for topic in TOPICS}) == len(TOPICS) >= 30
    assert {(len(topic.simple), len(topic.technical)) for topic in TOPICS} == {(4, 4)}


def test_every_sentence_of_the_world_is_a_different_one() -> None:
    assert len(facts()) == sum(len(topic.simple) + len(topic.technical) for topic in TOPICS)


def test_every_fact_is_one_short_sentence_with_one_full_stop_at_its_end() -> None:
    for sentence in facts():
        assert re.fullmatch(r"[A-Z][A-Za-z0-9 ]+[a-zA-Z0-9]\.", sentence), sentence
        assert "  " not in sentence
        assert 6 <= len(sentence.split()) <= 11, sentence


def test_every_fact_names_its_topic() -> None:
    for sentence, fact in facts().items():
        assert any(stem in sentence.lower() for stem in stems(fact.topic.name)), (fact.topic.name, sentence)


def test_a_sentence_is_found_with_its_topic_number_and_register() -> None:
    for topic in TOPICS:
        for number, (simple, technical) in enumerate(zip(topic.simple, topic.technical, strict=True)):
            assert (facts()[simple].number, facts()[simple].register) == (number, "simple")
            assert (facts()[technical].number, facts()[technical].register) == (number, "technical")
            assert facts()[simple].topic == facts()[technical].topic == topic


def test_each_register_is_the_other_of_the_other() -> None:
    assert other("simple") == "technical"
    assert other("technical") == "simple"
