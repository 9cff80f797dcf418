"""`rlhf pipeline`: fine-tuning, reward model, PPO and the report, each stage reading the folder of the one before."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_lightning.cli.build import build, build_all, trainers_refusals
from rlhf_lightning.cli.checks import Config, check, check_strategy, leaves, plain
from rlhf_lightning.cli.console import quieten_libraries, with_bar
from rlhf_lightning.cli.interrupts import resumable, started_by_lightning, this_command
from rlhf_lightning.cli.lock import only_run_in
from rlhf_lightning.cli.progress import Progress
from rlhf_lightning.cli.rehearsal import bare_trainer, look_at_rows, rehearse
from rlhf_lightning.cli.stages import Records, run_stage
from rlhf_lightning.cli.train import CHECKPOINTS, build_trainer, closing_loggers, log_settings, same_wandb_run
from rlhf_lightning.cli.train import ROOT_KEYS as TRAIN_KEYS
from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    import torch
    from lightning import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import Callback

    from rlhf_lightning.networks import NetworkConfig
    from rlhf_lightning.types import RewardFunction
    from rlhf_lightning.world import World

ROOT_KEYS = [*TRAIN_KEYS, "world", "evaluate"]

SAMPLING_BATCH = 8192
"""Prompts that the world's policy answers at a time for the comparisons: at the end of each rollout few are left."""

WHOLE = {"lora": None, "quantization": "none", "roles": "separate"}
"""The settings of a network of which all weights are trained."""

WORLD_FILES = {
    "pretrain": {"path": "text.jsonl"},
    "sft": {"path": "demonstrations.jsonl"},
    "reward": {"path": "comparisons.jsonl", "val_path": "comparisons_held_out.jsonl"},
    "ppo": {"path": "prompts.jsonl", "val_path": "held_out.jsonl"},
}


def run(config: DictConfig) -> None:
    """Run what is not complete yet, and say where everything is."""
    settings = plain(config)
    wire(settings)
    check(settings, known=ROOT_KEYS)
    for stage, module in settings["module"].items():
        check_strategy(module, settings["trainer"][stage])
    quieten_libraries()
    pipeline = Pipeline(settings)
    with only_run_in(settings["output_dir"]), resumable(pipeline.how_to_go_on):
        pipeline.run()


def wire(settings: Config) -> None:
    """Fill in where each stage reads: the user's files or the world's, and the folder of the stage before.

    Raises `InputError` where the user's files or network are not all named, or with a ``ckpt_path``. A stage without a
    file is left out, and what follows reads what it would have read.
    """
    folder = Path(settings["output_dir"])
    data, module = settings["data"], settings["module"]
    if settings["world"] is not None:
        for stage, files in WORLD_FILES.items():
            data[stage] |= {name: str(folder / "data" / file) for name, file in files.items()}
        settings["network"]["pretrained"] = str(folder / "initial")
    _check_sources(settings)
    _check_validation(settings)
    model = settings["network"]["pretrained"]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        # Pre-training makes the backbone that adapters stand on.
        network = settings["network"] | (WHOLE if stage == "pretrain" else {})
        module[stage]["model"] = {**network, "pretrained": model}
        if data[stage]["path"] is None:
            del data[stage], module[stage]
        elif stage in ("pretrain", "sft"):
            model = str(folder / stage)
        elif stage == "reward":
            module["ppo"]["reward"] = str(folder / "reward")


def _check_sources(settings: Config) -> None:
    data = settings["data"]
    if settings["ckpt_path"] is not None:
        raise InputError(
            f"ckpt_path={settings['ckpt_path']}: the pipeline goes on from its last checkpoint by itself when the same "
            "command is run again; ckpt_path is for `rlhf train`"
        )
    if settings["network"]["pretrained"] is None:
        raise InputError(
            "network.pretrained is required (a Hugging Face folder or hub name) when the pipeline runs on your files; "
            "with neither of them, `rlhf pipeline` runs on its embedded world"
        )
    if data["ppo"]["path"] is None:
        raise InputError("data.ppo.path is required (a .jsonl file with rows {prompt}): pass data.ppo.path=FILE")
    if data["reward"]["path"] is not None and settings["module"]["ppo"]["reward"] is not None:
        raise InputError(
            f"module.ppo.reward={settings['module']['ppo']['reward']!r} is not used where a reward model is trained: "
            f"PPO takes the one of data.reward.path={data['reward']['path']}; leave one of the two out"
        )
    if data["reward"]["path"] is None and settings["module"]["ppo"]["reward"] is None:
        raise InputError(
            "a reward is required: pass data.reward.path=FILE with comparisons to train one, or module.ppo.reward= a "
            "reward-model folder, a hub name, or file.py:function"
        )


def _check_validation(settings: Config) -> None:
    for stage in ("reward", "ppo"):
        data = settings["data"][stage]
        if data["path"] is not None and not (data["val_fraction"] or data["val_path"] or data["val_split"]):
            raise InputError(
                f"data.{stage}.val_fraction=0 keeps nothing to evaluate on at the end: set it above 0, or pass "
                f"data.{stage}.val_path"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How the policies are compared at the end; raises `InputError` where a number is below 1."""

    prompts: int
    """Held-out prompts, at most."""
    samples: int
    """Those of them that are shown in the report."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, number in vars(self).items():
            if number < 1:
                raise InputError(f"evaluate.{name}={number} must be at least 1")


class Pipeline:
    """The stages in order, each run once and skipped where it is complete."""

    def __init__(self, settings: Config) -> None:
        """Take settings that `wire` has filled in; raises `InputError` where those of world or evaluation are wrong."""
        self.settings = settings
        self.evaluation: Evaluation = build("evaluate", settings["evaluate"])
        self.world: World | None = None if settings["world"] is None else build("world", settings["world"])
        self.folder = Path(settings["output_dir"])
        self.records = Records(self.folder / "stages")
        self.progress = Progress(self.folder / CHECKPOINTS)
        self.done: dict[str, Config] = {}
        self.evaluated_now = False

    def run(self) -> None:
        """Run the stages and write the report."""
        self._look_ahead()
        if self.world is not None:
            self._make_world(self.world)
        for stage in self.settings["module"]:
            if stage == "reward" and self.world is not None:
                self._compare(self.world)
            self._train(stage)
        self._evaluate()
        self._report()

    def how_to_go_on(self) -> str | None:
        """Return what is kept of a run that ended early, and the command that goes on after it; None for nothing."""
        from rlhf_lightning.callbacks import checkpoints

        begun = [path for folder in self.progress.folder.glob("*") for path in checkpoints(folder)]
        if begun:
            return f"the last checkpoint is {begun[0]}; go on from it with\n  {this_command()}"
        if not any(self.records.folder.glob("*.json")):
            return None
        return f"finished stages are kept in {self.folder}; go on after them with\n  {this_command()}"

    def _look_ahead(self) -> None:
        """Raise `InputError` where a stage that is still to run could not start, before any of them trains."""
        from rlhf_lightning.networks import load_tokenizer
        from rlhf_lightning.rollout.reward import load_reward

        module = self.settings["module"]
        stages = [stage for stage in module if self.records.read(stage) is None]
        data = {stage: rehearse(stage, self.settings) for stage in stages}
        # A package that a logger lacks is told here; nothing is written before the first value.
        build_all("logger", self.settings["logger"])
        if self.world is not None or not stages:
            return
        tokenizer = load_tokenizer(build("network", next(iter(module.values()))["model"]))
        for stage in stages:
            look_at_rows(stage, data[stage], tokenizer)
        if "reward" not in module:
            load_reward(self._reward(), tokenizer)

    def _make_world(self, world: "World") -> None:
        from rlhf_lightning.world.story import write_world

        seed = self.settings["seed"]
        self._stage(
            "world",
            {"world": self.settings["world"], "seed": seed},
            lambda: write_world(self.folder, world, seed=seed),
            outputs=[self.folder / "data", self.folder / "initial"],
        )

    def _compare(self, world: "World") -> None:
        """Let the world's judge rank what the fine-tuned policy samples."""
        from rlhf_lightning.world.story import write_comparisons

        seed = self.settings["seed"]
        network = self.settings["module"]["reward"]["model"]
        self._stage(
            "comparisons",
            {"world": self.settings["world"], "seed": seed, "sampling": self._sampling()},
            lambda: write_comparisons(self.folder / "data", world, self._sampler(network), seed=seed),
            outputs=[self.folder / "data" / file for file in WORLD_FILES["reward"].values()],
        )

    def _train(self, stage: str) -> None:
        """Train one stage into its folder."""
        settings = {name: self.settings[name][stage] for name in ("module", "data", "trainer")}
        settings["seed"] = self.settings["seed"]
        callbacks = self._onlookers() if stage == "ppo" else []
        self._stage(
            stage,
            settings,
            lambda: train(self.settings | settings, stage, self.folder, callbacks, self.progress.of(stage)),
            outputs=[self.folder / stage],
            inputs=self._files(stage),
        )

    def _onlookers(self) -> "list[Callback]":
        """Return the judge as a monitor of PPO, for the report's curve alone: nothing of it reaches the updates."""
        from rlhf_lightning.callbacks import ScoreMonitor

        judge = self._judge()
        return [] if judge is None else [ScoreMonitor("judge_score", judge)]

    def _judge(self) -> "RewardFunction | None":
        from rlhf_lightning.world import Judge

        return None if self.world is None else Judge().score

    def _evaluate(self) -> None:
        settings = {
            "seed": self.settings["seed"],
            "evaluate": self.settings["evaluate"],
            "sampling": self._sampling(),
            "data": self.settings["data"]["ppo"],
        }
        self.evaluated_now = self.records.read("evaluate") is None
        inputs = [file for stage in ("reward", "ppo") for file in self._files(stage)]
        self._stage("evaluate", settings, self._gather, inputs=inputs)

    def _gather(self) -> Config:
        """Let the judge and the reward compare the policies on held-out prompts, and measure the reward model."""
        from rlhf_lightning.evaluation.evidence import gather_answers, load_reward_module, measure_reward

        module = self.settings["module"]
        found = gather_answers(
            self._policies(),
            self._held_out_prompts,
            reward=self._reward(),
            judge=self._judge(),
            seed=self.settings["seed"],
            reference=self._reference(),
            device=self._device(),
            follow=self._follow,
            **self._sampling(),
        )
        if "reward" in module:
            network = module["reward"]["model"] | {"pretrained": str(self.folder / "reward")}
            model = load_reward_module(build("network", network)).to(self._device())
            data = build("data.reward", self.settings["data"]["reward"], tokenizer=model.tokenizer)
            data.setup("validate")
            found["reward_card"] = measure_reward(model, data.val_dataloader()).as_dict()
        return found

    def _reward(self) -> Any:
        reward = self.settings["module"]["ppo"]["reward"]
        return build("module.ppo.reward", reward) if isinstance(reward, dict) else reward

    def _policies(self) -> "dict[str, NetworkConfig]":
        """Return the networks to compare: before fine-tuning if there is any, PPO's reference, and after PPO."""
        module = self.settings["module"]
        reference = module["ppo"]["model"]
        nodes = {self._reference(): reference, "ppo": reference | {"pretrained": str(self.folder / "ppo")}}
        if "sft" in module:
            nodes = {"pretrained": module["sft"]["model"], **nodes}
        return {name: build("network", node) for name, node in nodes.items()}

    def _reference(self) -> str:
        """Return how the policy that PPO starts from is called: after the stage that made it, if one did."""
        names = {"sft": "sft", "pretrain": "pretrained"}
        return next((name for stage, name in names.items() if stage in self.settings["module"]), "start")

    def _device(self) -> "torch.device":
        """Return the device of PPO's Trainer: there responses are sampled outside of training too."""
        return bare_trainer("trainer.ppo", self.settings["trainer"]["ppo"]).strategy.root_device

    def _held_out_prompts(self, tokenizer: Any, max_length: int | None) -> list[Any]:
        """Return the first ``evaluate.prompts`` of PPO's validation prompts."""
        lengths = [self.settings["data"]["ppo"]["max_prompt_length"], max_length]
        longest = min((length for length in lengths if length is not None), default=None)
        batches = self._prompts({"max_prompt_length": longest}, tokenizer, count=self.evaluation.prompts)
        if not batches:
            raise InputError("data.ppo leaves no held-out prompt to compare the policies on")
        return batches

    def _sampler(self, node: Config) -> "Callable[[Sequence[Any], int], list[str]]":
        """Return the function that samples a response of the policy to the prompt of each row."""
        from rlhf_lightning.evaluation.policies import answer
        from rlhf_lightning.networks import load_policy, load_tokenizer

        def sample(rows: "Sequence[Any]", seed: int) -> list[str]:
            policy = build("network", node)
            network: Any = load_policy(policy)
            tokenizer = load_tokenizer(policy)
            changes = {"batch_size": SAMPLING_BATCH, "max_prompt_length": None}
            batches = self._follow(self._prompts(changes, tokenizer, rows=rows), "responses")
            return answer(network.to(self._device()), tokenizer, batches, seed=seed, **self._sampling()).responses

        return sample

    def _follow(self, batches: "Sequence[Any]", what: str) -> "Iterable[Any]":
        """Return the batches, under a bar where training has one."""
        hidden = self.settings["callbacks"].get("progress") is None or started_by_lightning()
        return batches if hidden else with_bar(batches, what)

    def _prompts(
        self, changes: Config, tokenizer: Any, *, rows: "Sequence[Any] | None" = None, count: int | None = None
    ) -> list[Any]:
        """Return the first ``count`` validation prompts of PPO's data, or of other rows, with some settings changed."""
        data = build("data.ppo", self.settings["data"]["ppo"] | changes, tokenizer=tokenizer)
        if rows is not None:
            # Not through the config: Hydra walks through every value of a node, some milliseconds a row.
            data.path, data.val_path = rows[:1], rows
        data.setup("validate")
        data.val_items = data.val_items[:count]
        return list(data.val_dataloader())

    def _sampling(self) -> Config:
        """Return how responses are sampled outside of training: as PPO samples them."""
        ppo = self.settings["module"]["ppo"]
        return {key: ppo[key] for key in ("max_new_tokens", "temperature", "sampler")}

    def _files(self, stage: str) -> list[Path]:
        """Return the files that a stage reads: those of its data, and those of reward functions."""
        if stage not in self.settings["module"]:
            return []
        data = self.settings["data"][stage]
        sources = [data["path"], data["val_path"]]
        if stage == "ppo":
            rewards = leaves(self.settings["module"]["ppo"]["reward"], "")
            sources += [reward.rpartition(":")[0] for _, reward in rewards if isinstance(reward, str)]
        paths = [Path(source).expanduser() for source in sources if source]
        return [file for path in paths for file in ([path] if path.is_file() else _data_files(path))]

    def _stage(
        self,
        name: str,
        settings: Config,
        body: Callable[[], Config],
        *,
        outputs: "Sequence[Path]" = (),
        inputs: "Sequence[Path]" = (),
    ) -> None:
        self.done[name] = run_stage(
            self.records,
            name,
            settings,
            body,
            outputs=outputs,
            inputs=inputs,
            before=self.done,
            progress=self.progress,
        )

    def _report(self) -> None:
        from rlhf_lightning.evaluation.report import write_report
        from rlhf_lightning.evaluation.summary import summarise

        report = summarise(
            self.done,
            seed=self.settings["seed"],
            judge=self.done["evaluate"]["result"]["scored_by"] if self.world is None else "world",
            samples=self.evaluation.samples,
        )
        page = write_report(report, self.folder)
        if self.evaluated_now:
            self._track(report)
        say(self.folder, page, report)

    def _track(self, report: Config) -> None:
        """Send the report's numbers and figures to the loggers."""
        from rlhf_lightning.callbacks import log_figures, log_headline
        from rlhf_lightning.evaluation.report import report_figures

        nodes = stage_settings(self.settings, "report", self.folder, self.folder)["logger"]
        loggers = build_all("logger", nodes).values()
        with closing_loggers(loggers):
            log_headline(loggers, report)
            log_figures(loggers, report_figures(report))


def _data_files(folder: Path) -> list[Path]:
    """Return the data files in a folder; none where it does not exist, as that of a name on the hub."""
    from rlhf_lightning.data.reading import SUFFIXES

    return sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES)


def train(settings: Config, stage: str, folder: Path, callbacks: "list[Callback]", checkpoints: Path) -> Config:
    """Train the stage, write its Hugging Face folder, and return what was measured.

    It goes on from the newest whole one of the ``checkpoints``, if there is one.
    """
    from lightning import seed_everything

    from rlhf_lightning.callbacks import History, Throughput, newest_whole

    ckpt_path = newest_whole(checkpoints)
    if ckpt_path is not None:
        print(f"goes on from {ckpt_path}", flush=True)
    # Each stage starts from the seed, so that skipping the ones before does not change it.
    seed_everything(settings["seed"], workers=True, verbose=False)
    module: LightningModule = build(f"module.{stage}", settings["module"])
    data: LightningDataModule = build(f"data.{stage}", settings["data"])
    history = History()
    of_stage = stage_settings(settings, stage, folder, checkpoints)
    of_stage["logger"] = same_wandb_run(of_stage["logger"], ckpt_path)
    trainer = build_trainer(of_stage, [*callbacks, history])
    with closing_loggers(trainer.loggers), trainers_refusals():
        log_settings(trainer, settings)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    speeds = [callback.summary for callback in trainer.callbacks if isinstance(callback, Throughput)]  # type: ignore[attr-defined]
    return {
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "curves": history.curves,
        "throughput": speeds[0] if speeds else {},
    }


def stage_settings(settings: Config, stage: str, folder: Path, checkpoints: Path) -> Config:
    """Return the settings with the callbacks and loggers of one stage: each writes to, and logs to, its own folder."""
    # PPO puts the adapters of both onto the base that they name; merged, each would be a backbone of its own.
    as_adapter = settings["network"]["roles"] == "shared" and stage in ("sft", "reward")
    callbacks = {
        **settings["callbacks"],
        "export": {
            "_target_": "rlhf_lightning.callbacks.HuggingFaceExport",
            "dirpath": str(folder / stage),
            "export": "adapter" if as_adapter else "merged",
        },
    }
    checkpoint = callbacks.get("checkpoint")
    if checkpoint is not None:
        # A rollout takes as long as many steps of the other stages.
        every = checkpoint["every_n_train_steps"] // (10 if stage == "ppo" else 1)
        own = {"dirpath": str(checkpoints), "every_n_train_steps": max(1, every)}
        callbacks["checkpoint"] = {**checkpoint, **own}
    logger = settings["logger"]
    if logger is not None and "_target_" in logger:
        name = stage if logger["name"] in (None, "logs") else f"{logger['name']}-{stage}"
        logger = {**logger, "name": name, "save_dir": str(folder / "logs")}
    trainer = {**settings["trainer"], "enable_checkpointing": checkpoint is not None}
    return {**settings, "callbacks": callbacks, "logger": logger, "trainer": trainer}


def say(folder: Path, page: Path, report: Config) -> None:
    """Print where everything is, the figures, and one sample before and after."""
    from rich.console import Console

    sample = report["samples"][0]
    stages = [name for name in ("pretrain", "sft", "reward", "ppo") if (folder / name).exists()]
    rates = report["win_rate"].items()
    lines = [
        "",
        *(f"{name:<12}{folder / name}" for name in stages),
        f"{'report':<12}{page}",
        "",
        *(f"{name:<12}wins {rate['mean']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]" for name, rate in rates),
        "",
        f"{'prompt':<12}{sample['prompt']}",
        *(f"{name:<12}{sample['responses'][name]}" for name in (report["ppo"]["reference"], "ppo")),
    ]
    Console(highlight=False).print("\n".join(lines), markup=False, soft_wrap=True)
