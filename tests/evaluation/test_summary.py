from typing import Any

import pytest

from rlhf_lightning.evaluation.summary import mean, summarise, win_rates
from rlhf_lightning.evaluation.win_rate import win_rate


def record(seconds: float, memory: float = 1.0, **result: Any) -> dict[str, Any]:
    return {"seconds": seconds, "peak_memory_gb": memory, "result": {"metrics": {}, "curves": {}, **result}}


@pytest.fixture
def evidence() -> dict[str, Any]:
    return {
        "prompts": ["a", "b", "c"],
        "reference": "sft",
        "responses": {"demonstrations": ["d1", "d2", "d3"], "sft": ["s1", "s2", "s3"], "ppo": ["p1", "p2", "p3"]},
        "scores": {"demonstrations": [0.0, 0.0, 0.0], "sft": [1.0, 2.0, 3.0], "ppo": [4.0, 5.0, 6.0]},
        "kl": {"sft": 0.0, "ppo": 2.5},
    }


@pytest.fixture
def records(evidence: dict[str, Any]) -> dict[str, Any]:
    return {
        "sft": record(10.0, memory=2.0, metrics={"sft/val_loss": 1.5}, curves={"sft/loss": "curve"}),
        "ppo": record(20.5, steps=7),
        "evaluate": record(1.0, **evidence),
    }


def test_every_figure_is_that_of_its_stage(records: dict[str, Any]) -> None:
    found = summarise(records, seed=4, judge="reward model", samples=2)
    assert found["ppo"] == {"reference": "sft", "kl": 2.5, "score": {"before": 2.0, "after": 5.0}, "rollouts": 7}
    assert found["seconds"] == {"sft": 10.0, "ppo": 20.5, "evaluate": 1.0, "total": 31.5}
    assert found["peak_memory_gb"] == 2.0
    assert found["curves"] == {"sft": {"sft/loss": "curve"}, "ppo": {}}
    assert found["sft"] == {"sft/val_loss": 1.5}
    assert (found["seed"], found["prompts"], found["judge"]) == (4, 3, "reward model")


def test_speed_is_that_of_the_stages_that_were_measured(records: dict[str, Any]) -> None:
    # Of the callback that was left out, and of a record from before there was one.
    records["pretrain"] = record(5.0, throughput={})
    records["ppo"] = record(20.5, steps=7, throughput={"tokens_per_second": 100.0})
    assert summarise(records, seed=0, judge="world", samples=1)["throughput"] == {"ppo": {"tokens_per_second": 100.0}}


def test_without_a_judge_the_reward_judges(records: dict[str, Any]) -> None:
    found = summarise(records, seed=0, judge="reward model", samples=1)
    assert found["judge_score"] == {"demonstrations": 0.0, "sft": 2.0, "ppo": 5.0}
    records["evaluate"]["result"]["judge_scores"] = {"demonstrations": [9.0] * 3, "sft": [1.0] * 3, "ppo": [9.0] * 3}
    judged = summarise(records, seed=0, judge="world", samples=1)
    assert judged["judge_score"] == {"demonstrations": 9.0, "sft": 1.0, "ppo": 9.0}
    assert judged["win_rate"]["sft"]["mean"] == 0
    assert judged["win_rate"]["ppo"]["mean"] == 0.5
    # PPO's own score stays that of the reward it was trained on.
    assert judged["ppo"]["score"] == {"before": 2.0, "after": 5.0}


def test_samples_stand_side_by_side(records: dict[str, Any]) -> None:
    found = summarise(records, seed=0, judge="world", samples=2)["samples"]
    assert [sample["prompt"] for sample in found] == ["a", "b"]
    assert found[1]["responses"] == {"demonstrations": "d2", "sft": "s2", "ppo": "p2"}
    assert found[1]["scores"] == {"demonstrations": 0.0, "sft": 2.0, "ppo": 5.0}


def test_what_was_not_run_is_not_reported(records: dict[str, Any]) -> None:
    found = summarise(records, seed=0, judge="world", samples=1)
    assert found["reward"] == {}
    records["reward"] = record(3.0)
    records["evaluate"]["result"]["reward_card"] = {"accuracy": 0.7, "pairs": 12}
    assert summarise(records, seed=0, judge="world", samples=1)["reward"]["accuracy"] == 0.7
    records["comparisons"] = record(1.0, ceiling=0.8)
    assert summarise(records, seed=0, judge="world", samples=1)["reward"]["ceiling"] == 0.8


def test_win_rates_are_against_the_demonstrations() -> None:
    verdicts = {"demonstrations": [1.0, 1.0], "ppo": [2.0, 1.0]}
    assert win_rates(verdicts) == {"ppo": vars(win_rate([2.0, 1.0], [1.0, 1.0]))}
    assert win_rates({"ppo": [1.0]}) == {}


def test_the_mean_is_arithmetic() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0
