import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from rlhf_lightning.modules import PPOModule, RewardModule
from rlhf_lightning.preflight import Finding, check_ppo, check_reward
from rlhf_lightning.preflight.reward import check_cost, check_spread
from rlhf_lightning.types import ComparisonBatch, PromptBatch

Faults = Callable[[list[Finding]], dict[str, Finding]]
Make = Callable[..., PPOModule]


class ReadsThePad(LlamaForSequenceClassification):
    """Scores the last column, whatever stands there."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.score(self.model(input_ids=input_ids).last_hidden_state)[:, -1])


class EndsAtTheFirstPadId(LlamaForSequenceClassification):
    """Takes the first pad id for the end, as early classifiers of transformers did."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        is_pad = input_ids == self.config.pad_token_id
        last = is_pad.long().argmax(dim=1).where(is_pad.any(dim=1), is_pad.shape[1]) - 1
        return SimpleNamespace(logits=self.score(hidden[torch.arange(len(hidden)), last]))


class ReadsTheFirstToken(LlamaForSequenceClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.score(hidden[:, 0]))


FAULTY = [
    (ReadsThePad, "padding on the right moves scores"),
    (EndsAtTheFirstPadId, "a pad id inside of the sequence ends it"),
    (ReadsTheFirstToken, "the last token does not move the score"),
]


@pytest.fixture
def comparisons(tokenizer: Any) -> ComparisonBatch:
    """Two prompts with two responses each."""
    rows = [[*tokenizer(text)["input_ids"], 1] for text in ("Say a. a", "Say a. b, c", "Hi. You", "Hi. There, you")]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.tensor([i for row in rows for i in row])
    return ComparisonBatch(
        tokens=tokens,
        attention_mask=mask,
        response_mask=mask & (torch.arange(mask.shape[1]) > 3),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        ranks=torch.tensor([0, 1, 0, 1]),
        ratings=torch.zeros(4),
    )


def test_a_healthy_reward_model_has_no_fault_in_ppo_and_in_its_own_training(
    make: Make,
    classifier: Callable[..., Any],
    prompts: PromptBatch,
    comparisons: ComparisonBatch,
    tokenizer: Any,
    faults: Faults,
) -> None:
    assert faults(check_ppo(make(reward=classifier()), prompts)) == {}
    assert faults(check_reward(RewardModule(classifier(), tokenizer=tokenizer), comparisons)) == {}


@pytest.mark.parametrize(("model_class", "says"), FAULTY)
def test_a_reward_model_that_does_not_score_the_last_real_token_is_named(
    model_class: Any, says: str, make: Make, classifier: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    found = faults(check_ppo(make(reward=classifier(model_class)), prompts))
    assert found["reward model"].status == "error"
    assert says in found["reward model"].measured


@pytest.mark.parametrize(("model_class", "says"), FAULTY)
def test_the_same_is_named_before_it_is_trained(
    model_class: Any,
    says: str,
    classifier: Callable[..., Any],
    comparisons: ComparisonBatch,
    tokenizer: Any,
    faults: Faults,
) -> None:
    class Module(RewardModule):
        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return self.reward_model(tokens, attention_mask).logits.squeeze(-1)

    module = Module(classifier(), tokenizer=tokenizer)
    module.reward_model = classifier(model_class)
    found = faults(check_reward(module, comparisons))
    assert says in found["reward model"].measured


def test_a_reward_model_with_its_own_tokenizer_is_looked_at_in_its_own_tokens(
    make: Make,
    classifier: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    prompts: PromptBatch,
    faults: Faults,
) -> None:
    # Another end token: the text is tokenised anew.
    own = make_tokenizer(eos_token="!")
    assert faults(check_ppo(make(reward=classifier(), reward_tokenizer=own), prompts)) == {}
    found = faults(check_ppo(make(reward=classifier(ReadsThePad), reward_tokenizer=own), prompts))
    assert "reward model" in found


def test_a_constant_reward_is_named(
    make: Make, classifier: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    function = make(reward=lambda prompts, responses, **columns: [0.5] * len(responses))
    assert faults(check_ppo(function, prompts))["spread of scores"].status == "warning"
    model = classifier()
    torch.nn.init.zeros_(model.score.weight)
    found = faults(check_ppo(make(reward=model), prompts))
    assert found["spread of scores"].status == "error"
    assert "standard deviation 0 " in found["spread of scores"].measured


def test_equal_scores_of_equal_responses_say_nothing_of_the_reward() -> None:
    assert check_spread(torch.ones(3), ["a", "a", "a"], model=True).status == "note"


def test_a_slow_reward_function_is_named(make: Make, prompts: PromptBatch, faults: Faults) -> None:
    def slow(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        time.sleep(0.5)
        return [float(len(response)) for response in responses]

    # Six prompts of a probe; a rollout of 60 takes ten times as long.
    many = prompts.rows(torch.arange(60) % 6)
    found = faults(check_ppo(make(reward=slow), many))
    assert set(found) == {"cost of the reward"}
    assert "for 8 responses" in found["cost of the reward"].measured


def test_the_cost_of_a_rollout_is_that_of_its_size() -> None:
    finding = check_cost(seconds=0.5, responses=8, rollout_size=64, sampling_seconds=3.0)
    assert (finding.status, "500.0 ms for 8" in finding.measured, "at most 4 s" in finding.measured) == (
        "warning",
        True,
        True,
    )
    assert check_cost(seconds=0.5, responses=8, rollout_size=64, sampling_seconds=5.0).status == "ok"
    assert check_cost(seconds=0.1, responses=8, rollout_size=64, sampling_seconds=0.1).status == "ok"
