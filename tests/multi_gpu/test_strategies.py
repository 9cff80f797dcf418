"""What only several GPUs can show: each strategy as its trainer= config, against one GPU with the whole batch.

uv run pytest -n0 tests/multi_gpu
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GPUS = torch.cuda.device_count()
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]

ROWS = 64
STAGES = {
    "sft": ["module=sft", "data.path=demonstrations.jsonl"],
    "reward": ["module=reward", "data.path=comparisons.jsonl"],
    "ppo": ["module=ppo", "data.path=prompts.jsonl", "module.reward=my_rewards:length", "module.max_new_tokens=16"],
}
MEASURE = """
import json, os, sys, torch
from rlhf_lightning.cli.application import run_verb
# The processes that Lightning starts are told the verb.
code = run_verb("train", [argument for argument in sys.argv[1:] if argument != "train"])
rank = os.environ.get("LOCAL_RANK", "0")
with open(f"memory-{rank}.json", "w") as file:
    json.dump(torch.cuda.max_memory_allocated(), file)
sys.exit(code)
"""


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, float]]]:
    """Run `rlhf train` in a process of its own and return the rows of its log."""
    monkeypatch.chdir(tmp_path)
    rewards = "def length(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"
    Path("my_rewards.py").write_text(rewards, "utf-8")
    Path("measured.py").write_text(MEASURE, "utf-8")
    texts = {"chosen": "yes", "rejected": "no"}
    rows = [{"prompt": f"Say {i}.", "response": f"{i}" * (1 + i % 7), **texts} for i in range(ROWS)]
    columns = {"demonstrations": ["prompt", "response"], "comparisons": ["prompt", "chosen", "rejected"]}
    for name, wanted in (columns | {"prompts": ["prompt"]}).items():
        lines = [json.dumps({column: row[column] for column in wanted}) + "\n" for row in rows]
        Path(f"{name}.jsonl").write_text("".join(lines), "utf-8")

    def run(stage: str, strategy: str, *more: str, devices: int = 2) -> list[dict[str, float]]:
        size = 8 // devices
        sizes = [f"data.batch_size={size}"] + ([f"module.minibatch_size={size}"] if stage == "ppo" else [])
        settings = [f"trainer={strategy}", f"trainer.devices={devices}", "trainer.precision=32-true", *sizes]
        quiet = ["callbacks.progress=null", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]
        output = f"out-{stage}-{strategy}"
        arguments = [
            *STAGES[stage],
            f"network.pretrained={tiny_model}",
            f"output_dir={output}",
            *settings,
            *quiet,
            *more,
        ]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        subprocess.run([sys.executable, "measured.py", *arguments], check=True, timeout=900, env=environment)
        with Path(output, "logs", "version_0", "metrics.csv").open(encoding="utf-8") as file:
            return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]

    return run


def losses(rows: list[dict[str, float]], stage: str) -> list[float]:
    return [row[f"{stage}/loss"] for row in rows if f"{stage}/loss" in row]


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        "fsdp2",
        "fsdp",
        pytest.param("deepspeed_2", marks=needs_deepspeed),
        pytest.param("deepspeed_3", marks=needs_deepspeed),
    ],
)
def test_two_gpus_train_as_one_and_export(
    stage: str, strategy: str, train: Callable[..., list[dict[str, float]]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    one = losses(train(stage, "gpu", devices=1), stage)
    two = losses(train(stage, strategy), stage)
    assert len(one) == len(two) > 4
    assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    kind: Any = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    found, expected = (kind.from_pretrained(f"out-{stage}-{name}/model").state_dict() for name in (strategy, "gpu"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ppo_on_two_gpus_learns_to_write_more(strategy: str, train: Callable[..., list[dict[str, float]]]) -> None:
    rates = ["module.learning_rate=1e-3", "module.critic_learning_rate=1e-3", "trainer.max_epochs=10"]
    rows = [row for row in train("ppo", strategy, *rates) if "ppo/score" in row]
    scores = [row["ppo/score"] for row in rows]
    assert sum(scores[-5:]) > sum(scores[:5])


@pytest.mark.parametrize("gather", ["always", "never"])
def test_rollouts_of_sharded_weights_are_the_same_gathered_or_in_step(
    gather: str, train: Callable[..., list[dict[str, float]]]
) -> None:
    rows = train("ppo", "fsdp2", f"module.gather_weights={gather}", "trainer.max_steps=3")
    first = next(row for row in rows if "ppo/score" in row)
    other = train("ppo", "ddp", "trainer.max_steps=3")
    expected = next(row for row in other if "ppo/score" in row)
    assert first["ppo/score"] == pytest.approx(expected["ppo/score"], rel=1e-3)
    assert first["ppo/kl"] == pytest.approx(0.0, abs=1e-3)


def test_a_sharded_checkpoint_goes_on_on_one_gpu(train: Callable[..., list[dict[str, float]]]) -> None:
    train("ppo", "fsdp2", "trainer.max_steps=2")
    train("ppo", "fsdp2", "trainer.max_steps=3", "ckpt_path=last", devices=1)


def test_a_gpu_holds_less_under_fsdp2_than_under_ddp(train: Callable[..., list[dict[str, float]]]) -> None:
    peaks = {}
    for strategy in ("ddp", "fsdp2"):
        train("ppo", strategy, "trainer.max_steps=2", "module.gather_weights=never", "trainer.precision=bf16-mixed")
        peaks[strategy] = json.loads(Path("memory-0.json").read_text("utf-8"))
    assert peaks["fsdp2"] < peaks["ddp"]
