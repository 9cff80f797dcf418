import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.instructions import all_instructions, split
from rlhf_lightning.world.judge import ceiling
from rlhf_lightning.world.story import World, shuffled, write_comparisons, write_world

SIZES: dict[str, Any] = {
    "texts": 40, "demonstrations_per_instruction": 1, "comparisons": 6, "held_out_comparisons": 4, "responses": 3,
    "agreement": 0.75, "vocab_size": 400, "hidden_size": 8, "layers": 1, "heads": 2,
}  # fmt: skip
WORLD = World(**SIZES)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WORLD, seed=3)
    return folder


def numbered(rows: Sequence[Any], seed: int) -> list[str]:
    """A policy that never says the same twice."""
    return [f"{seed} {i}." for i in range(len(rows))]


def test_nothing_of_the_held_out_instructions_is_trained_on(written: Path) -> None:
    train, held_out = ({one.text for one in part} for part in split(3))
    assert {row["prompt"] for row in rows(written / "data/demonstrations.jsonl")} == train
    assert {row["prompt"] for row in rows(written / "data/prompts.jsonl")} == train
    assert {row["prompt"] for row in rows(written / "data/held_out.jsonl")} == held_out
    lists = " ".join(row["text"] for row in rows(written / "data/text.jsonl"))
    assert not [text for text in held_out if text in lists]


def test_the_network_and_its_tokenizer_are_a_hugging_face_folder(written: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(written / "initial")
    tokenizer = AutoTokenizer.from_pretrained(written / "initial")
    assert (network.config.hidden_size, network.config.num_hidden_layers) == (8, 1)
    assert len(tokenizer) == network.config.vocab_size == 400


def test_the_seed_decides_everything(written: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "same", WORLD, seed=3)
    write_world(tmp_path / "other", WORLD, seed=4)
    for name in ("data/text.jsonl", "data/demonstrations.jsonl", "data/held_out.jsonl", "initial/model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (written / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (written / name).read_bytes()


def test_comparisons_are_of_what_the_policy_said(tmp_path: Path) -> None:
    result = write_comparisons(tmp_path, WORLD, numbered, seed=3)
    trained, held_out = (rows(tmp_path / f"comparisons{part}.jsonl") for part in ("", "_held_out"))
    assert (len(trained), len(held_out)) == (6, 4) == (result["comparisons"], result["comparisons_held_out"])
    # Three neighbouring samples answer one instruction.
    assert [sorted(row["responses"]) for row in trained] == [
        [f"3 {3 * i + k}." for k in range(3)] for i in range(3)
    ] + [sorted(f"3 {3 * i + k}." for k in range(3)) for i in range(3, 6)]
    train, unseen = ({one.text for one in part} for part in split(3))
    assert {row["prompt"] for row in trained} <= train
    assert {row["prompt"] for row in held_out} <= unseen
    assert result["ceiling"] == ceiling(held_out)


def test_the_register_that_few_want_is_asked_more_often_and_always_answered_anew(tmp_path: Path) -> None:
    train, held_out = split(3)
    rare = {one.text for one in [*train, *held_out] if one.register == "technical"}
    asked = len(train) + 2 * sum(one.text in rare for one in train)
    write_comparisons(
        tmp_path, World(**{**SIZES, "comparisons": asked + 5, "held_out_comparisons": len(held_out)}), numbered, seed=3
    )
    trained, measured = (rows(tmp_path / f"comparisons{part}.jsonl") for part in ("", "_held_out"))
    times = Counter(row["prompt"] for row in trained[:asked])
    assert times == {one.text: 3 if one.text in rare else 1 for one in train}
    assert set(Counter(row["prompt"] for row in measured).values()) == {1}
    # When all have been asked it begins anew.
    again = [row["responses"] for row in trained if row["prompt"] == trained[0]["prompt"]]
    assert len(again) == times[trained[0]["prompt"]] + 1
    assert not set(again[0]) & set(again[-1])


def test_shuffling_keeps_every_instruction() -> None:
    every = all_instructions()
    assert shuffled(every, 1) == shuffled(every, 1) != shuffled(every, 2)
    assert {one.text for one in shuffled(every, 1)} == {one.text for one in every}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"texts": 0}, "texts=0 must be at least 1"),
        ({"responses": 1}, "responses=1 must be at least 2"),
        ({"agreement": 1.0}, "agreement=1.0 must lie between"),
    ],
)
def test_sizes_out_of_their_range_are_named(size: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        World(**{**SIZES, **size})
