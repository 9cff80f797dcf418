import re
from html.parser import HTMLParser
from typing import Any

import pytest

from rlhf_lightning.evaluation.page import ALTERNATIVES, duration, number, page, percent, scientific
from rlhf_lightning.rollout.reward import EnsembleReward, FunctionReward, ModelReward, Reward, WeightedReward

FIGURES = {name: f"<svg>{name}</svg>" for name in ALTERNATIVES}


class Reader(HTMLParser):
    """Collects the tags with their attributes, and checks that they close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_loads_nothing(report: dict[str, Any]) -> None:
    html = page(report, FIGURES)
    reader = Reader(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    sources = [attrs[key] for _, attrs in reader.tags for key in ("src", "href") if key in attrs]
    assert len(sources) == len(FIGURES)
    assert all(source is not None and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"https?:|url\(|@import", html)


def test_every_figure_is_described_to_those_who_cannot_see_it(report: dict[str, Any]) -> None:
    images = [attrs for tag, attrs in Reader(page(report, FIGURES)).tags if tag == "img"]
    assert all(image["alt"] for image in images)


def test_what_people_wrote_is_text_and_never_markup(report: dict[str, Any]) -> None:
    evil = "<script>alert('1')</script><img src=x>"
    report["samples"][0] = {"prompt": evil, "responses": {"ppo": evil, evil: evil}, "scores": {}}
    report |= {"judge": evil, "versions": {evil: evil}, "judge_score": {evil: 1.0}, "seconds": {evil: 1.0}}
    html = page(report, {})
    assert "<script" not in html
    assert "<img" not in html
    assert Reader(html).text.count(evil) == 9


def test_the_numbers_stand_on_the_page(report: dict[str, Any]) -> None:
    text = Reader(page(report, FIGURES)).text
    for expected in (
        "84.0 %",
        "78.0 to 89.0 %",
        "80.0 %",
        "81.2 %",
        "8.70",
        "5.90",
        "200 held-out prompts",
        "1 h 03 min",
    ):
        assert expected in text


def test_the_reward_models_card_tells_of_length_and_of_the_best_scores(report: dict[str, Any]) -> None:
    text = Reader(page(report, FIGURES)).text
    assert "accuracy where the chosen response is the longer one100.0 % of 3" in text
    assert "accuracy where the chosen response is the shorter one0.0 % of 1" in text
    assert "accuracy where the chosen response is as long as the other100.0 % of 1" in text
    assert "score of the best responses, mean ± standard deviation0.62 ± 0.38" in text


def test_the_page_says_how_fast_each_stage_was(report: dict[str, Any]) -> None:
    text = Reader(page(report, FIGURES)).text
    assert "Fine-tuning12.3 k–3.2 T41.0 %0.25 s" in text
    assert "PPO9871.5 k––12.50 s" in text


def test_samples_stand_side_by_side_with_their_scores(report: dict[str, Any]) -> None:
    text = Reader(page(report, FIGURES)).text
    order = [text.index(part) for part in ("Explain the moon.", "Far away.", "(empty)", "It is.", "It is far.")]
    assert order == sorted(order)
    assert "1.75" in text
    assert "2.25" in text


def test_a_conversation_is_shown_with_its_roles(report: dict[str, Any]) -> None:
    report["samples"][0]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "system: Be brief.\nuser: Hi" in Reader(page(report, {})).text


def test_the_page_says_who_judged(report: dict[str, Any]) -> None:
    assert "knows the truth" in page(report, {})
    for scorer in (reward.kind for reward in (Reward, FunctionReward, ModelReward, WeightedReward, EnsembleReward)):
        stand_in = page({**report, "judge": scorer}, {})
        assert f"the score of the {scorer} stands in for a judge" in stand_in
        assert "score of the judge" not in stand_in


def test_a_policy_that_nobody_fine_tuned_is_not_called_so(report: dict[str, Any]) -> None:
    report["judge_score"] = {"start": 4.1, "ppo": 5.9}
    report["ppo"]["reference"] = "start"
    text = Reader(page({**report, "win_rate": {}, "samples": [], "curves": {}}, {})).text
    assert "before PPO" in text
    assert "fine-tuned" not in text
    assert "score of the judge4.105.90" in text


@pytest.mark.parametrize(
    "missing", ["win_rate", "judge_score", "reward", "ppo", "seconds", "throughput", "curves", "samples", "versions"]
)
def test_the_page_does_without_any_part(report: dict[str, Any], missing: str) -> None:
    empty: Any = [] if missing == "samples" else {}
    Reader(page({**report, missing: empty}, {}))


def test_the_page_does_without_all_parts_but_ppo(report: dict[str, Any]) -> None:
    bare = {**report, "win_rate": {}, "reward": {}, "curves": {}, "samples": [], "judge_score": {"ppo": 1.0}}
    text = Reader(page(bare, {})).text
    assert "no demonstrations" in text
    assert "Reward model" not in text
    assert "pre-trained" not in text


def test_a_reward_that_rises_while_the_judge_falls_is_a_warning(report: dict[str, Any]) -> None:
    warning = "The reward rose and the judge's score fell."
    assert warning not in page(report, {})
    report["judge_score"]["ppo"] = 3.9
    assert warning in page(report, {})
    assert warning not in page({**report, "judge": "reward model"}, {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.7, "1 min 00 s"), (61.0, "1 min 01 s"), (7260.0, "2 h 01 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (999.0, "999"), (1234.0, "1.23 k"), (5.6e14, "560 T"), (2e18, "2e+03 P"), (None, "–")],
)
def test_large_numbers_read_well(value: float | None, text: str) -> None:
    assert scientific(value) == text


def test_missing_numbers_are_a_dash() -> None:
    assert (number(None), percent(None)) == ("–", "–")
    assert (number(3.14159), number(123.4), percent(0.8449), percent(0.8449, 1)) == ("3.14", "123", "84 %", "84.5 %")
