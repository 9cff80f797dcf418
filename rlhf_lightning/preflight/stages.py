"""Which checks a stage takes, and what they are given."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_lightning.preflight.effect import check_effect
from rlhf_lightning.preflight.findings import Finding, untouched
from rlhf_lightning.preflight.memory import check_memory, free_bytes
from rlhf_lightning.preflight.phases import PPONetworks, Supervised, ppo_memory, supervised_memory
from rlhf_lightning.preflight.policy import (
    check_decoding,
    check_first_ratio,
    check_kl,
    check_left_padding,
)
from rlhf_lightning.preflight.probe import sample_probe
from rlhf_lightning.preflight.reward import check_cost, check_last_token, check_positions, check_spread
from rlhf_lightning.preflight.rounding import check_rounding
from rlhf_lightning.preflight.sizes import PPOSizes
from rlhf_lightning.preflight.text import check_chat_template, check_end_token, check_pad_token, check_round_trip
from rlhf_lightning.rollout.reward import ModelReward, Reward, Scores
from rlhf_lightning.types import (
    ComparisonBatch,
    Experience,
    Message,
    PromptBatch,
    Rollout,
    ScoredRollout,
    SFTBatch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Run(Protocol):
    """A LightningModule around one trained network."""

    learning_rate: float
    without_effect: list[str]

    @property
    def network(self) -> nn.Module:
        """The network that is trained."""

    @property
    def required_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer."""

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that it can read."""

    def modules(self) -> Iterator[nn.Module]:
        """All submodules."""


class Stopping(Run, Protocol):
    """A run whose network ends its responses."""

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a response."""


class SFTRun(Stopping, Supervised, Protocol):
    """Fine-tuning."""


class RewardRun(Run, Supervised, Protocol):
    """Training of a reward model."""

    margin_coef: float

    def __call__(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores (B,) of sequences padded on the right."""


class PPORun(Stopping, PPONetworks, Protocol):
    """PPO: its networks, its settings, and the two steps of it that read the policy."""

    critic_learning_rate: float
    target_kl: float | None
    samples_per_prompt: int
    ppo_epochs: int

    def score(self, rollout: Rollout) -> ScoredRollout:
        """Score a rollout."""

    def losses(self, experience: Experience) -> dict[str, Tensor]:
        """Return what an update computes, among it the ratio (B, R)."""


def check_ppo(run: PPORun, batch: PromptBatch) -> list[Finding]:
    """Return what there is to say of PPO on a batch of its prompts, before the first update; changes nothing."""
    with untouched(run.modules(), batch.prompt_tokens.device):
        return [
            *_check_tokenizer(run.required_tokenizer, batch.texts, _first_conversation(batch), found_by_id=False),
            *_check_networks(run, batch),
            check_effect([*run.without_effect, *_idle_target_kl(run, len(batch))]),
            check_rounding({run.policy: run.learning_rate} | _critic_and_rate(run)),
            check_ppo_memory(run, batch),
        ]


def check_sft(
    run: SFTRun, batch: SFTBatch, ends: SFTBatch, conversation: Sequence[Message] | None = None
) -> list[Finding]:
    """Return what there is to say of fine-tuning on a batch.

    ``ends`` are rows that reach the end of their text, as a block from its middle does not; ``conversation`` is one of
    the data's, if it has any.
    """
    with untouched(run.modules(), batch.tokens.device):
        return [
            *_check_tokenizer(run.required_tokenizer, _texts(run, batch), conversation, found_by_id=False),
            check_end_token(ends.tokens, ends.attention_mask, ends.loss_mask, stop_tokens=run.stop_token_ids),
            check_effect(run.without_effect),
            check_rounding({run.network: run.learning_rate}),
            check_supervised_memory(run, batch),
        ]


def check_reward(
    run: RewardRun, batch: ComparisonBatch, conversation: Sequence[Message] | None = None
) -> list[Finding]:
    """Return what there is to say of a reward model's training on a batch."""
    tokenizer = run.required_tokenizer
    eos: Any = tokenizer.eos_token_id
    texts = _texts(run, batch)
    with untouched(run.modules(), batch.tokens.device):
        scores = run(batch.tokens, batch.attention_mask)
        return [
            *_check_tokenizer(tokenizer, texts, conversation, found_by_id=True),
            check_end_token(batch.tokens, batch.attention_mask, batch.response_mask, stop_tokens=[eos]),
            check_last_token(
                run.network,
                run,
                batch.tokens,
                batch.attention_mask,
                pad=_pad(tokenizer),
                max_positions=run.max_positions,
            ),
            check_spread(scores, texts, batch.prompt_index.tolist(), model=True),
            check_effect([*run.without_effect, *_idle_margin(run, batch)]),
            check_rounding({run.network: run.learning_rate}),
            check_supervised_memory(run, batch),
        ]


def ppo_sizes(run: PPORun, prompts: int, *, rollouts: float, processes: int) -> PPOSizes:
    """Return the sizes of a run whose batches have so many prompts."""
    return PPOSizes(
        prompts=prompts,
        samples_per_prompt=run.samples_per_prompt,
        minibatch_size=run.minibatch_size,
        micro_batch_size=run.micro_batch_size,
        micro_batch_tokens=run.micro_batch_tokens,
        ppo_epochs=run.ppo_epochs,
        rollouts=rollouts,
        processes=processes,
    )


def check_ppo_memory(run: PPORun, batch: PromptBatch) -> Finding:
    """Compare what policy, critic, reference, reward and average need with what is free on the batch's device."""
    device = batch.prompt_tokens.device
    sequences = ppo_sizes(run, len(batch), rollouts=1, processes=1).sequences
    estimate = ppo_memory(run, device, sequences=sequences, prompt_length=batch.prompt_tokens.shape[1])
    return check_memory(estimate, free=free_bytes(device))


def check_supervised_memory(run: Supervised, batch: SFTBatch | ComparisonBatch) -> Finding:
    """Compare what the network needs with what is free on the batch's device."""
    return check_memory(supervised_memory(run, batch), free=free_bytes(batch.tokens.device))


def _idle_target_kl(run: PPORun, prompts: int) -> list[str]:
    sequences = ppo_sizes(run, prompts, rollouts=1, processes=1).sequences
    if run.target_kl is None or run.ppo_epochs * sequences > run.minibatch_size:
        return []
    return [f"target_kl={run.target_kl} counts only with several updates of a rollout (ppo_epochs, minibatch_size)"]


def _idle_margin(run: RewardRun, batch: ComparisonBatch) -> list[str]:
    if not run.margin_coef or batch.ratings.any():
        return []
    return [f"margin_coef={run.margin_coef} counts only with rows that have a margin or ratings, and none here has"]


def _critic_and_rate(run: PPORun) -> dict[nn.Module, float]:
    return {} if run.critic is None else {run.critic: run.critic_learning_rate}


def _check_networks(run: PPORun, batch: PromptBatch) -> Iterator[Finding]:
    assert run.reward is not None
    settings: Any = {"temperature": run.temperature, "micro_batch_size": run.micro_batch_size}
    probe = sample_probe(
        run.policy,
        batch,
        run.required_tokenizer,
        max_new_tokens=run.max_new_tokens,
        temperature=run.temperature,
        stop_tokens=run.stop_token_ids,
        sampler=run.sampler,
    )
    models = run.reward.models()
    for name, model in models.items():
        yield check_positions(model, batch, probe.rollout, max_new_tokens=run.max_new_tokens, name=name)
    if any(model.positions is not None and model.longest(probe.rollout) > model.positions for model in models.values()):
        # What follows reads the scores.
        return
    with _timed(run.reward) as seconds:
        scored = run.score(probe.rollout)
    yield check_kl(run.policy, run.reference, scored, **settings)
    yield check_first_ratio(run.policy, scored, run.losses, **settings)
    yield check_left_padding(run.policy, run.critic, scored, max_positions=run.max_positions, **settings)
    yield check_decoding(run.policy, probe, scored, **settings)
    for name, model in models.items():
        yield _check_reward_model(model, probe.rollout, name)
    yield check_spread(scored.scores, scored.responses, scored.texts, model="" in models)
    for name, model in models.items():
        if name:
            yield check_spread(model(scored), scored.responses, scored.texts, model=True, name=name)
    sequences = ppo_sizes(run, len(batch), rollouts=1, processes=1).sequences
    share = run.max_new_tokens / probe.rollout.response_mask.shape[1] * sequences / len(probe.rollout)
    yield check_cost(
        seconds=sum(seconds),
        responses=len(scored),
        rollout_size=sequences,
        sampling_seconds=probe.seconds * share,
    )


def _check_reward_model(reward: ModelReward, rollout: Rollout, name: str) -> Finding:
    # On tokens of its own, so that each of them is under control.
    own = ModelReward(reward.reward_model, reward.tokenizer, reward.tokenizer, micro_batch_size=reward.micro_batch_size)

    def score(tokens: Tensor, mask: Tensor) -> Tensor:
        scores: Tensor = own(replace(rollout, tokens=tokens, attention_mask=mask))
        return scores

    whole = [text + response for text, response in zip(rollout.texts, rollout.responses, strict=True)]
    ids: Any = reward.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.tensor([i for row in ids for i in row])
    device = rollout.tokens.device
    return check_last_token(
        reward.reward_model,
        score,
        tokens.to(device),
        mask.to(device),
        pad=_pad(reward.tokenizer),
        max_positions=reward.positions,
        name=name,
    )


def _check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    conversation: Sequence[Message] | None,
    *,
    found_by_id: bool,
) -> Iterator[Finding]:
    yield check_pad_token(tokenizer, found_by_id=found_by_id)
    yield check_chat_template(tokenizer, conversation)
    yield check_round_trip(tokenizer, texts)


@contextmanager
def _timed(reward: Reward) -> Iterator[list[float]]:
    """Yield a list that takes the seconds of each call of ``reward.scores``, whatever the reward is made of."""
    scores, seconds = reward.scores, list[float]()

    def timed(rollout: Rollout) -> Scores:
        start = time.perf_counter()
        found = scores(rollout)
        seconds.append(time.perf_counter() - start)
        return found

    # It comes before the method of the class; a hook would see calls of `forward` alone.
    vars(reward)["scores"] = timed
    try:
        yield seconds
    finally:
        del vars(reward)["scores"]


def _first_conversation(batch: PromptBatch) -> Sequence[Message] | None:
    return next((prompt for prompt in batch.prompts if not isinstance(prompt, str)), None)


def _texts(run: Run, batch: SFTBatch | ComparisonBatch) -> list[str]:
    rows = [row[keep].tolist() for row, keep in zip(batch.tokens.cpu(), batch.attention_mask.cpu(), strict=True)]
    return [str(run.required_tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _pad(tokenizer: "PreTrainedTokenizerBase") -> int:
    pad: Any = tokenizer.pad_token_id
    return 0 if pad is None else int(pad)
