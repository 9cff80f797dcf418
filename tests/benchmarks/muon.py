"""Milliseconds of a step of AdamW, of torch's Muon with AdamW beside it, and of ours, on real gradients.

`python tests/benchmarks/muon.py` prints a line of JSON for the built-in world's network and one for size "a" of
peers.py: medians of steps in turns, each after a forward and a backward of its own copy of the network.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from peers import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.functional.muon import by_kind
from rlhf_lightning.modules.muon import MuonWithAdamW
from rlhf_lightning.networks.embeddings import embeddings_and_heads

WORLD = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4}
RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for size, shape in {"world": {**WORLD, "vocab_size": 2048}, "a": {**SIZES["a"], "num_attention_heads": 8}}.items():
        found = measure(LlamaConfig(**shape, pad_token_id=0), arguments.repeats)
        ratio = found["muon of torch"] / found["muon"]
        line = {"size": size, "threads": arguments.threads, "milliseconds": found, "torch_over_ours": round(ratio, 2)}
        print(json.dumps(line), flush=True)


def measure(config: LlamaConfig, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (32, 64))
    ways = {}
    for name in ("adamw", "muon of torch", "muon"):
        network = LlamaForCausalLM(config)
        ways[name] = network, optimizers(name, network)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (network, stepped) in ways.items():
            network(input_ids=tokens, labels=tokens).loss.backward()
            start = time.perf_counter()
            for optimizer in stepped:
                optimizer.step()
            seconds[name].append(time.perf_counter() - start)
            network.zero_grad()
    return {name: round(1e3 * statistics.median(times[repeats // 10 :]), 2) for name, times in seconds.items()}


def optimizers(name: str, network: Any) -> list[Any]:
    weights, special = list(network.parameters()), embeddings_and_heads(network)
    if name == "adamw":
        return [torch.optim.AdamW(weights, lr=RATE, fused=True)]
    matrices, others = by_kind(weights, special)
    adamw = torch.optim.AdamW(others, lr=RATE, fused=True)
    if name == "muon":
        return [MuonWithAdamW(matrices, adamw, lr=RATE)]
    return [torch.optim.Muon(matrices, lr=RATE, adjust_lr_fn="match_rms_adamw"), adamw]


if __name__ == "__main__":
    main()
