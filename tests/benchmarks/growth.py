"""How a step's time and memory grow with the batch, the length, the vocabulary and the size of the network.

`python tests/benchmarks/growth.py --figure docs/growth.png` prints a line of JSON for each point and draws the curves,
beside what grows with them: the operations that the step counts, and the weights with their gradients and moments. Each
point is a process of its own with one thread, forked when all is imported; seconds are of its own CPU time, memory is
the largest resident size less that before a network was made. A step of PPO is a rollout with its updates, with three
networks and a reward function.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import QUIET, begin_peak, peak, word_tokenizer
from lightning import Callback, Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

BASE = {"batch": 8, "length": 128, "vocabulary": 4096, "layers": 4}
AXES = {
    "batch": [4, 8, 16, 32, 64],
    "length": [32, 64, 128, 256, 512],
    "vocabulary": [1024, 4096, 16384, 65536, 150_000],
    "layers": [1, 2, 4, 8, 16],
}
STAGES = ("sft", "reward", "ppo")
HIDDEN, HEADS, STEPS = 128, 4, 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--repeats", type=int, default=3, help="processes a point, of which the medians count")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = []
    for stage in arguments.stages:
        for axis in arguments.axes:
            for value in AXES[axis]:
                point = {"stage": stage, **BASE, axis: value}
                line = {"axis": axis, **point, **median_of([in_a_process(point) for _ in range(arguments.repeats)])}
                print(json.dumps(line), flush=True)
                found.append(line)
    for line in last_growth(found):
        print(line)
    if arguments.figure:
        draw(found, arguments.figure)


def in_a_process(point: dict[str, Any]) -> dict[str, float]:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found: dict[str, float] = pool.apply(measure, kwds=point)
    return found


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def last_growth(found: list[dict[str, Any]]) -> list[str]:
    """Return by what each curve grew from its last point but one to the last, and by what its work did."""
    lines = []
    for stage, axis in dict.fromkeys((x["stage"], x["axis"]) for x in found):
        one, other = [x for x in found if (x["stage"], x["axis"]) == (stage, axis)][-2:]
        grown = {name: round(other[name] / one[name], 2) for name in (axis, "seconds", "operations", "memory")}
        lines.append(f"{stage}, {axis} {one[axis]} to {other[axis]}: {json.dumps(grown)}")
    return lines


class Clock(Callback):
    """Notes the CPU-seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def measure(stage: str, batch: int, length: int, vocabulary: int, layers: int) -> dict[str, float]:
    """Return seconds and operations of a step, and the memory in MiB of some steps and of weights and moments."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, vocabulary=vocabulary, layers=layers)
        before = begin_peak()
        module = module_of(stage, folder, batch=batch, length=length)
        data, clock = batch_of(stage, batch, length, vocabulary), Clock()
        batches = DataLoader([data] * STEPS, batch_size=None, collate_fn=lambda x: x)  # type: ignore[arg-type]
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[clock], **QUIET).fit(module, batches)
        trained = [p for p in module.parameters() if p.requires_grad]
        lasting = sum(p.nbytes for p in module.parameters()) + 3 * sum(p.nbytes for p in trained)
        return {
            "seconds": statistics.median(clock.seconds[1:]),
            "operations": float(module.work(data).flops),
            "memory": peak() - before,
            "lasting": lasting / 2**20,
        }


def write(folder: str, *, vocabulary: int, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(vocabulary).save_pretrained(folder)


def module_of(stage: str, folder: str, *, batch: int, length: int) -> Any:
    if stage == "sft":
        return SFTModule(folder)
    if stage == "reward":
        return RewardModule(folder, shift_scores=False)
    return PPOModule(
        folder,
        reward=length_modulo_7,
        minibatch_size=batch,
        micro_batch_size=8,
        ppo_epochs=2,
        max_new_tokens=length // 2,
        preflight=False,
    )


def length_modulo_7(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response) % 7) for response in responses]


def batch_of(stage: str, batch: int, length: int, vocabulary: int) -> Any:
    """Return sequences without padding: of PPO prompts of half the length, of reward models pairs that share theirs."""
    tokens = torch.randint(2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(tokens, dtype=torch.bool)
    if stage == "sft":
        return SFTBatch(tokens=tokens, attention_mask=ones, loss_mask=ones)
    if stage == "reward":
        responses = ones & (torch.arange(length) >= length // 2)
        pairs = torch.arange(batch)
        places = {"prompt_index": pairs // 2, "ranks": pairs % 2, "ratings": torch.zeros(batch)}
        return ComparisonBatch(tokens, ones, responses, **places)
    prompts = ["w1"] * batch
    half = length // 2
    return PromptBatch(tokens[:, :half], ones[:, :half], prompts=prompts, texts=prompts, columns={})


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw time above and memory below, a column for each axis and a colour for each stage; both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes_of = list(dict.fromkeys(x["axis"] for x in found))
    figure, grid = plt.subplots(2, len(axes_of), figsize=(3.2 * len(axes_of), 6), sharey="row", squeeze=False)
    for column, axis in enumerate(axes_of):
        for number, stage in enumerate(dict.fromkeys(x["stage"] for x in found)):
            curve = [x for x in found if (x["stage"], x["axis"]) == (stage, axis)]
            at = [x[axis] for x in curve]
            # Operations in the seconds that they would take at the speed of the base point, which every curve has.
            bases = [x for x in found if x["stage"] == stage and all(x[k] == BASE[k] for k in BASE)]
            speed = statistics.median(x["seconds"] / x["operations"] for x in bases)
            grid[0, column].plot(at, [x["seconds"] for x in curve], "o-", color=f"C{number}", label=stage)
            grid[0, column].plot(at, [x["operations"] * speed for x in curve], ":", color=f"C{number}")
            grid[1, column].plot(at, [x["memory"] for x in curve], "o-", color=f"C{number}", label=stage)
            grid[1, column].plot(at, [x["lasting"] for x in curve], ":", color=f"C{number}")
        for row in grid[:, column]:
            row.set(xscale="log", yscale="log", xticks=at, xlabel=axis)
            row.set_xticklabels([f"{value:,}" for value in at], fontsize=8, rotation=30)
            row.minorticks_off()
            row.yaxis.set_major_formatter("{x:g}")
            row.grid(alpha=0.3)
    grid[0, 0].set_ylabel("CPU-seconds a step")
    grid[1, 0].set_ylabel("memory, MiB")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "Measured; dotted: operations at the speed of the base point; weights, gradients and moments", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
