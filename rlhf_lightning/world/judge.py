"""The judge, who knows the truth, and the noisy labels that a person would give in its place."""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.instructions import parse
from rlhf_lightning.world.topics import Register, facts

Row = Mapping[str, Any]

NO_ANSWER = 3.0
"""What it costs to tell nothing of the topic, beside each sentence."""
HALF_RIGHT = 0.5
"""What a fact costs beyond what was asked, and each sentence left out.

A sentence that is false, of another topic or told before costs 1, as a missing end does.
"""
OFF_REGISTER: Mapping[Register, float] = MappingProxyType({"simple": 0.5, "technical": 0.125})
"""What a fact costs that is told in the other register, by the one that is wanted: experts understand simple words."""


@dataclass(frozen=True)
class Verdict:
    """What the judge found in a response; all but ``register``, ``ended`` and ``score`` count sentences."""

    least: int
    """Sentences that the instruction asks for at the least."""
    most: int
    """Sentences that it asks for at the most."""
    sentences: int
    """Sentences of the response, the unfinished one at its end among them."""
    true: int
    """Those that tell a fact of any topic word for word."""
    on_topic: int
    """The true ones about the topic."""
    distinct: int
    """The facts that these tell; one fact in both registers is one fact."""
    in_register: int
    """How many of these facts are told in the register of the audience."""
    register: Register
    """The register of the audience."""
    missing: int
    """Sentences fewer than those asked for."""
    surplus: int
    """Distinct facts beyond those asked for."""
    ended: bool
    """Whether the response ends with a full stop."""

    @property
    def score(self) -> float:
        """What the response is worth: 0 where it is flawless, less what its faults cost."""
        wrong = self.sentences - self.distinct + (not self.ended)
        half_right = HALF_RIGHT * (self.missing + self.surplus)
        off_register = OFF_REGISTER[self.register] * (self.distinct - self.in_register)
        # Subtracted: the negative of nothing would be written as -0.00.
        return 0.0 - (wrong + half_right + off_register + NO_ANSWER * (self.distinct == 0))


class Judge:
    """Knows every fact of the world; ``judge.score`` is a reward function."""

    def judge(self, prompt: str, response: str) -> Verdict:
        """Return what is right and wrong with a response; raises `InputError` where the prompt is no instruction."""
        instruction = parse(" ".join(prompt.split()))
        text = " ".join(response.split())
        sentences = _sentences(text)
        true = [facts()[sentence] for sentence in sentences if sentence in facts()]
        on_topic = [fact for fact in true if fact.topic == instruction.topic]
        least, most = instruction.sentences[0], instruction.sentences[-1]
        distinct = len({fact.number for fact in on_topic})
        return Verdict(
            least=least,
            most=most,
            sentences=len(sentences),
            true=len(true),
            on_topic=len(on_topic),
            distinct=distinct,
            in_register=len({fact.number for fact in on_topic if fact.register == instruction.register}),
            register=instruction.register,
            missing=max(0, least - len(sentences)),
            surplus=max(0, distinct - most),
            ended=text.endswith("."),
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str], **_: object) -> list[float]:
        """Return the score of each response, as a reward function does."""
        return [self.judge(prompt, response).score for prompt, response in zip(prompts, responses, strict=True)]


def temperature_for_agreement(score_differences: Sequence[float], agreement: float = 0.75) -> float:
    """Return the tau at which Bradley-Terry labels agree with the scores on this share of the pairs that differ.

    Solves mean sigmoid(abs(difference) / tau) = agreement by bisection; raises `InputError` where no pair differs.
    """
    if not 0.5 < agreement < 1:
        raise InputError(f"agreement={agreement} must lie between 0.5 (labels at random) and 1 (labels without noise)")
    # Scores are sums of a few fixed prices: a million differences have some dozens of sizes.
    sizes = Counter(abs(difference) for difference in score_differences if difference != 0)
    if not sizes:
        raise InputError(f"score_differences must hold one that is not 0; found {len(score_differences)} of 0")
    # At these bounds even the largest difference is noise, and even the smallest one is certain.
    low, high = min(sizes) / 50, max(sizes) * 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        expected = sum(n / (1 + math.exp(-size / middle)) for size, n in sizes.items()) / sizes.total()
        low, high = (middle, high) if expected > agreement else (low, middle)
    return high


def rank(scores: Sequence[float], *, temperature: float, generator: random.Random) -> list[int]:
    """Return the indices from best to worst, drawn from Plackett-Luce with strengths exp(score / temperature).

    Sorting by score / temperature plus Gumbel noise draws from it (Plackett 1975); the order of any two is then
    Bradley-Terry: the first one wins with probability sigmoid(difference / temperature) (Bradley & Terry 1952).
    """
    noisy = [score / temperature - math.log(generator.expovariate(1.0)) for score in scores]
    return sorted(range(len(scores)), key=lambda i: noisy[i], reverse=True)


def label(rows: Sequence[Row], *, seed: int, agreement: float = 0.75) -> list[dict[str, Any]]:
    """Return rows for a reward model from ``{prompt, responses}``, one for each prompt with something to compare.

    Responses of a prompt with the same text are one, and empty ones are left out. Two remaining responses become
    ``{prompt, chosen, rejected}``, more become ``{prompt, responses}`` from best to worst, fewer are left out. One
    temperature for all rows makes the labels agree with the judge on ``agreement`` of the pairs that it tells apart.
    """
    generator, judge = random.Random(seed), Judge()
    distinct = [_distinct(row["responses"]) for row in rows]
    scores = [
        judge.score([row["prompt"]] * len(responses), responses) for row, responses in zip(rows, distinct, strict=True)
    ]
    differences = [a - b for row in scores for a, b in combinations(row, 2) if a != b]
    # Where the judge finds all alike, every order is as good.
    temperature = temperature_for_agreement(differences, agreement) if differences else 1.0
    return [
        _ranking(row["prompt"], [responses[i] for i in rank(found, temperature=temperature, generator=generator)])
        for row, responses, found in zip(rows, distinct, scores, strict=True)
        if len(responses) > 1
    ]


def ceiling(rows: Sequence[Row]) -> float:
    """Return the accuracy of the judge itself on labelled rows, over all pairs, ties counting half.

    This is the best that a reward model can reach on them; raises `InputError` where there is no pair.
    """
    judge = Judge()
    agreed = [
        0.5 if better == worse else float(better > worse)
        for row in rows
        for better, worse in combinations(_scored(row, judge.score), 2)
    ]
    if not agreed:
        raise InputError("rows must hold at least one comparison; found none")
    return sum(agreed) / len(agreed)


def _sentences(text: str) -> list[str]:
    """Split at full stops; what is missing its own gets one, since how a response ends is judged apart."""
    pieces = [piece.strip() for piece in text.split(".")]
    return [f"{piece}." for piece in (pieces if pieces[-1] else pieces[:-1])]


def _distinct(responses: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(response for response in responses if response.strip()))


def _ranking(prompt: str, responses: list[str]) -> dict[str, Any]:
    if len(responses) == 2:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    return {"prompt": prompt, "responses": responses}


def _scored(row: Row, score: Callable[[Sequence[str], Sequence[str]], list[float]]) -> list[float]:
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    return score([row["prompt"]] * len(responses), responses)
