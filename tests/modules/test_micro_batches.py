"""`micro_batch_size=auto` under a real limit: that on the addresses of this process."""

import ctypes
import gc
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.micro_batches import largest_micro_batch
from rlhf_lightning.preflight.memory import free_bytes
from rlhf_lightning.preflight.phases import ppo_memory
from rlhf_lightning.types import PromptBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

CPU = torch.device("cpu")
BATCH, PROMPT, NEW = 32, 126, 2


def len_of(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture
def module(tokenizer: Any) -> PPOModule:
    """Small weights whose activations of 32 sequences take some hundred MiB."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return PPOModule(
        LlamaForCausalLM(config),
        reward=len_of,
        tokenizer=tokenizer,
        minibatch_size=BATCH,
        micro_batch_size="auto",
        ppo_epochs=1,
        max_new_tokens=NEW,
        preflight=False,
    )


@pytest.fixture
def long_prompts() -> PromptBatch:
    tokens = torch.randint(2, 258, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    texts = ["a"] * BATCH
    return PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), prompts=texts, texts=texts, columns={})


@contextmanager
def only(size: int) -> Iterator[None]:
    """Let this process have so many more bytes in a block, beyond what earlier tests left to be freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    table = Path("/proc/self/status").read_text("utf-8").splitlines()
    taken = int(next(line for line in table if line.startswith("VmSize:")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Confined(PPOModule):
    """PPO that has so much room while it looks for its micro-batch."""

    room: int

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        with only(self.room):
            super().on_train_batch_start(batch, batch_idx)


def between(module: PPOModule, size: int) -> int:
    """Return more bytes than so many sequences need, and less than twice as many do."""
    enough, more = needed(module, size), needed(module, 2 * size)
    assert enough < more
    return enough + 3 * (more - enough) // 4


def needed(module: PPOModule, size: int) -> int:
    module.micro_batch_size = size
    need = ppo_memory(module, CPU, sequences=BATCH, prompt_length=PROMPT).needed
    assert need is not None
    return need


def test_what_the_process_may_take_is_what_is_free() -> None:
    with only(2**30):
        free = free_bytes(CPU)
    assert free is not None
    assert 2**29 < free <= 2**30


def test_the_largest_that_fits_is_found_and_trained_with(
    module: PPOModule, long_prompts: PromptBatch, fit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    room = between(module, 8)
    module.__class__ = Confined
    module.room = room  # type: ignore[attr-defined]
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="rlhf_lightning"):
        logged = fit(module, [long_prompts], max_epochs=1)
    assert module.micro_batch_size == 8
    assert "micro_batch_size=auto: 8 sequences fit" in caplog.text
    # The estimate alone said so.
    assert "does not fit" not in caplog.text
    assert logged["ppo/ratio"] == [1.0]
    assert any(not torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_a_trial_corrects_an_estimate_that_is_not_known(
    module: PPOModule,
    long_prompts: PromptBatch,
    trainer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    room = between(module, 8)
    module.trainer = trainer()

    class Deciding(type(module.policy)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return output if output.logits.isfinite().all() else None

    module.policy.__class__ = Deciding
    with only(room), caplog.at_level(logging.INFO, logger="rlhf_lightning"):
        found = largest_micro_batch(module, long_prompts)
    # What Python has given back, and torch takes again, is not in the limit.
    assert found in (8, 16)
    assert "a micro-batch of 32 sequences does not fit" in caplog.text
    assert all(p.grad is None for p in module.parameters())


def test_a_run_that_goes_on_keeps_the_size_that_was_found(module: PPOModule) -> None:
    checkpoint: dict[str, Any] = {}
    module.use_micro_batches_of(5)
    module.on_save_checkpoint(checkpoint)
    for chosen, expected in (("auto", 5), (3, 3)):
        fresh = PPOModule(
            module.policy, reward=len_of, tokenizer=module.tokenizer, minibatch_size=BATCH, micro_batch_size=chosen
        )
        fresh.on_load_checkpoint(checkpoint)
        assert (fresh.micro_batch_size, fresh.finds_micro_batch_size) == (expected, False)


@pytest.mark.proof
def test_two_processes_take_the_smaller_size(
    module: PPOModule, long_prompts: PromptBatch, trainer: Callable[..., Any], make_loader: Any, tmp_path: Path
) -> None:
    class Unequal(Confined):
        def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
            # The second process has room for 8 and the first for all.
            self.room = 2**30 if self.global_rank == 0 else room
            super().on_train_batch_start(batch, batch_idx)
            (tmp_path / f"{self.global_rank}").write_text(str(self.micro_batch_size))

    room = between(module, 8)
    module.__class__ = Unequal
    trainer(max_steps=1, strategy="ddp_fork", devices=2).fit(module, make_loader([long_prompts]))
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["8", "8"]


def test_where_weights_are_cut_into_shards_a_number_is_asked_for(
    module: PPOModule, trainer: Callable[..., Any]
) -> None:
    module.trainer = trainer(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    with pytest.raises(InputError, match="micro_batch_size=auto"):
        module.configure_callbacks()


def test_a_budget_of_tokens_is_refused_where_weights_are_cut_into_shards(
    module: PPOModule, trainer: Callable[..., Any]
) -> None:
    module.finds_micro_batch_size = False
    module.micro_batch_tokens = 100
    module.trainer = trainer(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    with pytest.raises(InputError, match="micro_batch_tokens=100 makes more forwards"):
        module.configure_callbacks()


def test_a_budget_of_tokens_is_estimated_as_the_rows_that_it_leaves(module: PPOModule) -> None:
    full = needed(module, 32)
    module.micro_batch_tokens = 8 * (PROMPT + NEW)
    assert needed(module, 32) == needed(module, 8) < full


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="micro_batch_size="):
        PPOModule("none", reward=len_of, micro_batch_size="largest")  # type: ignore[arg-type]
