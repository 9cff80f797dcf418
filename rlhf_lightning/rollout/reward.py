"""What a response is worth: a reward model, a function that the user wrote, or several of them together."""

import importlib
import importlib.util
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.loading import NetworkConfig, load_reward_model, load_tokenizer, max_positions
from rlhf_lightning.networks.scalar_head import scalar_head
from rlhf_lightning.networks.scores import sequence_scores
from rlhf_lightning.types import PromptBatch, RewardFunction, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTER = (
    "use a smaller max_new_tokens (module.max_new_tokens) or max_prompt_length (data.max_prompt_length), or a reward "
    "model with more positions"
)
"""What helps where a reward model cannot read whole sequences."""


@dataclass(frozen=True)
class Scores:
    """What a reward says of the responses of a rollout."""

    total: Float[Tensor, " B"]
    """The score of each response, float32."""
    parts: dict[str, Tensor]
    """(B,) each, by name: what the total is made of; empty where the reward is in one piece."""


class Reward(nn.Module):
    """Scores whole responses: ``reward(rollout)`` is (B,) in float32, ``reward.scores(rollout)`` has the parts too.

    A reward in one piece defines ``forward``; one of several pieces defines ``scores``.
    """

    kind: ClassVar[str] = "reward"
    """How it is called where people read it."""

    def forward(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """Return one score per response."""
        raise TypeError(f"{type(self).__name__} is a Reward without a forward")

    def scores(self, rollout: Rollout) -> Scores:
        """Return the scores with what they are made of; each network reads the responses once."""
        return Scores(self(rollout), {})

    def models(self) -> "dict[str, ModelReward]":
        """Return the reward models in it by where they are, which is "" for one that is all of it."""
        return {name: part for name, part in self.named_modules() if isinstance(part, ModelReward)}


class FunctionReward(Reward):
    """A Python function ``f(prompts, responses, **columns) -> list[float]``."""

    kind = "reward function"

    def __init__(self, function: RewardFunction) -> None:
        """Take the function."""
        super().__init__()
        self.function = function

    def forward(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """Return its scores; raises `InputError` where it fails or does not return one finite number per response.

        The function works on copies, which it may change.
        """
        name = _name(self.function)
        try:
            found = self.function(*deepcopy((rollout.prompts, rollout.responses)), **deepcopy(rollout.columns))
        except (Exception, SystemExit) as error:
            if untaken := _untaken(self.function, rollout.columns):
                raise InputError(
                    f"reward function {name} does not take the rows' columns {', '.join(untaken)}: give it a parameter "
                    "of each name, or **columns for all that it has no use for"
                ) from error
            raise InputError(f"reward function {name} raised {_where(error)}") from error
        # The elements of these are no scores, or in no order.
        if isinstance(found, str | bytes | Mapping | Set) or not isinstance(found, Iterable | Tensor):
            raise InputError(
                f"reward function {name} must return a list of numbers, one for each response, in their order; "
                f"it returned a {type(found).__name__}: {str(found)[:60]}"
            )
        scores = list(found)
        if len(scores) != len(rollout.responses):
            raise InputError(
                f"reward function {name} must return one score per response: {len(rollout.responses)} responses, "
                f"{len(scores)} scores"
            )
        return torch.tensor(
            [_finite(score, name, row) for row, score in enumerate(scores)],
            dtype=torch.float32,
            device=rollout.tokens.device,
        )


class ModelReward(Reward):
    """A frozen sequence classifier with one label, and its tokenizer.

    Where its tokenizer is the policy's it reads the sampled ids themselves; otherwise the text is tokenised anew.
    """

    kind = "reward model"

    def __init__(
        self,
        reward_model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        policy_tokenizer: "PreTrainedTokenizerBase",
        *,
        micro_batch_size: int = 32,
    ) -> None:
        """Take the classifier and the two tokenizers; ``micro_batch_size`` rows are scored at a time."""
        super().__init__()
        self.reward_model = reward_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.shares_tokens = same_tokenizer(tokenizer, policy_tokenizer)
        self.micro_batch_size = micro_batch_size

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """Return the classifier's logit at the last real token of each sequence.

        Raises `InputError` where a sequence is longer than the classifier's positions, or a score is not finite.
        """
        tokens, mask = self._sequences(rollout)
        longest, positions = int(mask.sum(dim=1).max()), self.positions
        if positions is not None and longest > positions:
            raise InputError(
                f"prompt and response of {longest} tokens are longer than the {positions} positions of the reward "
                f"model; {SHORTER}"
            )
        by_length = mask.sum(dim=1).argsort()
        scores = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
        for rows in by_length.split(self.micro_batch_size):
            scores[rows] = self.logits(tokens[rows], mask[rows])
        if not scores.isfinite().all():
            raise InputError("the reward model's scores are not finite: its weights hold NaN, or overflowed")
        return scores

    @property
    def positions(self) -> int | None:
        """The longest sequence that the classifier can read, None where there is no end."""
        return max_positions(self.reward_model)

    def longest(self, rollout: Rollout) -> int:
        """Return how many of the classifier's tokens the longest prompt with its response has."""
        return int(self._sequences(rollout)[1].sum(dim=1).max())

    def longest_prompt(self, batch: PromptBatch) -> int:
        """Return how many of the classifier's tokens the longest prompt has."""
        if self.shares_tokens:
            return int(batch.prompt_mask.sum(dim=1).max())
        return max(len(self._prompt_ids(*prompt)) for prompt in zip(batch.prompts, batch.texts, strict=True))

    def logits(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """Return the classifier's logit at the last real token of rows of its own tokens, padded on the right."""
        network: Any = self.reward_model
        last = set(tokens[torch.arange(len(tokens)), mask.sum(dim=1) - 1].tolist())
        # The network takes the last id that is not this one: it must not be what a sequence really ends with.
        padding = next(i for i in range(len(last) + 1) if i not in last)
        width = int(mask.sum(dim=1).max())
        tokens = tokens.masked_fill(~mask, padding)[:, :width]
        with _pad_token_id(network.config.get_text_config(), padding):
            return sequence_scores(network, tokens, mask[:, :width])

    def _sequences(self, rollout: Rollout) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Return prompt and response in the classifier's tokens, padded on the right."""
        if self.shares_tokens:
            return left_aligned(rollout.tokens, rollout.attention_mask)
        return self._retokenised(rollout)

    def _retokenised(self, rollout: Rollout) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        eos = self.tokenizer.eos_token_id
        sequences = [
            self._prompt_ids(prompt, text)
            + self.tokenizer(response, add_special_tokens=False).input_ids
            + ([eos] if ended and eos is not None else [])
            for prompt, text, response, ended in zip(
                rollout.prompts, rollout.texts, rollout.responses, rollout.ended.tolist(), strict=True
            )
        ]
        width = max(len(ids) for ids in sequences)
        rows = [ids + [0] * (width - len(ids)) for ids in sequences]
        lengths = torch.tensor([len(ids) for ids in sequences])
        mask = torch.arange(width) < lengths.unsqueeze(1)
        device = rollout.tokens.device
        return torch.tensor(rows, device=device), mask.to(device)

    def _prompt_ids(self, prompt: Any, text: str) -> list[int]:
        """Return a conversation in the classifier's own chat template, all else as the text that the policy read."""
        if not isinstance(prompt, str) and self.tokenizer.chat_template is not None:
            text = str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        ids = list(self.tokenizer(text).input_ids)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


class WeightedReward(Reward):
    """The weighted sum of several rewards; its parts are what each adds, by name, and add up to the total.

    The parts of a reward that has some itself are there as ``NAME/PART``, times its weight.
    """

    kind = "weighted sum of rewards"

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        """Take rewards and weights of the same names."""
        super().__init__()
        # Not a ModuleDict, which refuses some names.
        self.rewards = nn.ModuleList(rewards.values())
        self.weights = {name: float(weights[name]) for name in rewards}

    def forward(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """Return the sum."""
        return self.scores(rollout).total

    def scores(self, rollout: Rollout) -> Scores:
        """Return the sum, and what each reward adds to it."""
        parts: dict[str, Tensor] = {}
        for (name, weight), reward in zip(self.weights.items(), self.rewards, strict=True):
            found = _scores(reward, rollout)
            parts[name] = weight * found.total
            parts |= {f"{name}/{part}": weight * value for part, value in found.parts.items()}
        return Scores(torch.stack([parts[name] for name in self.weights]).sum(dim=0), parts)

    def models(self) -> dict[str, ModelReward]:
        """Return the reward models in it by the names of the rewards."""
        return _models(self.weights, self.rewards)


class EnsembleReward(Reward):
    """The mean of several rewards less ``std_coef`` standard deviations; its parts are ``mean`` and ``std``."""

    kind = "ensemble of rewards"

    def __init__(self, rewards: Sequence[Reward], *, std_coef: float) -> None:
        """Take the members."""
        super().__init__()
        self.rewards = nn.ModuleList(rewards)
        self.std_coef = std_coef

    def forward(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """Return mean - std_coef * std."""
        return self.scores(rollout).total

    def scores(self, rollout: Rollout) -> Scores:
        """Return mean - std_coef * std with both; std is the population's."""
        totals = torch.stack([_scores(reward, rollout).total for reward in self.rewards])
        mean, std = totals.mean(dim=0), totals.std(dim=0, correction=0)
        return Scores(mean - self.std_coef * std, {"mean": mean, "std": std})

    def models(self) -> dict[str, ModelReward]:
        """Return the reward models in it by their numbers, the first is ``member 1``."""
        return _models([f"member {i + 1}" for i in range(len(self.rewards))], self.rewards)


@dataclass(frozen=True)
class WeightedSum:
    """The setting ``reward=WeightedSum({"helpful": "out/reward", "polite": polite}, {"helpful": 1.0, "polite": 0.5})``.

    What each reward adds is logged by its name. Raises `InputError` where names differ or a weight is no finite number.
    """

    rewards: Mapping[str, "RewardSetting"]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        """Check names and weights."""
        if not self.rewards or self.rewards.keys() != self.weights.keys():
            raise InputError(
                "a WeightedSum needs rewards, and weights of the same names; "
                f"rewards: {_names(self.rewards)}; weights: {_names(self.weights)}"
            )
        for name, weight in self.weights.items():
            if not _is_finite(weight):
                raise InputError(f"the weight of {name!r} must be a finite number; found {weight!r}")


@dataclass(frozen=True)
class Ensemble:
    """The setting ``reward=Ensemble(["out/reward_1", "out/reward_2", "out/reward_3"], std_coef=1.0)``.

    The score is mean - std_coef * std over the members, std the population's; with 0 it is the mean. It distrusts what
    the members disagree on, as the uncertainty-weighted objective of Coste et al. (2023), who take off the variance;
    the standard deviation has the score's unit. Raises `InputError` with fewer than two members, or a ``std_coef`` that
    is negative or not finite.
    """

    rewards: Sequence["RewardSetting"]
    std_coef: float = 0.0

    def __post_init__(self) -> None:
        """Check the members and the coefficient."""
        if isinstance(self.rewards, str) or len(self.rewards) < 2:
            raise InputError(f"an Ensemble needs a list of at least 2 rewards; found {self.rewards!r}")
        if not _is_finite(self.std_coef) or self.std_coef < 0:
            raise InputError(f"std_coef={self.std_coef!r} must be a finite number, 0 or more")


RewardSetting = str | Path | NetworkConfig | nn.Module | RewardFunction | WeightedSum | Ensemble
"""What a reward can be given as; see `load_reward`."""


def load_reward(
    reward: RewardSetting,
    policy_tokenizer: "PreTrainedTokenizerBase",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    micro_batch_size: int = 32,
    backbone: nn.Module | None = None,
) -> Reward:
    """Return the reward that a setting stands for.

    A `Reward` is itself; a classifier module reads ``tokenizer`` (the policy's where not given); another callable is a
    reward function; ``"file.py:function"`` and ``"package.module:function"`` name one; any other string is a
    reward-model folder or hub name, which brings its tokenizer. The rewards of a `WeightedSum` or an `Ensemble` are
    loaded in the same way. A reward model that was trained as an adapter on the network ``backbone`` uses its weights.
    Raises `InputError` where a ``tokenizer`` is given and no classifier module reads it.
    """
    if tokenizer is not None and not any(_reads_tokenizer(part) for part in _parts(reward)):
        raise InputError(
            f"reward_tokenizer={type(tokenizer).__name__} is read by a classifier that is given as a module, and the "
            "reward has none: a reward-model folder brings its own tokenizer; leave reward_tokenizer out"
        )
    return _loaded(
        reward,
        policy_tokenizer=policy_tokenizer,
        tokenizer=tokenizer,
        micro_batch_size=micro_batch_size,
        backbone=backbone,
    )


def _loaded(
    reward: RewardSetting,
    *,
    policy_tokenizer: "PreTrainedTokenizerBase",
    tokenizer: "PreTrainedTokenizerBase | None",
    micro_batch_size: int,
    backbone: nn.Module | None,
) -> Reward:
    if isinstance(reward, Reward):
        return reward
    load = partial(
        _loaded,
        policy_tokenizer=policy_tokenizer,
        tokenizer=tokenizer,
        micro_batch_size=micro_batch_size,
        backbone=backbone,
    )
    if isinstance(reward, WeightedSum):
        return WeightedReward({name: load(part) for name, part in reward.rewards.items()}, reward.weights)
    if isinstance(reward, Ensemble):
        return EnsembleReward([load(member) for member in reward.rewards], std_coef=reward.std_coef)
    if isinstance(reward, nn.Module):
        scalar_head(reward)
        return ModelReward(reward, tokenizer or policy_tokenizer, policy_tokenizer, micro_batch_size=micro_batch_size)
    if isinstance(reward, str) and ":" in reward and not Path(reward).exists():
        return FunctionReward(import_function(reward))
    if isinstance(reward, str | Path) and Path(reward).suffix == ".py":
        raise InputError(
            f"reward={reward} is a file without the name of a function in it: write reward={reward}:FUNCTION"
        )
    if isinstance(reward, str | Path | NetworkConfig):
        model = load_reward_model(reward, trained=True, backbone=backbone)
        return ModelReward(model, load_tokenizer(reward), policy_tokenizer, micro_batch_size=micro_batch_size)
    if callable(reward):
        return FunctionReward(reward)
    raise InputError(
        "reward must be a reward-model folder or name, a classifier, a function, a WeightedSum or an Ensemble; "
        f"found {type(reward).__name__}"
    )


def _parts(reward: RewardSetting) -> Iterator[RewardSetting]:
    """Yield what a reward is made of, which is itself where it is in one piece."""
    several: Iterable[RewardSetting] = ()
    if isinstance(reward, WeightedSum):
        several = reward.rewards.values()
    elif isinstance(reward, Ensemble):
        several = reward.rewards
    else:
        yield reward
    for part in several:
        yield from _parts(part)


def _reads_tokenizer(reward: RewardSetting) -> bool:
    return isinstance(reward, nn.Module) and not isinstance(reward, Reward)


def import_function(name: str) -> RewardFunction:
    """Return the function named by ``"path/to/file.py:function"`` or ``"package.module:function"``."""
    where, _, attribute = name.rpartition(":")
    try:
        module = _module_from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, OSError) as error:
        raise InputError(f"reward={name!r} cannot be imported: {error}") from error
    except Exception as error:
        raise InputError(f"reward={name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if attribute not in vars(module):
        raise InputError(f"reward={name!r} names {attribute!r}, which {where} does not define")
    function: Callable[..., Sequence[float]] = vars(module)[attribute]
    if not callable(function):
        raise InputError(f"reward={name!r} is not a function but {function!r}")
    return function


def same_tokenizer(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Return whether ids mean the same in both: equal vocabulary, and equal end token."""
    return one is other or (one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id)


def left_aligned(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Return the rows with their real tokens moved to the left, in order, and the mask that belongs to them."""
    order = (~mask).long().argsort(dim=1, stable=True)
    return tokens.gather(1, order), mask.gather(1, order)


@contextmanager
def _pad_token_id(config: Any, padding: int) -> Iterator[None]:
    """Let a network take this id as padding for the length of a block."""
    before = config.pad_token_id
    config.pad_token_id = padding
    try:
        yield
    finally:
        config.pad_token_id = before


def _scores(reward: nn.Module, rollout: Rollout) -> Scores:
    assert isinstance(reward, Reward)
    return reward.scores(rollout)


def _models(names: Iterable[str], rewards: Iterable[nn.Module]) -> dict[str, ModelReward]:
    found: dict[str, ModelReward] = {}
    for name, reward in zip(names, rewards, strict=True):
        assert isinstance(reward, Reward)
        found |= {f"{name}/{inner}" if inner else name: model for inner, model in reward.models().items()}
    return found


def _names(named: Mapping[str, object]) -> str:
    return ", ".join(map(str, named)) or "none"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise OSError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _finite(score: Any, name: str, row: int) -> float:
    try:
        if isinstance(score, str | bytes):
            raise TypeError  # which float would take
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"reward function {name} must return numbers; the score of row {row} is {score!r}") from None
    # Scores are kept in float32.
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise InputError(f"reward function {name} must return finite scores; the score of row {row} is {value}")
    return value


def _name(function: Any) -> str:
    return str(function.__qualname__) if isinstance(function, type(_name)) else repr(function)


def _untaken(function: Any, names: Iterable[str]) -> list[str]:
    """Return which keyword arguments a function has no parameter for; none where it does not say what it takes."""
    try:
        # What stands around a function may take more than it.
        parameters = signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return []
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    taken = {parameter.name for parameter in parameters if parameter.kind in by_name}
    return [name for name in names if name not in taken]


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {Path(frame.filename).name}:{frame.lineno})"
