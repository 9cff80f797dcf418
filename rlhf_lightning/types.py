"""The axes of every tensor, and the records that travel between the parts.

Axes: ``B`` sequences of a batch, ``P`` prompt positions (padding on the left), ``R`` response positions
(padding on the right), ``T = P + R``, ``S = R + 1`` states (before each response position, and after the last), ``V``
vocabulary. Masks are boolean; true means "counts".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

Message = Mapping[str, str]
"""One turn of a conversation: ``{"role": ..., "content": ...}``."""

Prompt = str | Sequence[Message]
"""What the user asks: plain text, or the conversation so far."""

RewardFunction = Callable[..., Sequence[float]]
"""``f(prompts, responses, **columns)`` with one score per response."""

Export = Literal["merged", "adapter"]
"""A whole network, adapters merged into plain weights; or what was trained beside a base that is named."""


@dataclass(frozen=True)
class Record:
    """A batch whose tensors share the leading axis and move between devices together."""

    def to(self, device: torch.device | str) -> Self:
        """Return the same record with every tensor on ``device``."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def pin_memory(self) -> Self:
        """Return the same record in memory from which a CUDA device copies while the host goes on."""
        return replace(self, **{f.name: _pinned(getattr(self, f.name)) for f in fields(self)})

    def rows(self, index: Tensor) -> Self:
        """Return the sequences at ``index``, in its order."""
        picked = {f.name: _pick(getattr(self, f.name), index) for f in fields(self)}
        return replace(self, **picked)

    def __len__(self) -> int:
        """Return the number of sequences ``B``."""
        return len(getattr(self, fields(self)[0].name))


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        # Not from the device to the host, which would read what has not arrived.
        return value.to(device, non_blocking=torch.device(device).type == "cuda")
    if isinstance(value, Mapping):
        return {name: _moved(column, device) for name, column in value.items()}
    return value


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, Mapping):
        return {name: _pinned(column) for name, column in value.items()}
    return value


def _pick(value: Any, index: Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, Mapping):
        return {name: _pick(column, index) for name, column in value.items()}
    return [value[i] for i in index.tolist()]


@dataclass(frozen=True)
class SFTBatch(Record):
    """Token sequences, padded on the right, and which of their tokens are to be predicted."""

    tokens: Tensor
    """(B, T) token ids."""
    attention_mask: Tensor
    """(B, T) bool, true for real tokens."""
    loss_mask: Tensor
    """(B, T) bool, true where the token at ``t`` is a target; never true at ``t = 0``."""


@dataclass(frozen=True)
class ComparisonBatch(Record):
    """Responses of several prompts, each a whole sequence padded on the right, with their places in the ranking.

    Its leading axis counts responses, not prompts: a prompt with K ranked responses holds K neighbouring rows.
    """

    tokens: Tensor
    """(B, T) token ids of prompt and response, the end token included."""
    attention_mask: Tensor
    """(B, T) bool, true for real tokens."""
    response_mask: Tensor
    """(B, T) bool, true for the tokens of the response, its end token among them; never true at ``t = 0``."""
    prompt_index: Tensor
    """(B,) which prompt of the batch a row answers, counted from 0."""
    ranks: Tensor
    """(B,) place of the response among those of its prompt, 0 is the best; equal where two are rated alike."""
    ratings: Tensor
    """(B,) how far a response is rated above its prompt's worst, 0 where nobody rated; margins are differences."""


@dataclass(frozen=True)
class PromptBatch(Record):
    """Prompts, padded on the left."""

    prompt_tokens: Tensor
    """(B, P) token ids."""
    prompt_mask: Tensor
    """(B, P) bool, true for real tokens."""
    prompts: list[Prompt]
    """The prompts as they stand in the data: what a reward function is given."""
    texts: list[str]
    """The prompts as the policy reads them: the prompt template or the chat template applied."""
    columns: dict[str, list[Any]]
    """All other columns of the rows: keyword arguments of a reward function."""


@dataclass(frozen=True)
class Rollout(PromptBatch):
    """Prompts with a response that the policy sampled."""

    tokens: Tensor
    """(B, T) prompt and response ids; after the first end token there is only padding."""
    attention_mask: Tensor
    """(B, T) bool, true for real tokens of prompt and response."""
    response_mask: Tensor
    """(B, R) bool, true from the first response token through the first end token."""
    ended: Tensor
    """(B,) bool, true where the response has an end token."""
    responses: list[str]
    """The responses as text, special tokens left out."""

    @property
    def response_tokens(self) -> Tensor:
        """(B, R) ids of the response positions."""
        return self.tokens[:, -self.response_mask.shape[1] :]

    @property
    def response_starts(self) -> Tensor:
        """(B,) where in its row a response begins: behind the prompts, whose ends are in one column."""
        return torch.full_like(self.ended, self.prompt_tokens.shape[1], dtype=torch.long)


@dataclass(frozen=True)
class SampledRollout(Rollout):
    """A rollout as it comes from the sampler."""

    sampler_logprobs: Tensor
    """(B, R) log-probabilities of the response tokens as they were drawn, nats; 0 after the end."""
    sampler_values: Tensor | None = None
    """(B, R + 1) values of the states before each token and after the last, where the sampler found them."""


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout with what policy, reference, critic and reward say about it."""

    logprobs: Tensor
    """(B, R) log-probabilities of the response tokens under the policy that sampled them, nats."""
    ref_logprobs: Tensor
    """(B, R) the same under the frozen reference, nats."""
    values: Tensor
    """(B, R + 1) the critic's value of the state before each response token, and after the last; 0 without a critic."""
    scores: Tensor
    """(B,) what the reward says of each whole response, before penalties."""
    score_parts: dict[str, Tensor] = field(default_factory=dict)
    """(B,) each, by name: what the scores are made of; empty where the reward is in one piece."""


@dataclass(frozen=True)
class Experience(Record):
    """What the updates of PPO need of a rollout; everything with an R axis is 0 on padding.

    Actions are the response tokens, (B, R) under ``response_mask``. States are what they are chosen in, (B, R + 1)
    under ``value_mask``: that before each token, and where the score is placed there, the one after the last. The masks
    keep what is learned from: of a response that is left out, nothing.
    """

    tokens: Tensor
    """(B, T) prompt and response ids."""
    attention_mask: Tensor
    """(B, T) bool."""
    response_starts: Tensor
    """(B,) where in its row a response begins."""
    response_mask: Tensor
    """(B, R) bool."""
    value_mask: Tensor
    """(B, R + 1) bool."""
    old_logprobs: Tensor
    """(B, R) log-probabilities at sampling time, nats."""
    ref_logprobs: Tensor
    """(B, R) log-probabilities under the reference, nats."""
    old_values: Tensor
    """(B, R + 1) values at sampling time."""
    rewards: Tensor
    """(B, R + 1) reward of each step: the KL penalty, and at the last one the score."""
    advantages: Tensor
    """(B, R) how much better each token was than expected, in the scale of the estimator."""
    returns: Tensor
    """(B, R + 1) targets of the critic."""


@dataclass(frozen=True)
class Work:
    """What a batch was for one process; each is ()."""

    tokens: Tensor
    """Real tokens that were trained on, each once; padding is not among them."""
    flops: Tensor | None
    """Floating-point operations that the method takes, None where they are not known."""
    sampled_tokens: Tensor | None = None
    """Tokens of responses, where some are sampled, in a phase called ``sampling``."""
