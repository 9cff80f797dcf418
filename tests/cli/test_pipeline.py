import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning.callbacks.tracking import leaves
from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.networks.lora import adapter_weights
from rlhf_lightning.networks.roles import have_one_backbone

TINY = [
    "world.texts=40",
    "world.demonstrations_per_instruction=1",
    "world.comparisons=8",
    "world.held_out_comparisons=6",
    "world.responses=3",
    "world.vocab_size=400",
    "world.hidden_size=16",
    "world.layers=1",
    "world.heads=2",
    "trainer.pretrain.max_steps=2",
    "trainer.sft.max_steps=2",
    "trainer.ppo.max_steps=2",
    "trainer.sft.limit_val_batches=1",
    "module.ppo.max_new_tokens=6",
    "module.ppo.learning_rate=0.01",  # so high that two rollouts change what is said
    "data.ppo.batch_size=8",
    "module.ppo.minibatch_size=8",
    "evaluate.prompts=8",
    "evaluate.samples=2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    assert run_verb("pipeline", [*TINY, f"output_dir={folder}"]) == 0
    return folder


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def test_the_report_holds_the_figures_of_every_stage(finished: Path) -> None:
    found = report(finished)
    for policy in ("pretrained", "sft", "ppo"):
        rate = found["win_rate"][policy]
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert found["judge_score"][policy] <= 0
    assert 0 <= found["reward"]["accuracy"] <= 1
    assert found["reward"]["pairs"] > 0
    assert found["ppo"]["kl"] is not None
    evaluated = json.loads((finished / "stages" / "evaluate.json").read_text("utf-8"))["result"]["scores"]
    means = {"before": fmean(evaluated["sft"]), "after": fmean(evaluated["ppo"])}
    assert found["ppo"]["score"] == pytest.approx(means, rel=1e-5)
    assert means["before"] != pytest.approx(means["after"], rel=1e-5)
    assert set(found["seconds"]) >= {"pretrain", "sft", "reward", "ppo", "evaluate", "total"}
    assert set(found["throughput"]) == {"pretrain", "sft", "reward", "ppo"}
    for stage, speed in found["throughput"].items():
        assert speed["tokens_per_second"] > 0
        assert 0 < speed["share_of_peak"] < 1
        assert ("share_sampling" in speed) == (stage == "ppo")
    assert found["peak_memory_gb"] > 0
    assert (finished / "report.html").stat().st_size > 1000


def test_the_curves_of_ppo_are_score_the_judges_score_and_the_distance(finished: Path) -> None:
    curves = report(finished)["curves"]["ppo"]
    for name in ("ppo/score", "ppo/judge_score", "ppo/kl"):
        assert curves[name]["step"] == [1, 2]
        assert len(curves[name]["value"]) == 2
    assert max(curves["ppo/judge_score"]["value"]) <= 0
    assert {file.stem for file in (finished / "figures").iterdir()} >= {"win_rate", "reward", "ppo", "distance"}


def test_the_reports_numbers_are_logged(finished: Path) -> None:
    with (finished / "logs" / "report" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        (logged,) = csv.DictReader(file)
    found = report(finished)
    for name, value in leaves({key: found[key] for key in ("win_rate", "judge_score", "reward", "ppo")}).items():
        assert float(logged[f"report/{name}"]) == pytest.approx(value, rel=1e-5)
    assert "report/win_rate/ppo/mean" in logged


def test_the_reports_numbers_and_figures_reach_wandb(
    finished: Path, wandb_records: Callable[[Path], list[Any]]
) -> None:
    (finished / "stages" / "evaluate.json").unlink()
    arguments = [*TINY, f"output_dir={finished}", "logger=wandb", "logger.offline=true"]
    assert run_verb("pipeline", arguments) == 0
    (folder,) = (finished / "logs" / "wandb").glob("offline-run-*")
    rows = [item for record in wandb_records(folder) for item in record.history.item]
    logged = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in rows}
    mean = report(finished)["win_rate"]["ppo"]["mean"]
    assert logged["report/win_rate/ppo/mean"] == pytest.approx(mean, rel=1e-5)
    images = [file.name for file in (folder / "files" / "media" / "images" / "report").iterdir()]
    for figure in (finished / "figures").iterdir():
        assert any(image.startswith(f"{figure.stem}_") for image in images)


def test_at_the_end_it_says_where_everything_is_who_wins_and_a_sample_before_and_after(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("pipeline", [*TINY, f"output_dir={finished}"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert [stage, str(finished / stage)] in lines
    assert ["report", str(finished / "report.html")] in lines
    found = report(finished)
    for policy, rate in found["win_rate"].items():
        assert [policy, f"wins {rate['mean']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]"] in lines
    sample = found["samples"][0]
    said = [f"{name}{sample['responses'][name]}" for name in ("sft", "ppo")]
    assert visible(printed).endswith(visible("".join([f"prompt{sample['prompt']}", *said])))


def visible(text: str) -> str:
    """Return the text without what a terminal may lay out in its own way."""
    return "".join(character for character in text if character.isprintable() and not character.isspace())


@pytest.mark.proof
def test_with_shared_roles_the_stages_hand_over_adapters_on_one_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[PPOModule] = []
    monkeypatch.setattr(PPOModule, "on_fit_start", lambda self: runs.append(self))
    command = [*TINY, f"output_dir={tmp_path}", "network=lora", "network.roles=shared", "network.lora.r=2"]
    assert run_verb("pipeline", command) == 0
    (run,) = runs
    reward_model = run._reward.models()[""].reward_model
    assert run.critic is not None
    for network in (run.reference, reward_model, run.critic.backbone):
        assert have_one_backbone(network, run.policy)
    assert [(tmp_path / stage / "adapter_config.json").exists() for stage in ("sft", "reward", "ppo")] == [
        True,
        True,
        False,
    ]
    handed_over = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    of_reward_model = adapter_weights(reward_model)
    assert len(of_reward_model) == len([name for name in handed_over if ".lora_" in name])
    assert any(weight.any() for name, weight in of_reward_model.items() if ".lora_B." in name)
    # The backbone was pre-trained as a whole: no adapter changes embeddings.
    embeddings = [
        load_file(tmp_path / folder / "model.safetensors")["model.embed_tokens.weight"]
        for folder in ("initial", "pretrain")
    ]
    assert not torch.equal(*embeddings)
    assert report(tmp_path)["reward"]["pairs"] > 0


def test_a_second_run_skips_every_stage_and_reports_the_same(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report(finished)
    assert run_verb("pipeline", [*TINY, f"output_dir={finished}"]) == 0
    assert capsys.readouterr().out.count("complete already, skipped") == 7
    assert report(finished) == before


def test_a_finished_stage_is_not_mixed_with_other_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, f"output_dir={finished}", "module.sft.learning_rate=0.5"]
    assert run_verb("pipeline", arguments) == 2
    said = capsys.readouterr().err
    assert "module.sft.learning_rate: was 0.01, is now 0.5" in said
    assert "go on" not in said  # with the same command, which would be refused again


@pytest.mark.parametrize("lost", ["reward", "reward/config.json", "reward/model.safetensors"])
def test_a_stage_whose_folder_is_gone_or_not_whole_runs_again_with_all_that_follows(
    lost: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report(finished)
    path = finished / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert run_verb("pipeline", [*TINY, f"output_dir={finished}"]) == 0
    said = capsys.readouterr().out
    assert said.count("complete already, skipped") == 4  # world, pretrain, sft, comparisons
    assert f"{path} is gone, so it and what follows run again" in said
    assert path.exists()
    assert report(finished)["win_rate"] == before["win_rate"]


def test_the_same_seed_gives_the_same_figures(finished: Path, tmp_path: Path) -> None:
    assert run_verb("pipeline", [*TINY, f"output_dir={tmp_path}"]) == 0
    one, other = report(finished), report(tmp_path)
    for key in ("win_rate", "judge_score", "reward", "ppo", "curves", "samples"):
        assert one[key] == other[key]


STOPPING = """
from lightning.pytorch.callbacks import Callback
class StopIn(Callback):
    def __init__(self, module, step):
        self.module, self.step = module, step
    def on_train_batch_end(self, trainer, pl_module, *_):
        if type(pl_module).__name__ == self.module and trainer.global_step == self.step:
            raise ZeroDivisionError
"""


def test_a_pipeline_that_stops_within_stages_goes_on_there_and_ends_bit_for_bit_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stopping.py").write_text(STOPPING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "out"
    again = [*TINY, f"output_dir={folder}", "callbacks.checkpoint.every_n_train_steps=1"]
    for module in ("SFTModule", "RewardModule", "PPOModule"):
        stop = f"{{_target_: stopping.StopIn, module: {module}, step: 2}}"
        with pytest.raises(ZeroDivisionError) as error:
            run_verb("pipeline", [*again, f"+callbacks.stop={stop}"])
        last = next(folder.glob("checkpoints/*/step-1.ckpt"))
        assert f"the last checkpoint is {last}; go on from it with\n  rlhf pipeline" in error.value.__notes__[0]
    capsys.readouterr()
    assert run_verb("pipeline", again) == 0
    assert f"goes on from {folder / 'checkpoints' / 'ppo' / 'step-1.ckpt'}" in capsys.readouterr().out
    one, other = report(finished), report(folder)
    for key in ("win_rate", "judge_score", "reward", "ppo", "curves", "samples"):
        assert one[key] == other[key]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        records = [json.loads((f / "stages" / f"{stage}.json").read_text("utf-8")) for f in (finished, folder)]
        # Times are all that may differ.
        speeds = [record["result"].pop("throughput") for record in records]
        assert speeds[0].keys() == speeds[1].keys()
        assert records[0]["result"] == records[1]["result"]
        weights = [(f / stage / "model.safetensors").read_bytes() for f in (finished, folder)]
        assert weights[0] == weights[1]
    assert not (folder / "checkpoints").exists()


PROMPTS = ["Explain rain to a child briefly.\n", "Describe the moon.\n"]
RESPONSES = ["Rain falls.", "Snow is cold. Yes."]

TRANSFORMERS_ALONE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

policy, reward, prompts, responses = json.loads(sys.argv[1])
generate = pipeline("text-generation", model=policy)
tokens = [generate(p, max_new_tokens=12, do_sample=False, return_tensors=True) for p in prompts]
tokenizer = AutoTokenizer.from_pretrained(reward)
texts = [f"{prompts[0]}{response}{tokenizer.eos_token}" for response in responses]
inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
with torch.no_grad():
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    scores = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.squeeze(-1)
assert not [name for name in sys.modules if name.startswith("rlhf_lightning")]
print(json.dumps({"tokens": [found[0]["generated_token_ids"] for found in tokens], "scores": scores.tolist()}))
"""


@pytest.fixture(scope="module")
def in_transformers_alone(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that knows nothing of this package generates and scores with the exported folders."""
    given = json.dumps([str(finished / "ppo"), str(finished / "reward"), PROMPTS, RESPONSES])
    command = [sys.executable, "-c", TRANSFORMERS_ALONE, given]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_exported_policy_generates_as_ours_with_transformers_alone(
    finished: Path, in_transformers_alone: dict[str, Any]
) -> None:
    from rlhf_lightning.networks import load_policy, load_tokenizer
    from rlhf_lightning.rollout.generate import sample_tokens

    policy, tokenizer = load_policy(str(finished / "ppo")), load_tokenizer(str(finished / "ppo"))
    for prompt, theirs in zip(PROMPTS, in_transformers_alone["tokens"], strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ours = sample_tokens(
            policy,
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            max_new_tokens=12,
            temperature=0,
            stop_tokens=torch.tensor([tokenizer.eos_token_id]),
            generator=torch.Generator(),
        ).tokens
        assert torch.cat([tokens, ours], dim=1).tolist() == [theirs]
        assert ours.shape[1] > 1


def test_the_exported_reward_model_scores_as_ours_with_transformers_alone(
    finished: Path, in_transformers_alone: dict[str, Any]
) -> None:
    from rlhf_lightning import RewardModule

    module = RewardModule(str(finished / "reward"))
    texts = [f"{PROMPTS[0]}{response}{module.required_tokenizer.eos_token}" for response in RESPONSES]
    inputs = module.required_tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        ours = module(inputs["input_ids"], inputs["attention_mask"].bool())
    torch.testing.assert_close(ours, torch.tensor(in_transformers_alone["scores"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ckpt_path=last"], "ckpt_path is for `rlhf train`"),
        (["network.pretrained=x"], "data.ppo.path is required"),
        (["evaluate.samples=0"], "evaluate.samples=0 must be at least 1"),
        (
            ["data.ppo.val_fraction=0", "data.ppo.path=p", "network.pretrained=x", "module.ppo.reward=y"],
            "val_fraction=0",
        ),
        (["module.ppo.reward=f.py:f"], "module.ppo.reward='f.py:f' is not used where a reward model is trained"),
        (["data.ppo.path=prompts.jsonl"], "network.pretrained is required"),
        (["network.pretrained=x", "data.ppo.path=prompts.jsonl"], "a reward is required"),
    ],
)
def test_the_pipeline_on_files_says_what_is_missing(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("pipeline", [*overrides, f"output_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Demonstrations, comparisons and prompts of a user; every third prompt has no demonstration."""
    prompts = [f"Name thing {i}." for i in range(24)]
    rows = {
        "sft": [{"prompt": prompt, "response": "A cup."} for prompt in prompts],
        "reward": [{"prompt": prompt, "chosen": "A cup.", "rejected": "No"} for prompt in prompts],
        "ppo": [{"prompt": p} | ({"response": "A cup."} if i % 3 else {}) for i, p in enumerate(prompts)],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return paths


def test_the_pipeline_runs_on_files_and_a_network_whose_tokenizer_has_no_padding(
    files: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    network = tmp_path / "network"
    shutil.copytree(finished / "pretrain", network)
    config = json.loads((network / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (network / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = [
        f"network.pretrained={network}",
        "network.pad_token='<|pad|>'",
        *(f"data.{stage}.path={path}" for stage, path in files.items()),
        "data.ppo.val_fraction=0.25",
        "data.reward.val_fraction=0.25",
        "data.ppo.batch_size=4",
        "module.ppo.minibatch_size=4",
        "module.ppo.max_new_tokens=4",
        *(f"+trainer.{stage}.limit_train_batches=1" for stage in ("sft", "reward", "ppo")),
        *(f"trainer.{stage}.max_epochs=1" for stage in ("sft", "reward", "ppo")),
        f"output_dir={tmp_path / 'out'}",
    ]
    assert run_verb("pipeline", arguments) == 0
    found = report(tmp_path / "out")
    assert set(found["judge_score"]) == {"pretrained", "sft", "ppo"}
    assert found["win_rate"] == {}  # where some prompts have no demonstration, there is nothing to win against
    assert found["reward"]["pairs"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.ppo.path=typo.jsonl"], "data.ppo.path=typo.jsonl: there is no such file"),
        (["data.reward.val_path=typo.jsonl"], "data.reward.val_path=typo.jsonl: there is no such file"),
        (["data.reward.path={sft}"], "sft.jsonl:1: a row needs"),
        (["data.ppo.path={broken}"], "broken.jsonl:2: malformed JSON"),
        (["module.ppo.minibatch_size=3"], "minibatch_size=3 must divide the rollout of 4"),
        (
            ["data.ppo.batch_size=32"],
            "data.ppo.batch_size=32 needs at least 32 training rows for each process; there are",
        ),
        (["trainer.ppo.gradient_clip_val=1.0"], "Trainer(gradient_clip_val=1.0) cannot clip"),
        (["trainer.reward.max_epochs=-7"], "trainer.reward: "),
        (["module.ppo.temperature=0"], "module.ppo: temperature=0 must be above 0"),
        (["data.reward.batch_size=0"], "data.reward: data.batch_size=0 must be at least 1"),
        (["data.reward.path=null", "module.ppo.reward=nowhere.py:f"], "reward='nowhere.py:f' cannot be imported"),
        (["data.reward.path=null", "module.ppo.reward={sft_model}"], "is no reward model"),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_said_before_the_first_one_runs(
    overrides: list[str],
    message: str,
    files: dict[str, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    filled = [override.format(sft=files["sft"], broken=broken, sft_model=tiny_model) for override in overrides]
    named = [f"data.{stage}.path={path}" for stage, path in files.items()]
    fitting = ["data.ppo.batch_size=4", "module.ppo.minibatch_size=4"]
    arguments = [f"network.pretrained={tiny_model}", *named, *fitting, *filled, f"output_dir={tmp_path / 'out'}"]
    assert run_verb("pipeline", arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "===" not in printed.out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+world.foo=1", "world.foo is not a setting of rlhf_lightning.world.World"),
        ("world.texts=many", "world.texts must be a whole number, not 'many'"),
        ("world.agreement=2", "agreement=2 must lie between 0.5"),
        ("world.layers=0", "layers=0 must be at least 1"),
        ("world.responses=1", "responses=1 must be at least 2"),
        ("+evaluate.sampels=1", "did you mean evaluate.samples?"),
        ("module.ppo.betta=1", "module.ppo.betta is not a setting of `rlhf pipeline`; did you mean module.ppo.beta?"),
        ("+module.ppo.betta=1", "did you mean module.ppo.beta?"),
        ("evaluate.prompts=all", "evaluate.prompts must be a whole number, not 'all'"),
        ("trainer.ppo.gradient_clip_val=1.0", "cannot clip"),
    ],
)
def test_settings_of_world_stages_and_evaluation_are_checked_before_anything_is_written(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("pipeline", [*TINY, override, f"output_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_no_checkpoint_is_left_behind(finished: Path) -> None:
    assert (finished / "logs").is_dir()
    assert list(finished.rglob("*.ckpt")) == []


@pytest.fixture
def ppo_alone(files: dict[str, Path], tiny_model: Path, tmp_path: Path) -> list[str]:
    """The command of a pipeline without any stage before PPO, whose reward is a function in a file."""
    (tmp_path / "rewards.py").write_text("def length(prompts, responses, **columns):\n    return map(len, responses)\n")
    return [
        f"network.pretrained={tiny_model}",
        f"data.ppo.path={files['ppo']}",
        f"module.ppo.reward={tmp_path / 'rewards.py'}:length",
        "data.ppo.val_fraction=0.5",
        "data.ppo.batch_size=4",
        "module.ppo.minibatch_size=4",
        "module.ppo.max_new_tokens=4",
        "trainer.ppo.max_steps=1",
        f"output_dir={tmp_path / 'out'}",
    ]


def test_policies_are_compared_on_so_many_prompts_as_were_asked_for_and_on_none_that_is_too_long(
    ppo_alone: list[str], tmp_path: Path
) -> None:
    assert run_verb("pipeline", [*ppo_alone, "evaluate.prompts=5"]) == 0
    assert report(tmp_path / "out")["prompts"] == 5
    shorter = ["data.ppo.max_prompt_length=13", "data.ppo.batch_size=3", "module.ppo.minibatch_size=3"]
    changed = [*ppo_alone, *shorter, f"output_dir={tmp_path / 'shorter'}"]
    assert run_verb("pipeline", changed) == 0
    found = report(tmp_path / "shorter")
    assert found["prompts"] == len(found["samples"]) > 0
    assert {len(sample["prompt"]) for sample in found["samples"]} == {len("Name thing 3.")}


def test_a_report_on_ppo_alone_names_what_it_started_from_and_what_scored(
    ppo_alone: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("pipeline", ppo_alone) == 0
    found = report(tmp_path / "out")
    assert list(found["judge_score"]) == ["start", "ppo"]
    assert found["ppo"]["score"]["before"] == found["judge_score"]["start"]
    assert found["judge"] == "reward function"
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "before PPO" in page
    assert "fine-tuned" not in page
    assert "\nstart " in capsys.readouterr().out


def test_a_stage_runs_again_when_a_file_that_it_reads_has_changed(
    ppo_alone: list[str], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        capsys.readouterr()
        assert run_verb("pipeline", ppo_alone) == 0
        return capsys.readouterr().out

    assert said().count("===") == 2
    files["ppo"].write_bytes(files["ppo"].read_bytes())  # another time, the same rows
    assert said().count("complete already, skipped") == 2
    files["ppo"].write_text(files["ppo"].read_text().replace("Name", "Tell"))
    assert "ppo.jsonl has changed, so it and what follows run again" in said()
    assert {sample["prompt"].split()[0] for sample in report(tmp_path / "out")["samples"]} == {"Tell"}
    rewards = tmp_path / "rewards.py"
    rewards.write_text(rewards.read_text().replace("map(len, responses)", "[7.0 for _ in responses]"))
    assert "rewards.py has changed" in said()
    assert report(tmp_path / "out")["judge_score"] == {"start": 7.0, "ppo": 7.0}


def test_several_rewards_are_one_and_the_files_of_each_are_watched(
    ppo_alone: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{tmp_path / 'rewards.py'}:length"
    several = f'{{_target_: rlhf_lightning.WeightedSum, rewards: {{long: "{name}"}}, weights: {{long: 2}}}}'
    assert run_verb("pipeline", [*ppo_alone, f"module.ppo.reward={several}"]) == 0
    found = report(tmp_path / "out")
    assert found["judge"] == "weighted sum of rewards"
    for sample in found["samples"]:
        assert sample["scores"] == {policy: 2 * len(text) for policy, text in sample["responses"].items()}
    rewards = tmp_path / "rewards.py"
    rewards.write_text(rewards.read_text().replace("map(len, responses)", "[7.0 for _ in responses]"))
    capsys.readouterr()
    assert run_verb("pipeline", [*ppo_alone, f"module.ppo.reward={several}"]) == 0
    assert "rewards.py has changed" in capsys.readouterr().out
    assert report(tmp_path / "out")["judge_score"]["start"] == 14.0


def test_an_error_in_a_stage_says_what_is_kept_and_how_to_go_on(
    ppo_alone: list[str], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, responses, **columns):\n    return [float('nan')] * len(responses)\n"
    )
    assert run_verb("pipeline", ppo_alone) == 2
    nothing_kept = capsys.readouterr().err
    assert "must return finite scores" in nothing_kept
    assert "go on" not in nothing_kept
    assert run_verb("pipeline", [*ppo_alone, f"data.sft.path={files['sft']}", f"output_dir={tmp_path / 'two'}"]) == 2
    said = capsys.readouterr().err
    assert "must return finite scores" in said
    assert f"finished stages are kept in {tmp_path / 'two'}; go on after them with\n  rlhf pipeline" in said
    assert f"data.sft.path={files['sft']}" in said


WAITING = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def length(prompts, responses, **columns):
    if (HERE / "wait").exists() and list(HERE.glob("out/checkpoints/ppo/step-1.ckpt")):
        (HERE / "waiting").touch()
        time.sleep(60)
    return [len(response) for response in responses]
"""


@pytest.mark.proof
def test_ctrl_c_within_a_stage_says_what_is_kept_and_the_command_it_names_goes_on_there(
    ppo_alone: list[str], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(WAITING)
    (tmp_path / "wait").touch()
    own = [f"data.sft.path={files['sft']}", "trainer.ppo.max_steps=3", "callbacks.checkpoint.every_n_train_steps=1"]
    command = [sys.executable, "-m", "rlhf_lightning.cli.main", "pipeline", *ppo_alone, *own]
    # A suite that was started in the background ignores SIGINT, and so would the run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "waiting").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(process.communicate()[1])
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    last = tmp_path / "out" / "checkpoints" / "ppo" / "step-1.ckpt"
    assert f"the last checkpoint is {last}; go on from it with" in errors
    (again,) = [shlex.split(line) for line in errors.splitlines() if line.startswith("  rlhf pipeline")]
    (tmp_path / "wait").unlink()
    assert run_verb("pipeline", again[2:]) == 0
    said = capsys.readouterr().out
    assert "=== sft: complete already, skipped" in said
    assert f"goes on from {last}" in said
    assert report(tmp_path / "out")["curves"]["ppo"]["ppo/score"]["step"] == [1, 2, 3]


@pytest.mark.usefixtures("without_tensorboard")
def test_a_logger_that_lacks_its_package_is_refused_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("pipeline", [*TINY, f"output_dir={tmp_path}", "logger=tensorboard"]) == 2
    assert "pip install rlhf-lightning[tensorboard]" in capsys.readouterr().err
    assert not list(tmp_path.glob("stages/*.json"))
