"""The judge: it knows what is true in the world. It labels comparisons and compares models; training never asks it."""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf_lightning.world.instructions import Instruction, parse
from rlhf_lightning.world.topics import TOPICS

FACTS = frozenset(fact for topic in TOPICS for fact in (*topic.simple, *topic.technical))

OTHER_REGISTER = 0.4
"""What a true sentence in the wrong register is worth."""
PENALTY = 0.3
"""What each false, stray, repeated or surplus sentence costs, and a text without an ending."""


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in a response; counts are sentences."""

    asked: int
    sentences: int
    true: int
    """Facts of any topic."""
    on_topic: int
    """Facts of the topic that was asked for."""
    distinct: int
    """The same, each counted once."""
    in_register: int
    """Of the distinct ones, those in the words of the audience."""
    ended: bool
    """Whether the text ends with a full stop."""
    score: float
    """1 for a flawless response, not below -1."""


class Judge:
    """Scores responses to instructions of the world."""

    def judge(self, prompt: str, response: str) -> Verdict:
        """Return the verdict on one response; raises `InputError` for a prompt that is no instruction of the world."""
        instruction = parse(prompt)
        sentences = sentences_of(response)
        on_topic = [s for s in sentences if s in (*instruction.topic.simple, *instruction.topic.technical)]
        distinct = set(on_topic)
        in_register = distinct & set(instruction.facts)
        ended = response.rstrip().endswith(".")
        return Verdict(
            asked=instruction.sentences,
            sentences=len(sentences),
            true=sum(s in FACTS for s in sentences),
            on_topic=len(on_topic),
            distinct=len(distinct),
            in_register=len(in_register),
            ended=ended,
            score=_score(instruction, len(sentences), len(distinct), len(in_register), ended),
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        """Return one score per response."""
        return [self.judge(prompt, response).score for prompt, response in zip(prompts, responses, strict=True)]


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, white space evened out; what follows the last full stop counts as one."""
    parts = re.split(r"(?<=\.)\s+", " ".join(text.split()))
    return [part for part in parts if part]


def temperature_for_agreement(differences: Sequence[float], *, agreement: float) -> float:
    """Return tau with mean sigmoid(|d| / tau) = agreement over the differences d that are not 0 (Bradley & Terry 1952)."""
    sizes = [abs(d) for d in differences if d != 0]
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        mean = sum(1 / (1 + math.exp(-min(size / middle, 500.0))) for size in sizes) / len(sizes)
        low, high = (middle, high) if mean > agreement else (low, middle)
    return math.sqrt(low * high)


def ranked(scores: Sequence[float], *, temperature: float, rng: random.Random) -> list[int]:
    """Return indices from best to worst, drawn so that every pair is ordered by Bradley-Terry (Plackett 1975)."""
    noisy = [score / temperature - math.log(rng.expovariate(1.0)) for score in scores]
    return sorted(range(len(scores)), key=lambda i: -noisy[i])


def label(rows: Sequence[Mapping[str, Any]], *, agreement: float, seed: int) -> list[dict[str, Any]]:
    """Return comparisons of rows ``{prompt, responses}``, the responses in the order that a noisy judge prefers.

    Equal responses count once; what leaves fewer than two is left out. Two make a pair, more a ranking.
    """
    rng = random.Random(f"labels {seed}")
    compared = [(row["prompt"], list(dict.fromkeys(row["responses"]))) for row in rows]
    compared = [(prompt, responses) for prompt, responses in compared if len(responses) > 1]
    scores = [Judge().score([prompt] * len(responses), responses) for prompt, responses in compared]
    differences = [a - b for row in scores for a, b in combinations(row, 2)]
    temperature = temperature_for_agreement(differences, agreement=agreement)
    orders = [ranked(row, temperature=temperature, rng=rng) for row in scores]
    return [
        _comparison(prompt, [responses[i] for i in order])
        for (prompt, responses), order in zip(compared, orders, strict=True)
    ]


def ceiling(comparisons: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of labelled pairs that the judge without noise orders alike (ties count half).

    No reward model can be expected to agree with the labels more often.
    """
    wins = [0.5 * (1 + _sign(a - b)) for row in comparisons for a, b in combinations(_scores(row), 2)]
    return sum(wins) / len(wins)


def _score(instruction: Instruction, sentences: int, distinct: int, in_register: int, ended: bool) -> float:
    if sentences == 0:
        return -1.0
    asked = instruction.sentences
    right = min(in_register, asked)
    passable = min(distinct - in_register, asked - right)
    surplus = sentences - right - passable
    score = (right + OTHER_REGISTER * passable) / asked - PENALTY * (surplus + (not ended))
    return max(-1.0, score)


def _comparison(prompt: str, responses: list[str]) -> dict[str, Any]:
    if len(responses) == 2:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    return {"prompt": prompt, "responses": responses}


def _scores(row: Mapping[str, Any]) -> list[float]:
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    return Judge().score([row["prompt"]] * len(responses), responses)


def _sign(x: float) -> float:
    return float((x > 0) - (x < 0))
