"""From the records of the stages to the report: every figure in it was measured by a stage."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rlhf_lightning.evaluation.win_rate import win_rate

Record = Mapping[str, Any]

STAGES = ("pretrain", "sft", "reward", "ppo")
PACKAGES = ("rlhf-lightning", "lightning", "torch", "transformers")


def summarise(records: Mapping[str, Record], *, seed: int, judge: str, samples: int) -> dict[str, Any]:
    """Return the report of the stages that were run; what a stage would have measured is left out where it was not.

    ``judge`` names who compared the responses: "world", or "reward model" or "reward function" where nobody else can.
    """
    evidence = records["evaluate"]["result"]
    verdicts = evidence["judge_scores"] if "judge_scores" in evidence else evidence["scores"]
    seconds = {stage: record["seconds"] for stage, record in records.items()}
    return {
        "judge": judge,
        "seed": seed,
        "prompts": len(evidence["prompts"]),
        "win_rate": win_rates(verdicts),
        "judge_score": {name: mean(scores) for name, scores in verdicts.items()},
        "reward": _reward(records),
        "ppo": _ppo(records, evidence),
        "sft": records["sft"]["result"]["metrics"] if "sft" in records else {},
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "throughput": _throughput(records),
        "peak_memory_gb": max(record["peak_memory_gb"] for record in records.values()),
        "curves": {stage: records[stage]["result"]["curves"] for stage in STAGES if stage in records},
        "samples": _samples(evidence, verdicts, samples),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def win_rates(verdicts: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return mean, low and high of each policy's win rate against the demonstrations; nothing where there are none."""
    if "demonstrations" not in verdicts:
        return {}
    reference = verdicts["demonstrations"]
    return {name: asdict(win_rate(scores, reference)) for name, scores in verdicts.items() if name != "demonstrations"}


def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def _reward(records: Mapping[str, Record]) -> dict[str, Any]:
    if "reward" not in records:
        return {}
    card = records["evaluate"]["result"]["reward_card"]
    ceiling = {"ceiling": records["comparisons"]["result"]["ceiling"]} if "comparisons" in records else {}
    return {"accuracy": card["accuracy"], "pairs": card["pairs"], "card": card} | ceiling


def _ppo(records: Mapping[str, Record], evidence: Mapping[str, Any]) -> dict[str, Any]:
    reference, scores = evidence["reference"], evidence["scores"]
    return {
        "reference": reference,
        "kl": evidence["kl"]["ppo"],
        "score": {"before": mean(scores[reference]), "after": mean(scores["ppo"])},
        "rollouts": records["ppo"]["result"]["steps"],
    }


def _throughput(records: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """Return how fast each stage was trained, of those that were measured."""
    results = {stage: records[stage]["result"] for stage in STAGES if stage in records}
    return {stage: result["throughput"] for stage, result in results.items() if result.get("throughput")}


def _samples(evidence: Mapping[str, Any], verdicts: Mapping[str, list[float]], count: int) -> list[dict[str, Any]]:
    responses = evidence["responses"]
    return [
        {
            "prompt": prompt,
            "responses": {name: texts[i] for name, texts in responses.items()},
            "scores": {name: scores[i] for name, scores in verdicts.items()},
        }
        for i, prompt in enumerate(evidence["prompts"][:count])
    ]
