import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule, SFTModule
from rlhf_lightning.preflight import Finding, check_ppo, check_sft
from rlhf_lightning.preflight.stages import check_ppo_memory, ppo_sizes
from rlhf_lightning.types import PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

Faults = Callable[[list[Finding]], dict[str, Finding]]
Make = Callable[..., PPOModule]


def loader(batches: list[PromptBatch]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def fit(module: PPOModule, batch: PromptBatch, folder: Path, *, ckpt_path: Any = None, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **{
            **quiet,
            "accelerator": "cpu",
            "devices": 1,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "max_epochs": 2,
            **settings,
        }
    )
    trainer.fit(module, loader([batch]), ckpt_path=ckpt_path)
    return trainer


def weights(module: PPOModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def random_reward(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward that draws from every source of randomness that there is."""
    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in responses]


def break_the_reference(module: PPOModule) -> None:
    with torch.no_grad():
        next(module.reference.parameters()).add_(0.1)


# Before the first update -----------------------------------------------------


def test_training_with_preflight_is_training_without_it_bit_for_bit(
    make: Make, prompts: PromptBatch, tmp_path: Path
) -> None:
    results = []
    for preflight in (True, False):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        module = make(reward=random_reward, preflight=preflight)
        before = weights(module)
        fit(module, prompts, tmp_path)
        results.append(weights(module))
        assert any(not torch.equal(before[name], results[-1][name]) for name in before)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_look_changes_neither_weights_nor_modes(make: Make, prompts: PromptBatch) -> None:
    module = make()
    module.policy.get_submodule("model.layers.0").train()
    before, modes = weights(module), [part.training for part in module.modules()]
    check_ppo(module, prompts)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(p.grad is None for p in module.parameters())


def test_an_error_stops_the_run_before_its_first_update_and_says_how_to_go_on(
    make: Make, prompts: PromptBatch, tmp_path: Path
) -> None:
    module = make()
    break_the_reference(module)
    before = weights(module)
    with pytest.raises(InputError, match=r"KL to the reference: .*weights differ.* -> .*") as caught:
        fit(module, prompts, tmp_path)
    assert "module.preflight=false" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())


def test_every_process_is_told_what_one_of_them_found(make: Make, prompts: PromptBatch, tmp_path: Path) -> None:
    class Broken(PPOModule):
        def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
            if self.global_rank == 1:
                break_the_reference(self)
            try:
                super().on_train_batch_start(batch, batch_idx)
            except InputError as error:
                (tmp_path / f"{self.global_rank}").write_text(str(error), encoding="utf-8")

    fit(make(None, Broken), prompts, tmp_path, strategy="ddp_fork", devices=2, max_steps=1)
    first, second = ((tmp_path / rank).read_text("utf-8") for rank in ("0", "1"))
    assert first == second
    assert first.startswith("preflight found 1 error(s)")
    assert "on rank 1: KL to the reference" in first


def test_it_can_be_turned_off(make: Make, prompts: PromptBatch, tmp_path: Path) -> None:
    module = make(preflight=False)
    break_the_reference(module)
    assert fit(module, prompts, tmp_path).global_step == 2


def test_a_warning_is_logged_and_training_goes_on(
    make: Make, prompts: PromptBatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make(reward=lambda prompts, responses, **columns: [1.0] * len(responses))
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        assert fit(module, prompts, tmp_path).global_step == 2
    assert [r.getMessage() for r in caplog.records if "spread of scores" in r.getMessage()]


def test_a_healthy_run_logs_nothing(
    make: Make, prompts: PromptBatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        fit(make(missing_eos="subtract"), prompts, tmp_path)
    assert caplog.records == []


def test_what_goes_on_from_a_checkpoint_is_not_looked_at_again(
    make: Make, prompts: PromptBatch, tmp_path: Path
) -> None:
    trained = make()
    trainer = fit(trained, prompts, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # The KL to the reference of a trained policy is not 0.
    assert "KL to the reference" in {f.name for f in check_ppo(trained, prompts) if f.status == "error"}
    resumed = fit(make(), prompts, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 2
    assert fit(trained, prompts, tmp_path).global_step == 2


def test_it_looks_in_the_precision_of_the_run(make: Make, prompts: PromptBatch, tmp_path: Path) -> None:
    seen = []

    class Watching(PPOModule):
        def score(self, rollout: Any, **known: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().score(rollout, **known)

    fit(make(None, Watching), prompts, tmp_path, precision="bf16-mixed", max_epochs=1)
    assert seen == [True, True]


def test_a_look_takes_seconds(make: Make, prompts: PromptBatch) -> None:
    module = make()
    # The first imports what it needs.
    check_ppo(module, prompts)
    # Of the processor, and by what it takes for its like: 3 s where an operation without numbers takes 150 us.
    unit = seconds_of(lambda: add_without_numbers(2000)) / 2000
    assert seconds_of(lambda: check_ppo(module, prompts)) < 20_000 * unit


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def add_without_numbers(times: int) -> None:
    with FakeTensorMode():
        number = torch.zeros(1)
        for _ in range(times):
            number = number + 1


# What the stages are given ----------------------------------------------------


def test_prompts_that_are_conversations_need_a_template_that_fits(
    make: Make, prompts: PromptBatch, tokenizer: Any, faults: Faults
) -> None:
    turns: Any = [[{"role": "user", "content": text}] for text in prompts.texts]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    assert faults(check_ppo(make(), prompts))["chat template"].status == "warning"
    assert faults(check_ppo(make(), replace(prompts, prompts=turns)))["chat template"].status == "error"


def test_a_pad_token_that_is_the_end_token_is_a_warning_in_ppo(
    make: Make, prompts: PromptBatch, make_tokenizer: Callable[..., Any], faults: Faults
) -> None:
    found = faults(check_ppo(make(tokenizer=make_tokenizer(pad_token="<eos>")), prompts))
    assert {name: finding.status for name, finding in found.items()} == {"pad token": "warning"}


def test_the_average_counts_among_what_memory_must_hold(make: Make, prompts: PromptBatch) -> None:
    without, with_average = (check_ppo_memory(make(ema_decay=decay), prompts).measured for decay in (None, 0.9))
    assert "average" not in without
    policy = make().policy
    size = sum(p.nbytes for p in policy.parameters()) / 2**20
    assert f"average {size:.2f} MiB" in with_average


def test_a_run_that_does_not_fit_the_memory_that_is_free_is_named_with_what_to_change(
    make: Make, prompts: PromptBatch, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    held = sum(p.nbytes for p in module.parameters())
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    # The weights are there; their gradients and AdamW's two moments are to come, and then the work.
    for free, status, says in ((3 * trained - 1, "error", "do not fit"), (3 * trained, "warning", "may not fit")):
        monkeypatch.setattr("rlhf_lightning.preflight.stages.free_bytes", lambda device, free=free: free)
        found = faults(check_ppo(module, prompts))
        assert {name: finding.status for name, finding in found.items()} == {"memory": status}
        assert says in found["memory"].measured
        assert "a smaller network, network=lora" in found["memory"].remedy
    monkeypatch.setattr("rlhf_lightning.preflight.stages.free_bytes", lambda device: 100 * held)
    assert faults(check_ppo(module, prompts)) == {}


def test_samples_per_prompt_count(make: Make) -> None:
    assert ppo_sizes(make(), 6, rollouts=1, processes=1).sequences == 6
    assert ppo_sizes(make(samples_per_prompt=4), 6, rollouts=1, processes=1).sequences == 24


def test_demonstrations_without_a_learnt_end_are_named_before_fine_tuning(
    llama: Callable[..., Any], tokenizer: Any, faults: Faults
) -> None:
    module = SFTModule(llama(), tokenizer=tokenizer)
    tokens = torch.tensor([[50, 51, 52, 1], [50, 53, 1, 0]])
    mask = tokens != 0
    right = SFTBatch(tokens, mask, mask & (torch.arange(4) > 0))
    wrong = SFTBatch(tokens, mask, right.loss_mask & (tokens != 1))
    assert faults(check_sft(module, right, right)) == {}
    assert set(faults(check_sft(module, right, wrong))) == {"end token"}
    assert module.policy.training


def test_a_warm_up_that_is_none_is_named_before_fine_tuning(
    llama: Callable[..., Any], tokenizer: Any, faults: Faults
) -> None:
    module = SFTModule(llama(), tokenizer=tokenizer, warmup_from=0.1)
    tokens = torch.tensor([[50, 51, 52, 1]])
    batch = SFTBatch(tokens, tokens > 0, torch.arange(4).unsqueeze(0) > 0)
    found = faults(check_sft(module, batch, batch))
    assert "warmup_from=0.1 counts only with warmup_steps above 0" in found["settings without effect"].measured


def test_settings_that_do_nothing_are_a_warning_with_what_they_would_count_with(
    make: Make, prompts: PromptBatch, faults: Faults
) -> None:
    once = {"ppo_epochs": 1, "minibatch_size": 6, "target_kl": 0.1}
    assert "settings without effect" not in faults(check_ppo(make(**(once | {"ppo_epochs": 2})), prompts))
    assert "settings without effect" not in faults(check_ppo(make(**(once | {"minibatch_size": 3})), prompts))
    found = faults(check_ppo(make(**once, adaptive_kl_horizon=5.0), prompts))["settings without effect"]
    assert found.status == "warning"
    assert "target_kl=0.1 counts only with several updates" in found.measured
    assert "adaptive_kl_horizon=5.0 counts only with adaptive_kl_target" in found.measured
