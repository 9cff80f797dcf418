import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli.stages import Records, digest, flat, peak_memory_gb, run_stage
from rlhf_lightning.errors import InputError


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "stages")


class Body:
    """What a stage does: it writes its output, and says how often it ran."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.runs = 0

    def __call__(self) -> dict[str, Any]:
        self.runs += 1
        self.output.touch()
        return {"runs": self.runs}


@pytest.fixture
def body(tmp_path: Path) -> Body:
    return Body(tmp_path / "output")


@pytest.fixture
def run(records: Records, body: Body) -> Callable[..., dict[str, Any]]:
    def stage(name: str = "sft", settings: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        chosen = {"outputs": [body.output], "before": [], **more}
        return run_stage(records, name, settings or {"lr": 1}, body, **chosen)

    return stage


def test_a_complete_stage_is_recorded_and_not_run_again(
    run: Callable[..., dict[str, Any]], records: Records, body: Body
) -> None:
    first = run(settings={"sizes": (1, 2)})
    assert run(settings={"sizes": (1, 2)}) == first == records.read("sft")
    assert body.runs == 1
    assert first["result"] == {"runs": 1}
    assert first["settings"] == {"sizes": [1, 2]}


def test_a_stage_that_fails_is_not_recorded(records: Records, tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise MemoryError

    with pytest.raises(MemoryError):
        run_stage(records, "sft", {}, fails, outputs=[], before=[])
    assert records.read("sft") is None


def test_other_settings_are_an_error_that_names_them(run: Callable[..., dict[str, Any]], body: Body) -> None:
    run(settings={"module": {"lr": 1, "seed": 0}})
    # By the name that it has on the command line.
    with pytest.raises(InputError, match=r"  module\.sft\.lr: was 1, is now 2") as error:
        run(settings={"module": {"lr": 2, "seed": 0}})
    assert "seed" not in str(error.value)
    assert body.runs == 1


def test_settings_are_named_as_they_are_passed(run: Callable[..., dict[str, Any]]) -> None:
    run("evaluate", settings={"data": {"path": "a"}, "seed": 1})
    with pytest.raises(InputError, match=r"  data\.ppo\.path: was 'a', is now 'b'\n  seed: was 1, is now 2\n"):
        run("evaluate", settings={"data": {"path": "b"}, "seed": 2})


def test_a_lost_output_runs_the_stage_again_and_forgets_what_follows(
    run: Callable[..., dict[str, Any]], records: Records, body: Body
) -> None:
    for name in ("world", "sft", "ppo"):
        run(name)
    body.output.unlink()
    run("sft", before=["world"])
    assert body.runs == 4
    assert records.read("world") is not None
    assert records.read("ppo") is None


@pytest.mark.parametrize("lost", ["config.json", "part/weights"])
def test_a_lost_file_of_an_output_runs_the_stage_again(
    lost: str, records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"

    def writes() -> dict[str, Any]:
        (folder / "part").mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "part/weights"):
            (folder / name).touch()
        return {}

    def said() -> str:
        run_stage(records, "sft", {}, writes, outputs=[folder], before=[])
        return capsys.readouterr().out

    said()
    assert "complete already" in said()
    (folder / lost).unlink()
    assert f"{folder / lost} is gone, so it and what follows run again" in said()
    assert (folder / lost).exists()


def test_a_record_of_a_version_that_named_no_files_still_counts(
    run: Callable[..., dict[str, Any]], records: Records, body: Body
) -> None:
    first = run()
    del first["files"]
    records.write("sft", first)
    run()
    assert body.runs == 1


def test_a_changed_input_runs_the_stage_again(run: Callable[..., dict[str, Any]], body: Body, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for content, runs in (("a", 1), ("a", 1), ("b", 2)):
        rows.write_text(content, encoding="utf-8")
        run(inputs=[rows])
        assert body.runs == runs


def test_a_record_is_written_whole_or_not_at_all(records: Records) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.write("sft", {"result": object()})
    assert records.read("sft") is None


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    for name, content in (("one", b"rows"), ("two", b"rows"), ("three", b"row")):
        (tmp_path / name).write_bytes(content)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") == hashlib.blake2b(b"rows").hexdigest()[:32]
    assert digest(tmp_path / "three") != digest(tmp_path / "one")


def test_leaves_have_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": [1]}, "d": None}) == {"a.b": 1, "a.c": [1], "d": None}


def test_peak_memory_is_that_of_a_python_process() -> None:
    assert 0.01 < peak_memory_gb() < 100
