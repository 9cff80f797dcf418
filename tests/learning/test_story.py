import json
from pathlib import Path

import pytest

from rlhf_lightning.cli.application import run_verb

pytestmark = pytest.mark.proof


def test_human_feedback_makes_the_policy_better_than_its_demonstrations(tmp_path: Path) -> None:
    """The default run of `rlhf pipeline`; the judge that compares the models has taken no part in their training.

    The win rates themselves differ by some points between machines; docs/pipeline.md has them for three seeds.
    """
    assert run_verb("pipeline", [f"output_dir={tmp_path}", "callbacks.progress=null"]) == 0
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    rates = report["win_rate"]
    assert rates["pretrained"]["mean"] < 0.10
    assert rates["pretrained"]["high"] < rates["sft"]["low"]
    assert rates["sft"]["high"] < rates["ppo"]["low"]
    assert rates["ppo"]["low"] > 0.5
    assert report["reward"]["accuracy"] > 0.6
    assert report["judge_score"]["ppo"] > report["judge_score"]["sft"] > report["judge_score"]["pretrained"]
    assert report["peak_memory_gb"] < 4
