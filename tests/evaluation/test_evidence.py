from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.data import PPODataModule, RewardDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.evidence import gather_answers, load_reward_module, measure_reward
from rlhf_lightning.networks import load_reward_model, load_tokenizer, save_pretrained
from rlhf_lightning.types import PromptBatch

ROWS = [{"prompt": f"Say {'a' * i}.", "response": f"{'a' * i}"} for i in range(1, 6)]


def length(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def prompts_of(rows: list[dict[str, str]], seen: list[int | None]) -> Any:
    def prompts(tokenizer: Any, max_length: int | None) -> list[PromptBatch]:
        seen.append(max_length)
        data = PPODataModule(rows, val_path=rows, batch_size=2, tokenizer=tokenizer)
        data.setup("validate")
        return list(data.val_dataloader())

    return prompts


def gather(tiny_model: Path, rows: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"reward": length, "judge": None, "max_new_tokens": 4, "temperature": 1.0, "seed": 0}
    policies = {"sft": str(tiny_model), "ppo": str(tiny_model)}
    return gather_answers(policies, prompts_of(rows, []), **{**settings, **more})


def test_every_policy_answers_the_same_prompts_with_the_same_noise(tiny_model: Path) -> None:
    found = gather(tiny_model, ROWS)
    assert found["prompts"] == [row["prompt"] for row in ROWS]
    assert found["responses"]["sft"] == found["responses"]["ppo"]
    assert found["scores"]["sft"] == length([], found["responses"]["sft"])
    assert found["kl"] == {"sft": 0.0, "ppo": 0.0}
    assert found["reference"] == "sft"
    assert found["scored_by"] == "reward function"


def test_demonstrations_are_scored_too_where_every_prompt_has_one(tiny_model: Path) -> None:
    found = gather(tiny_model, ROWS)
    assert found["responses"]["demonstrations"] == [row["response"] for row in ROWS]
    assert found["scores"]["demonstrations"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    partly = [*ROWS[:-1], {"prompt": "Say.", "response": " "}]
    assert "demonstrations" not in gather(tiny_model, partly)["responses"]


def test_the_judge_scores_all_that_was_said(tiny_model: Path) -> None:
    def judge(prompts: list[str], responses: list[str]) -> list[int]:
        return [len(prompt) - len(response) for prompt, response in zip(prompts, responses, strict=True)]

    found = gather(tiny_model, ROWS, judge=judge)
    assert found["judge_scores"].keys() == {"sft", "ppo", "demonstrations"}
    assert found["judge_scores"]["demonstrations"] == [5] * 5
    assert "judge_scores" not in gather(tiny_model, ROWS)


@pytest.fixture
def tiny_reward_model(tiny_model: Path, tmp_path: Path) -> Path:
    save_pretrained(load_reward_model(tiny_model), load_tokenizer(tiny_model), tmp_path / "reward")
    return tmp_path / "reward"


def test_a_language_model_is_not_measured_as_a_reward_model(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="is no reward model"):
        load_reward_module(tiny_model)


def test_prompts_leave_room_for_the_response(tiny_model: Path, tiny_reward_model: Path) -> None:
    seen: list[int | None] = []
    gather_answers(
        {"sft": str(tiny_model)},
        prompts_of(ROWS, seen),
        reward=length,
        judge=None,
        max_new_tokens=4,
        temperature=1.0,
        seed=0,
    )
    positions = load_reward_module(tiny_reward_model).max_positions
    assert positions is not None
    assert seen == [positions - 4]


def test_the_card_counts_the_pairs_that_the_reward_model_orders_rightly(tiny_reward_model: Path) -> None:
    module = load_reward_module(tiny_reward_model)
    assert not module.training
    rows = [{"prompt": "Say.", "responses": ["a", "bb", "ccc"]}, {"prompt": "Tell.", "chosen": "d", "rejected": "ee"}]
    data = RewardDataModule(rows, val_path=rows, batch_size=1, tokenizer=module.tokenizer)
    data.setup("validate")
    card = measure_reward(module, data.val_dataloader())
    right, best = [], []
    for row in rows:
        texts: Any = row.get("responses") or [row["chosen"], row["rejected"]]
        scores = []
        for text in texts:
            tokenizer: Any = module.tokenizer
            ids = [*tokenizer(f"{row['prompt']}{text}").input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                scores.append(module.reward_model(torch.tensor([ids])).logits.item())
        best.append(scores[0])
        right += [scores[i] > scores[j] for i in range(len(scores)) for j in range(i + 1, len(scores))]
    assert card.pairs == 4
    assert card.accuracy == pytest.approx(sum(right) / 4)
    # In every pair the first response is the shorter one.
    assert [(b.chosen, b.pairs, b.accuracy) for b in card.length_bins] == [("shorter", 4, card.accuracy)]
    assert card.best_score_mean == pytest.approx(sum(best) / 2, abs=1e-6)
    assert card.best_score_std == pytest.approx(abs(best[0] - best[1]) / 2, abs=1e-6)


def test_lengths_are_those_of_the_responses_alone(tiny_reward_model: Path) -> None:
    module = load_reward_module(tiny_reward_model)
    rows = [
        {"prompt": "A much longer prompt.", "chosen": "a", "rejected": "bb"},
        {"prompt": "Tell.", "responses": ["cccc", "dddd"]},
    ]
    data = RewardDataModule(rows, val_path=rows, batch_size=2, tokenizer=module.tokenizer)
    data.setup("validate")
    batches: Any = list(data.val_dataloader())
    card = measure_reward(module, batches)
    assert [(b.chosen, b.pairs) for b in card.length_bins] == [("shorter", 1), ("equal", 1)]
    with torch.no_grad():
        scores = torch.cat([module(batch.tokens, batch.attention_mask) for batch in batches])
    expected = np.corrcoef(scores.numpy(), [1, 2, 4, 4])[0, 1]
    assert card.length_correlation == pytest.approx(expected, abs=1e-5)
