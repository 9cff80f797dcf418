"""The published recipes: the values that the papers give, and each run whole with smaller batches and fewer steps."""

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_lightning.cli.application import run_verb

RECIPES = ["stiennon2020", "instructgpt", "nplus2024", "rloo2024"]
TASK_OF_SUMMARIES = {
    "data.sft.batch_size": 128,
    "data.reward.batch_size": 64,
    "trainer.sft.max_epochs": 1,
    "trainer.reward.max_epochs": 1,
    "module.ppo.advantage": "gae",
    "module.ppo.kl_penalty": "reward",
    "module.ppo.beta": 0.05,
    "module.ppo.gamma": 1.0,
    "module.ppo.lam": 0.95,
    "module.ppo.clip_range": 0.2,
    "module.ppo.lr_schedule": "linear",
    "module.ppo.lr_floor": 0.0,
    "module.ppo.warmup_steps": 0,
    "module.ppo.minibatch_size": 512,
}
NPLUS = {
    **TASK_OF_SUMMARIES,
    "module.sft.learning_rate": 3e-6,
    "module.sft.lr_schedule": "cosine",
    "module.sft.lr_floor": 0.0,
    "module.reward.learning_rate": 3e-6,
    "module.ppo.learning_rate": 3e-6,
    "module.ppo.critic_learning_rate": 3e-6,
    "module.ppo.value_clip_range": 0.2,
    "module.ppo.value_coef": 0.1,
    "module.ppo.temperature": 0.7,
    "module.ppo.missing_eos": "replace",
    "module.ppo.missing_eos_penalty": 1.0,
    "module.ppo.score_placement": "after_end",
    "module.ppo.ppo_epochs": 4,
    "module.ppo.samples_per_prompt": 1,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "stiennon2020": {
        **TASK_OF_SUMMARIES,
        "module.reward.learning_rate": 1.5e-5,
        "module.reward.lr_schedule": "cosine",
        "module.reward.shift_scores": True,
        "module.ppo.critic": "separate",
        "module.ppo.learning_rate": 1.5e-5,
        "module.ppo.critic_learning_rate": 1.5e-5,
        "module.ppo.ppo_epochs": 4,
        "module.ppo.samples_per_prompt": 1,
    },
    "instructgpt": {
        "data.sft.batch_size": 32,
        "data.reward.batch_size": 64,
        "trainer.sft.max_epochs": 16,
        "trainer.reward.max_epochs": 1,
        "module.sft.learning_rate": 9.65e-6,
        "module.sft.lr_schedule": "cosine",
        "module.sft.lr_floor": 0.1,
        "module.sft.dropout": 0.2,
        "module.reward.ranking_loss": "pairwise",
        "module.reward.learning_rate": 9e-6,
        "module.reward.lr_schedule": "cosine",
        "module.reward.lr_floor": 0.1,
        "module.reward.shift_scores": True,
        "module.ppo.advantage": "gae",
        "module.ppo.beta": 0.02,
        "module.ppo.clip_range": 0.2,
        "module.ppo.temperature": 1.0,
        "module.ppo.ppo_epochs": 1,
        "module.ppo.minibatch_size": 64,
        "module.ppo.samples_per_prompt": 1,
        "module.ppo.learning_rate": 9.65e-6,
        "module.ppo.critic_learning_rate": 9e-6,
        "module.ppo.lr_schedule": "constant",
        "module.ppo.warmup_steps": 10,
        "module.ppo.warmup_from": 0.1,
        "module.ppo.ema_decay": 0.992,
        "module.ppo.ptx_coef": 27.8,
        "module.ppo.ptx_data.batch_size": 8 * 64,
    },
    "nplus2024": NPLUS,
    "rloo2024": {
        **NPLUS,
        "module.ppo.advantage": "rloo",
        "module.ppo.samples_per_prompt": 4,
        "module.ppo.loss_mean": "sequences",
        "module.ppo.ppo_epochs": 1,
    },
}
EPISODES = {"stiennon2020": 1_000_000, "instructgpt": 256_000, "nplus2024": 1_000_000, "rloo2024": 1_000_000}
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
def test_a_recipe_has_the_values_that_its_paper_gives(recipe: str) -> None:
    with hydra.initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        config = hydra.compose("pipeline", [f"experiment={recipe}"])
    published = PUBLISHED[recipe]
    assert {name: OmegaConf.select(config, name) for name in published} == published
    rollout = config.data.ppo.batch_size * config.module.ppo.samples_per_prompt
    assert rollout == 512
    assert config.trainer.ppo.max_steps * rollout == pytest.approx(EPISODES[recipe], rel=1e-3)
    assert config.trainer.ppo.max_epochs is None


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
