"""This project against TRL and `transformers`: the same model, data, precision and updates, in turns, on one thread.

`python tests/benchmarks/peers.py sft`, `reward`, `sampling` and `ppo`, with `--size a` or `b`, print a line of JSON
each: medians of the turns' units (tokens, pairs, rollouts) per CPU-second, the largest memory of each way, the ratios
of ours to theirs, and of bf16-mixed to float32. `share_of_peak` is what ours reaches of the operations a second of a
product of large matrices, measured once in the same process. Each way runs in a process of its own and waits while
another has its turn. First all but those of bf16-mixed find the loss of the same batch, and must agree. Memory is that
of two turns in a new process, which has checked nothing. TRL is installed, once, into an environment of its own under
`--environments`; where that fails the line holds `transformers` alone. docs/benchmarks.md holds what it printed.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from common import word_tokenizer

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "a": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 4096},
    "b": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 8192},
}
FAST, SLOW = 3e-6, 3e-8
"""Learning rates. Where responses end early updates must be small: large ones change the probability of the end, and
each way would have responses of another length."""
FIRST = {"b": {"learning_rate": 3e-7}}
"""Settings of the check: in so large a network the ratio of a token that is next to impossible grows so fast that
rounding shows."""
TRL = {"sft": "trl", "reward": "trl", "ppo": "trl==1.12.*", "sampling": None}
"""The last that has PPO is 1.12; sampling needs none."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

OURS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "grouped": {"group_by_length": True},
        "grouped_bf16": {"group_by_length": True, "precision": "bf16-mixed"},
        "padded": {"group_by_length": False},
    },
    "reward": {
        "grouped": {"group_by_length": True},
        "grouped_bf16": {"group_by_length": True, "precision": "bf16-mixed"},
        "padded": {"group_by_length": False},
    },
    "sampling": {"sampler": {}},
    "ppo": {
        "separate": {},
        "separate_bf16": {"precision": "bf16-mixed"},
        "shared_trunk": {"critic": "shared_trunk"},
        "shared_trunk_bf16": {"critic": "shared_trunk", "precision": "bf16-mixed"},
        "lora": {"roles": "shared"},
        "lora_trunk": {"roles": "shared", "critic": "shared_trunk"},
    },
}
THEIRS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "trl_default": {"gradient_checkpointing": True},
        "trl_padded": {},
        "trl_grouped": {"sorted": True},
        "trl_wrapped": {"settings": {"packing": True, "packing_strategy": "wrapped", "max_length": 512}},
        "trl_bfd": {"settings": {"packing": True, "packing_strategy": "bfd", "max_length": 512}},
        "transformers_padded": {"plain": True},
        "transformers_grouped": {"plain": True, "sorted": True},
    },
    "reward": {
        "trl_default": {"gradient_checkpointing": True},
        "trl_padded": {},
        "trl_grouped": {"sorted": True},
    },
    "sampling": {
        "transformers_dynamic": {"plain": True, "cache": "dynamic"},
        "transformers_static": {"plain": True, "cache": "static"},
    },
    "ppo": {
        "trl": {},
        "trl_whole": {"whole": True},
        "trl_default": {"gradient_checkpointing": True},
        "trl_lora": {"lora": LORA},
    },
}
"""Grouped: the rows sorted by length, as groups of a large data set are; default: with the checkpoints TRL sets; whole:
the rollout in one backward, where others add up micro-batches to the same update."""

BF16 = "_bf16"
"""How the names of ways in bf16-mixed end."""

COMPUTES_ANOTHER = ("trl_wrapped", "lora", "lora_trunk", "trl_lora", "shared_trunk")
"""Ways whose first losses differ by nature: texts that follow each other in a row, other trained weights."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=OURS)
    parser.add_argument("--size", choices=SIZES, default="a")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="ways to run, all where not given")
    parser.add_argument("--responses-only", action="store_true", help="of sft: the second half of each row counts")
    parser.add_argument("--end", type=float, default=0.0, help="of ppo: probability that a token ends its response")
    parser.add_argument("--rows", type=int, default=64, help="of sft and reward: rows of an epoch")
    parser.add_argument("--batch", type=int, help="8, of ppo and sampling 32")
    parser.add_argument("--micro-batch", type=int, default=8, help="of ppo: sequences of one backward, of both sides")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    arguments = parser.parse_args()
    stage = arguments.stage
    run = {
        "stage": stage,
        "batch": arguments.batch or {"sft": 8, "reward": 8}.get(stage, 32),
        "new": arguments.new,
        "responses_only": arguments.responses_only,
        "epochs": 4,
        "micro_batch": arguments.micro_batch,
        "learning_rate": SLOW if arguments.end else FAST,
        # One micro-batch: TRL's means of PPO are those of a micro-batch.
        "first": {
            "epochs": 2,
            "micro_batch": arguments.batch or 32,
            "learning_rate": FAST,
            **FIRST.get(arguments.size, {}),
        },
    }
    python = peers_python(TRL[stage], arguments.environments)
    theirs = {name: way for name, way in THEIRS[stage].items() if python or way.get("plain")}
    wanted = arguments.only or [*OURS[stage], *theirs]
    ways = {name: (sys.executable, "peers_ours.py", way) for name, way in OURS[stage].items()}
    ways |= {name: (python or sys.executable, "peers_theirs.py", way) for name, way in theirs.items()}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments, run)
        workers = {
            name: (*way[:2], {**run, **way[2], "folder": folder}) for name, way in ways.items() if name in wanted
        }
        checked, found = measure(workers, arguments.repeats, run["batch"])
    ours, others = ([name for name in found if name in x[stage]] for x in (OURS, THEIRS))
    line = {
        "stage": stage,
        "size": arguments.size,
        **({"end": arguments.end, "micro_batch": arguments.micro_batch} if stage == "ppo" else {}),
        **({"responses_only": arguments.responses_only} if stage == "sft" else {}),
        "checked": checked,
        "found": found,
        "ratios": {x: {y: round(found[x]["rate"] / found[y]["rate"], 3) for y in others} for x in ours},
        "over_fp32": {
            x: round(found[x]["rate"] / found[y]["rate"], 3)
            for x in ours
            if x.endswith(BF16) and (y := x.removesuffix(BF16)) in ours
        },
        "memory": {x: {y: round(found[x]["own"] / found[y]["own"], 3) for y in others} for x in ours},
        "versions": versions(python),
        "cpu": cpu(),
    }
    print(json.dumps(line), flush=True)


def peers_python(requirement: str | None, folder: Path) -> str | None:
    """Return the interpreter of an environment with TRL, and with the `torch` and `transformers` that are here."""
    if requirement is None:
        return None
    place = folder / requirement.strip(".*").replace("==", "-")
    python = place / "bin" / "python"
    same = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "accelerate", "peft")]
    try:
        if not python.exists():
            subprocess.run(["uv", "venv", "-q", "--python", sys.executable, str(place)], check=True)
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), requirement, *same], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no environment with {requirement}: {error}", file=sys.stderr)
        return None
    return str(python)


def write(folder: Path, arguments: argparse.Namespace, run: dict[str, Any]) -> None:
    """Write the model and the data: token ids, which a tokenizer of one token per word spells for who reads texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from rlhf_lightning.networks import LoRA, NetworkConfig, load_reward_model, load_tokenizer, save_pretrained

    size = SIZES[arguments.size]
    vocabulary = size["vocab_size"]
    tokenizer = word_tokenizer(vocabulary)
    for name in ("base", "reward"):
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(0)
    config = LlamaConfig(**size, num_attention_heads=8, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    policy = LlamaForCausalLM(config)
    end_with_probability(policy, arguments.end)
    policy.save_pretrained(folder / "base")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    if arguments.stage == "ppo":
        network = NetworkConfig(str(folder / "base"), lora=LoRA())
        adapted = load_reward_model(network)
        save_pretrained(adapted, load_tokenizer(str(folder / "base")), folder / "reward_adapter", export="adapter")

    def tokens(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,)).tolist()

    def lengths(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high + 1, (count,)).tolist()

    # Where an end token follows, one token less.
    def responses() -> list[list[int]]:
        return [tokens(n) for n in lengths(23, 223, arguments.rows)]

    prompts = lengths(8, 32, arguments.rows)
    pairs = zip(prompts, responses(), responses(), strict=True)
    asked = zip(lengths(32, 64, run["batch"]), lengths(1, run["new"] - 1, run["batch"]), strict=True)
    data = {
        "sft": [{"ids": tokens(n), "prompt": (n + 1) // 2} for n in lengths(31, 511, arguments.rows)],
        "reward": [{"prompt": tokens(n), "chosen": chosen, "rejected": rejected} for n, chosen, rejected in pairs],
        "ppo": [{"ids": tokens(n), "response": [*tokens(new - 1), 1]} for n, new in asked],
        "sampling": [{"ids": tokens(48)} for _ in range(run["batch"])],
    }
    for name, rows in data.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def end_with_probability(policy: Any, probability: float) -> None:
    """Change the weights so that the end token has about this probability everywhere, and padding none."""
    import torch

    embedding, output = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    with torch.no_grad():
        # One coordinate of the states is about the same everywhere, and only these two tokens read it.
        embedding[:, 0] = 1.0
        output[:, 0] = 0.0
        output[:2] = 0.0
        ids = torch.randint(2, len(output), (8, 64))
        constant = policy.model(ids).last_hidden_state[..., 0].mean()
        output[0, 0] = -20 / constant
        odds = probability / (1 - probability) * len(output)
        output[1, 0] = (torch.tensor(odds).log() if odds else -20) / constant


def check(logged: dict[str, dict[str, Any]], sequences: int) -> dict[str, Any]:
    """Return what the ways find of the same batch; raises where one that should agree does not."""
    alike = [name for name in logged if name not in COMPUTES_ANOTHER and not name.endswith(BF16)]
    found = {name: losses(logged[name], sequences) for name in alike}
    first = next(iter(found.values()), {})
    for (name, values), (quantity, expected) in product(found.items(), first.items()):
        value = values[quantity]
        # A mean of advantages of unit size around 0, which cancel.
        floor = 1e-6 if quantity == "policy_loss" else 0.0
        is_list = isinstance(value, list)
        close = value == expected if is_list else math.isclose(value, expected, rel_tol=1e-5, abs_tol=floor)
        if not close:
            raise AssertionError(f"{name}: {quantity} is {value} where {next(iter(found))} has {expected}")
    return {q: "equal" if isinstance(first[q], list) else [x[q] for x in found.values()] for q in first}


def losses(logged: dict[str, Any], sequences: int) -> dict[str, Any]:
    """Return what both sides log of so many sequences, by one name."""
    names = {
        "loss": ("sft/loss", "reward/loss", "loss"),
        "policy_loss": ("ppo/policy_loss", "loss/policy_avg"),
        "value_loss": ("ppo/value_loss", "loss/value_avg"),
        "score": ("ppo/score", "objective/scores"),
        "tokens": ("tokens",),
    }
    found = {name: logged[x] for name, ways in names.items() for x in ways if x in logged}
    if "ppo/policy_loss" in logged:
        # TRL divides the variance of n advantages by n - 1 and we by n, and the policy's loss goes with them.
        found["policy_loss"] *= math.sqrt(1 - 1 / (sequences * logged["ppo/response_length"]))
    return found


def measure(workers: dict[str, Any], repeats: int, sequences: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Compare the losses of the first turn, then let all take turns, of which the first of each warms up."""
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(worker(*way)) for name, way in workers.items()}
        checked = check({name: turn(process)["logged"] for name, process in processes.items()}, sequences)
        for process in processes.values():
            turn(process)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        for _, (name, process) in product(range(repeats), processes.items()):
            turns[name].append(turn(process))
            print(name, round(turns[name][-1]["seconds"], 2), file=sys.stderr, flush=True)
    found = {name: summary(of_way) for name, of_way in turns.items()}
    for name, (python, script, run) in workers.items():
        with worker(python, script, {**run, "is_checked": True}) as process:
            alone = [turn(process) for _ in range(2)]
        peak = max(x["peak"] for x in alone)
        found[name] |= {"peak": round(peak, 1), "own": round(peak - alone[0]["before"], 1)}
    return checked, found


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    logged = turns[-1]["logged"]
    found = {
        "seconds": statistics.median(x["seconds"] for x in turns),
        "rate": statistics.median(x["amount"] / x["seconds"] for x in turns),
    }
    if "flops" in turns[-1]:
        found["share_of_peak"] = statistics.median(x["flops"] / x["seconds"] for x in turns) / turns[-1]["matrix_peak"]
    return {name: float(f"{x:.5g}") for name, x in found.items()} | (
        {"response_length": round(logged["ppo/response_length"], 1)} if "ppo/response_length" in logged else {}
    )


@contextlib.contextmanager
def worker(python: str, script: str, run: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # An environment of its own is not to find what is installed here.
    environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).parent / script), json.dumps(run)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            yield process
        except (EOFError, BrokenPipeError):
            errors.seek(0)
            sys.stderr.write(errors.read()[-4000:])
            raise
        finally:
            # A worker that nobody gives a turn ends.
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


def turn(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Let a worker take a turn, and return what it found."""
    print(file=process.stdin, flush=True)
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise EOFError(f"{process.args} ended early")
    found: dict[str, Any] = json.loads(line)
    return found


def versions(python: str | None) -> dict[str, str]:
    names = ("torch", "transformers", "lightning")
    found = {name: version(name) for name in names}
    if python:
        code = "from importlib.metadata import version; print(version('trl'))"
        found["trl"] = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return {"python": platform.python_version(), **found}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
