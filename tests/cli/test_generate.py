import json
import sys
from pathlib import Path

import pytest

from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.cli.generate import shown


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])


def rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_prompt_may_hold_what_hydra_would_read_as_grammar(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Is [this], it's {that}: a=b?"
    arguments = [f"network.pretrained={tiny_model}", f"prompt={prompt}", "out=out.jsonl", "max_new_tokens=3"]
    assert run_verb("generate", arguments) == 0
    (row,) = rows("out.jsonl")
    assert row["prompt"] == prompt
    said = capsys.readouterr().out
    assert row["response"] in said
    assert said.endswith("\n1 response is in out.jsonl\n")


def test_rows_of_a_file_keep_their_order_and_their_columns(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"prompt": "x" * length, "id": str(length)} for length in (5, 1, 3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "max_new_tokens=4", "batch_size=2"]
    assert run_verb("generate", [*arguments, "out=sampled.jsonl"]) == 0
    assert capsys.readouterr().out.endswith("\n3 responses are in sampled.jsonl\n")
    assert [{key: row[key] for key in ("prompt", "id")} for row in rows("sampled.jsonl")] == given
    assert run_verb("generate", [*arguments, "out=again.jsonl"]) == 0
    assert rows("again.jsonl") == rows("sampled.jsonl")
    assert run_verb("generate", [*arguments, "out=other.jsonl", "seed=2"]) == 0
    assert rows("other.jsonl") != rows("sampled.jsonl")


def test_a_response_that_cannot_be_seen_is_printed_as_empty() -> None:
    assert shown("") == shown(" \n") == "(empty)"
    assert shown(" a\n") == " a\n"


def test_both_samplers_find_the_same_likeliest_responses(tiny_model: Path) -> None:
    Path("rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "another"}\n', encoding="utf-8")
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "max_new_tokens=8", "temperature=0"]
    for sampler in ("builtin", "transformers"):
        assert run_verb("generate", [*arguments, f"sampler={sampler}", f"out={sampler}.jsonl"]) == 0
    assert rows("builtin.jsonl") == rows("transformers.jsonl")


@pytest.mark.parametrize("prompt", ["2024", "3.5", "true", "Say, please"])
def test_prompt_is_a_text_whatever_it_looks_like(prompt: str, tiny_model: Path) -> None:
    arguments = [f"network.pretrained={tiny_model}", f"prompt={prompt}", "out=out.jsonl", "max_new_tokens=1"]
    assert run_verb("generate", arguments) == 0
    assert rows("out.jsonl")[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of prompt="),
        (["prompt=a", "data.path=rows.jsonl"], "and not both"),
        (["prompt=a", "temperature=-1"], "temperature=-1"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0"),
        (["prompt=a", "sampler=vllm"], "sampler=vllm must be builtin or transformers"),
        (["data.path=nowhere.jsonl"], "data.path=nowhere.jsonl"),
        (["prompt=a", "max_new_tokens=1000"], "256 positions"),
        (["prompt=a", "device=cuda:99"], "device=cuda:99 cannot be used here"),
        (["prompt=a", "device=gpu"], "device=gpu cannot be used here"),
        (["prompt=a", "out=a_file/responses.jsonl"], "out=a_file/responses.jsonl: its folder cannot be made"),
        (["prompt=a", "out=a_folder"], "out=a_folder cannot be written: it is a folder"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    arguments: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a_file").touch()
    Path("a_folder").mkdir()
    assert run_verb("generate", [f"network.pretrained={tiny_model}", *arguments]) == 2
    assert message in capsys.readouterr().err
