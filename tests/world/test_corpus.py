from collections.abc import Callable
from itertools import pairwise

import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.corpus import LISTS, Flaws, demonstrations, prompts, raw_text
from rlhf_lightning.world.instructions import AUDIENCES, parse, split
from rlhf_lightning.world.judge import Judge, Verdict
from rlhf_lightning.world.topics import facts

NONE = Flaws(too_long=0, too_short=0, off_register=0, off_topic=0)
TRAIN, HELD_OUT = split(0)
RAW = [row["text"] for row in raw_text(2000, TRAIN, seed=0)]


def is_instruction(line: str) -> bool:
    try:
        parse(line)
    except InputError:
        return False
    return True


def verdicts(flaws: Flaws) -> list[Verdict]:
    return [Judge().judge(**row) for row in demonstrations(TRAIN, seed=0, flaws=flaws)]


def test_some_of_the_raw_texts_are_lists_of_three_to_six_instructions() -> None:
    lists = [text for text in RAW if is_instruction(text.splitlines()[0])]
    assert len(lists) / len(RAW) == pytest.approx(LISTS, abs=0.05)
    assert {len(text.splitlines()) for text in lists} == {3, 4, 5, 6}


def test_after_an_instruction_raw_text_has_an_instruction_or_nothing() -> None:
    for text in RAW:
        lines = [is_instruction(line) for line in text.splitlines()]
        assert all(following or not line for line, following in pairwise(lines))


def test_held_out_instructions_never_stand_in_raw_text_or_training_demonstrations() -> None:
    held_out = {one.text for one in HELD_OUT}
    written = {line for text in RAW for line in text.splitlines()}
    written |= {row["prompt"] for row in demonstrations(TRAIN, seed=0)}
    assert len(written & {one.text for one in TRAIN}) > 1000
    assert not written & held_out


def articles() -> list[tuple[str, str, bool]]:
    """Title, paragraph, and whether the title comes first."""
    found = []
    for text in RAW:
        if not is_instruction(text.splitlines()[0]):
            first, second = text.splitlines()
            titled = not second.startswith("(")
            found.append((first, second, True) if titled else (second[1:-1], first, False))
    return found


def test_an_article_tells_distinct_facts_of_its_topic_in_the_register_of_its_audience() -> None:
    for title, paragraph, _ in articles():
        told = [facts()[f"{sentence}."] for sentence in paragraph.removesuffix(".").split(". ")]
        numbers = [fact.number for fact in told]
        assert numbers == sorted(set(numbers))
        assert 1 <= len(told) <= 4
        (audience,) = [audience for audience in AUDIENCES if title.endswith(audience)]
        assert {(fact.topic.name, fact.register) for fact in told} == {(told[0].topic.name, AUDIENCES[audience])}
        assert title.lower().startswith(told[0].topic.name.lower())


def test_half_of_the_articles_have_their_title_above() -> None:
    above = [first for _, _, first in articles()]
    assert sum(above) / len(above) == pytest.approx(0.5, abs=0.05)


def test_every_fact_stands_in_what_the_network_learns_from() -> None:
    shown = demonstrations(TRAIN * 4, seed=0)
    written = " ".join([*RAW, *(row["response"] for row in shown)])
    assert all(sentence in written for sentence in facts())


def test_the_seed_decides_what_is_written() -> None:
    assert raw_text(50, TRAIN, seed=1) == raw_text(50, TRAIN, seed=1) != raw_text(50, TRAIN, seed=2)
    asked = TRAIN[:50]
    assert demonstrations(asked, seed=1) == demonstrations(asked, seed=1) != demonstrations(asked, seed=2)


def test_demonstrations_answer_the_instructions_in_their_order() -> None:
    assert [row["prompt"] for row in demonstrations(TRAIN, seed=0)] == [one.text for one in TRAIN]


def test_few_demonstrations_are_flawless_and_most_well_below() -> None:
    scores = [verdict.score for verdict in verdicts(Flaws())]
    assert 0.08 <= sum(score == 0 for score in scores) / len(scores) <= 0.25
    assert -2.0 <= sum(scores) / len(scores) <= -0.75


def test_people_without_flaws_answer_flawlessly() -> None:
    assert {verdict.score for verdict in verdicts(NONE)} == {0}


@pytest.mark.parametrize(
    ("flaw", "shows"),
    [
        ("too_long", lambda verdict: verdict.surplus > 0),
        ("too_short", lambda verdict: verdict.missing > 0),
        ("off_register", lambda verdict: verdict.in_register < verdict.distinct),
        ("off_topic", lambda verdict: verdict.on_topic < verdict.true),
    ],
)
def test_each_flaw_shows_as_itself_and_costs(flaw: str, shows: Callable[[Verdict], bool]) -> None:
    for verdict in verdicts(Flaws(**{**vars(NONE), flaw: 1.0})):
        # Where one sentence is enough, nothing can be left out.
        assert shows(verdict) == (flaw != "too_short" or verdict.least > 1)
        assert (verdict.score == 0) == (not shows(verdict))


def test_people_write_true_finished_sentences() -> None:
    for verdict in verdicts(Flaws()):
        assert verdict.true == verdict.sentences > 0
        assert verdict.ended


def test_prompts_are_the_instructions_alone() -> None:
    assert prompts(TRAIN[:2]) == [{"prompt": TRAIN[0].text}, {"prompt": TRAIN[1].text}]
