"""What README.md and docs/ say is so: commands compose, links lead somewhere, Python runs, tables match the code."""

import ast
import csv
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

import rlhf_lightning
from rlhf_lightning.cli.application import SOURCES, run_verb
from rlhf_lightning.cli.checks import check, leaves, plain
from rlhf_lightning.cli.main import VERBS
from rlhf_lightning.cli.pipeline import wire

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SETUP = ["pip install uv && uv run rlhf pipeline", "pip install uv && uv run pytest"]
"""What works on a machine that has only Python and pip."""

STARTED = re.compile(r"(?:^|srun )rlhf (.*?)\"?$|^torchrun .* -m rlhf_lightning.cli.main (.*)$")
"""A command of `rlhf`, which another program may start."""

INLINE_COMMAND = re.compile(r"`(rlhf (?!VERB|--help)[^`]*)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

CONSTRUCTORS = [
    ("sft", "`SFTModule`", "SFTModule"),
    ("sft", "`SFTDataModule`", "SFTDataModule"),
    ("sft", "Networks", "NetworkConfig"),
    ("hardware", "Adapters", "LoRA"),
    ("sft", "Choose by reward", "ValidationReward"),
    ("reward", "`RewardModule`", "RewardModule"),
    ("reward", "`RewardDataModule`", "RewardDataModule"),
    ("ppo", "`PPOModule`", "PPOModule"),
    ("ppo", "`PPODataModule`", "PPODataModule"),
]

RAISING = {"InputError", "_require", "_lacks"}
"""What takes the text of an error that a user sees."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def command_lines(text: str) -> Iterator[str]:
    """Yield the commands of bash blocks without ``uv run``, and the whole commands in the running text."""
    for block in blocks(text, "bash"):
        for line in block.splitlines():
            yield from (part.strip().removeprefix("uv run ") for part in line.split("&&") if part.strip())
    yield from INLINE_COMMAND.findall(FENCE.sub("", text))


def commands() -> list[Any]:
    found = [(page, line) for page in PAGES for line in command_lines(page.read_text("utf-8"))]
    return [pytest.param(line, id=f"{name_of(page)}: {line}") for page, line in found]


def table(text: str, heading: str, first: str) -> list[list[str]]:
    """Return the rows of the tables below a heading, down to the next of any level, whose first column is ``first``."""
    section = re.split(r"^#+ ", text, flags=re.MULTILINE)
    (body,) = [part for part in section if part.partition("\n")[0] == heading]
    rows: list[list[str]] = []
    inside = False
    for line in body.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            rows.append(cells)
    return rows


def code(cell: str) -> str:
    assert cell.startswith("`"), f"{cell} must be in backticks"
    assert cell.endswith("`"), f"{cell} must be in backticks"
    return cell[1:-1]


def slugs(text: str) -> set[str]:
    """Return the anchors of the headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
    return [link for link in found if not link.startswith("https://")]


def compose(verb: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        config = hydra.compose(verb, overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config


def check_command(verb: str, arguments: list[str]) -> None:
    """Compose and check the config of a command as `rlhf` does before anything is built."""
    overrides = [argument for argument in arguments if not argument.startswith("-") and argument != "..."]
    if "-m" in arguments:
        overrides = [override.split(",")[0] for override in overrides]
    if verb == "pipeline" and not any(SOURCES.match(override) for override in overrides):
        overrides = ["experiment=world", *overrides]
    # The data of the experiments need not be on this machine.
    config = compose(verb, [*overrides, f"data_root={ROOT}"])
    if "..." in arguments:
        fill(config)
    settings = plain(config)
    if verb == "pipeline":
        wire(settings)
    check(settings, known=importlib.import_module(f"rlhf_lightning.cli.{verb}").ROOT_KEYS)


def fill(config: DictConfig) -> None:
    """Give the required settings that a shortened command leaves out."""
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "given")


def error_texts() -> set[str]:
    """Return the constant parts of what the package's errors for users say."""
    found = set()
    for file in (ROOT / "rlhf_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISING:
                parts = (part for argument in node.args for part in ast.walk(argument))
                found |= {p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)}
    return found


@pytest.fixture
def project(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files and folders that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    rows = [{"prompt": f"Say {i}.", "response": f"{i}!", "chosen": f"{i}!", "rejected": f"not {i}"} for i in range(64)]
    columns = {"demonstrations": ["prompt", "response"], "comparisons": ["prompt", "chosen", "rejected"]}
    for name, wanted in (columns | {"prompts": ["prompt"]}).items():
        lines = [json.dumps({column: row[column] for column in wanted}) + "\n" for row in rows]
        # PPO's rollout is a batch of 64 unless told otherwise.
        Path(f"{name}.jsonl").write_text("".join(lines * (2 if name == "prompts" else 1)), "utf-8")
    Path("rewards.py").write_text("def polite(prompts, responses):\n    return [0.0 for _ in responses]\n", "utf-8")
    shutil.copytree(tiny_model, "out/sft")
    rlhf_lightning.RewardModule("out/sft").save_pretrained("out/reward")
    return tmp_path


def test_the_readme_begins_with_the_two_commands_that_set_up_and_run() -> None:
    assert blocks(PAGES[0].read_text("utf-8"), "bash")[0].splitlines() == SETUP


@pytest.fixture
def checked_out(tmp_path: Path) -> Callable[[str], tuple[int, list[str]]]:
    """``checked_out(readme)`` returns the exit code of .ci/run in a checkout with that README, and what it called.

    pip and uv are programs that write down how they were called.
    """

    def run(readme: str) -> tuple[int, list[str]]:
        for name in (".ci", "bin"):
            (tmp_path / name).mkdir()
        shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
        (tmp_path / "README.md").write_text(readme, "utf-8")
        for name in ("pip", "uv"):
            program = tmp_path / "bin" / name
            program.write_text(f'#!/bin/sh\necho {name} "$@" >> "{tmp_path}/called"\n', "utf-8")
            program.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run([tmp_path / ".ci" / "run"], env=environment, check=False)
        return done.returncode, (tmp_path / "called").read_text("utf-8").splitlines()

    return run


def test_a_change_must_pass_format_lint_types_and_the_test_command_of_the_readme(
    checked_out: Callable[[str], tuple[int, list[str]]],
) -> None:
    exit_code, called = checked_out(PAGES[0].read_text("utf-8"))
    assert exit_code == 0
    assert {"uv run ruff format --check .", "uv run ruff check .", "uv run mypy"} < set(called)
    test_command = called.index("uv run pytest")
    assert called[test_command - 1] == "pip install uv"


def test_a_change_does_not_pass_where_the_readme_lacks_its_test_command(
    checked_out: Callable[[str], tuple[int, list[str]]],
) -> None:
    exit_code, called = checked_out(PAGES[0].read_text("utf-8").replace(SETUP[1], "make test"))
    assert exit_code != 0
    assert "uv run mypy" in called


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_exists(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "rlhf":
        assert arguments[0] in VERBS
        assert not arguments[1:] or arguments[1].startswith("-") or "=" in arguments[1]
        return
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]["dev"]
    assert program in {"pip", "wandb", "torchrun", "sbatch", *(re.split(r"\W=|>", tool)[0] for tool in tools)}
    assert all((ROOT / argument).exists() for argument in arguments if argument.endswith(".py"))


@pytest.mark.parametrize("line", [line for line in commands() if STARTED.search(line.values[0])])
def test_every_command_composes_and_its_settings_exist(line: str) -> None:
    started = STARTED.search(line)
    assert started is not None
    verb, *arguments = shlex.split(started[1] or started[2])
    if not arguments and verb != "pipeline":
        return  # the name of the verb
    if {"--help", "--cfg", "--config-dir", "--config-path"} & set(arguments):
        return
    check_command(verb, arguments)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("train", ["network.pretrained=MODEL", "data.path=rows.jsonl", "module.betta=1"]),
        ("train", ["network.pretrained=MODEL", "data.path=rows.jsonl", "+module.betta=1"]),
        ("train", ["data.path=rows.jsonl"]),
        ("train", ["module=pop", "..."]),
        ("pipeline", ["network.pretrained=MODEL", "data.sft.path=rows.jsonl"]),
    ],
)
def test_the_check_of_commands_refuses_what_the_command_would(verb: str, arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"betta|network.pretrained|pop|data.ppo.path"):
        check_command(verb, arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in slugs(target.read_text("utf-8")), link


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, open_pages = set[Path](), [PAGES[0]]
    while open_pages:
        page = open_pages.pop()
        if page not in reached:
            reached.add(page)
            linked = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if link[0] != "#"]
            open_pages += [path for path in linked if path.suffix == ".md"]
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text("utf-8"), "python")], ids=name_of)
def test_the_python_of_every_page_runs(page: Path, project: Path, tiny_model: Path) -> None:
    shorter = {'"gpt2"': repr(str(tiny_model)), "max_steps=200": "max_steps=1"}
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text("utf-8"), "python"):
        for written, run in shorter.items():
            block = block.replace(written, run)
        with warnings.catch_warnings():
            # Lightning has advice for whoever trains in earnest.
            warnings.simplefilter("ignore")
            exec(compile(block, name_of(page), "exec"), namespace)


@pytest.mark.parametrize(("page", "heading", "constructor"), CONSTRUCTORS)
def test_the_tables_of_settings_are_the_constructors(page: str, heading: str, constructor: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    rows = table(text, heading, "setting")
    parameters = inspect.signature(getattr(rlhf_lightning, constructor)).parameters
    assert [code(name) for name, *_ in rows] == list(parameters)
    for name, default, meaning in rows:
        expected = parameters[code(name)].default
        if expected is inspect.Parameter.empty:
            assert default == "required", name
        else:
            assert repr(ast.literal_eval(code(default))) == repr(expected), name
        assert meaning


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_the_tables_of_settings_of_a_verb_are_its_config(verb: str) -> None:
    text = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    config = cast(DictConfig, OmegaConf.load(ROOT / "conf" / f"{verb}.yaml"))
    # Those that hold an interpolation are told of below the table.
    expected = {
        key: "null" if value is None else str(value)
        for key, value in leaves(OmegaConf.to_container(config), "")
        if not key.startswith("defaults.") and "${" not in str(value)
    }
    rows = table(text, f"Settings of `rlhf {verb}`", "setting")
    assert {code(name): code(default) for name, default, _ in rows} == expected


def throughput_of(stage: str) -> set[str]:
    rows = table((ROOT / "docs" / "tracking.md").read_text("utf-8"), "Throughput", "metric")
    return {code(name) for name, of, _ in rows if of == "all" or stage == "ppo"}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_logs_and_writes_what_its_page_lists(stage: str, project: Path) -> None:
    text = (ROOT / "docs" / f"{stage}.md").read_text("utf-8")
    files = {"sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}
    small = ["data.batch_size=32", "module.max_new_tokens=4"] if stage == "ppo" else []
    arguments = [
        f"module={stage}",
        "network.pretrained=out/sft",
        f"data.path={files[stage]}.jsonl",
        "output_dir=run",
        "trainer=cpu",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.progress=null",
        *small,
        *(["module.reward=rewards.py:polite"] if stage == "ppo" else []),
    ]
    assert run_verb("train", arguments) == 0
    with Path("run/logs/version_0/metrics.csv").open(encoding="utf-8") as file:
        logged = set(next(csv.reader(file))) - {"epoch", "step"}
    assert {code(name) for name, _ in table(text, "Metrics", "metric")} | throughput_of(stage) == logged
    written = [code(path) for path, _ in table(text, "Run it alone", "path")]
    assert written
    assert [path for path in written if not Path("run", path).exists()] == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_error_of_a_page_is_raised_somewhere(stage: str) -> None:
    rows = table((ROOT / "docs" / f"{stage}.md").read_text("utf-8"), "Errors", "message contains")
    raised = error_texts()
    assert rows
    assert [row[0] for row in rows if not any(code(row[0]) in text for text in raised)] == []
