from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from transformers import AutoTokenizer

from rlhf_lightning import FSDP2Strategy, RewardModule, SFTDataModule, SFTModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.validation_reward import ValidationReward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

TRAIN = [{"prompt": f"Say {i}.", "response": "b" * i} for i in range(1, 5)]
VAL = [{"prompt": f"Tell {i}.", "response": "c", "wanted": i} for i in range(5)]


class Spy:
    """A reward function that notes what it was asked and scores the n-th validation with the n-th number."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.asked: list[tuple[list[Any], list[str], dict[str, Any]]] = []

    def __call__(self, prompts: list[Any], responses: list[str], **columns: Any) -> list[float]:
        self.asked.append((prompts, responses, columns))
        return [self.scores.pop(0)] * len(responses) if self.scores else [float(len(text)) for text in responses]


class Seen(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics["sft/val_reward"]))


@pytest.fixture
def fit(tiny_model: Path, tmp_path: Path) -> Callable[..., tuple[SFTModule, list[float]]]:
    """Fine-tune with the callbacks and return the module and the metric of each validation."""

    def run(
        *callbacks: Callback,
        epochs: int = 2,
        learning_rate: float = 1e-2,
        rows: Any = VAL,
        tokenizer: Any = None,
        **settings: Any,
    ) -> tuple[SFTModule, list[float]]:
        module, seen = SFTModule(tiny_model, learning_rate=learning_rate, tokenizer=tokenizer), Seen()
        watched = [seen] if any(isinstance(callback, ValidationReward) for callback in callbacks) else []
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            default_root_dir=tmp_path,
            callbacks=[*callbacks, *watched],
            log_every_n_steps=1,
            **settings,
        )
        trainer.fit(module, SFTDataModule(TRAIN, val_path=rows, batch_size=2))
        return module, seen.values

    return run


def test_it_is_the_mean_reward_of_sampled_responses_to_validation_prompts(fit: Callable[..., Any]) -> None:
    spy = Spy()
    _, values = fit(ValidationReward(spy, max_new_tokens=6, batch_size=2))
    assert len(values) == 2
    for value, calls in zip(values, (spy.asked[:3], spy.asked[3:]), strict=True):
        assert [prompt for prompts, _, _ in calls for prompt in prompts] == [row["prompt"] for row in VAL]
        assert [wanted for _, _, columns in calls for wanted in columns["wanted"]] == [0, 1, 2, 3, 4]
        lengths = [len(text) for _, responses, _ in calls for text in responses]
        assert value == pytest.approx(sum(lengths) / 5)


def test_the_noise_is_the_same_in_each_validation_and_that_of_the_seed(fit: Callable[..., Any]) -> None:
    spies = [Spy(), Spy()]
    for seed, spy in enumerate(spies):
        fit(ValidationReward(spy, max_new_tokens=6, seed=seed), learning_rate=0.0)
        assert spy.asked[0][1] == spy.asked[1][1]
    assert spies[0].asked[0][1] != spies[1].asked[0][1]


def test_training_is_the_same_without_it(fit: Callable[..., Any]) -> None:
    with_it, _ = fit(ValidationReward(Spy(), max_new_tokens=4))
    without, _ = fit()
    for one, other in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)
    assert with_it.policy.training


def test_the_checkpoint_with_the_highest_reward_is_kept(fit: Callable[..., Any], tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="sft/val_reward", mode="max")
    _, values = fit(ValidationReward(Spy(1.0, 3.0, 2.0), max_new_tokens=2), best, epochs=3)
    assert values == [1.0, 3.0, 2.0]
    assert Path(best.best_model_path).name == "epoch=1.ckpt"


@pytest.mark.parametrize(
    ("settings", "changed"),
    [({"num_prompts": 3}, 3), ({"num_prompts": 100}, 5)],
)
def test_num_prompts_is_how_many_are_asked(settings: Any, changed: int, fit: Callable[..., Any]) -> None:
    spy = Spy()
    fit(ValidationReward(spy, max_new_tokens=2, **settings), epochs=1)
    assert len(spy.asked[0][0]) == changed


def test_responses_are_as_long_and_as_random_as_asked_for(fit: Callable[..., Any]) -> None:
    found = {}
    for tokens, temperature in ((1, 1.0), (6, 1.0), (6, 0.1)):
        spy = Spy()
        fit(ValidationReward(spy, max_new_tokens=tokens, temperature=temperature), epochs=1, learning_rate=0.0)
        found[tokens, temperature] = spy.asked[0][1]
    assert max(map(len, found[1, 1.0])) <= 1
    assert max(map(len, found[6, 1.0])) > 1
    assert found[6, 0.1] != found[6, 1.0]


def test_a_conversation_is_asked_without_its_last_turn(fit: Callable[..., Any], tiny_model: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    spy, tokenizer = Spy(), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    fit(ValidationReward(spy, max_new_tokens=2), epochs=1, rows=[{"messages": turns}], tokenizer=tokenizer)
    assert spy.asked[0][0] == [turns[:1]]


def test_a_reward_model_is_named_by_its_folder(fit: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    RewardModule(tiny_model).save_pretrained(tmp_path / "reward")
    _, values = fit(ValidationReward(str(tmp_path / "reward"), max_new_tokens=3), epochs=1)
    assert torch.tensor(values).isfinite().all()


def test_a_validation_text_has_no_prompt(fit: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"row 0 of .*: ValidationReward needs a prompt to respond to; the row is a"):
        fit(ValidationReward(Spy()), rows=[{"text": "once"}])


def test_plain_loaders_have_no_prompts(tiny_model: Path, tmp_path: Path) -> None:
    module = SFTModule(tiny_model)
    data = SFTDataModule(VAL, val_path=VAL, tokenizer=module.tokenizer)
    data.setup("validate")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[ValidationReward(Spy())],
    )
    with pytest.raises(InputError, match="the validation rows of an SFTDataModule"):
        trainer.validate(module, data.val_dataloader())


@pytest.mark.parametrize("sharded", [True, False])
def test_processes_with_unequal_numbers_of_prompts_log_the_mean_over_all(
    sharded: bool, fit: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    def wanted(prompts: list[Any], responses: list[str], *, wanted: list[int], **_: Any) -> list[float]:
        return [float(number) for number in wanted]

    def work(rank: int) -> list[float]:
        how = {"strategy": FSDP2Strategy() if sharded else "ddp", "devices": 2, "use_distributed_sampler": False}
        callback = ValidationReward(wanted, max_new_tokens=2, batch_size=1)
        _, values = fit(callback, rows=[{**VAL[0], "wanted": n} for n in (1, 3, 8)], epochs=1, **how)
        return list(values)

    assert processes(2, work) == [[4.0], [4.0]]


def test_strategies_that_cannot_sample_in_a_hook_are_refused(tiny_model: Path) -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(
        InputError, match=r"ValidationReward samples outside .* which FSDPStrategy cannot; use trainer=f"
    ):
        ValidationReward(Spy()).on_validation_start(trainer, SFTModule(tiny_model))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_new_tokens", "num_prompts", "batch_size"])
def test_numbers_are_at_least_1(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}=0 must be at least 1"):
        ValidationReward(Spy(), **{name: 0})
