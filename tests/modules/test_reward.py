import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor
from transformers import AutoModelForSequenceClassification, OPTConfig, OPTForSequenceClassification

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import RewardModule
from rlhf_lightning.modules.reward import wins
from rlhf_lightning.networks.scalar_head import scalar_head
from rlhf_lightning.types import ComparisonBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

Ranking = list[list[int]]
"""The responses to one prompt, the best first."""

MIXED: list[Ranking] = [
    [[50, 60, 1], [50, 61, 62, 63, 1]],
    [[70, 30, 31, 1], [70, 32, 1], [70, 33, 34, 35, 1], [70, 36, 1]],
    [[80, 81, 82, 1], [80, 83, 1], [80, 84, 85, 1]],
]


def batch(
    rankings: list[Ranking],
    *,
    pads: int = 0,
    ranks: list[list[int]] | None = None,
    ratings: list[list[float]] | None = None,
) -> ComparisonBatch:
    ranks = ranks or [list(range(len(ranking))) for ranking in rankings]
    ratings = ratings or [[0.0] * len(ranking) for ranking in rankings]
    rows = [row for ranking in rankings for row in ranking]
    width = max(map(len, rows)) + pads
    return ComparisonBatch(
        tokens=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        # The prompt is the first token.
        response_mask=torch.tensor([[False] + [True] * (len(row) - 1) + [False] * (width - len(row)) for row in rows]),
        prompt_index=torch.tensor([i for i, ranking in enumerate(rankings) for _ in ranking]),
        ranks=torch.tensor([rank for of_prompt in ranks for rank in of_prompt]),
        ratings=torch.tensor([rating for of_prompt in ratings for rating in of_prompt]),
    )


def without_trainer(module: RewardModule) -> None:
    """Let a module compute its loss alone: there is nothing to log to, and no other process."""
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.share_of_mean = lambda total, count: total / count  # type: ignore[method-assign]


def separable(count: int, seed: int) -> list[Ranking]:
    """The better response of a pair holds token 100, the worse one token 101, among random others."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        prompt, good, bad = (torch.randint(10, 90, (3,), generator=generator).tolist() for _ in range(3))
        found.append([[*prompt, *good, 100, 1], [*prompt, 101, *bad[:2], 1]])
    return found


def scores_one_by_one(network: Any, rankings: list[Ranking]) -> list[list[Tensor]]:
    return [[network(torch.tensor([row])).logits[0, 0] for row in ranking] for ranking in rankings]


def pair_margins(scores: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[better - worse for better, worse in combinations(ranking, 2)] for ranking in scores]


@pytest.fixture
def make(classifier: Callable[..., Any], tokenizer: Any) -> Callable[..., RewardModule]:
    return lambda kind="llama", **settings: RewardModule(
        classifier(kind), tokenizer=tokenizer, **{"learning_rate": 1e-2, **settings}
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pads", [0, 4])
def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_their_pairs(
    kind: str, pads: int, make: Callable[..., RewardModule], classifier: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    margins = pair_margins(scores_one_by_one(classifier(kind), MIXED))
    losses = [torch.stack([(1 + (-m).exp()).log() for m in of_prompt]).mean() for of_prompt in margins]
    logged = fit(make(kind), [batch(MIXED, pads=pads)], max_steps=1)
    assert logged["reward/loss"] == pytest.approx([torch.stack(losses).mean().item()], rel=1e-4)
    right = [float(m > 0) for of_prompt in margins for m in of_prompt]
    assert logged["reward/accuracy"] == pytest.approx([sum(right) / len(right)])


def test_each_response_is_read_once_however_many_pairs_it_is_in(
    make: Callable[..., RewardModule], fit: Callable[..., Any]
) -> None:
    rows: list[int] = []
    module = make(shift_scores=False)
    module.reward_model.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    fit(module, [batch(MIXED)], max_steps=1)
    assert sum(rows) == 9


TIED_RANKS = [[0, 1], [0, 1, 1, 2], [0, 0, 0]]
RATINGS = [[1.5, 0.0], [2.0, 0.75, 0.75, 0.0], [0.0, 0.0, 0.0]]


def reference_loss(network: Any, margin_coef: float) -> Tensor:
    """The loss of `MIXED` with ties and margins, pair by pair in float64 (Touvron et al. 2023, eq. 2)."""
    of_prompts = []
    for scores, ranks, ratings in zip(scores_one_by_one(network, MIXED), TIED_RANKS, RATINGS, strict=True):
        losses = [
            (1 + (margin_coef * (ratings[i] - ratings[j]) - scores[i] + scores[j]).exp()).log()
            for i, j in combinations(range(len(scores)), 2)
            if ranks[i] != ranks[j]
        ]
        if losses:
            of_prompts.append(torch.stack(losses).mean())
    return torch.stack(of_prompts).mean()


@pytest.mark.parametrize("margin_coef", [0.0, 0.7])
def test_ties_are_no_pairs_and_margins_are_taken_off_as_in_a_reference_in_float64(
    margin_coef: float, make: Callable[..., RewardModule], classifier: Callable[..., Any]
) -> None:
    network = classifier().double()
    expected = reference_loss(network, margin_coef)
    expected.backward()
    module = make(margin_coef=margin_coef, share_prompts=True)
    without_trainer(module)
    loss = module.training_step(batch(MIXED, pads=2, ranks=TIED_RANKS, ratings=RATINGS), 0)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    found, wanted = (
        torch.cat([p.grad.double().flatten() for p in of.parameters()])  # type: ignore[union-attr]
        for of in (module.reward_model, network)
    )
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_a_ranking_can_count_as_a_whole(make: Callable[..., RewardModule], classifier: Callable[..., Any]) -> None:
    scores = [torch.stack(own).detach().float() for own in scores_one_by_one(classifier().double(), MIXED)]
    expected = [torch.stack([own[i:].logsumexp(dim=0) - own[i] for i in range(len(own) - 1)]).mean() for own in scores]
    found = {}
    for kind in ("pairwise", "k_wise"):
        module = make(ranking_loss=kind)
        without_trainer(module)
        found[kind] = module.training_step(batch(MIXED), 0).item()
    assert found["k_wise"] == pytest.approx(float(sum(expected) / len(expected)), abs=1e-5)
    assert abs(found["pairwise"] - found["k_wise"]) > 1e-3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0 must be finite and not negative"),
        ({"lr_floor": 2.0}, r"lr_floor=2\.0 must lie in \[0, 1\]"),
        ({"optimizer": "sgd"}, "optimizer=sgd must be one of adamw, adamw_8bit, paged_adamw_8bit, muon"),
        ({"head_init": "big"}, "head_init=big must be one of unit, small"),
        ({"ranking_loss": "listwise"}, "ranking_loss=listwise must be one of pairwise, k_wise"),
        ({"max_bad_updates": 0}, "max_bad_updates=0 must be a whole number, 1 or more"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"lm_coef": "0.1"}, "lm_coef='0.1' must be a number"),
        ({"margin_coef": "1"}, "margin_coef='1' must be a number"),
        *(
            ({name: wrong}, f"{name}={wrong} must be finite and not negative")
            for name in ("margin_coef", "lm_coef")
            for wrong in (-0.5, float("nan"), float("inf"))
        ),
    ],
)
def test_settings_are_looked_at_before_anything_is_loaded(
    setting: dict[str, Any], message: str, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(InputError, match=message):
        RewardModule("no/such/folder", **setting)
    # A network that is there already, and whose head is not drawn.
    with pytest.raises(InputError, match=message):
        RewardModule(classifier(), tokenizer=tokenizer, **setting)


def test_ties_do_not_count_in_validation(
    make: Callable[..., RewardModule], classifier: Callable[..., Any], validate: Callable[..., Any]
) -> None:
    with torch.no_grad():
        scores = scores_one_by_one(classifier(), MIXED)[1]
    right = [float(scores[i] > scores[j]) for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))]
    found = validate(make(), [batch(MIXED[1:2], ranks=TIED_RANKS[1:2])])
    assert found["reward/val_accuracy"] == pytest.approx(sum(right) / 5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_shared_prompts_have_the_same_loss_and_gradients_with_fewer_tokens(
    attn_implementation: str, make: Callable[..., RewardModule]
) -> None:
    alone, shared = make(), make(share_prompts=True)
    shared.reward_model.config._attn_implementation = attn_implementation
    read: list[int] = []
    shared.reward_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    losses, gradients = [], []
    for module in (alone, shared):
        without_trainer(module)
        loss = module.training_step(batch(MIXED, pads=3), 0)
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    together = [1 + sum(len(row) - 1 for row in ranking) for ranking in MIXED]
    # Attention by mask would be of every token to all tokens of one row.
    assert read == [sum(together) if attn_implementation == "sdpa" else len(together) * max(together)]


UNEVEN: list[Ranking] = [*MIXED, [[90, *range(91, 99), 1], [90, 1]], [[100, 40, 1], [100, 1]]]
"""Lengths of 2 to 10."""


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_sequences_have_the_same_loss_and_gradients(
    kind: str, share_prompts: bool, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    losses, gradients = [], []
    for settings in ({}, {"packing": True, "share_prompts": share_prompts}):
        network = classifier(kind, tie_word_embeddings=True).double()
        module = RewardModule(network, tokenizer=tokenizer, margin_coef=0.7, lm_coef=0.3, **settings)
        without_trainer(module)
        loss = module.training_step(
            batch(UNEVEN, pads=2, ranks=[*TIED_RANKS, [0, 1], [0, 1]], ratings=[*RATINGS, [0.5, 0.0], [1.0, 0.0]]), 0
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()


def body_reads(module: RewardModule) -> list[tuple[int, ...]]:
    """The shapes of the ids that the network's body reads from now on."""
    shapes: list[tuple[int, ...]] = []
    module.reward_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((*args, kwargs.get("input_ids"))[0].shape)), with_kwargs=True
    )
    return shapes


LOOK = (2, 3)
"""What is read to find out whether the head is plain."""


@pytest.mark.parametrize(
    ("attn_implementation", "settings", "shapes"),
    [
        ("sdpa", {}, [LOOK, (1, 51), (1, 51)]),
        ("sdpa", {"packing": True}, [(1, 4), (2, 13), (1, 51), LOOK, (1, 51)]),
        ("sdpa", {"packing": True, "share_prompts": True}, [(1, 43), (13, 13), (1, 43), LOOK, (1, 51)]),
        ("eager", {}, [LOOK, (13, 13), (13, 13)]),
        ("eager", {"packing": True}, [(1, 4), (2, 13), (6, 10), LOOK, (13, 13)]),
        ("eager", {"packing": True, "share_prompts": True}, [(4, 12), (13, 13), (4, 12), LOOK, (13, 13)]),
    ],
)
def test_training_reads_rows_where_they_are_asked_for_and_validation_no_padding_where_it_can_be_left_out(
    attn_implementation: str,
    settings: dict[str, Any],
    shapes: list[tuple[int, ...]],
    make: Callable[..., RewardModule],
    fit: Callable[..., Any],
) -> None:
    module = make(shift_scores=False, **settings)
    module.reward_model.config._attn_implementation = attn_implementation
    read = body_reads(module)
    fit(module, [batch(UNEVEN, pads=3)], val=[batch(UNEVEN, pads=3)], max_steps=1)
    assert read == shapes


def test_attention_that_takes_lengths_reads_a_batch_in_one_row(
    make: Callable[..., RewardModule], fit: Callable[..., Any], flash_by_lengths: str
) -> None:
    plain, told = make(shift_scores=False), make(shift_scores=False, packing=True)
    told.reward_model.config._attn_implementation = flash_by_lengths
    read = body_reads(told)
    losses = [fit(module, [batch(UNEVEN, pads=3)], max_epochs=3)["reward/loss"] for module in (plain, told)]
    assert read[-1] == (1, 51)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_shared_prompts_need_attention_that_takes_a_mask(
    classifier: Callable[..., Any], tokenizer: Any, flash_by_lengths: str
) -> None:
    network = classifier()
    network.config._attn_implementation = flash_by_lengths
    with pytest.raises(
        InputError, match="share_prompts=True needs attention that takes a mask of its own, which Flash"
    ):
        RewardModule(network, tokenizer=tokenizer, share_prompts=True)


def test_a_network_whose_scores_move_when_prompts_are_shared_is_refused_on_the_first_batch(
    classifier: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any]
) -> None:
    network = classifier(attn_implementation="eager")
    # As one whose attention looks at everything before it whatever the mask says.
    body = network.model.forward
    network.model.forward = lambda input_ids, attention_mask, **inputs: body(
        input_ids, attention_mask=attention_mask if attention_mask.dim() == 2 else None, **inputs
    )
    with pytest.raises(InputError, match="share_prompts=True moves scores of LlamaForSequenceClassification by"):
        fit(RewardModule(network, tokenizer=tokenizer, share_prompts=True), [batch(MIXED)], max_steps=1)


def test_a_network_that_finds_positions_from_its_mask_is_refused_when_sequences_are_packed(
    tokenizer: Any, fit: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=258, hidden_size=16, ffn_dim=32, word_embed_proj_dim=16, num_hidden_layers=2)
    config.num_attention_heads, config.init_std, config.num_labels, config.pad_token_id = 2, 0.3, 1, 0
    config._attn_implementation = "eager"
    module = RewardModule(OPTForSequenceClassification(config), tokenizer=tokenizer, packing=True)
    with pytest.raises(
        InputError, match=r"packing=True moves scores of OPTForSequenceClassification by .* set packing="
    ):
        fit(module, [batch(MIXED)], max_steps=1)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_next_token_loss_of_the_best_responses_is_added(
    share_prompts: bool, make: Callable[..., RewardModule], classifier: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    network = classifier(tie_word_embeddings=True)
    logged = fit(
        RewardModule(network, tokenizer=make().tokenizer, lm_coef=0.5, learning_rate=0.0, share_prompts=share_prompts),
        [batch(MIXED, pads=2)],
        max_steps=1,
    )
    losses = []
    for row in (ranking[0] for ranking in MIXED):
        with torch.no_grad():
            hidden = network.model(torch.tensor([row])).last_hidden_state[0]
        logprobs = torch.log_softmax(hidden @ network.model.embed_tokens.weight.T, dim=-1)
        losses += [-logprobs[t - 1, row[t]].item() for t in range(1, len(row))]
    assert logged["reward/lm_loss"] == pytest.approx([sum(losses) / len(losses)], rel=1e-5)


def test_the_next_token_loss_has_its_weight_in_the_gradient(
    classifier: Callable[..., Any], tokenizer: Any, trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    gradients = {}
    for lm_coef in (0.0, 1.0, 2.0):
        network = classifier(tie_word_embeddings=True)
        module = RewardModule(network, tokenizer=tokenizer, lm_coef=lm_coef, learning_rate=0.0, shift_scores=False)
        seen: list[Tensor] = []
        module.on_before_optimizer_step = lambda _, seen=seen, network=network: seen.append(  # type: ignore[method-assign,misc]
            network.model.embed_tokens.weight.grad.clone()
        )
        trainer(max_steps=1).fit(module, make_loader([batch(MIXED)]))
        gradients[lm_coef] = seen[0]
    torch.testing.assert_close(gradients[2.0] - gradients[0.0], 2 * (gradients[1.0] - gradients[0.0]))
    assert not torch.allclose(gradients[1.0], gradients[0.0])


def test_the_next_token_loss_needs_output_embeddings(make: Callable[..., RewardModule]) -> None:
    with pytest.raises(InputError, match="tie_word_embeddings"):
        make(lm_coef=0.1)
    with pytest.raises(InputError, match=r"lm_coef=-0\.1 must be finite and not negative"):
        make(lm_coef=-0.1)


def test_validation_metrics_are_over_all_pairs_of_all_batches(
    make: Callable[..., RewardModule], classifier: Callable[..., Any], validate: Callable[..., Any]
) -> None:
    with torch.no_grad():
        margins = [m for p in pair_margins(scores_one_by_one(classifier(), MIXED)) for m in p]
    found = validate(make(), [batch(MIXED[:1], pads=2), batch(MIXED[1:])])
    expected = torch.stack(margins)
    assert found["reward/val_loss"] == pytest.approx((1 + (-expected).exp()).log().mean().item(), rel=1e-4)
    assert found["reward/val_accuracy"] == pytest.approx((expected > 0).float().mean().item())
    assert found["reward/val_margin"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["reward/val_calibration_error"] == pytest.approx(calibration_error(expected.tolist()), rel=1e-4)


def calibration_error(margins: list[float]) -> float:
    """Mean of |accuracy - confidence| over 10 bins of confidence from 1/2 to 1, weighted by pairs (Guo et al. 2017)."""
    confidences = [1 / (1 + math.exp(-abs(margin))) for margin in margins]
    found = 0.0
    for low in (0.5 + 0.05 * i for i in range(10)):
        inside = [i for i, confidence in enumerate(confidences) if low <= confidence < low + 0.05]
        if inside:
            accuracy = sum((margins[i] > 0) + 0.5 * (margins[i] == 0) for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            found += len(inside) / len(margins) * abs(accuracy - confidence)
    return found


def test_a_tie_counts_half() -> None:
    assert wins(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_what_separates_good_from_bad_is_learned(
    make: Callable[..., RewardModule], fit: Callable[..., Any], validate: Callable[..., Any]
) -> None:
    module = make()
    losses = fit(module, [batch(separable(8, seed)) for seed in range(12)], max_epochs=3)["reward/loss"]
    assert losses[-1] < 0.2 * losses[0]
    found = validate(module, [batch(separable(64, seed=99))])
    assert found["reward/val_accuracy"] > 0.95


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_after_training_the_best_responses_of_the_training_data_average_0(
    kind: str, make: Callable[..., RewardModule], fit: Callable[..., Any]
) -> None:
    data = [batch(separable(8, seed), pads=seed) for seed in range(3)] + [batch(MIXED)]
    for shift_scores in (True, False):
        module = make(kind, shift_scores=shift_scores)
        fit(module, data, max_epochs=1)
        with torch.no_grad():
            chosen = torch.cat([module(b.tokens, b.attention_mask)[b.ranks == 0] for b in data])
        assert (abs(chosen.mean().item()) < 1e-3) is shift_scores


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_the_best_of_several_batches_are_read_at_once_for_the_same_shift(
    attn_implementation: str,
    make: Callable[..., RewardModule],
    fit: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Their best responses are of different number and length.
    data = [batch(separable(2, seed), pads=seed) for seed in range(8)] + [batch(MIXED, ranks=TIED_RANKS), batch(UNEVEN)]
    heads, reads = [], []
    for at_once in (8, 1):
        monkeypatch.setattr("rlhf_lightning.modules.reward.BATCHES_AT_ONCE", at_once)
        module = make()
        module.reward_model.config._attn_implementation = attn_implementation
        read = body_reads(module)
        fit(module, data, max_epochs=1)
        heads.append(scalar_head(module.reward_model).weight)
        reads.append(read)
    # 16 of 8 tokens each, and 10 of 3 to 10 tokens.
    assert reads[0][-2:] == [(16, 8), (1, 42) if attn_implementation == "sdpa" else (10, 10)]
    assert len(reads[1]) == len(reads[0]) + 10 - 2
    torch.testing.assert_close(*heads)


def test_the_exported_folder_gives_the_modules_scores_in_transformers_alone(
    tmp_path: Path, make: Callable[..., RewardModule], fit: Callable[..., Any]
) -> None:
    module = make()
    fit(module, [batch(MIXED)], max_epochs=3)
    module.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    sequences = batch(MIXED, pads=2)
    with torch.no_grad():
        found = loaded(input_ids=sequences.tokens, attention_mask=sequences.attention_mask.long()).logits.squeeze(-1)
        torch.testing.assert_close(found, module(sequences.tokens, sequences.attention_mask))
    assert found[sequences.ranks == 0].mean().item() == pytest.approx(0.0, abs=1e-3)


def test_scores_are_blind_to_padding_and_to_what_lies_in_it(make: Callable[..., RewardModule]) -> None:
    module, narrow, wide = make(), batch(MIXED), batch(MIXED, pads=5)
    expected = module(narrow.tokens, narrow.attention_mask)
    torch.testing.assert_close(module(wide.tokens, wide.attention_mask), expected)


def test_a_language_model_becomes_a_reward_model_with_the_head_of_the_seed(
    policy: Callable[..., Any], tokenizer: Any
) -> None:
    one, same, other = (RewardModule(policy(), tokenizer=tokenizer, seed=s).reward_model.score for s in (0, 0, 1))
    assert one.weight.shape == (1, 16)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("as_folder", [True, False])
def test_head_init_sets_the_spread_of_a_language_models_new_head(
    as_folder: bool, policy: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    network = policy(hidden_size=2048, intermediate_size=8, num_hidden_layers=1)
    if as_folder:
        network.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    for head_init, std in (("unit", 2049**-0.5), ("small", 1 / 2049)):
        module = RewardModule(tmp_path if as_folder else network, tokenizer=tokenizer, head_init=head_init)
        assert scalar_head(module.reward_model).weight.std().item() == pytest.approx(std, rel=0.05)


def test_with_a_small_head_the_loss_begins_at_that_of_guessing(
    policy: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any]
) -> None:
    first = {}
    for head_init in ("unit", "small"):
        module = RewardModule(policy(hidden_size=64), tokenizer=tokenizer, head_init=head_init, learning_rate=0.0)
        first[head_init] = fit(module, [batch(MIXED)], max_steps=1)["reward/loss"][0]
    assert first["small"] == pytest.approx(math.log(2), abs=0.1)
    assert abs(first["unit"] - math.log(2)) > 2 * abs(first["small"] - math.log(2))


def test_a_language_model_without_a_padding_token_is_trained(
    policy: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any]
) -> None:
    module = RewardModule(policy(pad_token_id=None), tokenizer=tokenizer)
    fit(module, [batch(MIXED)], max_steps=1)
    assert module.reward_model.config.pad_token_id == 0


def test_training_runs_without_dropout(classifier: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any]) -> None:
    logged = []
    for seed in (0, 1):
        network = classifier("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        torch.manual_seed(seed)
        logged.append(fit(RewardModule(network, tokenizer=tokenizer), [batch(MIXED)], max_epochs=2)["reward/loss"])
    assert logged[0] == logged[1]


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 5e-3},
        {"weight_decay": 0.5},
        {"lr_schedule": "constant"},
        {"lr_floor": 0.5},
        {"warmup_steps": 2},
        {"shift_scores": False},
        {"margin_coef": 1.0},
    ],
)
def test_every_setting_changes_the_trained_weights(
    setting: dict[str, Any], make: Callable[..., RewardModule], fit: Callable[..., Any], weights: Callable[..., Any]
) -> None:
    default, other = make(), make(**setting)
    for module in (default, other):
        fit(module, [batch(MIXED, ratings=RATINGS), batch(separable(2, 0))], max_epochs=2)
    before, after = weights(default.reward_model), weights(other.reward_model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_the_warm_up_begins_at_its_share_of_the_learning_rate(
    make: Callable[..., RewardModule], fit: Callable[..., Any]
) -> None:
    found = Rates()
    module = make(learning_rate=1e-3, lr_schedule="constant", warmup_steps=2, warmup_from=0.2)
    fit(module, [batch(MIXED), batch(separable(2, 0))], max_epochs=2, callbacks=[found])
    assert found.seen == pytest.approx([2e-4, 6e-4, 1e-3, 1e-3])


def test_two_processes_shift_the_scores_by_the_mean_over_both(
    tmp_path: Path,
    make: Callable[..., RewardModule],
    classifier: Callable[..., Any],
    tokenizer: Any,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    halves = (batch(separable(2, 0)), batch(separable(6, 1)))

    class Halves(RewardModule):
        def train_dataloader(self) -> Any:
            return make_loader([halves[self.global_rank]])

        def on_train_end(self) -> None:
            super().on_train_end()
            torch.save(self.reward_model.state_dict(), tmp_path / f"{self.global_rank}.pt")

    trainer(max_epochs=1, strategy="ddp_fork", devices=2).fit(Halves(classifier(), tokenizer=tokenizer))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    module = make()
    module.reward_model.load_state_dict(first)
    with torch.no_grad():
        chosen = torch.cat([module(b.tokens, b.attention_mask)[b.ranks == 0] for b in halves])
    assert chosen.mean().item() == pytest.approx(0.0, abs=1e-3)
