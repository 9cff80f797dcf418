import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.natural_instructions import read_natural_instructions
from rlhf_lightning.errors import InputError

TASK: dict[str, Any] = {
    "Definition": ["Double the number."],
    "Positive Examples": [{"input": str(n), "output": str(2 * n), "explanation": "-"} for n in (1, 2, 3)],
    "Negative Examples": [{"input": "9", "output": "99"}],
    "Instances": [{"id": "x-1", "input": "4", "output": ["8", "eight"]}, {"input": "5", "output": "10"}],
}


def write(folder: Path, name: str = "train.json", **changes: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps({**TASK, **changes}))
    return file


def test_the_prompt_is_definition_examples_and_input(tmp_path: Path) -> None:
    assert read_natural_instructions(write(tmp_path), examples=2)[1].fields["prompt"] == (
        "Definition: Double the number.\n\n"
        "Positive Example 1 -\nInput: 1\nOutput: 2\n\n"
        "Positive Example 2 -\nInput: 2\nOutput: 4\n\n"
        "Now complete the following example -\nInput: 5\nOutput:"
    )


def test_the_first_output_is_the_response_and_all_are_references(tmp_path: Path) -> None:
    first, second = read_natural_instructions(write(tmp_path))
    assert (first.fields["response"], first.fields["references"], first.fields["id"]) == ("8", ["8", "eight"], "x-1")
    assert (second.fields["response"], second.fields["references"]) == ("10", ["10"])


@pytest.mark.parametrize(("examples", "shown"), [(0, 0), (1, 1), (3, 3), (9, 3)])
def test_as_many_examples_are_shown_as_asked_for_and_there_are(tmp_path: Path, examples: int, shown: int) -> None:
    prompt = read_natural_instructions(write(tmp_path), examples=examples)[0].fields["prompt"]
    assert prompt.count("Positive Example") == shown


def test_negative_examples_are_not_shown(tmp_path: Path) -> None:
    assert "99" not in read_natural_instructions(write(tmp_path), examples=9)[0].fields["prompt"]


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "test.json", Instances=TASK["Instances"][:1])
    assert len(read_natural_instructions(tmp_path)) == 2
    assert len(read_natural_instructions(tmp_path, split="test")) == 1


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"Instances": []}, "has no rows"),
        ({"Instances": None}, "needs a list 'Instances'"),
        ({"Instances": ["a"]}, r"Instances\[0\] must be an object"),
        ({"Instances": [{"input": "4"}]}, r"Instances\[0\]: 'output' is missing; found input"),
        ({"Instances": [{"input": "4", "output": []}]}, r"Instances\[0\]: 'output' must be text.*found \[\]"),
        ({"Instances": [{"input": "", "output": "8"}]}, r"Instances\[0\]: 'input' must be text"),
        ({"Instances": [{"input": "4", "output": [8]}]}, r"'output' must be text.*found \[8\]"),
        ({"Positive Examples": [{"input": "4"}]}, r"Positive Examples\[0\]: 'output' is missing"),
        ({"Definition": []}, r"train\.json: 'Definition' must be text"),
    ],
)
def test_a_task_that_breaks_the_schema_is_an_error_with_file_and_field(
    tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        read_natural_instructions(write(tmp_path, **changes))


def test_a_task_without_a_field_is_an_error_that_says_which_are_there(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text('{"Instances": []}')
    with pytest.raises(InputError, match=r"train\.json: 'Definition' is missing; found Instances"):
        read_natural_instructions(file)


def test_real_tasks_can_be_read(real_data: Path) -> None:
    files = sorted((real_data / "instructions" / "natural_instructions").glob("*/*.json"))
    assert files
    for file in files:
        instances = json.loads(file.read_text(encoding="utf-8"))["Instances"]
        rows = read_natural_instructions(file, examples=1)
        assert len(rows) == len(instances)
        assert all(
            instance["input"].strip() in row.fields["prompt"] for instance, row in zip(instances, rows, strict=True)
        )
