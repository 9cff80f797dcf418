"""PPO on the reward minus the KL penalty: one `training_step` is one rollout and its updates."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.advantages import explained_variance
from rlhf_lightning.functional.kl import k1, k3
from rlhf_lightning.functional.logprobs import entropy, gather_logprobs
from rlhf_lightning.functional.losses import clipped_policy_loss, clipped_value_loss
from rlhf_lightning.functional.masking import masked_moments, masked_sum
from rlhf_lightning.functional.schedules import Schedule, learning_rate_factor
from rlhf_lightning.modules.language import LanguageModule, without_dropout_on_purpose
from rlhf_lightning.networks import Critic, Model, NetworkConfig, load_policy, stop_token_ids
from rlhf_lightning.preflight import check_ppo, of_status, refusal
from rlhf_lightning.rollout.experience import estimate_advantages, minibatches, trimmed_micro_batches
from rlhf_lightning.rollout.generate import generate
from rlhf_lightning.rollout.reward import ModelReward, Reward, load_reward
from rlhf_lightning.rollout.score import response_logits, response_values, score_rollout
from rlhf_lightning.types import Experience, PromptBatch, RewardFunction, Rollout, ScoredRollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FROZEN = ("reference.", "reward.")
"""Networks that training never changes: they come from their folders and stay out of checkpoints."""


class PPOModule(LanguageModule):
    """Trains a policy by PPO (Schulman et al. 2017) on R(x, y) - beta log [p_RL(y|x) / p_FT(y|x)] (Ouyang et al. 2022).

    The reference p_FT is the policy as it was given. The critic starts from the reward model where that reads the
    policy's tokens, else from the policy. All four run without dropout.
    """

    def __init__(
        self,
        model: Model,
        *,
        reward: "str | Path | NetworkConfig | nn.Module | RewardFunction",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        reward_tokenizer: "PreTrainedTokenizerBase | None" = None,
        beta: float = 0.05,
        gamma: float = 1.0,
        lam: float = 0.95,
        clip_range: float = 0.2,
        value_clip_range: float = 0.2,
        value_coef: float = 0.1,
        ppo_epochs: int = 4,
        minibatch_size: int = 32,
        micro_batch_size: int = 8,
        learning_rate: float = 3e-6,
        critic_learning_rate: float = 3e-6,
        lr_schedule: Schedule = "linear",
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        missing_eos_penalty: float = 1.0,
        seed: int = 0,
        preflight: bool = True,
    ) -> None:
        """Load the policy; the other roles are made in `setup`, when the tokenizer is known.

        Sizes count sequences of one process: ``minibatch_size`` for each optimizer step, which must divide the rollout,
        and ``micro_batch_size`` for each forward. Raises `InputError` where a setting is out of its range.
        """
        super().__init__(model, tokenizer)
        _require(temperature > 0, "temperature", temperature, "must be above 0: PPO learns from samples")
        _require(0 <= gamma <= 1, "gamma", gamma, "must lie in [0, 1]")
        _require(0 <= lam <= 1, "lam", lam, "must lie in [0, 1]")
        for name, amount in (
            ("beta", beta),
            ("value_coef", value_coef),
            ("learning_rate", learning_rate),
            ("critic_learning_rate", critic_learning_rate),
            ("warmup_steps", warmup_steps),
            ("missing_eos_penalty", missing_eos_penalty),
        ):
            _require(amount >= 0, name, amount, "must not be negative")
        for name, amount in (("clip_range", clip_range), ("value_clip_range", value_clip_range)):
            _require(amount > 0, name, amount, "must be above 0: nothing could change")
        _require(max_grad_norm > 0, "max_grad_norm", max_grad_norm, "must be above 0; inf clips nothing")
        for name, size in (
            ("ppo_epochs", ppo_epochs),
            ("minibatch_size", minibatch_size),
            ("micro_batch_size", micro_batch_size),
            ("max_new_tokens", max_new_tokens),
        ):
            _require(size >= 1, name, size, "must be at least 1")
        self.automatic_optimization = False
        # Frozen networks are not in a checkpoint; `load_state_dict` checks all other keys itself.
        self.strict_loading = False
        self.policy = load_policy(model).eval()
        self.reference = deepcopy(self.policy).requires_grad_(False)
        self.beta = beta
        self.gamma = gamma
        self.lam = lam
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.ppo_epochs = ppo_epochs
        self.minibatch_size = minibatch_size
        self.micro_batch_size = micro_batch_size
        self.learning_rate = learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.missing_eos_penalty = missing_eos_penalty
        self.seed = seed
        self.preflight = preflight
        # In a closure: a network that was given here is registered once, as part of `reward`.
        self._load_reward = lambda: load_reward(
            reward, self.required_tokenizer, tokenizer=reward_tokenizer, micro_batch_size=micro_batch_size
        )
        self.reward: Reward | None = None
        self.critic: Critic | None = None
        self.scored_rollout: ScoredRollout | None = None
        if self.tokenizer is not None:
            self.configure_model()

    @property
    def network(self) -> nn.Module:
        """The policy."""
        return self.policy

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a response."""
        return stop_token_ids(self.policy, self.required_tokenizer)

    def configure_callbacks(self) -> list[Callback]:
        """Refuse what the Trainer cannot do for PPO; no other hook runs before Lightning's own, poorer refusal."""
        trainer = self.trainer
        if trainer.gradient_clip_val:
            raise InputError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) cannot clip the several updates of a rollout; "
                f"use PPOModule(max_grad_norm={trainer.gradient_clip_val}), module.max_grad_norm in a config"
            )
        if trainer.accumulate_grad_batches != 1:
            raise InputError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) cannot split the updates of a "
                "rollout; use PPOModule(minibatch_size=..., micro_batch_size=...): gradients of micro-batches add up "
                "to those of their minibatch"
            )
        return []

    def configure_model(self) -> None:
        """Make the reward and the critic, once the policy's tokenizer is known."""
        if self.critic is not None:
            return
        self.reward = self._load_reward()
        if isinstance(self.reward, ModelReward) and self.reward.shares_tokens:
            self.critic = Critic.from_reward_model(self.reward.reward_model)
        else:
            self.critic = Critic.from_policy(self.policy, torch.Generator().manual_seed(self.seed))
        self.policy.requires_grad_(True)
        # Dropout would make the first ratio differ from 1.
        self.eval()
        without_dropout_on_purpose()

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Look at the run before its first update; one that goes on from a checkpoint is past that."""
        if self.preflight and self.trainer.global_step == 0 and self.trainer.ckpt_path is None:
            # A second `fit` of this module goes on from weights that were trained.
            self.preflight = False
            self._require_preflight(batch)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample a rollout, score it, estimate advantages, and update policy and critic."""
        self.check_minibatches(len(batch))
        rollout = self.generate(batch, self.trainer.global_step)
        scored = self.score(rollout)
        experience = estimate_advantages(
            scored,
            beta=self.beta,
            gamma=self.gamma,
            lam=self.lam,
            missing_eos_penalty=self.missing_eos_penalty,
            sum_over_ranks=self.sum_over_ranks,
        )
        losses = self.update(experience)
        metrics = self.rollout_metrics(scored, experience) | losses
        for name, value in metrics.items():
            self.log(f"ppo/{name}", value, prog_bar=name in ("score", "kl"), batch_size=len(batch))
        self.scored_rollout = scored

    def generate(self, batch: PromptBatch, draw: int) -> Rollout:
        """Sample a response for each prompt; ``draw`` selects the noise, which differs between ranks."""
        longest = self.max_positions
        needed = batch.prompt_tokens.shape[1] + self.max_new_tokens
        if longest is not None and needed > longest:
            raise InputError(
                f"a prompt of {batch.prompt_tokens.shape[1]} tokens and max_new_tokens={self.max_new_tokens} need "
                f"{needed} positions; the policy has {longest}"
            )
        return generate(
            self.policy,
            batch,
            self.required_tokenizer,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop_tokens=self.stop_token_ids,
            generator=seeded_generator(self.seed, self.global_rank, draw, device=self.device),
        )

    def score(self, rollout: Rollout) -> ScoredRollout:
        """Add log-probabilities, values and scores."""
        return score_rollout(
            rollout,
            policy=self.policy,
            reference=self.reference,
            critic=self._critic,
            reward=self._reward,
            temperature=self.temperature,
            micro_batch_size=self.micro_batch_size,
        )

    def update(self, experience: Experience) -> dict[str, Tensor]:
        """Make ``ppo_epochs`` passes over the rollout, a step each minibatch; return the means of the metrics."""
        rollouts_done = self.trainer.global_step
        generator = seeded_generator(self.seed, rollouts_done)
        sums: dict[str, Tensor] = {}
        updates = self._updates_per_rollout(len(experience))
        for update, minibatch in enumerate(self._minibatches(experience, generator)):
            self._set_learning_rates(rollouts_done * updates + update, updates)
            metrics = self._accumulate_gradients(minibatch)
            metrics |= self._optimizer_step(last=update == updates - 1)
            sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
        means = {name: value / updates for name, value in sums.items()}
        learning_rate = torch.tensor(self._optimizer.param_groups[0]["lr"])
        return means | {"learning_rate": learning_rate, "updates": torch.tensor((rollouts_done + 1.0) * updates)}

    def losses(self, experience: Experience) -> dict[str, Tensor]:
        """Return per-token quantities (B, R) of the current policy and critic on sampled tokens."""
        tokens, attention_mask = experience.tokens, experience.attention_mask
        length = experience.response_mask.shape[1]
        logits = response_logits(self.policy, tokens, attention_mask, length=length)
        logprobs = gather_logprobs(logits, tokens[:, -length:], temperature=self.temperature)
        # Outside of the mask nothing counts, and a ratio of 1 keeps it finite.
        logprobs = logprobs.where(experience.response_mask, experience.old_logprobs)
        values = response_values(self._critic, tokens, attention_mask, length=length)
        log_ratio = logprobs - experience.old_logprobs
        return {
            "policy_loss": clipped_policy_loss(
                logprobs, experience.old_logprobs, experience.advantages, clip_range=self.clip_range
            ),
            "value_loss": clipped_value_loss(
                values, experience.old_values, experience.returns, value_clip_range=self.value_clip_range
            ),
            "entropy": entropy(logits.detach(), temperature=self.temperature),
            "approx_kl": log_ratio.detach().square() / 2,
            "ratio": log_ratio.detach().exp(),
            "clip_fraction": ((log_ratio.detach().exp() - 1).abs() > self.clip_range).float(),
            "value_clip_fraction": ((values.detach() - experience.old_values).abs() > self.value_clip_range).float(),
        }

    def rollout_metrics(self, scored: ScoredRollout, experience: Experience) -> dict[str, Tensor]:
        """Return means over the responses, or the response tokens, of all processes."""
        mask = scored.response_mask
        lengths = mask.sum(dim=1).float()
        sums = {
            "score": scored.scores.sum(),
            "kl": masked_sum(k1(scored.logprobs, scored.ref_logprobs), mask).sum(),
            "kl_k3": masked_sum(k3(scored.logprobs, scored.ref_logprobs), mask).sum(),
            "reward": experience.rewards.sum(),
            "response_length": lengths.sum(),
            "missing_eos": (~scored.ended).float().sum(),
            "sequences": torch.tensor(float(len(scored)), device=lengths.device),
        }
        totals = self.sum_over_ranks(torch.stack([value.float() for value in sums.values()]))
        means = dict(zip(sums, totals / totals[-1], strict=True))
        del means["sequences"]
        means["kl_per_token"] = means["kl"] / means["response_length"]
        errors = masked_moments(experience.returns - experience.old_values, mask)
        returns = masked_moments(experience.returns, mask)
        means["explained_variance"] = explained_variance(self.sum_over_ranks(errors), self.sum_over_ranks(returns))
        return means

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample on held-out prompts, with the same noise every time, and log score, KL and length."""
        scored = self.score(self.generate(batch, -1 - batch_idx))
        mask = scored.response_mask
        metrics = {
            "ppo/val_score": scored.scores.mean(),
            "ppo/val_kl": masked_sum(k1(scored.logprobs, scored.ref_logprobs), mask).mean(),
            "ppo/val_response_length": mask.sum(dim=1).float().mean(),
        }
        self.log_dict(metrics, on_epoch=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one AdamW with a group for the policy and one for the critic (eps as in Huang et al. 2024)."""
        groups = [
            {"params": list(self.policy.parameters()), "lr": self.learning_rate},
            {"params": list(self._critic.parameters()), "lr": self.critic_learning_rate},
        ]
        return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients of policy and critic, each by its own norm, after they were unscaled."""
        norms = [clip_grad_norm_(group["params"], self.max_grad_norm) for group in optimizer.param_groups]
        self._grad_norms = dict(zip(("policy_grad_norm", "critic_grad_norm"), norms, strict=True))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what training changes: the frozen networks come from their folders."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(FROZEN)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; raises `RuntimeError` where a weight is missing or unknown."""
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in keys.missing_keys if not name.startswith(FROZEN)]
        if missing or keys.unexpected_keys:
            raise RuntimeError(f"checkpoint does not fit: missing {missing}, unexpected {keys.unexpected_keys}")
        return keys

    def _require_preflight(self, batch: PromptBatch) -> None:
        """Log what is doubtful; raises `InputError` on all processes where one of them finds an error."""
        with self.trainer.precision_plugin.train_step_context():
            findings = check_ppo(self, batch)
        if self.trainer.is_global_zero:
            for finding in of_status(findings, "warning"):
                log.warning("preflight: %s", finding)
        errors = torch.tensor(float(len(of_status(findings, "error"))), device=self.device)
        if self.sum_over_ranks(errors):
            raise refusal(findings, off="PPOModule(preflight=False), module.preflight=false, trains without this check")

    @property
    def _reward(self) -> Reward:
        assert self.reward is not None
        return self.reward

    @property
    def _critic(self) -> Critic:
        assert self.critic is not None
        return self.critic

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizers()
        return cast(torch.optim.Optimizer, optimizer.optimizer)

    def check_minibatches(self, rollout_size: int) -> None:
        """Raise `InputError` where a rollout of so many sequences of one process cannot be cut into minibatches."""
        if rollout_size % self.minibatch_size:
            raise InputError(
                f"minibatch_size={self.minibatch_size} must divide the rollout of {rollout_size} sequences "
                "(data.batch_size)"
            )

    def _updates_per_rollout(self, rollout_size: int) -> int:
        return self.ppo_epochs * (rollout_size // self.minibatch_size)

    def _minibatches(self, experience: Experience, generator: torch.Generator) -> Iterator[Experience]:
        for _ in range(self.ppo_epochs):
            yield from minibatches(experience, minibatch_size=self.minibatch_size, generator=generator)

    def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
        """Add up the gradients of all micro-batches; return the means over the minibatch's tokens on all processes."""
        self._optimizer.zero_grad()
        # A token mean over the whole optimizer step: the count must be known before the first micro-batch.
        count = self.sum_over_ranks(minibatch.response_mask.sum().float())
        sums: dict[str, Tensor] = {}
        parts = list(trimmed_micro_batches(minibatch, micro_batch_size=self.micro_batch_size))
        for part in parts:
            tokens = self.losses(part)
            means = {name: masked_sum(x, part.response_mask).sum() / count for name, x in tokens.items()}
            loss = means["policy_loss"] + self.value_coef * means["value_loss"]
            with self._gradient_sync(part is parts[-1]):
                # Data-parallel strategies average over ranks, while these losses are parts of one global mean.
                self.manual_backward(loss * self.trainer.world_size)
            sums = {name: sums[name] + x.detach() if sums else x.detach() for name, x in means.items()}
        totals = self.sum_over_ranks(torch.stack(list(sums.values())))
        return dict(zip(sums, totals, strict=True))

    @contextmanager
    def _gradient_sync(self, wanted: bool) -> Iterator[None]:
        strategy = self.trainer.strategy
        if wanted or not isinstance(strategy, ParallelStrategy):
            yield
        else:
            with strategy.block_backward_sync():
                yield

    def _optimizer_step(self, *, last: bool) -> dict[str, Tensor]:
        """Step; only the rollout's last one moves Lightning's clock, so that `global_step` counts rollouts."""
        optimizer: Any = self.optimizers()
        if last:
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
        return self._grad_norms

    def _set_learning_rates(self, update: int, updates_per_rollout: int) -> None:
        """Set what the schedule says of this update out of all that the Trainer will make."""
        total = self.trainer.estimated_stepping_batches * updates_per_rollout
        warmup = self.warmup_steps * updates_per_rollout
        factor = learning_rate_factor(update, total, schedule=self.lr_schedule, warmup_steps=warmup)
        rates = (self.learning_rate, self.critic_learning_rate)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


def seeded_generator(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on all numbers given, which are well mixed: nothing of it needs to be saved."""
    sequence = np.random.SeedSequence([number % 2**32 for number in entropy])
    seed = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed % 2**63)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise InputError(f"{name}={value} {rule}")
