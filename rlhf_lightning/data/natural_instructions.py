"""Tasks in the schema of Super-NaturalInstructions (Wang et al. 2022)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.data.reading import Row, local_file, read_json
from rlhf_lightning.errors import InputError


def read_natural_instructions(
    path: str | Path, *, examples: int = 2, split: str = "train", setting: str = "data.path"
) -> list[Row]:
    """Return the instances of a task as rows ``{prompt, response, references, id}``.

    The prompt is the definition, the first ``examples`` positive examples as demonstrations, and the input; the
    response is the first of the instance's outputs, and ``references`` are all of them. ``path`` is the task's file or
    a folder with a file for each split. Raises `InputError` with the file and the field where the schema is not kept.
    """
    if examples < 0:
        raise InputError(f"data.examples={examples} must not be negative")
    file = local_file(path, split=split, suffixes=(".json",), setting=setting)
    task = read_json(file)
    if not isinstance(task, Mapping):
        raise InputError(f"{file}: a task must be an object with Definition, Positive Examples and Instances")
    heading = _heading(task, examples, file)
    rows = [_row(instance, heading, origin) for instance, origin in _entries(task, "Instances", file)]
    if not rows:
        raise InputError(f"{setting}={path} has no rows: Instances is empty")
    return rows


def _heading(task: Mapping[str, Any], examples: int, file: Path) -> str:
    """Return what all prompts of a task begin with, in the wording of Tk-Instruct."""
    parts = [f"Definition: {_first(task, 'Definition', str(file)).strip()}"]
    if examples:
        shown = list(_entries(task, "Positive Examples", file))[:examples]
        for number, (example, origin) in enumerate(shown, start=1):
            given, wanted = _first(example, "input", origin).strip(), _first(example, "output", origin).strip()
            parts.append(f"Positive Example {number} -\nInput: {given}\nOutput: {wanted}")
    return "\n\n".join(parts)


def _row(instance: Mapping[str, Any], heading: str, origin: str) -> Row:
    question = _first(instance, "input", origin).strip()
    references = [output.strip() for output in _texts(instance, "output", origin)]
    prompt = f"{heading}\n\nNow complete the following example -\nInput: {question}\nOutput:"
    fields = {"prompt": prompt, "response": references[0], "references": references}
    if "id" in instance:
        fields["id"] = instance["id"]
    return Row(fields, origin)


def _entries(task: Mapping[str, Any], name: str, file: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if name not in task or not isinstance(task[name], list):
        raise InputError(f"{file}: a task needs a list {name!r}; found {', '.join(map(str, task)) or 'no field'}")
    for i, entry in enumerate(task[name]):
        origin = f"{file}: {name}[{i}]"
        if not isinstance(entry, Mapping):
            raise InputError(f"{origin} must be an object with input and output; found {entry!r}")
        yield entry, origin


def _first(fields: Mapping[str, Any], name: str, origin: str) -> str:
    return _texts(fields, name, origin)[0]


def _texts(fields: Mapping[str, Any], name: str, origin: str) -> list[str]:
    """Return a field that is a text or a list of texts, as a list with at least one."""
    if name not in fields:
        raise InputError(f"{origin}: {name!r} is missing; found {', '.join(map(str, fields)) or 'no field'}")
    value = fields[name]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{origin}: {name!r} must be text or a list of texts, none empty; found {value!r}")
    return texts
