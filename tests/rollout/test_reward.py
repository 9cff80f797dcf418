from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import NetworkConfig, save_pretrained
from rlhf_lightning.networks.unpadded import reading_padding
from rlhf_lightning.rollout.reward import (
    Ensemble,
    FunctionReward,
    ModelReward,
    Reward,
    WeightedSum,
    left_aligned,
    load_reward,
)
from rlhf_lightning.types import Rollout

KINDS = ["llama", "gpt2"]
PROMPTS = [[50, 90, 70, 30, 20], [80, 40], [40, 41, 42]]
RESPONSES = [[11, 1], [12, 13, 14, 15, 16, 17], [20, 21, 22, 1]]


@pytest.fixture
def sequences(rollout: Callable[..., Rollout]) -> Rollout:
    return rollout(PROMPTS, RESPONSES)


def logits_one_by_one(network: Any, rows: list[list[int]]) -> torch.Tensor:
    """The classifier's logit at the last token of each sequence, without any padding."""
    with torch.no_grad():
        return torch.cat([network(torch.tensor([row])).logits.flatten() for row in rows])


# A reward function -----------------------------------------------------------


def test_a_function_gets_prompts_responses_and_all_columns(rollout: Callable[..., Rollout]) -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, responses=responses, **columns)
        return [1.0, 2.0, 3.0]

    made = rollout(PROMPTS, RESPONSES, wanted=["x", "y", "z"], weight=[3, 2, 1])
    scores = FunctionReward(spy)(made)
    assert scores.tolist() == [1.0, 2.0, 3.0]
    assert scores.dtype == torch.float32
    assert seen == {
        "prompts": made.prompts, "responses": made.responses, "wanted": ["x", "y", "z"], "weight": [3, 2, 1]
    }  # fmt: skip


@pytest.mark.parametrize(
    "scores", [(1, 0, 2), [True, False, 2.0], torch.tensor([1.0, 0.0, 2.0]), (float(x) for x in (1, 0, 2))]
)
def test_scores_may_be_any_numbers_in_any_sequence(sequences: Rollout, scores: Any) -> None:
    assert FunctionReward(lambda prompts, responses: scores)(sequences).tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "one score per response: 3 responses, 2 scores"),
        ([1.0, 2.0, 3.0, 4.0], "3 responses, 4 scores"),
        ([1.0, float("nan"), 3.0], "finite scores; the score of row 1 is nan"),
        ([1.0, 2.0, float("-inf")], "finite scores; the score of row 2 is -inf"),
        ([1e39, 2.0, 3.0], "finite scores; the score of row 0 is 1e\\+39"),
        (["high", 2.0, 3.0], "must return numbers; the score of row 0 is 'high'"),
        ([1.0, 2.0, None], "must return numbers; the score of row 2 is None"),
    ],
)
def test_scores_that_cannot_be_used_name_function_rule_and_value(
    sequences: Rollout, scores: list[Any], message: str
) -> None:
    def short_and_sweet(prompts: list[str], responses: list[str]) -> list[Any]:
        return scores

    with pytest.raises(InputError, match=message) as error:
        FunctionReward(short_and_sweet)(sequences)
    assert "short_and_sweet" in str(error.value)


def test_a_function_that_would_end_the_program_is_an_input_error(sequences: Rollout) -> None:
    def leave(prompts: list[str], responses: list[str]) -> list[float]:
        raise SystemExit(0)

    with pytest.raises(InputError, match="leave raised SystemExit: 0"):
        FunctionReward(leave)(sequences)


def test_an_exception_of_the_function_names_function_error_and_line(sequences: Rollout) -> None:
    def broken(prompts: list[str], responses: list[str]) -> list[float]:
        return [{"known": 1.0}["unknown"]]

    with pytest.raises(InputError, match=r"broken raised KeyError: 'unknown' \(at test_reward\.py:\d+\)") as error:
        FunctionReward(broken)(sequences)
    assert isinstance(error.value.__cause__, KeyError)


def around(function: Callable[..., list[float]]) -> Callable[..., list[float]]:
    @wraps(function)
    def called(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return function(prompts, responses)

    return called


def test_a_function_that_does_not_take_a_column_is_told_so(rollout: Callable[..., Rollout]) -> None:
    made = rollout(PROMPTS, RESPONSES, wanted=[1, 2, 3], topic=["a", "b", "c"])
    message = r"lambda.* does not take the rows' columns wanted, topic: give it a parameter .* or \*\*columns"
    with pytest.raises(InputError, match=message):
        FunctionReward(lambda prompts, responses: [0.0] * 3)(made)
    with pytest.raises(InputError, match="does not take the rows' columns topic:"):
        FunctionReward(lambda prompts, responses, *, wanted: [0.0] * 3)(made)
    # What stands around a function takes what is called, whatever the function says of itself.
    assert FunctionReward(around(lambda prompts, responses: [0.0] * 3))(made).tolist() == [0.0] * 3
    with pytest.raises(InputError, match=r"dict.* raised TypeError"):
        FunctionReward(dict)(made)


# A reward model --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 32])
def test_a_score_is_the_classifiers_logit_at_the_last_real_token(
    kind: str, micro_batch_size: int, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier(kind)
    reward = ModelReward(network, tokenizer, tokenizer, micro_batch_size=micro_batch_size)
    expected = logits_one_by_one(network, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(reward(sequences), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_cannot_change_a_score(
    kind: str, rollout: Callable[..., Rollout], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    reward = ModelReward(classifier(kind), tokenizer, tokenizer)
    expected = reward(rollout(PROMPTS, RESPONSES))
    for left, right in ((4, 0), (0, 4), (3, 2)):
        found = reward(rollout(PROMPTS, RESPONSES, left=left, right=right))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ids_outside_of_the_mask_cannot_change_a_score(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    reward = ModelReward(classifier(), tokenizer, tokenizer)
    noise = sequences.tokens.where(sequences.attention_mask, torch.tensor(99))
    other = Rollout(**{**vars(sequences), "tokens": noise})
    assert torch.equal(reward(other), reward(sequences))


def test_no_padding_is_read_for_the_same_scores(
    rollout: Callable[..., Rollout], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network, made = classifier(), rollout(PROMPTS, RESPONSES, left=2)
    reward = ModelReward(network, tokenizer, tokenizer)
    with reading_padding():
        expected = reward(made)
    reward(made)  # which looks at the network, once
    read: list[int] = []
    network.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    torch.testing.assert_close(reward(made), expected)
    assert read == [sum(len(row) for row in PROMPTS + RESPONSES)]


class TakesTokensAndMask(LlamaForSequenceClassification):
    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_network_need_not_take_more_than_tokens_and_mask(
    attn_implementation: str, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier(attn_implementation=attn_implementation)
    own = TakesTokensAndMask(network.config).eval()
    own.load_state_dict(network.state_dict())
    expected = ModelReward(network, tokenizer, tokenizer)(sequences)
    torch.testing.assert_close(ModelReward(own, tokenizer, tokenizer)(sequences), expected)


@pytest.mark.parametrize("response", [[11, 0, 12], [11, 12, 0]], ids=["in the middle", "at the end"])
def test_a_padding_id_that_the_policy_sampled_is_a_token_like_others(
    response: list[int], rollout: Callable[..., Rollout], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier()
    found = ModelReward(network, tokenizer, tokenizer)(rollout([[5, 9], [7]], [response, [20, 21]]))
    with torch.no_grad():
        hidden = network.model(torch.tensor([[5, 9, *response]])).last_hidden_state[0, -1]
        torch.testing.assert_close(found[:1], network.score(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokenizers_that_are_other_objects_share_tokens_and_retokenising_agrees(
    kind: str, sequences: Rollout, classifier: Callable[..., Any], make_tokenizer: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier(kind)
    copy = make_tokenizer(pad_token="<pad>", eos_token="<eos>")
    shared, anew = (ModelReward(network, copy, tokenizer) for _ in range(2))
    assert shared.shares_tokens
    anew.shares_tokens = False
    torch.testing.assert_close(anew(sequences), shared(sequences), rtol=1e-4, atol=1e-4)


def test_another_end_token_is_another_tokenizer(make_tokenizer: Callable[..., Any], tokenizer: Any) -> None:
    from rlhf_lightning.rollout.reward import same_tokenizer

    assert same_tokenizer(tokenizer, make_tokenizer(pad_token="<pad>", eos_token="<eos>"))
    assert not same_tokenizer(tokenizer, make_tokenizer(pad_token="<pad>", eos_token="<pad>"))


def word_tokenizer() -> Any:
    """Whole words and their spaces, end 3, pad 4."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"yes": 0, "no": 1, " ": 2, "</s>": 3, "[P]": 4, "?": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="[P]")


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_with_another_tokenizer_reads_the_text_in_its_own_tokens(
    kind: str, rollout: Callable[..., Rollout], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier(kind, vocab_size=6, pad_token_id=4, eos_token_id=3)
    prompts = [tokenizer("yes ").input_ids, tokenizer("no yes ").input_ids]
    responses = [[*tokenizer("no").input_ids, 1], tokenizer("yes no yes").input_ids]
    found = ModelReward(network, word_tokenizer(), tokenizer)(rollout(prompts, responses))
    # The first response has ended, so the reward model reads its own end token behind it.
    expected = logits_one_by_one(network, [[0, 2, 1, 3], [1, 2, 0, 2, 0, 2, 1, 2, 0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_text_after_the_end_token_cannot_change_a_score(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    # `generate` turns what follows the end into padding; the mask alone must be enough for the reward.
    later = sequences.tokens.clone()
    later[0, -4:] = torch.tensor([33, 1, 44, 55])
    other = Rollout(**{**vars(sequences), "tokens": later})
    reward = ModelReward(classifier(), tokenizer, tokenizer)
    assert torch.equal(reward(other), reward(sequences))


def test_a_conversation_is_read_in_the_reward_models_own_chat_template(
    rollout: Callable[..., Rollout], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    own = word_tokenizer()
    own.chat_template = "{% for m in messages %}no {{ m['content'] }} {% endfor %}"
    network = classifier(vocab_size=6, pad_token_id=4, eos_token_id=3)
    made = rollout([tokenizer("anything").input_ids], [[*tokenizer("yes").input_ids, 1]])
    conversation = Rollout(**{**vars(made), "prompts": [[{"role": "user", "content": "yes"}]]})
    expected = logits_one_by_one(network, [[1, 2, 0, 2, 0, 3]])
    torch.testing.assert_close(ModelReward(network, own, tokenizer)(conversation), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad_token_id", [None, 77])
def test_the_padding_of_the_tokenizer_is_used_whatever_the_network_believes(
    pad_token_id: int | None, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    expected = ModelReward(classifier(), tokenizer, tokenizer)(sequences)
    found = ModelReward(classifier(pad_token_id=pad_token_id), tokenizer, tokenizer)(sequences)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scoring_leaves_the_networks_own_padding_as_it_was(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier(pad_token_id=77)
    ModelReward(network, tokenizer, tokenizer)(sequences)
    assert network.config.pad_token_id == 77


def test_a_reward_model_is_frozen(sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any) -> None:
    reward = ModelReward(classifier().train(), tokenizer, tokenizer)
    assert not reward.reward_model.training
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward(sequences).requires_grad


def test_left_alignment_keeps_the_order_of_the_real_tokens() -> None:
    tokens = torch.tensor([[0, 0, 5, 6, 0, 0], [7, 0, 8, 9, 4, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]).bool()
    aligned, aligned_mask = left_aligned(tokens, mask)
    assert aligned[0, :2].tolist() == [5, 6]
    assert aligned[1, :4].tolist() == [7, 8, 9, 4]
    assert aligned_mask.sum(dim=1).tolist() == [2, 4]
    assert aligned_mask.int().diff(dim=1).max() <= 0


@pytest.fixture
def three(rollout: Callable[..., Rollout]) -> Rollout:
    """Three responses."""
    return rollout([[5]] * 3, [[6, 1], [7, 1], [8, 1]])


# What a setting stands for ---------------------------------------------------

FILE = "def longer(prompts, responses):\n    return [float(len(r)) for r in responses]\n\nnumber = 3\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


def lengths(sequences: Rollout) -> list[float]:
    return [float(len(text)) for text in sequences.responses]


def test_a_function_in_a_file_is_named_with_a_colon(file: Path, sequences: Rollout, tokenizer: Any) -> None:
    assert load_reward(f"{file}:longer", tokenizer)(sequences).tolist() == lengths(sequences)


def test_a_function_in_a_package_is_named_with_a_colon(
    tmp_path: Path, sequences: Rollout, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_package_of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward("some_package_of_a_user.inner:longer", tokenizer)
    assert reward(sequences).tolist() == lengths(sequences)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/missing.py:longer", "cannot be imported: no file .*missing.py"),
        ("{folder}/broken.py:longer", "cannot be imported: SyntaxError: .*broken.py, line 1"),
        ("no_such_package.inner:longer", "cannot be imported: No module named 'no_such_package'"),
        ("{folder}/my_rewards.py:shorter", "names 'shorter', which .*my_rewards.py does not define"),
        ("math:shorter", "names 'shorter', which math does not define"),
        ("{folder}/my_rewards.py:number", "number"),
        ("{folder}/my_rewards.py", "without the name of a function in it: write reward=.*my_rewards.py:FUNCTION"),
    ],
)
@pytest.mark.usefixtures("file")
def test_a_name_that_leads_to_no_function_is_an_input_error(
    name: str, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "broken.py").write_text("def longer(:")
    with pytest.raises(InputError, match=message) as error:
        load_reward(name.format(folder=tmp_path), tokenizer)
    assert "reward=" in str(error.value)


def test_scores_that_are_not_finite_are_an_input_error(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier()
    torch.nn.init.constant_(network.score.weight, float("nan"))
    with pytest.raises(InputError, match="scores are not finite"):
        ModelReward(network, tokenizer, tokenizer)(sequences)


def test_a_folder_is_a_reward_model_with_its_own_tokenizer(
    tmp_path: Path, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier()
    save_pretrained(network, tokenizer, tmp_path)
    expected = ModelReward(network, tokenizer, tokenizer)(sequences)
    for setting in (tmp_path, str(tmp_path), NetworkConfig(str(tmp_path))):
        reward = load_reward(setting, tokenizer)
        assert isinstance(reward, ModelReward)
        assert reward.shares_tokens
        torch.testing.assert_close(reward(sequences), expected)


def test_a_folder_that_does_not_exist_is_an_input_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="missing"):
        load_reward(str(tmp_path / "missing"), tokenizer)


def test_a_reward_stays_itself_and_a_callable_becomes_one(sequences: Rollout, tokenizer: Any) -> None:
    class Constant(Reward):
        def forward(self, rollout: Rollout) -> torch.Tensor:
            return torch.ones(len(rollout))

    reward = Constant()
    assert load_reward(reward, tokenizer) is reward
    made = load_reward(lambda prompts, responses: [2.0] * len(responses), tokenizer)
    assert made(sequences).tolist() == [2.0, 2.0, 2.0]


def test_a_held_classifier_reads_the_policys_tokens_unless_told_otherwise(
    classifier: Callable[..., Any], tokenizer: Any
) -> None:
    own = load_reward(classifier(), tokenizer)
    assert isinstance(own, ModelReward)
    assert own.shares_tokens
    other = load_reward(classifier(vocab_size=6), tokenizer, tokenizer=word_tokenizer())
    assert isinstance(other, ModelReward)
    assert not other.shares_tokens


def test_a_network_that_is_no_classifier_with_one_label_is_refused(
    policy: Callable[..., Any], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    for network in (policy(), classifier(num_labels=2)):
        with pytest.raises(InputError, match="one label"):
            load_reward(network, tokenizer)


def test_what_is_no_reward_is_refused_by_its_type(tokenizer: Any) -> None:
    setting: Any = 3
    with pytest.raises(InputError, match="found int"):
        load_reward(setting, tokenizer)


# Several rewards -------------------------------------------------------------


def longer(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def first_letter(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(ord(response[0])) for response in responses]


def test_a_weighted_sum_adds_up_what_each_reward_says_times_its_weight(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier()
    reward = load_reward(WeightedSum({"helpful": network, "long": longer}, {"long": -0.5, "helpful": 2.0}), tokenizer)
    helpful = 2.0 * ModelReward(network, tokenizer, tokenizer)(sequences)
    long = -0.5 * torch.tensor(longer([], sequences.responses))
    found = reward.scores(sequences)
    assert list(found.parts) == ["helpful", "long"]
    torch.testing.assert_close(found.parts["helpful"], helpful)
    torch.testing.assert_close(found.parts["long"], long)
    torch.testing.assert_close(found.total, helpful + long)
    assert torch.equal(reward(sequences), found.total)


@pytest.mark.parametrize("std_coef", [0.0, 0.5, 2.0])
def test_an_ensemble_takes_standard_deviations_off_its_mean(
    std_coef: float, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    networks = [classifier(seed=seed) for seed in range(3)]
    members = [ModelReward(network, tokenizer, tokenizer)(sequences).tolist() for network in networks]
    means, stds = [], []
    for row in zip(*members, strict=True):
        means.append(sum(row) / 3)
        stds.append((sum((score - means[-1]) ** 2 for score in row) / 3) ** 0.5)
    reward = load_reward(Ensemble(networks, std_coef=std_coef), tokenizer)
    found = reward.scores(sequences)
    assert set(found.parts) == {"mean", "std"}
    assert found.parts["mean"].tolist() == pytest.approx(means, rel=1e-4)
    assert found.parts["std"].tolist() == pytest.approx(stds, rel=1e-4)
    expected = [mean - std_coef * std for mean, std in zip(means, stds, strict=True)]
    assert found.total.tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(reward(sequences), found.total)


def test_rewards_of_several_can_be_parts_of_others(sequences: Rollout, tokenizer: Any) -> None:
    inner = Ensemble([longer, first_letter], std_coef=1.0)
    reward = load_reward(WeightedSum({"both": inner, "long": longer}, {"both": 3.0, "long": 1.0}), tokenizer)
    alone, long = load_reward(inner, tokenizer).scores(sequences), torch.tensor(longer([], sequences.responses))
    found = reward.scores(sequences)
    assert list(found.parts) == ["both", "both/mean", "both/std", "long"]
    torch.testing.assert_close(found.parts["both/std"], 3 * alone.parts["std"])
    torch.testing.assert_close(found.total, 3 * alone.total + long)
    average = load_reward(Ensemble([WeightedSum({"long": longer}, {"long": 2.0}), longer]), tokenizer)
    torch.testing.assert_close(average(sequences), 1.5 * long)


def test_a_reward_in_one_piece_has_no_parts(sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any) -> None:
    for setting in (longer, classifier()):
        reward = load_reward(setting, tokenizer)
        found = reward.scores(sequences)
        assert found.parts == {}
        assert torch.equal(found.total, reward(sequences))


def test_each_network_reads_a_rollout_once_for_the_total_and_the_parts(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    networks, calls = [classifier(seed=seed) for seed in range(2)], [0, 0]

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    for index, network in enumerate(networks):
        network.register_forward_hook(count(index))
    setting = WeightedSum({"models": Ensemble(networks, std_coef=1.0), "long": longer}, {"models": 1.0, "long": 0.1})
    load_reward(setting, tokenizer).scores(sequences)
    assert calls == [1, 1]


def test_parts_of_a_reward_are_loaded_with_the_settings_of_the_whole(
    file: Path, tmp_path: Path, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network, foreign = classifier(), classifier(vocab_size=6)
    save_pretrained(network, tokenizer, tmp_path / "reward")
    setting = WeightedSum(
        {"folder": str(tmp_path / "reward"), "file": f"{file}:longer", "foreign.words": foreign},
        {"folder": 1.0, "file": 1.0, "foreign.words": 1.0},
    )
    other = word_tokenizer()
    parts = load_reward(setting, tokenizer, tokenizer=other, micro_batch_size=2).scores(sequences).parts
    assert parts["file"].tolist() == lengths(sequences)
    torch.testing.assert_close(parts["foreign.words"], ModelReward(foreign, other, tokenizer)(sequences))
    # A folder reads its own tokens, whatever the others read.
    torch.testing.assert_close(parts["folder"], ModelReward(network, tokenizer, tokenizer)(sequences))


def test_a_tokenizer_that_no_part_of_the_reward_reads_is_refused(
    tmp_path: Path, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    save_pretrained(classifier(), tokenizer, tmp_path / "reward")
    folder = str(tmp_path / "reward")
    for setting in (folder, longer, Ensemble([folder, longer]), WeightedSum({"a": folder}, {"a": 1.0})):
        with pytest.raises(InputError, match=r"reward_tokenizer=.* the reward has none"):
            load_reward(setting, tokenizer, tokenizer=word_tokenizer())
    load_reward(Ensemble([folder, WeightedSum({"a": classifier()}, {"a": 1.0})]), tokenizer, tokenizer=word_tokenizer())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({0: 1.0, 1: 2.0, 2: 3.0}, "it returned a dict"),
        ("123", "it returned a str"),
        ({1.0, 2.0, 3.0}, "it returned a set"),
        (0.5, "it returned a float: 0.5"),
        (None, "it returned a NoneType"),
        (["1", "2", "3"], "must return numbers; the score of row 0 is '1'"),
        ([[1.0, 2.0]] * 3, "must return numbers"),
        (torch.ones(3, 2), "must return numbers"),
        (torch.ones(2), "3 responses, 2 scores"),
        ([1.0] * 4, "3 responses, 4 scores"),
    ],
)
def test_a_reward_function_that_returns_something_else_than_a_number_for_each_response_is_refused(
    returned: Any, message: str, three: Rollout
) -> None:
    with pytest.raises(InputError, match=message):
        FunctionReward(lambda prompts, responses: returned)(three)


def test_a_reward_function_cannot_change_what_it_is_given(three: Rollout) -> None:
    rows = [{"role": "user", "content": "a"}]
    given = Rollout(**{**vars(three), "prompts": [rows] * 3, "columns": {"topic": [["x"], ["y"], ["z"]]}})
    before = str(vars(given))

    def careless(prompts: Any, responses: Any, topic: Any) -> list[float]:
        prompts[0][0]["content"] = "changed"
        responses.sort(reverse=True)
        topic[0].append("more")
        topic.clear()
        return [1.0] * len(responses)

    assert FunctionReward(careless)(given).tolist() == [1.0] * 3
    assert str(vars(given)) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSum({"a": longer, "b": longer}, {"a": 1.0, "c": 1.0}), "rewards: a, b; weights: a, c"),
        (lambda: WeightedSum({"a": longer}, {}), "rewards: a; weights: none"),
        (lambda: WeightedSum({}, {}), "rewards: none; weights: none"),
        (lambda: WeightedSum({"a": longer}, {"a": float("nan")}), "weight of 'a' must be a finite number; found nan"),
        (lambda: WeightedSum({"a": longer}, {"a": float("inf")}), "weight of 'a' must be a finite number; found inf"),
        (lambda: WeightedSum({"a": longer}, {"a": None}), "weight of 'a' must be a finite number; found None"),
        (lambda: Ensemble([longer]), "at least 2 rewards"),
        (lambda: Ensemble("out/reward"), "list of at least 2 rewards; found 'out/reward'"),
        (lambda: Ensemble([longer, longer], std_coef=-1.0), "std_coef=-1.0 must be a finite number, 0 or more"),
        (lambda: Ensemble([longer, longer], std_coef=float("nan")), "std_coef=nan must be a finite number"),
    ],
)
def test_what_does_not_fit_together_is_an_input_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# What a reward model can read -------------------------------------------------


@pytest.mark.parametrize("own_tokens", [False, True])
def test_a_sequence_longer_than_the_positions_of_the_reward_model_is_an_input_error(
    own_tokens: bool, sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    own = word_tokenizer() if own_tokens else tokenizer
    longest = ModelReward(classifier(), own, tokenizer).longest(sequences)
    assert own_tokens or longest == max(len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True))
    enough, less = (ModelReward(classifier("gpt2", n_positions=longest - n), own, tokenizer) for n in (0, 1))
    assert enough(sequences).isfinite().all()
    with pytest.raises(
        InputError, match=rf"{longest} tokens .* {longest - 1} positions .*max_new_tokens.*data.max_pro"
    ):
        less(sequences)


def test_the_longest_prompt_is_counted_in_the_tokens_of_the_reward_model(
    sequences: Rollout, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    assert ModelReward(classifier(), tokenizer, tokenizer).longest_prompt(sequences) == max(map(len, PROMPTS))
    other = word_tokenizer()
    longest = max(len(other(text).input_ids) for text in sequences.texts)
    assert ModelReward(classifier(), other, tokenizer).longest_prompt(sequences) == longest


def test_the_reward_models_in_a_reward_have_names(classifier: Callable[..., Any], tokenizer: Any) -> None:
    class Own(Reward):
        def __init__(self, inner: Reward) -> None:
            super().__init__()
            self.inner = inner

    def names(setting: Any) -> list[str]:
        return list(load_reward(setting, tokenizer).models())

    assert names(longer) == []
    assert names(classifier()) == [""]
    assert names(Ensemble([classifier(), longer, classifier()])) == ["member 1", "member 3"]
    assert names(Own(load_reward(classifier(), tokenizer))) == ["inner"]
    nested = {"a": Ensemble([classifier(), classifier()]), "b": longer, "c": classifier()}
    assert names(WeightedSum(nested, dict.fromkeys(nested, 1.0))) == ["a/member 1", "a/member 2", "c"]
