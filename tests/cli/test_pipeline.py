import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.cli.application import run_verb

TINY = [
    "world.texts=40",
    "world.demonstrations_per_instruction=1",
    "world.comparisons=8",
    "world.held_out_comparisons=6",
    "world.responses=3",
    "world.vocab_size=400",
    "world.hidden_size=16",
    "world.layers=1",
    "world.heads=2",
    "trainer.pretrain.max_steps=2",
    "trainer.sft.max_steps=2",
    "trainer.ppo.max_steps=2",
    "trainer.sft.limit_val_batches=1",
    "module.ppo.max_new_tokens=6",
    "data.ppo.batch_size=8",
    "module.ppo.minibatch_size=8",
    "evaluate.prompts=8",
    "evaluate.samples=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    assert run_verb("pipeline", [*TINY, f"output_dir={folder}"]) == 0
    return folder


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def test_the_report_holds_the_figures_of_every_stage(finished: Path) -> None:
    found = report(finished)
    for policy in ("pretrained", "sft", "ppo"):
        rate = found["win_rate"][policy]
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert -1 <= found["judge_score"][policy] <= 1
    assert 0 <= found["reward"]["accuracy"] <= 1
    assert found["reward"]["pairs"] > 0
    assert set(found["ppo"]) >= {"kl", "score"}
    assert set(found["seconds"]) >= {"pretrain", "sft", "reward", "ppo", "evaluate", "total"}
    assert found["peak_memory_gb"] > 0
    assert (finished / "report.html").stat().st_size > 1000


def test_a_second_run_skips_every_stage_and_reports_the_same(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report(finished)
    assert run_verb("pipeline", [*TINY, f"output_dir={finished}"]) == 0
    assert capsys.readouterr().out.count("complete already, skipped") == 7
    assert report(finished) == before


def test_a_finished_stage_is_not_mixed_with_other_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, f"output_dir={finished}", "module.sft.learning_rate=0.5"]
    assert run_verb("pipeline", arguments) == 2
    assert "module.learning_rate: was 0.002, is now 0.5" in capsys.readouterr().err


def test_a_stage_whose_folder_is_gone_runs_again_with_all_that_follows(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report(finished)
    shutil.rmtree(finished / "reward")
    assert run_verb("pipeline", [*TINY, f"output_dir={finished}"]) == 0
    said = capsys.readouterr().out
    assert said.count("complete already, skipped") == 4  # world, pretrain, sft, comparisons
    assert "reward is gone, so it and what follows run again" in said
    assert (finished / "reward").is_dir()
    assert report(finished)["win_rate"] == before["win_rate"]


def test_the_same_seed_gives_the_same_figures(finished: Path, tmp_path: Path) -> None:
    assert run_verb("pipeline", [*TINY, f"output_dir={tmp_path}"]) == 0
    one, other = report(finished), report(tmp_path)
    for key in ("win_rate", "judge_score", "reward", "ppo", "curves", "samples"):
        assert one[key] == other[key]


def test_the_exported_policy_generates_as_ours_with_transformers_alone(finished: Path) -> None:
    from transformers import pipeline

    from rlhf_lightning.networks import load_policy, load_tokenizer
    from rlhf_lightning.rollout.generate import decode, sample_tokens

    folder, prompt = str(finished / "ppo"), "Explain rain to a child briefly.\n"
    theirs: Any = pipeline("text-generation", model=folder)(
        prompt, max_new_tokens=12, do_sample=False, return_full_text=False
    )
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ours = sample_tokens(
        load_policy(folder),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        max_new_tokens=12,
        temperature=0,
        stop_tokens=torch.tensor([tokenizer.eos_token_id]),
        generator=torch.Generator(),
    )
    assert decode(tokenizer, ours, torch.ones_like(ours, dtype=torch.bool)) == [theirs[0]["generated_text"]]
    assert ours.shape[1] > 1


def test_the_exported_reward_model_scores_as_ours_with_transformers_alone(finished: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlhf_lightning import RewardModule

    folder = str(finished / "reward")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        f"Explain rain to a child.\n{words}{tokenizer.eos_token}" for words in ("Rain falls.", "Snow is cold. Yes.")
    ]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        theirs = plain(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.squeeze(-1)
        ours = RewardModule(folder)(inputs["input_ids"], inputs["attention_mask"].bool())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ckpt_path=last"], "ckpt_path is for `rlhf train`"),
        (["network.pretrained=x"], "data.ppo.path is required"),
        (["evaluate.samples=0"], "evaluate.samples=0 must be at least 1"),
        (
            ["data.ppo.val_fraction=0", "data.ppo.path=p", "network.pretrained=x", "module.ppo.reward=y"],
            "val_fraction=0",
        ),
        (["module.ppo.reward=f.py:f"], "module.ppo.reward='f.py:f' is not used where a reward model is trained"),
        (["data.ppo.path=prompts.jsonl"], "network.pretrained is required"),
        (["network.pretrained=x", "data.ppo.path=prompts.jsonl"], "a reward is required"),
    ],
)
def test_the_pipeline_on_files_says_what_is_missing(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("pipeline", [*overrides, f"output_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Demonstrations, comparisons and prompts of a user; every third prompt has no demonstration."""
    prompts = [f"Name thing {i}." for i in range(24)]
    rows = {
        "sft": [{"prompt": prompt, "response": "A cup."} for prompt in prompts],
        "reward": [{"prompt": prompt, "chosen": "A cup.", "rejected": "No"} for prompt in prompts],
        "ppo": [{"prompt": p} | ({"response": "A cup."} if i % 3 else {}) for i, p in enumerate(prompts)],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return paths


def test_the_pipeline_runs_on_files_and_a_network_whose_tokenizer_has_no_padding(
    files: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    network = tmp_path / "network"
    shutil.copytree(finished / "pretrain", network)
    config = json.loads((network / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (network / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = [
        f"network.pretrained={network}",
        "network.pad_token='<|pad|>'",
        *(f"data.{stage}.path={path}" for stage, path in files.items()),
        "data.ppo.val_fraction=0.25",
        "data.reward.val_fraction=0.25",
        "data.ppo.batch_size=4",
        "module.ppo.minibatch_size=4",
        "module.ppo.max_new_tokens=4",
        *(f"+trainer.{stage}.limit_train_batches=1" for stage in ("sft", "reward", "ppo")),
        *(f"trainer.{stage}.max_epochs=1" for stage in ("sft", "reward", "ppo")),
        f"output_dir={tmp_path / 'out'}",
    ]
    assert run_verb("pipeline", arguments) == 0
    found = report(tmp_path / "out")
    assert set(found["judge_score"]) == {"pretrained", "sft", "ppo"}
    assert found["win_rate"] == {}  # where some prompts have no demonstration, there is nothing to win against
    assert found["reward"]["pairs"] == 6
