"""What only a GPU shows: sampling, fine-tuning, PPO and memory on networks in the shape of well-known ones.

`python tests/benchmarks/on_a_gpu.py sampling` and so on; each prints one line of JSON. Weights are random, nothing is
downloaded. `--size tiny --device cpu` runs the same lines on a small network. docs/benchmarks.md holds what it printed.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import QUIET, word_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
"""Of Qwen2.5-0.5B and -1.5B, and of Llama-3.1-8B; all as Llamas, without biases."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["sampling", "generate", "sft", "ppo", "ppo_of_trl", "four_roles"])
    parser.add_argument("--size", choices=SHAPES, default="0.5B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="network.compile of sft and ppo")
    parser.add_argument("--critic", choices=["separate", "shared_trunk"], default="separate")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    work: Callable[[argparse.Namespace], dict[str, Any]] = globals()[arguments.work]
    found = work(arguments)
    if arguments.device == "cuda":
        found |= {"peak_GiB": torch.cuda.max_memory_allocated() / 2**30, "device": torch.cuda.get_device_name()}
    numbers = {name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}
    print(json.dumps({**vars(arguments), "torch": torch.__version__, **numbers}))


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the package's sampler, and its share of what the memory's bandwidth allows."""
    from rlhf_lightning.rollout.generate import sample_tokens

    network, prompts = build(arguments), prompt_tokens(arguments)

    def sample() -> None:
        sample_tokens(
            network,
            prompts,
            torch.ones_like(prompts, dtype=torch.bool),
            max_new_tokens=arguments.new,
            temperature=1.0,
            stop_tokens=torch.tensor([], dtype=torch.long, device=prompts.device),
            generator=torch.Generator(prompts.device).manual_seed(0),
        )

    return of_sampling(arguments, network, sample)


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same by `generate` of `transformers`."""
    network, prompts = build(arguments), prompt_tokens(arguments)

    def sample() -> None:
        network.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=arguments.new,
            min_new_tokens=arguments.new,
            pad_token_id=0,
        )

    return of_sampling(arguments, network, sample)


def of_sampling(arguments: argparse.Namespace, network: Any, sample: Callable[[], None]) -> dict[str, Any]:
    first, seconds = timed(sample), statistics.median(timed(sample) for _ in range(arguments.repeats))
    config = network.config
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    size = config.hidden_size // config.num_attention_heads
    per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * size * next(network.parameters()).element_size()
    )
    # On average the half of the new tokens has been drawn.
    cache = arguments.batch * (arguments.prompt + arguments.new / 2) * per_token
    floor = (weights + cache) / bandwidth(arguments.device)
    return {
        "first_s": first,
        "seconds": seconds,
        "tokens_per_s": arguments.batch * arguments.new / seconds,
        "ms_per_step": 1000 * seconds / arguments.new,
        "floor_ms_per_step": 1000 * floor,
        "share_of_bandwidth": floor * arguments.new / seconds,
    }


def sft(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of fine-tuning on full sequences, and its share of the measured peak of matrix products."""
    from rlhf_lightning.modules import SFTModule
    from rlhf_lightning.networks import NetworkConfig
    from rlhf_lightning.types import SFTBatch

    length = arguments.prompt + arguments.new
    tokens = torch.randint(2, SHAPES[arguments.size]["vocab_size"], (arguments.batch, length))
    ones = torch.ones_like(tokens, dtype=torch.bool)
    batch = SFTBatch(tokens=tokens, attention_mask=ones, loss_mask=ones.clone().index_fill(1, torch.tensor(0), False))
    with tempfile.TemporaryDirectory() as folder:
        save(arguments, Path(folder))
        module = SFTModule(NetworkConfig(folder, compile=arguments.compile))
        steps = step_seconds(module, [batch] * (arguments.repeats + 3), arguments)
    seconds = statistics.median(steps[3:])
    config = module.policy.config
    weights = sum(p.numel() for p in module.policy.parameters())
    attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * length / 2
    flops = 3 * arguments.batch * length * (2 * weights + attention)
    return {
        "seconds": seconds,
        "tokens_per_s": arguments.batch * length / seconds,
        "share_of_matrix_peak": flops / seconds / matrix_peak(arguments),
    }


def ppo(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a rollout with its updates; policy, critic, reference and reward of equal size."""
    return of_ppo(arguments, {"compile": arguments.compile}, {"critic": arguments.critic})


def four_roles(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same with all four on one backbone in 4 bits, an adapter each, and 8-bit moments in paged memory."""
    from rlhf_lightning.networks import LoRA

    return of_ppo(
        arguments,
        {"lora": LoRA(), "quantization": "nf4", "roles": "shared", "dtype": "bfloat16"},
        {"optimizer": "paged_adamw_8bit" if arguments.device == "cuda" else "adamw_8bit"},
    )


def of_ppo(arguments: argparse.Namespace, network: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    from rlhf_lightning.modules import PPOModule
    from rlhf_lightning.networks import NetworkConfig, load_reward_model, load_tokenizer, save_pretrained
    from rlhf_lightning.types import PromptBatch

    with tempfile.TemporaryDirectory() as folder:
        base, reward = Path(folder) / "base", Path(folder) / "reward"
        save(arguments, base)
        config = NetworkConfig(str(base), **network)
        export = "adapter" if "lora" in network else "merged"
        save_pretrained(load_reward_model(config), load_tokenizer(base), reward, export=export)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        module = PPOModule(
            config,
            reward=str(reward),
            minibatch_size=arguments.batch,
            micro_batch_size=arguments.micro_batch_size,
            max_new_tokens=arguments.new,
            preflight=False,
            **settings,
        )
        tokens, texts = prompt_tokens(arguments).cpu(), ["w1"] * arguments.batch
        ones = torch.ones_like(tokens, dtype=torch.bool)
        batch = PromptBatch(tokens, ones, prompts=[*texts], texts=texts, columns={})
        steps = step_seconds(module, [batch] * (arguments.repeats + 1), arguments)
    logged = module.trainer.callback_metrics
    return {
        "steps": [round(x, 2) for x in steps],
        "seconds": statistics.median(steps[1:]),
        "response_length": float(logged["ppo/response_length"]),
        "kl": float(logged["ppo/kl"]),
    }


def ppo_of_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same by TRL 1.12, the last that has PPO: four networks, without gradient checkpoints."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            now = time.perf_counter()
            self.steps.append(now - self.start)
            self.start = now

    clock, load = Clock(), {"dtype": torch.bfloat16 if arguments.precision == "bf16-true" else torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        base, reward = Path(folder) / "base", Path(folder) / "reward"
        save(arguments, base)
        scored = LlamaConfig.from_pretrained(base, num_labels=1)
        LlamaForSequenceClassification(scored).to(load["dtype"]).save_pretrained(reward)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        settings = PPOConfig(
            output_dir=folder,
            use_cpu=arguments.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=3e-6,
            per_device_train_batch_size=arguments.micro_batch_size,
            gradient_accumulation_steps=arguments.batch // arguments.micro_batch_size,
            num_ppo_epochs=4,
            total_episodes=(arguments.repeats + 1) * arguments.batch,
            response_length=arguments.new,
            stop_token="eos",
            temperature=1.0,
            num_sample_generations=0,
            local_rollout_forward_batch_size=arguments.batch,
        )
        policy, reference = (AutoModelForCausalLM.from_pretrained(base, **load) for _ in range(2))
        reward_model, critic = (AutoModelForSequenceClassification.from_pretrained(reward, **load) for _ in range(2))
        PPOTrainer(
            settings,
            AutoTokenizer.from_pretrained(base, padding_side="left"),
            policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": prompt_tokens(arguments).tolist()}),
            callbacks=[clock],
        ).train()
    return {"steps": [round(x, 2) for x in clock.steps], "seconds": statistics.median(clock.steps[1:])}


def step_seconds(module: Any, batches: list[Any], arguments: argparse.Namespace) -> list[float]:
    """Train on the batches and return the seconds of each step."""
    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            synchronize()
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    trainer = Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        precision=arguments.precision,
        max_epochs=1,
        **QUIET,
        callbacks=[clock],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))  # type: ignore[arg-type]
    return clock.seconds


def build(arguments: argparse.Namespace) -> Any:
    """Return a network of the size with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(**SHAPES[arguments.size], **special, max_position_embeddings=4096)
    dtype = torch.bfloat16 if arguments.precision == "bf16-true" else torch.float32
    with torch.device(arguments.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def save(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the network with a tokenizer of one token per word; no token ends a response."""
    word_tokenizer(SHAPES[arguments.size]["vocab_size"]).save_pretrained(folder)
    network = build(arguments)
    with torch.no_grad():
        # Random weights would end a response by chance: the end token is next to never drawn.
        network.get_output_embeddings().weight[1] = 0
    network.save_pretrained(folder)


def prompt_tokens(arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (arguments.batch, arguments.prompt)
    return torch.randint(2, SHAPES[arguments.size]["vocab_size"], size, generator=generator).to(arguments.device)


def timed(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """Return bytes per second, read and written, of a copy of 2 GiB (256 MiB on a CPU)."""
    source = torch.ones(2**31 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / statistics.median(timed(lambda: target.copy_(source)) for _ in range(5))


def matrix_peak(arguments: argparse.Namespace) -> float:
    """Return operations per second of a large product of matrices in the type of the arithmetic."""
    n = 8192 if arguments.device == "cuda" else 1024
    dtype = torch.float32 if arguments.precision == "32-true" else torch.bfloat16
    one, other = (torch.randn(n, n, dtype=dtype, device=arguments.device) for _ in range(2))
    return 2 * n**3 / statistics.median(timed(lambda: one @ other) for _ in range(10))


if __name__ == "__main__":
    main()
