import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.cli.preflight import conversation_of, short_and_long
from rlhf_lightning.data import read_rows

REWARDS = """
def letters(prompts, responses, **columns):
    return [sum(map(ord, response)) for response in responses]

def constant(prompts, responses, **columns):
    return [1.0 for response in responses]

def broken(prompts, responses, **columns):
    raise KeyError("topic")
"""
SMALL = ["data.batch_size=4", "module.minibatch_size=4", "module.max_new_tokens=4"]


@pytest.fixture(autouse=True)
def in_a_directory_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    monkeypatch.setenv("COLUMNS", "300")
    Path("rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [{"prompt": f"Say {i}.", "response": f"{i}!", "chosen": f"{i}!", "rejected": f"not {i}"} for i in range(20)]
    write("rows.jsonl", rows)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def look(*arguments: str, model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """Return exit code, status of each check, and everything that was printed."""
    given = [f"network.pretrained={model}", "data.path=rows.jsonl", "trainer=cpu", "output_dir=out"]
    code = run_verb("preflight", [*given, *arguments])
    captured = capsys.readouterr()
    cells = [[cell.strip() for cell in line.split("│")] for line in captured.out.splitlines()]
    statuses = {c[1]: c[2] for c in cells if len(c) > 3 and c[2] in ("ok", "note", "warning", "error")}
    return code, statuses, captured.out + captured.err


def test_a_healthy_run_of_each_stage_has_only_what_is_right(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {
        "ppo": {"KL to the reference", "first ratio", "left padding", "sampler and trainer", "cost of the reward"},
        "sft": {"end token"},
        "reward": {"end token", "reward model", "spread of scores"},
    }
    for stage, names in stages.items():
        more = ["module.reward=rewards.py:letters", *SMALL] if stage == "ppo" else []
        code, statuses, _ = look(f"module={stage}", *more, model=tiny_model, capsys=capsys)
        assert code == 0
        assert {name: status for name, status in statuses.items() if status != "ok"} == {}
        everywhere = {"pad token", "chat template", "round trip", "length", "memory", "batch sizes"}
        assert names | everywhere <= set(statuses)


def test_nothing_is_trained_or_written(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look("module=sft", model=tiny_model, capsys=capsys)
    assert {path.name for path in Path("out").iterdir()} == {".hydra"}


def test_the_numbers_of_the_run_are_shown(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = ["module=ppo", "module.reward=rewards.py:letters", *SMALL, "module.minibatch_size=2", "trainer.max_epochs=3"]
    _, _, printed = look(*ppo, model=tiny_model, capsys=capsys)
    numbers = {
        c[1].strip(): c[2].strip() for line in printed.splitlines() if len(c := line.split("│")) == 5 and c[1].strip()
    }
    # 19 rows without validation: 4 rollouts an epoch; 2 minibatches x 4 passes each.
    assert numbers["rollouts"] == "12"
    assert numbers["optimizer steps of a rollout"] == "8"
    assert numbers["optimizer steps in total: the learning rate's schedule"] == "96"


def test_every_fault_is_shown_at_once_and_exits_with_2(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [{"prompt": "Say it. " * (40 if i < 5 else 1)} for i in range(20)])
    ppo = ["module=ppo", "module.reward=rewards.py:constant", *SMALL, "module.minibatch_size=3"]
    code, statuses, printed = look(
        *ppo, "trainer.gradient_clip_val=1.0", "data.val_fraction=0", model=tiny_model, capsys=capsys
    )
    assert code == 2
    wrong = {name: status for name, status in statuses.items() if status != "ok"}
    assert wrong == {"trainer": "error", "length": "warning", "batch sizes": "error", "spread of scores": "warning"}
    assert "5 of 20 rows are dropped" in printed
    assert "preflight found 2 error(s): trainer, batch sizes" in printed


def test_prompts_that_are_all_too_long_are_an_error(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = ["module=ppo", "module.reward=rewards.py:letters", *SMALL, "module.max_new_tokens=254"]
    code, statuses, _ = look(*ppo, model=tiny_model, capsys=capsys)
    assert (code, statuses) == (2, {"length": "error"})


def changed(model: Path, tmp_path: Path, **settings: Any) -> Path:
    """Return a copy of the model with other settings of its tokenizer."""
    folder = shutil.copytree(model, tmp_path / "changed")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), "utf-8")
    return folder


def test_a_missing_pad_token_is_one_line_with_its_remedy(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed(tiny_model, tmp_path, pad_token=None)
    code, statuses, printed = look("module=sft", model=model, capsys=capsys)
    assert (code, statuses) == (2, {"pad token": "error"})
    assert "network.pad_token=" in printed


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        (None, "use text prompts, or a model whose tokenizer has one"),
        (
            "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}",
            "change tokenizer.chat_template so that add_generation_prompt=True",
        ),
        ("{{ raise_exception('only one turn') }}", "change the rows, or the template"),
    ],
)
def test_a_chat_template_that_fine_tuning_cannot_use_is_one_line_with_its_remedy(
    template: str | None, remedy: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1"}]
    write("rows.jsonl", [{"messages": turns}] * 20)
    model = changed(tiny_model, tmp_path, chat_template=template)
    code, statuses, printed = look("module=sft", "data.val_fraction=0", model=model, capsys=capsys)
    assert (code, statuses) == (2, {"chat template": "error"})
    assert remedy in printed


def test_rows_of_another_format_are_one_line(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [{"prompt": f"Say {i}."} for i in range(20)])
    code, statuses, _ = look("module=sft", model=tiny_model, capsys=capsys)
    assert (code, statuses) == (2, {"rows": "error"})


def test_a_reward_function_that_fails_is_an_error_beside_the_other_checks(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, statuses, printed = look(
        "module=ppo", "module.reward=rewards.py:broken", *SMALL, model=tiny_model, capsys=capsys
    )
    assert code == 2
    assert (statuses["networks"], statuses["length"]) == ("error", "ok")
    assert "KeyError: 'topic'" in printed


def test_a_chat_template_that_does_not_fit_the_rows_is_an_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(model)
    write("rows.jsonl", [{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(20)])
    ppo = ["module=ppo", "module.reward=rewards.py:letters", *SMALL]
    code, statuses, _ = look(*ppo, model=Path(model), capsys=capsys)
    assert (code, statuses["chat template"]) == (2, "error")


def test_texts_that_are_cut_into_blocks_have_their_end_token(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("rows.jsonl", [{"text": "Once upon a time. " * 30} for _ in range(4)])
    code, statuses, _ = look("module=sft", "data.max_length=64", "data.val_fraction=0", model=tiny_model, capsys=capsys)
    assert (code, statuses["end token"]) == (0, "ok")


def test_two_processes_are_planned_for_and_one_looks(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = ["module=ppo", "module.reward=rewards.py:letters", *SMALL, "trainer=ddp_cpu"]
    code, _, printed = look(*ppo, model=tiny_model, capsys=capsys)
    assert code == 0
    assert "4 sequences a rollout, 1 minibatch(es) x 4 passes = 4 optimizer steps; 2 rollouts" in printed


def test_a_micro_batch_that_is_to_be_found_is_estimated(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = ["module=ppo", "module.reward=rewards.py:letters", *SMALL, "module.micro_batch_size=auto"]
    code, statuses, printed = look(*ppo, model=tiny_model, capsys=capsys)
    assert (code, statuses["memory"], statuses["batch sizes"]) == (0, "ok", "ok")
    assert "minibatch_size / module.micro_batch_size=4, rounded up" in printed


def test_a_batch_to_look_at_has_the_shortest_and_the_longest_item() -> None:
    items = ["aaaa", "a", "aaa", "aa", "aaaaa"]
    assert [len(item) for item in short_and_long(items, 3)] == [1, 3, 5]
    assert [len(item) for item in short_and_long(items, 2)] == [1, 5]
    assert [len(item) for item in short_and_long(items, 1)] == [5]
    assert len(short_and_long(items, 9)) == 5


def test_the_conversation_of_rows_is_what_is_asked() -> None:
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = read_rows([{"text": "x"}, {"messages": [asked, answer]}])
    assert list(conversation_of(rows) or []) == [asked]
    assert list(conversation_of(read_rows([{"prompt": [asked]}])) or []) == [asked]
    assert conversation_of(read_rows([{"prompt": "a"}])) is None


def test_data_of_another_stage_are_said_at_once(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, printed = look("module=sft", "data=ppo", "data.batch_size=4", model=tiny_model, capsys=capsys)
    assert code == 2
    assert "SFTModule reads batches of the type SFTBatch" in printed
    assert "data=sft" in printed
