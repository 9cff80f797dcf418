"""What must not matter: padding, the order of rows, how they are cut, a shift of the scores, one process or two.

Scores of the rollout, advantages, gradients and every logged number are compared in float64, of a policy that has moved
since it sampled, so that ratios differ from 1 and some are clipped.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.rollout.metrics import critic_metrics, rollout_metrics
from rlhf_lightning.rollout.shaping import RunningMoments, moments_of
from rlhf_lightning.types import PromptBatch, Rollout, ScoredRollout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]

GROUP = 2
SEEN = [0.5, -1.0, 2.0]
PENALTIES: dict[str, Any] = {
    "missing_eos": "subtract",
    "missing_eos_penalty": 0.7,
    "length_penalty": 0.01,
    "repetition_penalty": 0.3,
    "max_new_tokens": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "gae": {},
    "gae, end_token, sequences": {"score_placement": "end_token", "loss_mean": "sequences"},
    "gae, loss_k1": {"kl_penalty": "loss_k1", "entropy_coef": 0.2},
    "gae, loss_k2, normalised": {"kl_penalty": "loss_k2", "normalize_scores": "shift_and_scale", "score_clip": 1.0},
    "reinforce": {"advantage": "reinforce", "ppo_epochs": 1},
    "reinforce, running, loss_k1": {
        "advantage": "reinforce",
        "ppo_epochs": 1,
        "baseline": "running",
        "kl_penalty": "loss_k1",
        "loss_mean": "sequences",
    },
    "rloo": {"advantage": "rloo"},
    "rloo, loss_k2": {"advantage": "rloo", "kl_penalty": "loss_k2", "normalize_scores": "scale"},
    "grpo": {"advantage": "grpo", "loss_mean": "sequences", "entropy_coef": 0.1},
    "grpo, loss_k1": {"advantage": "grpo", "kl_penalty": "loss_k1"},
    "gae, mask": {"missing_eos": "mask"},
    "rloo, mask, sequences": {"advantage": "rloo", "missing_eos": "mask", "loss_mean": "sequences"},
}
# The first example of every strategy is its simplest: none may be one in which nothing is changed.
few = settings(max_examples=8, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
fewer = settings(few, max_examples=4)
"""Of what takes many small forwards."""
Made = tuple[Any, Rollout, ScoredRollout, Any]


@pytest.fixture(scope="module")
def cached() -> Callable[[Callable[[], Made], str], Made]:
    """Each case's bench, rollout, scored rollout and what was worked out of it, made once."""
    made: dict[str, Made] = {}

    def get(make: Callable[[], Made], name: str) -> Made:
        if name not in made:
            made[name] = make()
        return made[name]

    return get


@pytest.fixture
def case(bench: Callable[..., Any], prompts: PromptBatch, cached: Callable[..., Made]) -> Callable[[str], Made]:
    """``case(name)``: twelve responses to six prompts, of uneven length."""

    def make(name: str) -> Made:
        work = bench(
            **{"beta": 0.3, "clip_range": 0.05, "value_clip_range": 0.05, **PENALTIES, **CASES[name]},
            samples_per_prompt=GROUP,
            micro_batch_size=6,
        )
        rollout = work.rollout(prompts)
        scored = work.score(rollout)
        found = work.work(scored, SEEN)
        assert len(set(scored.response_mask.sum(dim=1).tolist())) > 2
        assert 0 < found.metrics["missing_eos"] < 1
        assert 0 < found.metrics["clip_fraction"] < 1
        return work, rollout, scored, found

    return lambda name: cached(lambda: make(name), name)


def assert_same(found: Any, expected: Any) -> None:
    """The same logged numbers and gradients."""
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-7)
    assert_gradients(found.gradients, expected.gradients)


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9)


def padded(rollout: Rollout, left: int, right: int) -> Rollout:
    """The same rollout with more padding; the padding holds ids that are real tokens elsewhere."""
    size = len(rollout)

    def columns(x: Tensor, fill: int, before: int, after: int) -> Tensor:
        return torch.cat([x.new_full((size, before), fill), x, x.new_full((size, after), fill)], dim=1)

    return replace(
        rollout,
        prompt_tokens=columns(rollout.prompt_tokens, 9, left, 0),
        prompt_mask=columns(rollout.prompt_mask, False, left, 0),
        tokens=columns(rollout.tokens, 9, left, right),
        attention_mask=columns(rollout.attention_mask, False, left, right),
        response_mask=columns(rollout.response_mask, False, 0, right),
    )


@pytest.mark.parametrize("name", CASES)
@few
@given(left=st.integers(1, 7), right=st.integers(1, 7))
def test_padding_on_either_side(name: str, left: int, right: int, case: Callable[[str], Made]) -> None:
    # Columns of nothing but padding; that of single rows comes and goes with the size of the micro-batch, below.
    work, rollout, _, expected = case(name)
    assert_same(work.work(work.score(padded(rollout, left, right)), SEEN), expected)


@pytest.mark.parametrize("name", CASES)
@few
@given(groups=st.permutations(range(6)), inside=st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_order_of_prompts_and_of_the_samples_of_a_prompt(
    name: str, groups: list[int], inside: list[bool], case: Callable[[str], Made]
) -> None:
    work, rollout, _, expected = case(name)
    rows = [GROUP * g + (1 - i if inside[g] else i) for g in groups for i in range(GROUP)]
    assume(rows != sorted(rows))
    found = work.work(work.score(rollout.rows(torch.tensor(rows))), SEEN)
    assert_same(found, expected)
    advantages = expected.experience.advantages[rows]
    torch.testing.assert_close(found.experience.advantages, advantages, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("gae", "reinforce"))])
@few
@given(rows=st.permutations(range(12)))
def test_which_rows_are_neighbours_where_nothing_compares_the_samples_of_a_prompt(
    name: str, rows: list[int], case: Callable[[str], Made]
) -> None:
    assume(rows != sorted(rows))
    work, rollout, _, expected = case(name)
    assert_same(work.work(work.score(rollout.rows(torch.tensor(rows))), SEEN), expected)


@pytest.mark.parametrize("name", CASES)
@fewer
@given(size=st.sampled_from([1, 4, 5, 100]))
def test_the_size_of_the_micro_batch(name: str, size: int, case: Callable[[str], Made]) -> None:
    work, rollout, _, expected = case(name)
    usual, work.module.micro_batch_size = work.module.micro_batch_size, size
    try:
        assert_same(work.work(work.score(rollout), SEEN), expected)
    finally:
        work.module.micro_batch_size = usual


@pytest.mark.parametrize("name", CASES)
@fewer
@given(order=st.permutations(range(12)), size=st.sampled_from([3, 2, 4, 1]))
def test_how_an_epoch_at_a_learning_rate_of_0_is_cut_into_minibatches(
    name: str, order: list[int], size: int, case: Callable[[str], Made]
) -> None:
    """Its minibatches' gradients, weighted by what each is a mean over, add up to that of the whole rollout.

    That is tokens for the policy (sequences with loss_mean="sequences"), and states for the critic. The plain sum of
    gradients of means is not invariant unless the minibatches have equal counts.
    """
    assume(order != sorted(order))
    work, _, _, expected = case(name)
    whole, module = expected.experience, work.module
    total: dict[str, Tensor] = {}
    for rows in torch.tensor(order).split(size):
        part = whole.rows(rows)
        module.zero_grad()
        module._accumulate_gradients(part)
        tokens, states = int(part.response_mask.sum()), int(part.value_mask.sum())
        learned, all_learned = (int(x.response_mask.any(dim=1).sum()) for x in (part, whole))
        sequences = module.loss_mean == "sequences"
        shares = {
            "policy": learned / all_learned if sequences else tokens / int(whole.response_mask.sum()),
            "critic": states / int(whole.value_mask.sum()),
        }
        for weight, gradient in work.gradients().items():
            total[weight] = total.get(weight, 0.0) + shares[weight.split(".")[0]] * gradient
    assert_gradients(total, expected.gradients)


# A shift of every score --------------------------------------------------------

SHIFT_IS_NOTHING: dict[str, dict[str, Any]] = {
    "gae without discount": {"gamma": 1.0, "lam": 1.0},
    "gae without discount, end_token": {"gamma": 1.0, "lam": 1.0, "score_placement": "end_token"},
    "gae, scores are shifted back": {"lam": 0.9, "normalize_scores": "shift_and_scale"},
    "reinforce": {"advantage": "reinforce", "ppo_epochs": 1},
    "rloo": {"advantage": "rloo"},
    "grpo": {"advantage": "grpo"},
    "grpo, loss_k2": {"advantage": "grpo", "kl_penalty": "loss_k2"},
}
SHIFT_MATTERS: dict[str, dict[str, Any]] = {
    "gae, lambda below 1: the critic has not learned the shift": {"lam": 0.9},
    "reinforce against rollouts before": {"advantage": "reinforce", "ppo_epochs": 1, "baseline": "running"},
    "a fixed score replaces that of a response without end": {
        "advantage": "reinforce",
        "ppo_epochs": 1,
        "missing_eos": "replace",
    },
}


shifts = st.builds(lambda size, sign: sign * size, st.floats(1, 50), st.sampled_from([1, -1]))


def shifted(scored: ScoredRollout, shift: float) -> ScoredRollout:
    return replace(scored, scores=scored.scores.double() + shift)


@pytest.mark.parametrize("name", SHIFT_IS_NOTHING)
@few
@given(shift=shifts)
def test_a_shift_of_every_score_leaves_advantages_and_the_policys_gradient(
    name: str, shift: float, bench: Callable[..., Any], prompts: PromptBatch, cached: Callable[..., Made]
) -> None:
    def make() -> Made:
        settings = {"beta": 0.3, **PENALTIES, **SHIFT_IS_NOTHING[name]}
        work = bench(**settings, samples_per_prompt=GROUP, micro_batch_size=6)
        rollout = work.rollout(prompts)
        scored = work.score(rollout)
        return work, rollout, scored, work.work(scored)

    work, _, scored, expected = cached(make, f"shift: {name}")
    found = work.work(shifted(scored, shift))
    torch.testing.assert_close(found.experience.advantages, expected.experience.advantages, rtol=1e-6, atol=1e-6)
    for weight, gradient in expected.gradients.items():
        if weight.startswith("policy"):
            torch.testing.assert_close(found.gradients[weight], gradient, rtol=1e-6, atol=1e-6)
    assert found.metrics["score"] == pytest.approx(expected.metrics["score"] + shift, abs=1e-4)
    same = ("score_std", "kl", "kl_part", "policy_loss", "response_length")
    assert [found.metrics[n] for n in same] == pytest.approx([expected.metrics[n] for n in same], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", SHIFT_MATTERS)
def test_where_a_shift_of_every_score_is_seen(name: str, bench: Callable[..., Any], prompts: PromptBatch) -> None:
    work = bench(**{"beta": 0.3, **PENALTIES, **SHIFT_MATTERS[name]}, samples_per_prompt=GROUP)
    scored = work.score(work.rollout(prompts))
    one, other = (work.work(x, SEEN).experience.advantages for x in (scored, shifted(scored, 5.0)))
    assert (one - other).abs().max() > 0.1


def test_a_shift_of_this_and_all_earlier_rollouts_is_nothing_to_the_running_baseline(
    case: Callable[[str], Made],
) -> None:
    work, _, scored, expected = case("reinforce, running, loss_k1")
    found = work.work(shifted(scored, 5.0), [reward + 5.0 for reward in SEEN])
    torch.testing.assert_close(found.experience.advantages, expected.experience.advantages, rtol=1e-8, atol=1e-8)
    assert_gradients(found.gradients, expected.gradients)


# One process and two -------------------------------------------------------------

Place = tuple[list[int], int, int]
"""Prompts of a process, and how many columns of padding its rollout has on the left and on the right."""


@st.composite
def two_places(draw: st.DrawFn) -> tuple[Place, Place]:
    """The six prompts on two processes, each with one at least, and rollouts of different width."""
    order, cut = draw(st.permutations(range(6))), draw(st.sampled_from([2, 1, 3, 4, 5]))
    padding = [draw(st.tuples(st.integers(0, 3), st.integers(0, 3))) for _ in range(2)]
    return (order[:cut], *padding[0]), (order[cut:], *padding[1])


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Examples drawn beforehand, where starting two processes for each would take too long."""
    found: list[Any] = []

    @settings(few, max_examples=count)
    @given(strategy)
    def keep(example: Any) -> None:
        found.append(example)

    keep()
    return found


PLACES = drawn(two_places(), 4)


def rows_of(prompts: list[int]) -> Tensor:
    """The rows of the samples of prompts."""
    return (GROUP * torch.tensor(prompts).unsqueeze(1) + torch.arange(GROUP)).flatten()


@pytest.mark.parametrize("critic", [True, False])
def test_one_process_or_two(
    critic: bool,
    tmp_path: Path,
    case: Callable[[str], Made],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    """Losses, gradients and every logged number of two processes with uneven rollouts are those of one with both."""
    names = [name for name in CASES if name.startswith("gae") == critic]
    made = {name: case(name) for name in names}
    module = made[names[0]][0].module
    lengths = made[names[0]][2].response_mask.sum(dim=1)
    # As uneven as can be: the longest on one process; the samples of a prompt stay together.
    by_length = lengths.view(6, GROUP).sum(dim=1).argsort().tolist()
    places = [((by_length[:2], 0, 0), (by_length[2:], 0, 0)), *PLACES]
    tokens = [[int(lengths[rows_of(prompts)].sum()) for prompts, _, _ in both] for both in places]
    assert sum(one != other for one, other in tokens) >= 4
    scored = {
        name: [
            [work.score(padded(rollout.rows(rows_of(prompts)), left, right)) for prompts, left, right in both]
            for both in places
        ]
        for name, (work, rollout, _, _) in made.items()
    }
    module.load_state_dict(made[names[0]][0].updated)

    class TwoRanks(PPOModule):
        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            rank = self.global_rank
            found = {name: [self.worked(name, both[rank]) for both in scored[name]] for name in names}
            torch.save(found, tmp_path / f"{rank}.pt")
            self.optimizers().step()

        def worked(self, name: str, scored: ScoredRollout) -> tuple[dict[str, float], dict[str, Tensor]]:
            other = made[name][0].module
            for setting in ("advantage", "baseline", "kl_penalty", "loss_mean", "entropy_coef", "score_placement"):
                setattr(self, setting, getattr(other, setting))
            self.shaping = other.shaping
            self.seen_scores, self.seen_rewards = RunningMoments(), RunningMoments()
            self.seen_rewards.add(moments_of(torch.tensor(SEEN)))
            parts = self.shaping(scored, self.seen_scores, sum_over_ranks=self.sum_over_ranks)
            experience = self.experience(scored, parts)
            metrics = rollout_metrics(scored, experience, parts, sum_over_ranks=self.sum_over_ranks)
            if self.critic is not None:
                metrics |= critic_metrics(experience, sum_over_ranks=self.sum_over_ranks)
            metrics |= self._accumulate_gradients(experience)
            roles = {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})
            gradients = {f"{r}.{n}": p.grad.clone() for r, net in roles.items() for n, p in net.named_parameters()}
            return {n: float(x) for n, x in metrics.items()}, gradients

    alone = type(module)
    module.__class__ = TwoRanks
    try:
        trainer(max_steps=1, strategy="ddp_fork", devices=2).fit(module, make_loader([prompts]))
    finally:
        module.__class__ = alone
    for rank in (0, 1):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            expected = made[name][3]
            assert len(found) == len(places)
            for both, (metrics, gradients) in zip(places, found, strict=True):
                assert metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-7), (name, both)
                assert_gradients(gradients, expected.gradients)


# Lightning's word on it does not count: a user's run goes on after a warning.
@pytest.mark.filterwarnings("ignore:.*recommended to use.*sync_dist.*")
def test_validation_by_one_process_or_two(
    tmp_path: Path,
    case: Callable[[str], Made],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    """Every number of a validation is the mean over the prompts of both, however few one of them has."""
    work, rollout, _, _ = case("gae")
    module = work.module
    module.load_state_dict(work.updated)
    places = [[prompts for prompts, _, _ in both] for both in PLACES]
    everything = [list(range(6))]

    class Validated(PPOModule):
        def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
            both = places[batch_idx] if self.trainer.world_size == 2 else everything
            self.mine = torch.tensor(both[self.global_rank])
            super().validation_step(batch.rows(self.mine), batch_idx)

        def generate(self, batch: PromptBatch, draw: int) -> Rollout:
            # One response to each prompt, the same in every validation: two processes sample different noise.
            return rollout.rows(GROUP * self.mine)

        def on_validation_end(self) -> None:
            logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            torch.save(logged, tmp_path / f"{self.trainer.world_size}-{self.global_rank}.pt")

    alone = type(module)
    module.__class__ = Validated
    try:
        for ranks in ({}, {"strategy": "ddp_fork", "devices": 2}):
            trainer(**ranks).validate(module, make_loader([prompts] * len(places)), verbose=False)
    finally:
        module.__class__ = alone
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert set(one) == {"ppo/val_score", "ppo/val_kl", "ppo/val_response_length"}
    assert first == pytest.approx(one, rel=1e-5)
    assert second == first
