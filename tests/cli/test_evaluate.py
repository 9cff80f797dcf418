import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli.application import run_verb

QUIET = ["max_new_tokens=4", "output_dir=out", "samples_shown=0"]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    Path("my_rewards.py").write_text(
        "def length(prompts, responses, **columns):\n    return [len(r) for r in responses]\n", encoding="utf-8"
    )
    write("rows.jsonl", [{"prompt": f"Say {i}.", "response": f"{i}"} for i in range(6)])


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(*arguments: str) -> dict[str, Any]:
    assert run_verb("evaluate", [*QUIET, *arguments]) == 0
    found: dict[str, Any] = json.loads(Path("out/evaluation.json").read_text(encoding="utf-8"))
    return found


def test_policies_are_scored_by_a_reward_function(tiny_model: Path) -> None:
    found = evaluation(
        f"policies.sft={tiny_model}",
        f"+policies.mine={tiny_model}",
        "data.path=rows.jsonl",
        "reward=my_rewards.py:length",
    )
    assert found["metric"] == "reward"
    written = [json.loads(line) for line in Path("out/responses.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("sft", "mine"):
        lengths = [len(row[name]["response"]) for row in written]
        assert found["policies"][name]["score"]["mean"] == pytest.approx(sum(lengths) / 6)
    # The same weights, the same prompts and the same seed.
    assert found["policies"]["sft"] == found["policies"]["mine"]


def test_references_are_the_measure_where_there_is_no_reward(tiny_model: Path) -> None:
    found = evaluation(f"policies.sft={tiny_model}", "data.path=rows.jsonl", "data.limit=3")
    assert found["metric"] == "rouge_l"
    assert found["policies"]["sft"]["prompts"] == 3


def test_responses_to_a_task_of_natural_instructions_are_scored_by_the_nearest_of_its_references(
    tiny_model: Path,
) -> None:
    def write_task(split: str, instances: list[dict[str, Any]]) -> None:
        examples = [{"input": str(n), "output": str(2 * n), "explanation": "-"} for n in (1, 2)]
        task = {"Definition": ["Double the number."], "Positive Examples": examples, "Instances": instances}
        Path("task", f"{split}.json").write_text(json.dumps(task), encoding="utf-8")

    def responses() -> tuple[list[str], list[float]]:
        found = evaluation(*arguments)
        assert found["metric"] == "rouge_l"
        written = [json.loads(line) for line in Path("out/responses.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = [row["sft"]["score"] for row in written]
        assert found["policies"]["sft"]["score"]["mean"] == pytest.approx(sum(scores) / len(scores))
        assert [row["prompt"].partition("Positive Example 1 -")[0] for row in written] == [
            "Definition: Double the number.\n\n"
        ] * 2
        assert [row["prompt"][-16:] for row in written] == ["Input: 4\nOutput:", "Input: 5\nOutput:"]
        assert not any("Positive Example 2" in row["prompt"] for row in written)
        return [row["sft"]["response"] for row in written], scores

    arguments = [
        f"policies.sft={tiny_model}",
        "data.path=task",
        "data.format=natural_instructions",
        "data.examples=1",
        "metric=rouge_l",
        "max_new_tokens=32",
    ]
    Path("task").mkdir()
    write_task("train", [{"input": "3", "output": ["6"]}])
    write_task("test", [{"input": "4", "output": ["eight", "8"]}, {"input": "5", "output": "ten"}])
    said, scores = responses()
    assert scores == [0.0, 0.0]
    write_task("test", [{"input": "4", "output": ["eight", said[0], "8"]}, {"input": "5", "output": ["ten", "10"]}])
    assert responses() == (said, [1.0, 0.0])


def test_perplexity_of_given_responses_is_exp_of_their_mean_loss(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = evaluation(f"policies.sft={tiny_model}", "data.path=rows.jsonl", "batch_size=4")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    network: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    losses: list[float] = []
    for i in range(6):
        ids = torch.tensor([[*tokenizer(f"Say {i}.{i}").input_ids, tokenizer.eos_token_id]])
        logprobs = network(ids).logits[0, :-1].log_softmax(dim=-1)
        # The response is its digit and the end token.
        losses += (-logprobs.gather(1, ids[0, 1:, None])[-2:, 0]).tolist()
    assert found["policies"]["sft"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 12), rel=1e-5)


def test_without_responses_there_is_no_perplexity(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("prompts.jsonl", [{"prompt": "Say 1.", "response": "1"}, {"prompt": "Say 2."}])
    found = evaluation(f"policies.sft={tiny_model}", "data.path=prompts.jsonl", "reward=my_rewards.py:length")
    assert "perplexity" not in found["policies"]["sft"]
    assert "–" in capsys.readouterr().out


def test_reward_model_that_always_scores_the_same_is_right_half_of_the_time(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, pad_token_id=0)
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained("reward")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("reward")
    write(
        "pairs.jsonl", [{"prompt": "a", "responses": ["b", "c", "d"]}, {"prompt": "e", "chosen": "f", "rejected": "g"}]
    )
    found = evaluation("reward=reward", "reward_data.path=pairs.jsonl")
    assert found["reward_model"]["pairs"] == 4
    assert found["reward_model"]["accuracy"] == 0.5
    said = capsys.readouterr().out
    assert "accuracy 0.500 on 4 pairs" in said
    assert "0.500 on 4 whose chosen response is as long as the other" in said
    assert "log loss 0.693, calibration error 0.000" in said
    assert "score of the best responses 0.00 ± 0.00" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["policies.sft={model}"], "data.path is required"),
        (["policies.sft={model}", "data.path=rows.jsonl", "metric=reward"], "metric=reward needs a reward"),
        (["policies.sft={model}", "data.path=rows.jsonl", "metric=bleu"], "metric=bleu"),
        (
            ["policies.sft={model}", "data.path=prompts.jsonl"],
            "metric=rouge_l needs a response to compare with, or references; or pass reward=FOLDER or reward=file.py",
        ),
        (
            ["policies.sft={model}", "data.path=prompts.jsonl", "metric=rouge_l"],
            "metric=rouge_l needs a response to compare with, or references\n",
        ),
        (["policies.stf={model}"], "did you mean policies.sft?"),
        (["reward_data.path=rows.jsonl", "reward=my_rewards.py:length"], "pass reward=FOLDER"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    arguments: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("prompts.jsonl", [{"prompt": "Say 1."}])
    filled = [argument.format(model=tiny_model) for argument in arguments]
    assert run_verb("evaluate", [*QUIET, *filled]) == 2
    assert message in capsys.readouterr().err
