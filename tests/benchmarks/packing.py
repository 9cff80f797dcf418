"""Real tokens a CPU-second of forward and backward on batches of mixed and of similar lengths, padded and packed.

`python tests/benchmarks/packing.py` prints a JSON line for each stage: medians over passes of one thread, in its own
CPU time, batches of the ways alternating; and how many positions each way computes for a real token.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.data.collating import RankedSequences, comparison_batch, sft_batch
from rlhf_lightning.data.sampling import EpochSampler
from rlhf_lightning.data.tokenizing import TokenSequence
from rlhf_lightning.modules import RewardModule, SFTModule
from rlhf_lightning.networks.unpadded import reading_padding

SIZE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096}
SEQUENCES = 8
SHORTEST, LONGEST = 32, 512
READ = "padding read, "
"""What the names of ways begin with that read padding, as all do on other devices."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="sdpa")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(**SIZE, num_attention_heads=8, pad_token_id=0, attn_implementation=arguments.attention)
    for stage in ("fine-tuning", "reward model"):
        ways = fine_tuning(config, arguments.batches) if stage == "fine-tuning" else rewards(config, arguments.batches)
        print(json.dumps({"stage": stage, **vars(arguments)} | compare(ways, arguments.repeats)), flush=True)


def fine_tuning(config: LlamaConfig, count: int) -> dict[str, tuple[Any, list[Any]]]:
    """Return of each way a module and its batches; a quarter of a sequence is prompt."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (SEQUENCES * count,), generator=noise()).tolist()
    rows = [TokenSequence(torch.randint(2, config.vocab_size, (n,), generator=noise(n)), n // 4) for n in lengths]
    mixed, similar = (
        [sft_batch(part, pad_token_id=0) for part in batches(rows, SEQUENCES, grouped=grouped)]
        for grouped in (False, True)
    )
    padded, packing = (SFTModule(LlamaForCausalLM(config), packing=packing) for packing in (False, True))
    return {
        f"{READ}mixed lengths": (padded, mixed),
        f"{READ}similar lengths": (padded, similar),
        "mixed lengths": (padded, mixed),
        "similar lengths": (padded, similar),
        "mixed lengths, packed": (packing, mixed),
        "similar lengths, packed": (packing, similar),
    }


def rewards(config: LlamaConfig, count: int) -> dict[str, tuple[Any, list[Any]]]:
    """Return the same for pairs of responses, whose prompt is a quarter of the first one."""
    config.num_labels = 1
    rows = []
    for i in range(SEQUENCES // 2 * count):
        one, other = torch.randint(SHORTEST, LONGEST + 1, (2,), generator=noise(i)).tolist()
        first, second = (torch.randint(2, config.vocab_size, (n,), generator=noise(n)) for n in (one, other))
        prompt = min(one, other) // 4
        second[:prompt] = first[:prompt]
        pair = [TokenSequence(ids, prompt) for ids in (first, second)]
        rows.append(RankedSequences(pair, ranks=[0, 1], ratings=[0.0, 0.0]))
    mixed, similar = (
        [comparison_batch(part, pad_token_id=0) for part in batches(rows, SEQUENCES // 2, grouped=grouped)]
        for grouped in (False, True)
    )
    made = {
        name: RewardModule(LlamaForSequenceClassification(config), **settings)
        for name, settings in {
            "alone": {},
            "packed": {"packing": True},
            "shared prompts": {"share_prompts": True},
            "shared prompts, packed": {"share_prompts": True, "packing": True},
        }.items()
    }
    return {
        f"{READ}mixed lengths": (made["alone"], mixed),
        f"{READ}similar lengths": (made["alone"], similar),
        "mixed lengths": (made["alone"], mixed),
        "similar lengths": (made["alone"], similar),
        **{name: (made[name], mixed) for name in ("packed", "shared prompts", "shared prompts, packed")},
    }


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(rows: Sequence[Any], size: int, *, grouped: bool) -> list[list[Any]]:
    """Return the rows of an epoch in the order of training, batch by batch."""
    lengths = [len(row) for row in rows] if grouped else None
    order = EpochSampler(len(rows), batch_size=size, lengths=lengths).order()
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def as_named(name: str) -> AbstractContextManager[None]:
    return reading_padding() if name.startswith(READ) else nullcontext()


def compare(ways: dict[str, tuple[Any, list[Any]]], repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    positions = {}
    for name, (module, data) in ways.items():
        with as_named(name):
            positions[name] = sum(computed(module, batch) for batch in data)
    real = {name: sum(int(batch.attention_mask.sum()) for batch in data) for name, (_, data) in ways.items()}
    for _ in range(repeats):
        passed = dict.fromkeys(ways, 0.0)
        for i in range(len(next(iter(ways.values()))[1])):
            for name, (module, data) in ways.items():
                with as_named(name):
                    passed[name] += timed(module, data[i])
        for name, spent in passed.items():
            seconds[name].append(spent)
    return {
        name: {
            "tokens/s": round(real[name] / statistics.median(seconds[name])),
            "positions": round(positions[name] / real[name], 2),
        }
        for name in ways
    }


@torch.no_grad()
def computed(module: Any, batch: Any) -> int:
    """Return how many positions the network's body reads of a batch."""
    read: list[int] = []
    hook = module.network.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((*args, kwargs.get("input_ids"))[0].numel()), with_kwargs=True
    )
    module.differentiated(batch)
    hook.remove()
    return read[-1]


def timed(module: Any, batch: Any) -> float:
    module.zero_grad()
    start = time.process_time()
    module.differentiated(batch).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
