"""`rlhf evaluate`: policies on held-out prompts, a reward model on held-out comparisons."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_lightning.cli.build import build
from rlhf_lightning.cli.checks import Config, check, plain
from rlhf_lightning.cli.console import quieten_libraries
from rlhf_lightning.cli.generate import SAMPLING_KEYS, check_sampling, device_of, shown
from rlhf_lightning.errors import InputError
from rlhf_lightning.jsonl import write_rows

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_lightning.data.reading import Row
    from rlhf_lightning.evaluation.policies import Answers

ROOT_KEYS = [
    "seed",
    "data_root",
    "output_dir",
    "policies",
    "data",
    "reward",
    "metric",
    "reward_data",
    "dtype",
    "samples_shown",
    *SAMPLING_KEYS,
]


def run(config: DictConfig) -> None:
    """Write evaluation.json and responses.jsonl, and print the same as a table with samples."""
    settings = plain(config)
    check(settings, known=ROOT_KEYS)
    check_sampling(settings)
    policies = {name: model for name, model in settings["policies"].items() if model is not None}
    if not policies and settings["reward_data"]["path"] is None:
        raise InputError("nothing to evaluate: pass policies.NAME=FOLDER and data.path=FILE, or reward_data.path=FILE")
    if isinstance(settings["reward"], dict):
        settings["reward"] = build("reward", settings["reward"])
    metric = metric_of(settings) if policies else None
    quieten_libraries()
    folder = Path(settings["output_dir"])
    evaluation: Config = {"seed": settings["seed"]}
    if settings["reward_data"]["path"] is not None:
        evaluation["reward_model"] = reward_accuracy(settings)
    if metric is not None:
        evaluation |= {"metric": metric, "policies": evaluate_policies(settings, policies, metric, folder)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    say(evaluation, folder)


def metric_of(settings: Config) -> str:
    """Return "reward" or "rouge_l"; raises `InputError` where what it needs is not given."""
    metric = settings["metric"]
    if metric is None:
        metric = "rouge_l" if settings["reward"] is None else "reward"
    if metric not in ("reward", "rouge_l"):
        raise InputError(f"metric={metric} must be reward or rouge_l")
    if metric == "reward" and settings["reward"] is None:
        raise InputError("metric=reward needs a reward: pass reward=FOLDER or reward=file.py:function")
    return str(metric)


def evaluate_policies(settings: Config, policies: dict[str, str], metric: str, folder: Path) -> Config:
    """Return the mean score of each policy with its 95 % interval, and write all responses.

    Where all rows have a response, the policy's perplexity of these is measured too.
    """
    from rlhf_lightning.cli.prompts import read_prompts, response_batches
    from rlhf_lightning.evaluation.policies import perplexity
    from rlhf_lightning.evaluation.text_metrics import rouge_l
    from rlhf_lightning.evaluation.win_rate import mean_interval

    rows = read_prompts(settings["data"])
    by_choice = settings["metric"] is not None
    references = references_of(rows, by_choice=by_choice) if metric == "rouge_l" else None
    results: Config = {}
    written: list[Config] = [{"prompt": row.fields["prompt"]} for row in rows]
    answered = all(isinstance(row.fields.get("response"), str) for row in rows)
    for name, model in policies.items():
        policy, tokenizer = load(model, settings)
        answers = answers_of(policy, tokenizer, rows, settings, metric)
        scores = answers.scores if references is None else rouge_l(answers.responses, references)
        assert scores is not None
        results[name] = {"score": asdict(mean_interval(scores)), "ended": fmean(answers.ended), "prompts": len(rows)}
        if answered:
            batches = response_batches(rows, policy, tokenizer, settings)
            results[name]["perplexity"] = perplexity(policy, tokenizer, batches)
        for row, response, score in zip(written, answers.responses, scores, strict=True):
            row[name] = {"response": response, "score": score}
    write_rows(folder / "responses.jsonl", written)
    _show_samples(written[: settings["samples_shown"]])
    return results


def load(model: str, settings: Config) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a policy on its device, and its tokenizer."""
    from rlhf_lightning.networks import NetworkConfig, load_policy, load_tokenizer

    device = device_of(settings)
    network = NetworkConfig(model, dtype=settings["dtype"])
    policy: Any = load_policy(network)
    return policy.to(device), load_tokenizer(network)


def answers_of(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "list[Row]",
    settings: Config,
    metric: str,
) -> "Answers":
    """Return the responses that a policy samples to the rows, scored where the metric is a reward."""
    from rlhf_lightning.cli.prompts import prompt_batches
    from rlhf_lightning.evaluation.policies import answer
    from rlhf_lightning.rollout.reward import load_reward

    return answer(
        policy,
        tokenizer,
        prompt_batches(rows, policy, tokenizer, settings),
        max_new_tokens=settings["max_new_tokens"],
        temperature=settings["temperature"],
        seed=settings["seed"],
        reward=load_reward(settings["reward"], tokenizer).to(policy.device) if metric == "reward" else None,
        sampler=settings["sampler"],
    )


def references_of(rows: "list[Row]", *, by_choice: bool) -> list[list[str]]:
    """Return the reference responses of each row, its `references` or its `response`; raises `InputError` without.

    Where the metric was not chosen, the error names the other one too.
    """
    instead = "" if by_choice else "; or pass reward=FOLDER or reward=file.py:function to score by a reward"
    found = []
    for row in rows:
        if "references" in row.fields:
            found.append(list(row.fields["references"]))
        elif "response" in row.fields:
            found.append([row.fields["response"]])
        else:
            raise InputError(f"{row.origin}: metric=rouge_l needs a response to compare with, or references{instead}")
    return found


def reward_accuracy(settings: Config) -> Config:
    """Return the card of the reward model on held-out comparisons: accuracy, calibration, margins."""
    if not isinstance(settings["reward"], str) or ":" in settings["reward"]:
        raise InputError("reward_data.path measures a reward model: pass reward=FOLDER or a hub name")
    from rlhf_lightning.cli.prompts import comparison_batches
    from rlhf_lightning.evaluation.evidence import load_reward_module, measure_reward
    from rlhf_lightning.networks import NetworkConfig

    device = device_of(settings)
    module = load_reward_module(NetworkConfig(settings["reward"], dtype=settings["dtype"])).to(device)
    batches = comparison_batches(module.required_tokenizer, settings)
    return measure_reward(module, batches).as_dict()


def say(evaluation: Config, folder: Path) -> None:
    """Print what was measured, and where it is written."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "policies" in evaluation:
        table = Table("policy", evaluation["metric"], "95 %", "with an end token", "perplexity", "prompts")
        for name, result in evaluation["policies"].items():
            perplexity = f"{result['perplexity']:.2f}" if "perplexity" in result else "–"
            ended = f"{result['ended']:.0%}"
            table.add_row(name, *_columns(result["score"]), ended, perplexity, str(result["prompts"]))
        console.print(table)
    if "reward_model" in evaluation:
        say_card(evaluation["reward_model"], console)
    console.print(f"written to {folder}", soft_wrap=True)


def say_card(card: Config, console: "Console") -> None:
    """Print what was measured of a reward model."""
    console.print(f"reward model: accuracy {card['accuracy']:.3f} on {card['pairs']} pairs")
    for part in card["length_bins"]:
        length = {"longer": "longer than", "shorter": "shorter than", "equal": "as long as"}[part["chosen"]]
        console.print(f"  {part['accuracy']:.3f} on {part['pairs']} whose chosen response is {length} the other")
    console.print(f"  log loss {card['log_loss']:.3f}, calibration error {card['expected_calibration_error']:.3f}")
    console.print(f"  score of the best responses {card['best_score_mean']:.2f} ± {card['best_score_std']:.2f}")


def _columns(interval: Config) -> tuple[str, str]:
    return f"{interval['mean']:.3f}", f"{interval['low']:.3f} to {interval['high']:.3f}"


def _show_samples(rows: list[Config]) -> None:
    for row in rows:
        print(f"\n{row['prompt']}")
        for name in list(row)[1:]:
            print(f"  {name} ({row[name]['score']:.2f}): {shown(row[name]['response'])}")
