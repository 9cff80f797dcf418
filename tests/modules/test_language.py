import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer

from rlhf_lightning.data import PPODataModule, RewardDataModule, SFTDataModule
from rlhf_lightning.errors import InputError, NotResumable
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.language import LanguageModule
from rlhf_lightning.types import ComparisonBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]


class Data(LightningDataModule):
    """Has a tokenizer, and no data."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer


def introduced(module: LightningModule, datamodule: LightningDataModule) -> LightningModule:
    """Do what the Trainer does before it asks either of them for anything."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    module.trainer = trainer
    module.setup("fit")
    module.configure_model()
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda network, **settings: SFTModule(network, **settings),
        lambda network, **settings: RewardModule(network, **settings),
        lambda network, **settings: PPOModule(network, reward=lambda prompts, responses: [0.0], **settings),
    ],
    ids=["sft", "reward", "ppo"],
)
def test_a_module_takes_the_datamodules_tokenizer_unless_it_was_given_one(
    make: Callable[..., LanguageModule], policy: Callable[..., Any], tokenizer: Any, make_tokenizer: Callable[..., Any]
) -> None:
    theirs = make_tokenizer(pad_token="<pad>", eos_token="<eos>")
    bare = make(policy())
    introduced(bare, Data(theirs))
    assert bare.tokenizer is theirs
    own = make(policy(), tokenizer=tokenizer)
    introduced(own, Data(theirs))
    assert own.tokenizer is tokenizer


def test_outside_of_a_process_group_the_sum_over_ranks_is_the_value(policy: Callable[..., Any], tokenizer: Any) -> None:
    module = SFTModule(policy())
    introduced(module, Data(tokenizer))
    x = torch.tensor([1.0, 2.0])
    total = module.sum_over_ranks(x)
    assert torch.equal(total, x)
    total += 1
    assert x.tolist() == [1.0, 2.0]


def greedy(network: Any, *, from_call: int, training: bool = False) -> Any:
    """Let the network ask for more memory than there is, from its n-th forward on, or from the first with gradients."""
    calls = []

    def ask(_: Any, __: Any, output: Any) -> None:
        calls.append(None)
        if torch.is_grad_enabled() if training else len(calls) >= from_call:
            # The estimate reads it as well, and there nothing is allocated.
            output.logits.new_empty(2**60)

    network.register_forward_hook(ask)
    return network


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_fine_tuning_and_reward_model_say_what_to_do_when_memory_runs_out(
    stage: str, accumulate: int, policy: Any, classifier: Any, tokenizer: Any, fit: Any
) -> None:
    mask = torch.tensor([[False, True, True]] * 2)
    tokens = torch.tensor([[5, 6, 7], [5, 8, 9]])
    if stage == "sft":
        module: Any = SFTModule(greedy(policy(), from_call=1), tokenizer=tokenizer)
        batch: Any = SFTBatch(tokens=tokens, attention_mask=torch.ones_like(mask), loss_mask=mask)
    else:
        module = RewardModule(greedy(classifier(), from_call=1), tokenizer=tokenizer, shift_scores=False)
        zeros = torch.zeros(2, dtype=torch.long)
        batch = ComparisonBatch(
            tokens=tokens,
            attention_mask=torch.ones_like(mask),
            response_mask=mask,
            prompt_index=zeros,
            ranks=torch.arange(2),
            ratings=zeros.float(),
        )
    with pytest.raises(InputError, match=r"(?s)out of memory while updating.*network: weights.*data\.batch_size"):
        fit(module, [batch, batch], max_epochs=1, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize(
    ("phase", "from_call", "helps"),
    [
        ("sampling", 1, r"data\.batch_size or module\.samples_per_prompt=1"),
        ("scoring", 1, r"module\.micro_batch_size=8"),
        ("updating", 0, r"module\.micro_batch_size=8"),
    ],
)
def test_ppo_names_the_phase_in_which_memory_runs_out(
    phase: str, from_call: int, helps: str, policy: Any, tokenizer: Any, prompts: Any, fit: Any
) -> None:
    def count(prompts: Any, responses: Any) -> list[float]:
        return [float(len(text)) for text in responses]

    settings: Any = {"preflight": False, "max_new_tokens": 4, "minibatch_size": 6}
    module = PPOModule(policy(), reward=count, tokenizer=tokenizer, **settings)
    # The reference is read in scoring alone.
    greedy(module.reference if phase == "scoring" else module.policy, from_call=from_call, training=phase == "updating")
    with pytest.raises(
        InputError, match=rf"(?s)out of memory while {phase}.*critic: weights.*{phase}: [^\n]*beside them.*{helps}"
    ):
        fit(module, [prompts], max_steps=1)


# Settings that do nothing -----------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_schedule": "constant", "lr_floor": 0.5}, ["lr_floor=0.5 counts only with lr_schedule=linear or cosine"]),
        ({"warmup_from": 0.1}, ["warmup_from=0.1 counts only with warmup_steps above 0"]),
        ({"lr_schedule": "linear", "lr_floor": 0.5, "warmup_from": 0.1, "warmup_steps": 2}, []),
        ({"lr_schedule": "constant"}, []),
    ],
)
def test_what_the_schedule_does_not_use_is_named_once_when_training_starts(
    stage: str,
    settings: dict[str, Any],
    said: list[str],
    policy: Callable[..., Any],
    tokenizer: Any,
    trainer: Callable[..., Trainer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, data = made(stage, policy(), tokenizer, **settings)
    assert module.without_effect == said
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        trainer(max_steps=1).fit(module, datamodule=data)
    found = [r.getMessage().partition("settings without effect: ")[2] for r in caplog.records]
    assert [message.split(" -> ")[0] for message in found if message] == said


# What does not belong together -----------------------------------------------

ROWS = [
    {"prompt": f"Say {i}.", "response": f"{i}!", "chosen": f"{i}!", "rejected": f"not {i}", "text": "ab" * 9}
    for i in range(8)
]
STAGES: dict[str, tuple[Callable[..., LanguageModule], Callable[..., LightningDataModule]]] = {
    "sft": (SFTModule, SFTDataModule),
    "reward": (RewardModule, RewardDataModule),
    "ppo": (
        lambda network, **settings: PPOModule(
            network,
            reward=lambda prompts, responses, **columns: [float(len(response)) for response in responses],
            **{"minibatch_size": 4, "max_new_tokens": 2, "advantage": "rloo", "samples_per_prompt": 2, **settings},
        ),
        PPODataModule,
    ),
}


def made(stage: str, network: Any, tokenizer: Any, **settings: Any) -> tuple[LanguageModule, LightningDataModule]:
    module, data = STAGES[stage]
    return module(network, tokenizer=tokenizer, **settings), data(ROWS, batch_size=4, val_fraction=0.0)


@pytest.fixture
def written(trainer: Callable[..., Trainer], policy: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Any:
    """``written(stage)`` trains for a step and returns the checkpoint."""

    def write(stage: str, **settings: Any) -> Path:
        run = trainer(max_steps=1)
        module, data = made(stage, policy(), tokenizer, **settings)
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "it.ckpt")
        return tmp_path / "it.ckpt"

    return write


@pytest.mark.parametrize(("wrote", "reads"), [("sft", "reward"), ("reward", "ppo"), ("ppo", "sft")])
def test_a_checkpoint_of_another_stage_is_refused_by_its_name(
    wrote: str, reads: str, written: Any, trainer: Callable[..., Trainer], policy: Callable[..., Any], tokenizer: Any
) -> None:
    file = written(wrote)
    module, data = made(reads, policy(), tokenizer)
    message = rf"the checkpoint is of stage {wrote}, and \w+ goes on from one of stage {reads} only"
    with pytest.raises(InputError, match=message):
        trainer(max_steps=2).fit(module, datamodule=data, ckpt_path=file)


def test_a_checkpoint_of_another_network_is_refused_with_the_first_weight_that_does_not_fit(
    written: Any, trainer: Callable[..., Trainer], policy: Callable[..., Any], tokenizer: Any
) -> None:
    file = written("sft")
    fault = {
        "size mismatch for policy.model.embed_tokens.weight": policy(hidden_size=32),
        r"missing \['policy.transformer.wte.weight', .*\] and \d+ more, unexpected": policy("gpt2"),
    }
    for found, network in fault.items():
        module, data = made("sft", network, tokenizer)
        with pytest.raises(InputError, match=rf"does not fit SFTModule: {found}") as error:
            trainer(max_steps=2).fit(module, datamodule=data, ckpt_path=file)
        assert len(str(error.value)) < 700


@pytest.mark.parametrize(("wrote", "reads"), [("adamw", "muon"), ("muon", "adamw"), ("adamw", "adamw_8bit")])
def test_a_checkpoint_of_another_optimizer_is_refused_by_its_name(
    wrote: str, reads: str, written: Any, trainer: Callable[..., Trainer], policy: Callable[..., Any], tokenizer: Any
) -> None:
    file = written("sft", optimizer=wrote)
    module, data = made("sft", policy(), tokenizer, optimizer=reads)
    message = f"written with optimizer={wrote}, from whose state {reads} cannot go on; pass module.optimizer={wrote}"
    with pytest.raises(NotResumable, match=message):
        trainer(max_steps=2).fit(module, datamodule=data, ckpt_path=file)
    # What is trained no further has no use for the state.
    trainer(limit_val_batches=1).validate(
        module, datamodule=SFTDataModule(ROWS, val_path=ROWS), ckpt_path=file, verbose=False
    )


def test_a_checkpoint_of_a_version_that_kept_something_else_is_refused(
    written: Any, trainer: Callable[..., Trainer], policy: Callable[..., Any], tokenizer: Any
) -> None:
    file = written("sft")
    state = torch.load(file, weights_only=True)
    del state["stage"], state["bad_updates"]
    torch.save(state, file)
    module, data = made("sft", policy(), tokenizer)
    with pytest.raises(InputError, match="not of this version of the package"):
        trainer(max_steps=2).fit(module, datamodule=data, ckpt_path=file)


@pytest.mark.parametrize(("stage", "of"), [("sft", "ppo"), ("reward", "sft"), ("ppo", "reward")])
def test_data_of_another_stage_are_refused_with_the_datamodule_to_take(
    stage: str, of: str, trainer: Callable[..., Trainer], policy: Callable[..., Any], tokenizer: Any
) -> None:
    (module, _), (_, data) = made(stage, policy(), tokenizer), made(of, policy(), tokenizer)
    with pytest.raises(InputError, match=rf"reads batches of .*{STAGES[stage][1].__name__}\); the data given make"):
        trainer(max_steps=1).fit(module, datamodule=data)


def test_a_datamodule_with_another_tokenizer_is_refused(
    policy: Callable[..., Any], tokenizer: Any, make_tokenizer: Callable[..., Any]
) -> None:
    grown = make_tokenizer(pad_token="<pad>", eos_token="<eos>")
    grown.add_tokens(["hello"])
    for other in (grown, make_tokenizer(pad_token="!", eos_token="<eos>"), make_tokenizer(pad_token="<pad>")):
        with pytest.raises(InputError, match=r"the tokenizer of Data \(.*\) is not that of SFTModule"):
            introduced(SFTModule(policy(), tokenizer=tokenizer), Data(other))
