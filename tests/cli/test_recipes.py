"""The published recipes, each run whole at toy size: their settings, with smaller batches and fewer steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_lightning.cli.application import run_verb

RECIPES = ["stiennon2020", "instructgpt", "nplus2024", "rloo2024"]
TOY = [
    "data.sft.batch_size=4",
    "data.reward.batch_size=2",
    "data.reward.val_fraction=0.2",
    "data.ppo.val_fraction=0.2",
    "trainer.sft.max_epochs=1",
    "trainer.ppo.max_steps=2",
    "module.ppo.max_new_tokens=6",
    "evaluate.prompts=4",
    "evaluate.samples=1",
    "callbacks=none",
    "logger=none",
]
BATCHES = {"rloo2024": ["data.ppo.batch_size=2"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """A GPT-2 with dropout, which fine-tuning of InstructGPT needs, and twenty rows for each stage."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    prompts = [f"Say {number}." for number in range(20)]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": prompt, "response": prompt[4:]} for prompt in prompts],
        "reward": [{"prompt": prompt, "responses": [prompt[4:], "No.", "x" * 5, "y"]} for prompt in prompts],
        "ppo": [{"prompt": prompt} for prompt in prompts],
        "text": [{"text": f"{prompt} And then {prompt}"} for prompt in prompts],
    }
    for name, entries in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries), "utf-8")
    return {name: folder / f"{name}.jsonl" for name in rows} | {"model": folder / "model"}


def arguments(recipe: str, files: dict[str, Path], output: Path) -> list[str]:
    pretraining = [f"pretraining={files['text']}", "module.ppo.ptx_data.batch_size=4"]
    return [
        f"experiment={recipe}",
        f"network.pretrained={files['model']}",
        *(f"data.{stage}.path={files[stage]}" for stage in ("sft", "reward", "ppo")),
        *(pretraining if recipe == "instructgpt" else []),
        *TOY,
        *BATCHES.get(recipe, ["data.ppo.batch_size=8"]),
        "module.ppo.minibatch_size=8",
        f"output_dir={output}",
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_whole_at_toy_size(recipe: str, files: dict[str, Path], tmp_path: Path) -> None:
    assert run_verb("pipeline", arguments(recipe, files, tmp_path)) == 0
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["ppo"]["rollouts"] == 2
    curves = report["curves"]["ppo"]
    assert ("ppo/value_loss" in curves) == (recipe != "rloo2024")
    assert ("ppo/ptx_loss" in curves) == (recipe == "instructgpt")


def test_a_recipe_that_lacks_its_texts_says_what_to_pass(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [a for a in arguments("instructgpt", files, tmp_path) if not a.startswith("pretraining=")]
    assert run_verb("pipeline", given) == 2
    assert "pretraining is required" in capsys.readouterr().err
