"""Peak memory of fine-tuning and PPO with separate and shared roles, each in a process of its own, on the CPU.

`python tests/benchmarks/memory_of_roles.py` prints a table; docs/hardware.md holds what it printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import QUIET, begin_peak, peak, word_tokenizer

RUNS = {
    "SFT, adapter": {"stage": "sft", "lora": True},
    "SFT, all weights": {"stage": "sft"},
    "PPO, shared, adapters": {"stage": "ppo", "lora": True, "roles": "shared"},
    "PPO, shared, adapters, shared trunk": {"stage": "ppo", "lora": True, "roles": "shared", "critic": "shared_trunk"},
    "PPO, shared, adapters, int8": {"stage": "ppo", "lora": True, "roles": "shared", "quantization": "int8"},
    "PPO, shared, adapters, nf4": {"stage": "ppo", "lora": True, "roles": "shared", "quantization": "nf4"},
    "PPO, separate, adapters": {"stage": "ppo", "lora": True, "roles": "separate"},
    "PPO, separate, all weights": {"stage": "ppo", "roles": "separate"},
}
SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 8192},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
}
BATCH, PROMPT, NEW = 32, 32, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        measure(Path(arguments.folder), arguments.micro_batch_size, RUNS[arguments.run])
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), SIZES[arguments.size])
        found = {}
        for name in arguments.only:
            command = [sys.executable, __file__, "--run", name, "--folder", folder]
            command += ["--micro-batch-size", str(arguments.micro_batch_size)]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            found[name] = json.loads(line)
            largest, before = found[name]["peak"], found[name]["before"]
            print(f"{name:40} peak {largest:8.0f} MiB, of it the run's own {largest - before:8.0f} MiB", flush=True)


def make(folder: Path, size: dict[str, int]) -> None:
    """Write base, and an adapter and a whole reward model on it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_lightning.networks import LoRA, NetworkConfig, load_reward_model, load_tokenizer, save_pretrained

    torch.manual_seed(0)
    config = LlamaConfig(**size, num_attention_heads=8, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    word_tokenizer(size["vocab_size"]).save_pretrained(folder / "base")
    base = str(folder / "base")
    for name, lora, export in (("reward", None, "merged"), ("reward_adapter", LoRA(), "adapter")):
        network: Any = NetworkConfig(base, lora=lora)
        save_pretrained(load_reward_model(network), load_tokenizer(base), folder / name, export=export)


def measure(folder: Path, micro_batch_size: int, run: dict[str, Any]) -> None:
    """Train for two batches and print the process's largest resident memory, before the networks and at the end."""
    import logging
    import warnings

    import torch
    from lightning import Trainer
    from torch.utils.data import DataLoader

    from rlhf_lightning.modules import PPOModule, SFTModule
    from rlhf_lightning.networks import LoRA, NetworkConfig
    from rlhf_lightning.types import PromptBatch, SFTBatch

    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    __import__("peft")
    __import__("bitsandbytes")
    before = begin_peak()
    network = NetworkConfig(
        str(folder / "base"),
        lora=LoRA() if run.get("lora") else None,
        quantization=run.get("quantization", "none"),
        roles=run.get("roles", "separate"),
    )
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, vocabulary, (BATCH, PROMPT + NEW), generator=generator)
    ones = torch.ones_like(tokens, dtype=torch.bool)
    batch: Any = SFTBatch(tokens=tokens, attention_mask=ones, loss_mask=ones)
    settings: dict[str, Any] = {"accumulate_grad_batches": BATCH // micro_batch_size}
    batches = [batch.rows(rows) for rows in torch.arange(BATCH).split(micro_batch_size)] * 2
    module: Any = None
    if run["stage"] != "ppo":
        module = SFTModule(network)
    else:
        module = PPOModule(
            network,
            reward=str(folder / ("reward_adapter" if run.get("roles") == "shared" else "reward")),
            critic=run.get("critic", "separate"),
            minibatch_size=BATCH,
            micro_batch_size=micro_batch_size,
            ppo_epochs=1,
            max_new_tokens=NEW,
            preflight=False,
        )
        prompts = ["w1"] * BATCH
        batches = [PromptBatch(tokens[:, :PROMPT], ones[:, :PROMPT], prompts=prompts, texts=prompts, columns={})] * 2
        settings = {}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        **QUIET,
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))  # type: ignore[arg-type]
    print(json.dumps({"before": before, "peak": peak()}))


if __name__ == "__main__":
    main()
