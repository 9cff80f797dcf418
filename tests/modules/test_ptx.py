from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor

from rlhf_lightning.data import PPODataModule, SFTDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.batch_file import read_records
from rlhf_lightning.modules.ptx import BatchStream
from rlhf_lightning.types import Experience, PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

ROWS = 10
BATCHES = 4
"""Batches of an epoch: ten texts, three at a time, the last batch one."""
Gradients = dict[str, Tensor]


@pytest.fixture
def texts(tokenizer: Any) -> Callable[..., SFTDataModule]:
    """A DataModule of ten texts of uneven length, three in a batch."""

    def make(**settings: Any) -> SFTDataModule:
        rows = [{"text": "abcdefghij"[i] * (2 + i % 4)} for i in range(ROWS)]
        return SFTDataModule(rows, tokenizer=tokenizer, **{"batch_size": 3, "val_fraction": 0.0, **settings})

    return make


@pytest.fixture
def stream(texts: Callable[..., SFTDataModule], trainer: Callable[..., Any]) -> Callable[..., BatchStream]:
    """A stream of such texts."""
    return lambda **settings: BatchStream(texts(**settings), trainer(max_steps=1))


def tokens_of(batch: SFTBatch) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(batch.tokens, batch.attention_mask, strict=True)]


def drawn_from(stream: BatchStream, batches: int) -> list[list[list[int]]]:
    return [tokens_of(next(stream)) for _ in range(batches)]


# The stream --------------------------------------------------------------------


def test_the_stream_does_not_end_and_holds_every_text_once_an_epoch_in_a_new_order(
    stream: Callable[..., BatchStream],
) -> None:
    epochs = []
    texts = stream()
    for _ in range(4):
        epoch = [row for batch in drawn_from(texts, BATCHES) for row in batch]
        assert len({tuple(row) for row in epoch}) == len(epoch) == ROWS
        epochs.append(epoch)
    assert all(sorted(one) == sorted(other) for one, other in pairwise(epochs))
    assert len({str(epoch) for epoch in epochs}) == 4
    assert texts.drawn == 4 * BATCHES


@pytest.mark.parametrize("place", [0, 1, BATCHES - 1, BATCHES, BATCHES + 2, 3 * BATCHES + 1])
def test_a_place_that_is_set_goes_on_as_the_stream_that_was_never_interrupted(
    place: int, stream: Callable[..., BatchStream]
) -> None:
    whole = drawn_from(stream(), place + 2 * BATCHES)
    torch.manual_seed(99)  # the noise of the process has no part in it
    resumed = stream()
    resumed.drawn = place
    assert drawn_from(resumed, 2 * BATCHES) == whole[place:]
    assert resumed.drawn == place + 2 * BATCHES


def test_a_place_can_be_set_in_the_middle_of_reading(stream: Callable[..., BatchStream]) -> None:
    texts = stream()
    whole = drawn_from(texts, 7)
    for place in (2, 5, 0):
        texts.drawn = place
        assert tokens_of(next(texts)) == whole[place]


def test_data_without_a_whole_batch_are_an_input_error(trainer: Callable[..., Any]) -> None:
    class Empty:
        def __init__(self) -> None:
            self.prepare_data = lambda: None
            self.setup = lambda stage: None
            self.train_dataloader = list

    with pytest.raises(InputError, match="ptx_data has no training batch"):
        BatchStream(Empty(), trainer(max_steps=1))  # type: ignore[arg-type]


# Beside PPO --------------------------------------------------------------------


class Watching(PPOModule):
    """Keeps gradients before they are clipped, and the minibatches they are of."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.raw: list[Gradients] = []
        self.minibatches: list[Experience] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.raw.append({name: p.grad.clone() for name, p in self.policy.named_parameters() if p.grad is not None})
        super().on_before_optimizer_step(optimizer)


@pytest.fixture
def make(policy: Callable[..., Any], tokenizer: Any, texts: Callable[..., SFTDataModule]) -> Callable[..., Watching]:
    """A PPO module in float64 whose updates also learn the texts, with the weight given."""

    def build(ptx_coef: float, **settings: Any) -> Watching:
        # Llama computes its norms in float32 whatever it is given; GPT-2 is float64 throughout.
        network = policy("gpt2")
        network.generation_config.eos_token_id = list(range(1, 258, 5))
        defaults = {
            "reward": lambda prompts, responses: [float(len(text)) for text in responses],
            "tokenizer": tokenizer,
            "ptx_coef": ptx_coef,
            "ptx_data": texts() if ptx_coef else None,
            "ppo_epochs": 1,
            "minibatch_size": 6,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "max_new_tokens": 5,
            "preflight": False,
        }
        return Watching(network, **{**defaults, **settings}).double()

    return build


def language_gradient(network: Any, batch: SFTBatch) -> tuple[float, Gradients]:
    """The mean of -log p over the tokens that count, text by text without padding, and its gradient."""
    losses = []
    for row, keep, counts in zip(batch.tokens, batch.attention_mask, batch.loss_mask, strict=True):
        ids = row[keep]
        logprobs = network(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        losses += [-logprobs[t - 1, ids[t]] for t in range(len(ids)) if counts[keep][t]]
    loss = torch.stack(losses).mean()
    names = [name for name, _ in network.named_parameters()]
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, list(network.parameters())), strict=True))


@pytest.mark.parametrize("ptx_coef", [0.5, 27.8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 6])
def test_the_gradient_is_that_of_ppo_plus_the_weighted_one_of_the_texts(
    ptx_coef: float,
    micro_batch_size: int,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    stream: Callable[..., BatchStream],
) -> None:
    plain, mixed = make(0.0, micro_batch_size=micro_batch_size), make(ptx_coef, micro_batch_size=micro_batch_size)
    loss, texts = language_gradient(mixed.policy, next(stream()))
    fit(plain, [prompts], max_steps=1)
    logged = fit(mixed, [prompts], max_steps=1)
    assert logged["ppo/ptx_loss"] == pytest.approx([loss], rel=1e-6)
    for name, gradient in plain.raw[0].items():
        expected = gradient + ptx_coef * texts[name]
        torch.testing.assert_close(mixed.raw[0][name], expected, rtol=1e-9, atol=1e-9)


def test_every_update_takes_the_next_batch_of_texts(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], stream: Callable[..., BatchStream]
) -> None:
    # With a learning rate of 0 the loss says which batch it was.
    module = make(0.5, learning_rate=0.0, critic_learning_rate=0.0, ppo_epochs=3, minibatch_size=3)
    logged = fit(module, [prompts], max_steps=2, max_epochs=2)
    texts = stream()
    losses = [language_gradient(module.policy, next(texts))[0] for _ in range(12)]
    assert module.ptx_batches is not None
    assert module.ptx_batches.drawn == 12
    assert logged["ppo/ptx_loss"] == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 6], rel=1e-6)


def test_a_second_fit_reads_on_where_the_first_one_stopped(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], stream: Callable[..., BatchStream]
) -> None:
    module = make(0.5, learning_rate=0.0, critic_learning_rate=0.0, ppo_epochs=3, minibatch_size=3)
    fit(module, [prompts], max_steps=1)
    logged = fit(module, [prompts], max_steps=1)
    texts = stream()
    losses = [language_gradient(module.policy, next(texts))[0] for _ in range(12)]
    assert logged["ppo/ptx_loss"] == pytest.approx([sum(losses[6:]) / 6], rel=1e-6)


def test_a_resumed_run_reads_on_where_it_stopped_and_ends_bit_for_bit_the_same(
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Gradients],
) -> None:
    settings = {"ppo_epochs": 2, "minibatch_size": 2, "lr_schedule": "constant"}
    whole, half, resumed = (make(0.5, **settings) for _ in range(3))
    fit(whole, [prompts], max_epochs=3)
    fit(half, [prompts], max_epochs=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["ppo"]["ptx_drawn"] == 6
    fit(resumed, [prompts], max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    found, expected = weights(resumed), weights(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # From the stream's beginning it would have ended elsewhere.
    again = make(0.5, **settings)
    again.on_load_checkpoint = lambda checkpoint: None
    fit(again, [prompts], max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert not all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_two_processes_learn_the_mean_over_the_tokens_of_both(
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    """The gradient of PPO is 0 without advantages and penalty: what is left is that of the texts."""

    class Saving(Watching):
        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.ptx_batches.drawn = 0
            seen = {"gradient": self.raw[0], "loss": self.trainer.callback_metrics["ppo/ptx_loss"]}
            torch.save(seen | {"texts": vars(next(self.ptx_batches))}, tmp_path / f"{self.global_rank}.pt")

    module = make(
        2.0,
        reward=lambda prompts, responses: [0.0 for _ in responses],
        missing_eos_penalty=0.0,
        beta=0.0,
        advantage="grpo",
        samples_per_prompt=2,
        minibatch_size=12,
    )
    module.__class__ = Saving
    policy = module.policy
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trainer(max_steps=1, strategy="ddp_fork", devices=2).fit(module, make_loader([prompts]))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    batches = [SFTBatch(**rank["texts"]) for rank in ranks]
    assert batches[0].loss_mask.sum() != batches[1].loss_mask.sum()
    policy.load_state_dict(before)
    counts = [int(batch.loss_mask.sum()) for batch in batches]
    alone = [language_gradient(policy, batch) for batch in batches]
    shares = [count / sum(counts) for count in counts]
    assert ranks[0]["loss"].item() == pytest.approx(sum(s * loss for s, (loss, _) in zip(shares, alone, strict=True)))
    for rank in ranks:
        for name, gradient in rank["gradient"].items():
            expected = 2.0 * sum(s * texts[name] for s, (_, texts) in zip(shares, alone, strict=True))
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_that_is_put_back_comes_in_place_of_the_next(stream: Callable[..., BatchStream]) -> None:
    ahead = stream()
    _, second, _, other = (next(ahead) for _ in range(4))
    texts = stream()
    texts.put_back(other)
    assert next(texts) is other
    assert tokens_of(next(texts)) == tokens_of(second)


def test_the_texts_of_an_update_that_is_not_finite_are_kept_and_replayed_with_it(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], tmp_path: Path
) -> None:
    module = make(0.5)
    hook = next(module.policy.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    fit(module, [prompts], max_epochs=1)
    hook.remove()
    (file,) = (tmp_path / "bad_updates").iterdir()
    _, texts = read_records(file)[0]
    assert isinstance(texts, SFTBatch)
    lines: list[str] = []

    class Replay(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            # Elsewhere in the stream: the texts are those of the file.
            module.ptx_batches.drawn = 2
            lines.extend(module.replay(file))

    fit(module, [prompts], max_epochs=1, callbacks=[Replay()])
    loss, _ = language_gradient(make(0.5).policy, texts)
    # The texts come first, in two micro-batches.
    parts = [float(part) for part in lines[1].removeprefix("loss: ").split(", ")]
    assert sum(parts[:2]) == pytest.approx(0.5 * loss, rel=1e-5)


def test_ptx_data_of_another_kind_or_with_another_tokenizer_are_refused(
    fit: Callable[..., Any],
    policy: Callable[..., Any],
    prompts: PromptBatch,
    tokenizer: Any,
    make_tokenizer: Callable[..., Any],
) -> None:
    others = {
        "ptx_data must be an SFTDataModule; PPODataModule makes": PPODataModule([{"prompt": "a"}] * 4, batch_size=2),
        "the tokenizer of SFTDataModule": SFTDataModule(
            [{"text": "abc"}] * 4, tokenizer=make_tokenizer(pad_token="!", eos_token="<eos>"), val_fraction=0.0
        ),
    }
    for message, data in others.items():
        module = PPOModule(
            policy(),
            reward=lambda prompts, responses: [1.0 for _ in responses],
            tokenizer=tokenizer,
            minibatch_size=3,
            max_new_tokens=2,
            ptx_coef=1.0,
            ptx_data=data,
            preflight=False,
        )
        with pytest.raises(InputError, match=message):
            fit(module, [prompts], max_epochs=1)
