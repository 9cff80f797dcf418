from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.types import SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

FEW = ([[50, 90, 70, 30, 20, 1], [80, 40, 1]], [[0, 0, 0, 1, 1, 1], [0, 1, 1]])
MANY = ([[11, 12, 13, 14, 15, 16, 17, 1], [21, 22, 23, 24, 1], [5, 6]], [[0] + [1] * 7, [0, 0, 1, 1, 1], [0, 1]])


def batch(rows: list[list[int]], targets: list[list[int]], *, pads: int = 0, pad: int = 0) -> SFTBatch:
    width = max(map(len, rows)) + pads
    return SFTBatch(
        tokens=torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        loss_mask=torch.tensor([[bool(x) for x in row] + [False] * (width - len(row)) for row in targets]),
    )


def mistral() -> Any:
    """A network whose attention reaches back three tokens."""
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 8
    config.sliding_window, config.initializer_range = 3, 0.3
    return MistralForCausalLM(config)


def token_losses(network: Any, rows: list[list[int]], targets: list[list[int]]) -> Tensor:
    """-log p of each token that counts, sequence by sequence, without any padding."""
    found = []
    for row, counts in zip(rows, targets, strict=True):
        logprobs = network(torch.tensor([row])).logits[0].log_softmax(-1)
        found += [-logprobs[t - 1, row[t]] for t in range(len(row)) if counts[t]]
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_mean_cross_entropy_of_the_tokens_that_count(
    kind: str, policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    expected = token_losses(policy(kind), *FEW).mean().item()
    for pads in (0, 3):
        logged = fit(SFTModule(policy(kind)), [batch(*FEW, pads=pads, pad=99)], max_steps=1)
        assert logged["sft/loss"] == pytest.approx([expected], rel=1e-4)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_batch(
    policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    network = policy()
    token_losses(network, *MANY).mean().backward()
    expected = {name: p.grad for name, p in network.named_parameters()}

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.found = {name: p.grad.clone() for name, p in module.policy.named_parameters()}

    seen = Gradients()
    fit(SFTModule(policy()), [batch(*MANY)], max_steps=1, callbacks=[seen])
    for name, gradient in expected.items():
        torch.testing.assert_close(seen.found[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_loss_falls_and_the_end_token_is_learned(policy: Callable[..., Any], fit: Callable[..., Any]) -> None:
    module = SFTModule(policy(), learning_rate=1e-2)
    losses = fit(module, [batch(*FEW)], max_epochs=40)["sft/loss"]
    assert losses[-1] < 0.1 * losses[0]
    logits = module.policy(torch.tensor([FEW[0][0][:-1]])).logits
    assert logits[0, -1].argmax() == 1


def test_validation_metrics_are_over_all_tokens_of_all_batches(
    policy: Callable[..., Any], validate: Callable[..., Any]
) -> None:
    module = SFTModule(policy())
    with torch.no_grad():
        losses = torch.cat([token_losses(policy(), *FEW), token_losses(policy(), *MANY)])
    hits = []
    for rows, targets in (FEW, MANY):
        for row, counts in zip(rows, targets, strict=True):
            likeliest = policy()(torch.tensor([row])).logits[0].argmax(-1)
            hits += [float(likeliest[t - 1] == row[t]) for t in range(len(row)) if counts[t]]
    found = validate(module, [batch(*FEW), batch(*MANY, pads=2)])
    assert found["sft/val_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert found["sft/val_perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-3)
    assert found["sft/val_token_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_token_accuracy_is_1_once_everything_is_learned(
    policy: Callable[..., Any], fit: Callable[..., Any], validate: Callable[..., Any]
) -> None:
    module = SFTModule(policy(), learning_rate=1e-2)
    fit(module, [batch(*MANY)], max_epochs=60)
    assert validate(module, [batch(*MANY)])["sft/val_token_accuracy"] == 1.0


def test_dropout_is_on_in_training_and_off_in_validation(policy: Callable[..., Any], fit: Callable[..., Any]) -> None:
    class Forwards(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.training = [module(batch(*FEW))[0].detach() for _ in range(2)]

        def on_validation_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.validation = [module(batch(*FEW))[0] for _ in range(2)]

    seen = Forwards()
    module = SFTModule(policy("gpt2", resid_pdrop=0.5))
    fit(module, [batch(*FEW)], val=[batch(*FEW)], max_steps=1, callbacks=[seen])
    assert not torch.allclose(*seen.training)
    assert torch.equal(*seen.validation)


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447])],
)
def test_the_learning_rate_follows_its_schedule_over_the_steps_of_the_trainer(
    schedule: Any, rates: list[float], policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    found = Rates()
    module = SFTModule(policy(), learning_rate=1e-3, lr_schedule=schedule)
    fit(module, [batch(*FEW), batch(*MANY)], max_epochs=2, callbacks=[found])
    assert found.seen == pytest.approx([1e-3 * rate for rate in rates], rel=1e-4)


def test_the_warm_up_begins_at_its_share_of_the_learning_rate(
    policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    found = Rates()
    module = SFTModule(policy(), learning_rate=1e-3, lr_schedule="constant", warmup_steps=2, warmup_from=0.2)
    fit(module, [batch(*FEW), batch(*MANY)], max_epochs=2, callbacks=[found])
    assert found.seen == pytest.approx([2e-4, 6e-4, 1e-3, 1e-3])


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 5e-3},
        {"weight_decay": 0.5},
        {"lr_schedule": "constant"},
        {"lr_floor": 0.5},
        {"warmup_steps": 2},
        {"dropout": 0.5},
    ],
)
def test_every_setting_changes_the_trained_weights(
    setting: dict[str, Any], policy: Callable[..., Any], fit: Callable[..., Any], weights: Callable[..., Any]
) -> None:
    default, other = (SFTModule(policy("gpt2"), **{"learning_rate": 1e-3, **s}) for s in ({}, setting))
    for module in (default, other):
        fit(module, [batch(*FEW), batch(*MANY)], max_epochs=2)
    before, after = weights(default.policy), weights(other.policy)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_dropout_is_set_for_every_layer_and_off_in_validation(policy: Callable[..., Any]) -> None:
    module = SFTModule(policy("gpt2"), dropout=0.4)
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Dropout)]
    assert {layer.p for layer in layers} == {0.4}
    tokens = torch.tensor([[5, 9, 7]])
    assert not torch.equal(module.policy(tokens).logits, module.policy(tokens).logits)
    module.eval()
    assert torch.equal(module.policy(tokens).logits, module.policy(tokens).logits)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in"),
        ({"lr_floor": -0.1}, r"lr_floor=-0\.1 must lie in \[0, 1\]"),
        ({"lr_schedule": "step"}, "lr_schedule=step must be one of constant, linear, cosine"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be finite and not negative"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 must be finite and not negative"),
        ({"warmup_steps": 1.5}, r"warmup_steps=1\.5 must be a whole number, 0 or more"),
        ({"warmup_steps": True}, "warmup_steps=True must be a whole number, 0 or more"),
        ({"warmup_from": 1.0}, r"warmup_from=1\.0 must lie in \[0, 1\)"),
        ({"warmup_from": "0.1"}, r"warmup_from='0\.1' must be a number"),
        ({"dropout": "0.2"}, r"dropout='0\.2' must be a number"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a number"),
        ({"weight_decay": None}, "weight_decay=None must be a number"),
        ({"lr_floor": "0"}, "lr_floor='0' must be a number"),
        ({"tokenizer": "gpt2"}, r"tokenizer='gpt2' must be a tokenizer and not its name: load_tokenizer\('gpt2'\)"),
        ({"dropout": 0.2}, r"dropout=0\.2: LlamaForCausalLM has no dropout layers"),
    ],
)
def test_a_setting_that_cannot_be_had_is_an_input_error(
    setting: dict[str, Any], message: str, policy: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=message):
        SFTModule(policy(), **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0 must be finite and not negative"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in"),
        ({"optimizer": "sgd"}, "optimizer=sgd must be one of adamw, adamw_8bit, paged_adamw_8bit, muon"),
        ({"max_bad_updates": 0}, "max_bad_updates=0 must be a whole number, 1 or more"),
    ],
)
def test_settings_are_looked_at_before_anything_is_loaded(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SFTModule("no/such/folder", **setting)


PAIRS = ([[7, 8], [9, 10], [11, 12]], [[0, 1], [0, 1], [0, 1]])
ONE = ([FEW[0][0]], [FEW[1][0]])


@pytest.mark.parametrize("rows", [FEW, MANY, PAIRS, ONE], ids=["few", "many", "of two tokens", "one"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_padded_and_packed_sequences_have_the_loss_and_gradient_of_a_loop_over_their_tokens_in_float64(
    kind: str, rows: tuple[list[list[int]], list[list[int]]], policy: Callable[..., Any]
) -> None:
    network = (mistral() if kind == "mistral" else policy(kind)).double().eval()
    expected = token_losses(network, *rows).sum()
    expected.backward()
    expected_gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    for packing in (False, True):
        module = SFTModule((mistral() if kind == "mistral" else policy(kind)).double(), packing=packing).eval()
        loss = module.differentiated(batch(*rows, pads=2))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        gradient = torch.cat([p.grad.flatten() for p in module.policy.parameters() if p.grad is not None])
        assert (gradient - expected_gradient).norm() < 1e-6 * expected_gradient.norm()


def shapes_read(module: SFTModule) -> list[tuple[int, ...]]:
    """The shapes of the ids that the network's body reads from now on."""
    shapes: list[tuple[int, ...]] = []
    module.policy.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize(
    ("attn_implementation", "expected"),
    [
        # Of padded sequences it reads no padding but in that look.
        ("sdpa", [(2, 11), (1, 7), (1, 15), (1, 15), (1, 15)]),
        ("eager", [(2, 11), (1, 7), (2, 8), (2, 8), (3, 11)]),
    ],
)
def test_packed_sequences_are_read_in_fewer_rows_after_a_look_at_the_two_shortest(
    attn_implementation: str, expected: list[tuple[int, int]], policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    network = policy(attn_implementation=attn_implementation)
    module, data = SFTModule(network, packing=True), batch(*MANY, pads=3)
    shapes = shapes_read(module)
    fit(module, [data, data], val=[data], max_steps=2)
    # What tells whether the output layer is plain reads two tokens.
    assert [shape for shape in shapes if shape != (1, 2)] == expected


def test_attention_that_takes_lengths_reads_a_batch_in_one_row(
    policy: Callable[..., Any], fit: Callable[..., Any], flash_by_lengths: str
) -> None:
    network = policy()
    network.config._attn_implementation = flash_by_lengths
    module = SFTModule(network, packing=True)
    shapes = shapes_read(module)
    logged = fit(module, [batch(*MANY, pads=3)], max_steps=1)
    assert shapes[-1] == (1, 15)
    assert logged["sft/loss"] == pytest.approx([token_losses(policy(), *MANY).mean().item()], rel=1e-4)


def opt() -> Any:
    """A network that finds positions from its mask, unless it is told them and needs none."""
    config = OPTConfig(vocab_size=258, hidden_size=16, ffn_dim=32, word_embed_proj_dim=16, num_hidden_layers=2)
    config.num_attention_heads, config.init_std = 2, 0.3
    return OPTForCausalLM._from_config(config, attn_implementation="eager")


def mamba() -> Any:
    """A network whose state goes through all of a row."""
    return MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2, initializer_range=0.3))


@pytest.mark.parametrize("make", [opt, mamba])
def test_a_network_that_does_not_keep_sequences_apart_is_refused_on_the_first_batch(
    make: Callable[[], Any], fit: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    module = SFTModule(make(), packing=True)
    with pytest.raises(InputError, match=r"packing=True moves log-probabilities of \w+ForCausalLM by .* set packing="):
        fit(module, [batch([[9, 1], [8]], [[0, 1], [0]]), batch(*MANY)], max_epochs=1)


def test_the_look_at_packing_takes_no_noise_from_the_training(policy: Callable[..., Any]) -> None:
    module = SFTModule(policy("gpt2", resid_pdrop=0.5), packing=True)
    torch.manual_seed(3)
    module._check_packing(batch(*MANY))
    found = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(4))
    assert module.policy.training


def test_packed_sequences_are_trained_on_in_mixed_precision_from_the_first_batch_on(
    policy: Callable[..., Any], fit: Callable[..., Any], weights: Callable[..., Any]
) -> None:
    trained, losses = [], []
    for packing in (False, True):
        module = SFTModule(policy(), learning_rate=1e-2, packing=packing)
        losses.append(fit(module, [batch(*MANY)], max_epochs=3, precision="bf16-mixed")["sft/loss"])
        trained.append(weights(module.policy))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    before = weights(policy())
    for name, weight in trained[1].items():
        moved = (weight - before[name]).norm()
        assert moved == pytest.approx((trained[0][name] - before[name]).norm().item(), rel=0.1), name
        assert moved > 0, name


def test_the_folder_is_loaded_by_transformers_alone(
    tmp_path: Path, policy: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any]
) -> None:
    module = SFTModule(policy(), tokenizer=tokenizer, learning_rate=1e-2)
    fit(module, [batch(*FEW)], max_epochs=2)
    module.save_pretrained(tmp_path)
    tokens = torch.tensor([[5, 9, 7]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, module.policy.eval()(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1
    assert SFTModule(tmp_path).stop_token_ids == [1]


def test_a_network_without_a_tokenizer_cannot_be_exported(tmp_path: Path, policy: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"SFTModule was given a network without a tokenizer: pass tokenizer="):
        SFTModule(policy()).save_pretrained(tmp_path)


def test_the_longest_sequence_is_that_of_the_network(policy: Callable[..., Any]) -> None:
    assert SFTModule(policy("gpt2")).max_positions == 64


def test_two_processes_with_uneven_numbers_of_tokens_take_the_step_of_one_with_both(
    tmp_path: Path, policy: Callable[..., Any], trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    both = batch([*FEW[0], *MANY[0]], [*FEW[1], *MANY[1]])
    parts = {1: [both], 2: [batch(*FEW), batch(*MANY)]}

    class Parts(SFTModule):
        def train_dataloader(self) -> Any:
            return make_loader([parts[self.trainer.world_size][self.global_rank]])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            found = {name: p.grad for name, p in self.policy.named_parameters()}
            torch.save(found, tmp_path / f"{self.trainer.world_size}-{self.global_rank}.pt")

    for settings in ({}, {"strategy": "ddp_fork", "devices": 2}):
        trainer(max_steps=1, **settings).fit(Parts(policy()))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, gradient in one.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name], second[name])
