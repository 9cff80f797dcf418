"""The estimate of memory against the peak that CUDA's allocator counted, for all stages of a 35-million-weight Llama.

`python tests/benchmarks/memory_estimate.py` prints a line for each run; docs/hardware.md holds what it printed.
"""

import argparse
import gc
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import QUIET
from lightning import Trainer
from memory_of_roles import BATCH, NEW, PROMPT, SIZES, make
from torch.utils.data import DataLoader

from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import LoRA, NetworkConfig
from rlhf_lightning.preflight.phases import ppo_memory, supervised_memory
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

RUNS: dict[str, dict[str, Any]] = {
    "SFT, adapter": {"stage": "sft", "lora": True},
    "SFT, all weights": {"stage": "sft"},
    "reward model": {"stage": "reward"},
    "PPO, shared, adapters": {"stage": "ppo", "lora": True, "roles": "shared"},
    "PPO, shared trunk": {"stage": "ppo", "critic": "shared_trunk"},
    "PPO, separate, all weights": {"stage": "ppo"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--micro-batch-size", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--precision", nargs="*", default=["32-true", "bf16-mixed"])
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), SIZES[arguments.size])
        for precision in arguments.precision:
            for size in arguments.micro_batch_size:
                for name in arguments.only:
                    estimate, phase, peak = measure(Path(folder), size, precision, RUNS[name])
                    print(
                        f"{precision:10} {size:3} {name:30} measured {peak / 2**20:8.0f} MiB, "
                        f"estimate {estimate / 2**20:8.0f} MiB, {estimate / peak:5.3f} ({phase})",
                        flush=True,
                    )


def measure(folder: Path, micro_batch_size: int, precision: str, run: dict[str, Any]) -> tuple[int, str, int]:
    """Return the estimate, its largest phase, and the peak of two batches."""
    device = torch.device("cuda", 0)
    network = NetworkConfig(
        str(folder / "base"), lora=LoRA() if run.get("lora") else None, roles=run.get("roles", "separate")
    )
    settings: dict[str, Any] = {}
    tokens = torch.randint(2, 8192, (BATCH, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    # Left padding in one row of each micro-batch, as prompts of different lengths have.
    mask[::2, 0] = run["stage"] != "ppo"
    rows = torch.arange(BATCH)
    batches: list[Any]
    if run["stage"] == "ppo":
        module: Any = PPOModule(
            network,
            reward=str(folder / ("reward_adapter" if run.get("roles") == "shared" else "reward")),
            critic=run.get("critic", "separate"),
            minibatch_size=BATCH,
            micro_batch_size=micro_batch_size,
            ppo_epochs=1,
            max_new_tokens=NEW,
            preflight=False,
        )
        texts = ["w1"] * BATCH
        batches = [PromptBatch(tokens[:, :PROMPT], mask[:, :PROMPT], prompts=texts, texts=texts, columns={})] * 2
    else:
        mask[:, -1] = rows % 2 == 0
        if run["stage"] == "sft":
            module, whole = SFTModule(network), SFTBatch(tokens, mask, mask & (torch.arange(PROMPT + NEW) > 0))
        else:
            module = RewardModule(network, shift_scores=False)
            whole = ComparisonBatch(tokens, mask, mask, rows // 2, rows % 2, torch.zeros(BATCH))
        batches = [whole.rows(part) for part in rows.split(micro_batch_size)] * 2
        if run["stage"] == "reward":
            batches = [
                ComparisonBatch(**{**vars(b), "prompt_index": b.prompt_index - b.prompt_index[0]}) for b in batches
            ]
        settings = {"accumulate_grad_batches": BATCH // micro_batch_size}
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        **QUIET,
        **settings,
    )
    module.trainer = trainer
    module.to(device)
    with trainer.precision_plugin.train_step_context():
        if run["stage"] == "ppo":
            estimate = ppo_memory(module, device, sequences=BATCH, prompt_length=PROMPT)
        else:
            estimate = supervised_memory(module, batches[0].to(device))
    if not estimate.work:
        raise SystemExit(estimate.unknown)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))  # type: ignore[arg-type]
    phase = max(estimate.work, key=lambda name: estimate.work[name].total)
    found = estimate.peak, phase, torch.cuda.max_memory_allocated()
    del module, trainer
    gc.collect()
    return found


if __name__ == "__main__":
    main()
