from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.data import PPODataModule, SFTDataModule
from rlhf_lightning.evaluation.policies import answer, perplexity, sequence_kl, with_responses
from rlhf_lightning.networks import load_policy, load_tokenizer
from rlhf_lightning.rollout import load_reward
from rlhf_lightning.types import PromptBatch

ROWS = [{"prompt": "Say a."}, {"prompt": "Say something longer."}, {"prompt": "No."}]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    return load_policy(tiny_model)


@pytest.fixture
def other(tiny_model: Path) -> Any:
    """A policy that differs from the first one."""
    network: Any = load_policy(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return network


@pytest.fixture
def batches(tokenizer: Any) -> list[PromptBatch]:
    data = PPODataModule(ROWS, val_path=ROWS, batch_size=2, tokenizer=tokenizer)
    data.setup("validate")
    return list(data.val_dataloader())


def length(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(prompt) + len(response)) for prompt, response in zip(prompts, responses, strict=True)]


SAMPLING: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "seed": 0}


def test_each_prompt_is_answered_and_scored_in_its_order(policy: Any, tokenizer: Any, batches: Any) -> None:
    found = answer(policy, tokenizer, batches, reward=load_reward(length, tokenizer), **SAMPLING)
    assert len(found.responses) == len(found.ended) == 3
    assert found.scores == length([row["prompt"] for row in ROWS], found.responses)
    assert found.kl is None


def test_the_seed_decides_the_responses(policy: Any, tokenizer: Any, batches: Any) -> None:
    first, again = (answer(policy, tokenizer, batches, **SAMPLING) for _ in range(2))
    assert first == again
    assert answer(policy, tokenizer, batches, **{**SAMPLING, "seed": 1}).responses != first.responses
    assert first.scores is None


def test_the_kl_to_itself_is_0_and_to_another_is_not(policy: Any, other: Any, tokenizer: Any, batches: Any) -> None:
    assert answer(policy, tokenizer, batches, reference=policy, **SAMPLING).kl == 0
    kl = answer(policy, tokenizer, batches, reference=other, **SAMPLING).kl
    assert kl is not None
    assert abs(kl) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_kl_of_a_response_is_the_sum_over_its_tokens_read_alone(
    temperature: float, policy: Any, other: Any, tokenizer: Any, batches: Any
) -> None:
    texts = ["ab", "c"]
    found = sequence_kl(policy, other, with_responses(batches[0], texts, tokenizer), temperature=temperature)
    for row, text in enumerate(texts):
        prompt = tokenizer(ROWS[row]["prompt"]).input_ids
        response = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        total = 0.0
        for network, sign in ((policy, 1), (other, -1)):
            with torch.no_grad():
                logits = network(torch.tensor([prompt + response])).logits[0].float() / temperature
            logprobs = torch.log_softmax(logits, dim=-1)
            total += sign * sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response))
        assert found[row] == pytest.approx(total, abs=1e-4)


def test_given_responses_end_with_the_end_token(tokenizer: Any, batches: Any) -> None:
    rollout = with_responses(batches[0], ["ab", "c"], tokenizer)
    kept = [ids[mask].tolist() for ids, mask in zip(rollout.response_tokens, rollout.response_mask, strict=True)]
    eos = tokenizer.eos_token_id
    assert kept == [[*tokenizer(text, add_special_tokens=False).input_ids, eos] for text in ("ab", "c")]
    assert rollout.ended.all()
    assert rollout.responses == ["ab", "c"]


def test_perplexity_is_exp_of_the_mean_loss_of_the_response_tokens(policy: Any, tokenizer: Any) -> None:
    rows = [{"prompt": "Say a.", "response": "a"}, {"prompt": "Say.", "response": "abc"}]
    data = SFTDataModule(rows, val_path=rows, batch_size=2, tokenizer=tokenizer)
    data.setup("validate")
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        response = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = torch.log_softmax(policy(torch.tensor([prompt + response])).logits[0], dim=-1)
        losses += [-logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(response)]
    expected = torch.tensor(losses).mean().exp().item()
    assert perplexity(policy, tokenizer, data.val_dataloader()) == pytest.approx(expected, rel=1e-4)
