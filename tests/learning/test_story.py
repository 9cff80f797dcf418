import json
from pathlib import Path

import pytest

from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.world.instructions import all_instructions

pytestmark = pytest.mark.proof


def test_human_feedback_makes_the_policy_better_than_its_demonstrations(tmp_path: Path) -> None:
    """The default run of `rlhf pipeline`; the judge that compares the models has taken no part in their training.

    What it must reach is docs/pipeline.md's, with the few points that the same seed differs by between machines.
    """
    assert run_verb("pipeline", [f"output_dir={tmp_path}", "callbacks.progress=null"]) == 0
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    rates = report["win_rate"]
    assert rates["pretrained"]["mean"] < 0.10
    assert 0.28 < rates["sft"]["mean"] < 0.57
    assert rates["ppo"]["mean"] > 0.70
    assert rates["pretrained"]["high"] < rates["sft"]["low"]
    assert rates["sft"]["high"] < rates["ppo"]["low"]
    assert report["reward"]["ceiling"] - report["reward"]["accuracy"] < 0.045
    assert report["judge_score"]["ppo"] > report["judge_score"]["sft"] > report["judge_score"]["pretrained"]
    assert report["ppo"]["score"]["after"] > report["ppo"]["score"]["before"]
    assert report["peak_memory_gb"] < 4
    evaluated = json.loads((tmp_path / "stages" / "evaluate.json").read_text("utf-8"))
    responses = evaluated["result"]["responses"]
    # As on the web, where instructions stand in lists.
    assert share_that_asks(responses["pretrained"]) > 0.8
    assert share_that_asks(responses["sft"]) < 0.1


def share_that_asks(responses: list[str]) -> float:
    """Return the share of the responses that begin with an instruction."""
    instructions = {instruction.text for instruction in all_instructions()}
    return sum(response.strip().partition("\n")[0] in instructions for response in responses) / len(responses)
