"""Every file below conf/ composes and instantiates, and shows the defaults that the constructors have."""

import inspect
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.strategies import FSDPStrategy
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_lightning import RewardModule
from rlhf_lightning.cli.build import build, build_all
from rlhf_lightning.cli.checks import check, plain, target, target_nodes
from rlhf_lightning.cli.main import VERBS
from rlhf_lightning.cli.pipeline import ROOT_KEYS as PIPELINE_KEYS
from rlhf_lightning.cli.pipeline import stage_settings, wire
from rlhf_lightning.cli.train import ROOT_KEYS as TRAIN_KEYS
from rlhf_lightning.modules.language import idle_settings
from rlhf_lightning.modules.ppo_checks import without_effect

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = ["module", "data", "network", "trainer", "logger", "callbacks"]
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
NEEDS_GPU = {("trainer", name) for name in ("gpu", "ddp", "fsdp", "fsdp2", "deepspeed_2", "deepspeed_3", "slurm")}
ON_A_CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}


def compose(verb: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        config = hydra.compose(verb, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config


def command(experiment: str) -> list[str]:
    """Return verb and overrides of the command in an experiment's first comment that is not Hydra's."""
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if line.startswith("# ") and not line.startswith("# @"))
    program, *arguments = first.removeprefix("# ").split()
    assert program == "rlhf", f"{experiment}.yaml must begin with its command, not with {first!r}"
    return arguments


@pytest.fixture
def filled(tiny_model: Path, tmp_path: Path) -> list[str]:
    """What a user must give before anything can be built; the folder stands in for the data of the experiments."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    rewards = tmp_path / "rewards" / "vader_reward.py"
    rewards.parent.mkdir()
    rewards.write_text("def vader_reward(prompts, responses):\n    return [0.0 for _ in responses]\n", encoding="utf-8")
    return [f"network.pretrained={tiny_model}", f"data.path={rows}", f"output_dir={tmp_path}", f"data_root={tmp_path}"]


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The output directory of a pipeline with the networks that its stages hand over.

    They have dropout layers, whose rate a recipe sets.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=1)
    network, tokenizer = GPT2LMHeadModel(config), AutoTokenizer.from_pretrained(tiny_model)
    for stage in ("initial", "pretrain", "sft"):
        network.save_pretrained(folder / stage)
        tokenizer.save_pretrained(folder / stage)
    RewardModule(str(folder / "sft")).save_pretrained(folder / "reward")
    return folder


def for_a_cpu(node: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a Trainer for GPUs with what a CPU allows; a strategy that it does not is built alone."""
    if isinstance(node["strategy"], dict) and isinstance(build("trainer.strategy", node["strategy"]), FSDPStrategy):
        node = node | {"strategy": "auto"}
    return node | ON_A_CPU


def build_everything(settings: dict[str, Any]) -> Iterator[Any]:
    yield build("module", settings["module"])
    yield build("data", settings["data"])
    yield from build_all("logger", settings["logger"]).values()
    yield from build_all("callbacks", settings["callbacks"]).values()
    yield build("trainer", settings["trainer"], logger=False, enable_checkpointing=False)


def build_pipeline(settings: dict[str, Any]) -> Iterator[Any]:
    yield build("evaluate", settings["evaluate"])
    if settings["world"] is not None:
        yield build("world", settings["world"])
    folder = Path(settings["output_dir"])
    for stage in settings["module"]:
        own = {name: settings[name][stage] for name in ("module", "data", "trainer")}
        yield from build_everything(stage_settings(settings | own, stage, folder, folder / "checkpoints"))


@pytest.mark.parametrize("verb", VERBS)
def test_root_config_of_each_verb_composes(verb: str) -> None:
    config = compose(verb)
    assert {"seed", "output_dir"} <= set(config)
    OmegaConf.to_container(config, resolve=True)


def test_root_keys_that_stay_are_there() -> None:
    kept = {"seed", "output_dir", "ckpt_path", "module", "data", "network", "trainer", "logger", "callbacks"}
    for verb in ("train", "pipeline"):
        assert kept <= set(compose(verb))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes_and_instantiates(group: str, option: str, filled: list[str]) -> None:
    reward = ["module.reward=builtins:len"] if (group, option) == ("module", "ppo") else []
    config = compose("train", f"{group}={option}", *filled, *reward)
    settings = plain(config)
    check(settings, known=list(config))
    if option.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    node = settings[group]
    if (group, option) in NEEDS_GPU and not torch.cuda.is_available():
        node = for_a_cpu(node)
    if group == "trainer":
        build(group, node, logger=False, enable_checkpointing=False)
    else:
        assert None not in build_all(group, node).values()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_by_its_own_command_and_instantiates(
    experiment: str, filled: list[str], handed_over: Path
) -> None:
    verb, *overrides = command(experiment)
    if experiment == "world":  # which is what a bare `rlhf pipeline` plays
        overrides = ["experiment=world"]
    assert f"experiment={experiment}" in overrides
    given = [override for override in filled if not override.startswith("data.path")]
    if verb == "train":
        settings = plain(compose(verb, *overrides, *given))
        check(settings, known=TRAIN_KEYS)
        things = list(build_everything(settings))
    else:
        folders = [f"output_dir={handed_over}", f"network.pretrained={handed_over / 'initial'}"]
        settings = plain(compose(verb, *overrides, *given, *folders))
        wire(settings)
        check(settings, known=PIPELINE_KEYS)
        things = list(build_pipeline(settings))
    assert len(things) > 4
    assert None not in things


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_experiment_sets_what_does_nothing(experiment: str, filled: list[str]) -> None:
    verb, *overrides = command(experiment)
    config = compose(verb, *overrides, *(filled if verb == "train" else []))
    looks = {"SFTModule": idle_settings, "RewardModule": idle_settings, "PPOModule": without_effect}
    stages = [node for _, node in target_nodes(plain(config)["module"], "module")]
    constructors = [target("module", node["_target_"]) for node in stages]
    idle = [looks[c.__name__](n, c) for n, c in zip(stages, constructors, strict=True) if c.__name__ in looks]
    assert idle
    assert not any(idle)


def test_data_follow_the_module_unless_they_are_chosen(filled: list[str]) -> None:
    def data(*overrides: str) -> str:
        return str(compose("train", *overrides).data._target_).rsplit(".", 1)[-1]

    assert data("module=reward") == "RewardDataModule"
    assert data("module=ppo") == "PPODataModule"
    assert data("module=ppo", "data=sft") == "SFTDataModule"


def shown_defaults() -> Iterator[tuple[str, str, Any, inspect.Parameter]]:
    """Yield config file, argument, value shown, parameter, of every node of ours."""
    for group, option in OPTIONS:
        config = compose("train", f"{group}={option}")
        node = OmegaConf.to_container(config[group], resolve=False)
        for _, part in target_nodes(node, group):
            if part["_target_"].startswith("rlhf_lightning."):
                parameters = inspect.signature(target(group, part["_target_"])).parameters
                for name, parameter in parameters.items():
                    value = part.get(name, inspect.Parameter.empty)
                    yield f"{group}/{option}.yaml", name, value, parameter


def test_configs_show_the_defaults_of_the_constructors() -> None:
    wrong = [
        f"{file}: {name} is {value!r}, the constructor says {parameter.default!r}"
        for file, name, value, parameter in shown_defaults()
        if value is not inspect.Parameter.empty
        and parameter.default is not inspect.Parameter.empty
        and not (isinstance(value, str) and "${" in value)
        and (file, name)
        not in {
            ("data/natural_instructions.yaml", "format"),
            ("callbacks/ppo.yaml", "every_n_train_steps"),
            ("network/lora.yaml", "lora"),
        }
        and value != parameter.default
    ]
    assert not wrong, "\n".join(wrong)


def test_configs_show_every_knob() -> None:
    hidden = [
        f"{file}: {name}"
        for file, name, value, _ in shown_defaults()
        # A tokenizer is an object; in a config it comes from the network.
        if value is inspect.Parameter.empty and not name.endswith("tokenizer")
    ]
    assert not hidden, "\n".join(hidden)


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_value_of_a_knob_has_a_comment(file: Path) -> None:
    if file.parent.name not in {"module", "data", "network"}:
        pytest.skip("only our own constructors have knobs")
    lines = file.read_text(encoding="utf-8").splitlines()
    knobs = [line for line in lines if line[:1].isalpha() and not line.startswith(("_target_", "defaults:", "model:"))]
    silent = [line for line in knobs if "#" not in line]
    assert not silent, f"without a comment: {silent}"


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "rlhf_lightning").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    assert set(settings["packages"]) == found | {"rlhf_lightning.conf"}


def test_wheel_holds_every_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    # A copy, so that nothing is written beside the sources.
    copy = tmp_path / "copy"
    for name in ("rlhf_lightning", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    monkeypatch.chdir(copy)
    wheel = tmp_path / build_wheel(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"rlhf_lightning/conf/{file.relative_to(CONF)}" for file in CONF.rglob("*.yaml")}
    assert configs | {"rlhf_lightning/py.typed", "rlhf_lightning/cli/main.py"} <= names
    assert not {name for name in names if name.startswith(("conf/", "tests/"))}


def build_wheel(folder: Path) -> str:
    """Return the name of the wheel; in a process of its own, because setuptools changes this one's state."""
    import subprocess
    import sys

    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1]
