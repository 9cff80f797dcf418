import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_lightning.modules import PPOModule, RewardModule
from rlhf_lightning.preflight import Finding, check_ppo, check_reward
from rlhf_lightning.preflight.reward import check_cost, check_spread
from rlhf_lightning.rollout.reward import Ensemble, WeightedSum
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
    assert check_spread(torch.ones(3), ["a", "a", "a"], ["p", "q", "r"], model=True).status == "note"


def test_a_constant_that_no_float_is_exactly_has_no_spread() -> None:
    finding = check_spread(torch.full((11,), 0.1), list("abcdefghijk"), list("abcdefghijk"), model=False)
    assert finding.status == "warning"


def test_a_reward_that_the_prompt_alone_decides_is_named(make: Make, prompts: PromptBatch, faults: Faults) -> None:
    def of_prompts(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    found = faults(check_ppo(make(reward=of_prompts), prompts))
    assert {name: finding.status for name, finding in found.items()} == {"spread of scores": "warning"}
    assert "at most 0 apart within a prompt" in found["spread of scores"].measured


def test_scores_within_a_prompt_are_compared_where_its_responses_differ() -> None:
    def status(scores: list[float], responses: list[str]) -> str:
        return check_spread(torch.tensor(scores), responses, ["p", "p", "q", "q"], model=False).status

    assert status([1.0, 1.0, 2.0, 2.0], ["a", "b", "a", "b"]) == "warning"
    assert status([1.0, 1.0, 2.0, 3.0], ["a", "b", "a", "b"]) == "ok"
    assert status([1.0, 1.0, 2.0, 2.0], ["a", "a", "b", "b"]) == "ok"


def test_a_reward_model_in_training_that_does_not_read_the_response_is_named(
    classifier: Callable[..., Any], comparisons: ComparisonBatch, tokenizer: Any, faults: Faults
) -> None:
    class Module(RewardModule):
        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return tokens[:, 0].float()

    found = faults(check_reward(Module(classifier(), tokenizer=tokenizer), comparisons))
    assert "at most 0 apart within a prompt, though 2 prompts" in found["spread of scores"].measured


# Rewards that are made of several ---------------------------------------------


def several(kind: str, first: Any, second: Any) -> tuple[Any, str]:
    """A reward made of two, and the name of the second."""
    if kind == "sum":
        return WeightedSum({"first": first, "second": second}, {"first": 1.0, "second": 0.5}), "second"
    if kind == "ensemble":
        return Ensemble([first, second], std_coef=0.5), "member 2"
    return WeightedSum({"both": Ensemble([first, second])}, {"both": 1.0}), "both/member 2"


KINDS = ["sum", "ensemble", "sum of an ensemble"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model_class", "says"), FAULTY)
def test_each_reward_model_of_several_must_score_the_last_real_token(
    model_class: Any,
    says: str,
    kind: str,
    make: Make,
    classifier: Callable[..., Any],
    prompts: PromptBatch,
    faults: Faults,
) -> None:
    reward, name = several(kind, classifier(), classifier(model_class))
    found = faults(check_ppo(make(reward=reward), prompts))
    assert {finding for finding in found if finding.startswith("reward model")} == {f"reward model {name}"}
    assert found[f"reward model {name}"].status == "error"
    assert says in found[f"reward model {name}"].measured


@pytest.mark.parametrize("kind", KINDS)
def test_each_reward_model_of_several_must_tell_responses_apart(
    kind: str, make: Make, classifier: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    constant = classifier()
    torch.nn.init.zeros_(constant.score.weight)
    reward, name = several(kind, classifier(), constant)
    found = faults(check_ppo(make(reward=reward), prompts))
    # Its last token does not move the score either.
    assert set(found) == {f"spread of scores {name}", f"reward model {name}"}
    assert found[f"spread of scores {name}"].status == "error"


@pytest.mark.parametrize("kind", KINDS)
def test_healthy_reward_models_together_have_no_fault(
    kind: str, make: Make, classifier: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    reward, _ = several(kind, classifier(), classifier())
    assert faults(check_ppo(make(reward=reward), prompts)) == {}


# Coarse types and other families ----------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "num_labels": 1,
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (RobertaForSequenceClassification, RobertaConfig(**SMALL, type_vocab_size=1)),
        (DebertaV2ForSequenceClassification, DebertaV2Config(**SMALL, type_vocab_size=0)),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_bfloat16_classifier_that_rounds_two_last_tokens_alike_has_no_fault(
    seed: int, model_class: Any, config: Any, make: Make, prompts: PromptBatch
) -> None:
    torch.manual_seed(seed)
    module = make(reward=model_class(config).bfloat16().eval(), advantage="rloo", samples_per_prompt=3)
    findings = {finding.name: finding for finding in check_ppo(module, prompts)}
    assert findings["reward model"].status == "ok", findings["reward model"]


# Positions ---------------------------------------------------------------------


def short_reward(gpt2: Callable[..., Any], positions: int) -> Any:
    return gpt2(GPT2ForSequenceClassification, num_labels=1, n_positions=positions)


def test_a_reward_model_with_too_few_positions_is_named_with_what_to_change(
    make: Make, gpt2: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    # The longest prompt has 15 tokens; a probe's response has at most 16.
    name = "positions of the reward model"
    assert faults(check_ppo(make(reward=short_reward(gpt2, 21)), prompts)) == {}
    for positions, tokens in ((20, 6), (8, 6), (40, 30)):
        found = faults(check_ppo(make(reward=short_reward(gpt2, positions), max_new_tokens=tokens), prompts))
        assert {name: finding.status for name, finding in found.items()} == {name: "error"}
        assert f"need {15 + tokens} positions; it has {positions}" in found[name].measured
        assert "max_new_tokens" in found[name].remedy
        assert "max_prompt_length" in found[name].remedy


def test_what_a_reward_model_with_its_own_tokenizer_will_need_is_an_estimate(
    make: Make,
    gpt2: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    prompts: PromptBatch,
    faults: Faults,
) -> None:
    def status(positions: int, tokens: int) -> str:
        own = make_tokenizer(eos_token="!")
        module = make(reward=short_reward(gpt2, positions), reward_tokenizer=own, max_new_tokens=tokens)
        found = faults(check_ppo(module, prompts))
        return found["positions of the reward model"].status if found else "ok"

    # A probe's response has at most 16 tokens, of at most 3 bytes each as text.
    assert [status(120, 70), status(80, 70), status(16, 6)] == ["ok", "warning", "error"]


def test_the_reward_model_with_too_few_positions_is_named_among_several(
    make: Make, gpt2: Callable[..., Any], classifier: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    reward, name = several("sum", classifier(), short_reward(gpt2, 12))
    assert set(faults(check_ppo(make(reward=reward), prompts))) == {f"positions of the reward model {name}"}


# Cost --------------------------------------------------------------------------


def slow(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    time.sleep(0.5)
    return [float(sum(map(ord, response))) for response in responses]


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_a_slow_reward_is_named_whatever_it_is_made_of(
    kind: str, make: Make, prompts: PromptBatch, faults: Faults
) -> None:
    # A probe has twelve responses; a rollout of 60 takes five times as long.
    many = prompts.rows(torch.arange(60) % 6)
    reward = slow if kind == "one" else several(kind, low_bytes, slow)[0]
    found = faults(check_ppo(make(reward=reward), many))
    assert set(found) == {"cost of the reward"}
    assert float(found["cost of the reward"].measured.split()[0]) >= 500
    assert "ms for 12 responses" in found["cost of the reward"].measured


def low_bytes(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [sum(ord(c) < 128 for c in text) / max(1, len(text)) for text in responses]


def test_the_reward_is_as_before_once_its_time_was_taken(make: Make, prompts: PromptBatch) -> None:
    module = make()
    assert module.reward is not None
    before = set(vars(module.reward))
    check_ppo(module, prompts)
    assert set(vars(module.reward)) == before


def test_the_cost_of_a_rollout_is_that_of_its_size() -> None:
    finding = check_cost(seconds=0.5, responses=8, rollout_size=64, sampling_seconds=3.0)
    assert (finding.status, "500.0 ms for 8" in finding.measured, "at most 4 s" in finding.measured) == (
        "warning",
        True,
        True,
    )
    assert check_cost(seconds=0.5, responses=8, rollout_size=64, sampling_seconds=5.0).status == "ok"
    assert check_cost(seconds=0.1, responses=8, rollout_size=64, sampling_seconds=0.1).status == "ok"


def test_a_margin_that_no_row_has_and_a_warm_up_that_is_none_are_a_warning(
    classifier: Callable[..., Any], comparisons: ComparisonBatch, tokenizer: Any, faults: Callable[..., Any]
) -> None:
    rated = replace(comparisons, ratings=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    margin, both = ({"margin_coef": 0.5, "warmup_from": start} for start in (0.0, 0.1))

    def measured(batch: ComparisonBatch, settings: dict[str, Any]) -> str:
        found = faults(check_reward(RewardModule(classifier(), tokenizer=tokenizer, **settings), batch))
        return found["settings without effect"].measured if found else ""

    assert measured(comparisons, margin).startswith("margin_coef=0.5 counts only with rows")
    assert measured(rated, margin) == ""
    assert measured(rated, both) == "warmup_from=0.1 counts only with warmup_steps above 0"
    assert len(measured(comparisons, both).split("; ")) == 2
