"""PPO on the reward minus the KL penalty: one `training_step` is one rollout and its updates."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.dtensors import whole
from rlhf_lightning.functional.kl import adapted_beta, k1, k1_weighted, k2
from rlhf_lightning.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    is_clipped,
    probability_ratio,
    reinforce_loss,
)
from rlhf_lightning.functional.masking import masked_sum
from rlhf_lightning.functional.schedules import Schedule, learning_rate_factor
from rlhf_lightning.modules.hardware import OptimizerName
from rlhf_lightning.modules.language import (
    LanguageModule,
    adamw,
    sft_predictions,
    trained_weights,
    without_dropout_on_purpose,
)
from rlhf_lightning.modules.micro_batches import estimated_micro_batch, largest_micro_batch
from rlhf_lightning.modules.ppo_checks import (
    CriticKind,
    KLPenalty,
    LossMean,
    check_settings,
    nearest_divisors,
    without_effect,
)
from rlhf_lightning.modules.ptx import BatchStream
from rlhf_lightning.modules.sharding import Gathering, gathered_where_wanted, shards_weights
from rlhf_lightning.networks import Critic, Model, NetworkConfig, load_policy, stop_token_ids
from rlhf_lightning.networks.checkpointing import checkpoint_blocks, is_checkpointed
from rlhf_lightning.networks.critic import Copy, TrunkCritic, new_value_head
from rlhf_lightning.networks.embeddings import embeddings_and_heads
from rlhf_lightning.networks.flops import Flops, Reading, flops_of
from rlhf_lightning.networks.lora import train_adapter
from rlhf_lightning.networks.offloading import HostWeights
from rlhf_lightning.networks.roles import frozen, have_one_backbone, on_the_same_backbone, reference_of
from rlhf_lightning.networks.sharding import is_sharded, set_gradient_sync
from rlhf_lightning.preflight import check_ppo, check_ppo_strategy, of_all_processes, of_status, refusal
from rlhf_lightning.preflight.out_of_memory import naming_phase
from rlhf_lightning.preflight.phases import ppo_memory
from rlhf_lightning.rollout.experience import (
    AdvantageSettings,
    Baseline,
    Estimator,
    Placement,
    estimate_advantages,
    minibatches,
    trimmed_micro_batches,
)
from rlhf_lightning.rollout.generate import Sampler, generate
from rlhf_lightning.rollout.metrics import critic_metrics, rollout_metrics, sampler_metrics
from rlhf_lightning.rollout.reward import Reward, RewardSetting, load_reward
from rlhf_lightning.rollout.score import response_predictions, response_values, score_rollout, spread
from rlhf_lightning.rollout.shaping import MissingEOS, Normalization, RunningMoments, Shaping
from rlhf_lightning.types import Experience, PromptBatch, Rollout, SampledRollout, ScoredRollout, SFTBatch, Work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

UNTIL_FOUND = 8
"""Sequences that micro_batch_size=auto reads at a time where it has not found how many fit: in a validation before."""

OF_STATES = ("value_loss", "value_clip_fraction")
"""Quantities of an update that have a place for each state (B, R + 1); the others have one for each token (B, R)."""

ALL_CUT_OFF = (
    "every response of the rollout was cut off at max_new_tokens={}: with missing_eos={} nothing is learned from the "
    "reward; raise max_new_tokens, or set missing_eos=subtract"
)

NO_PREFLIGHT = (
    "preflight is left out: it needs all networks whole, which gather_weights={} and the free memory do not allow; "
    "look at a smaller network with the same tokenizer and data on one device, by `rlhf preflight`"
)


class PPOModule(LanguageModule):
    """Trains a policy by PPO (Schulman et al. 2017) on R(x, y) - beta log [p_RL(y|x) / p_FT(y|x)] (Ouyang et al. 2022).

    The reference p_FT is the policy as it was given. The critic starts from the reward model where that reads the
    policy's tokens, else from the policy. All four run without dropout. Other estimators of the policy gradient do
    without a critic: REINFORCE (Williams 1992), RLOO (Ahmadian et al. 2024), GRPO (Shao et al. 2024).
    """

    never_changed = ("reference.", "reward.")
    stage = "ppo"
    reads = PromptBatch
    update_is_made_from = Experience
    phases = ("sampling", "scoring", "updating")

    optimizer: OptimizerName

    def __init__(
        self,
        model: Model,
        *,
        reward: RewardSetting,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        reward_tokenizer: "PreTrainedTokenizerBase | None" = None,
        critic: CriticKind = "separate",
        beta: float = 0.05,
        kl_penalty: KLPenalty = "reward",
        adaptive_kl_target: float | None = None,
        adaptive_kl_horizon: float = 10_000.0,
        normalize_scores: Normalization = "none",
        score_clip: float | None = None,
        missing_eos: MissingEOS = "replace",
        missing_eos_penalty: float = 1.0,
        length_penalty: float = 0.0,
        repetition_penalty: float = 0.0,
        score_placement: Placement = "after_end",
        advantage: Estimator = "gae",
        samples_per_prompt: int = 1,
        baseline: Baseline = "batch",
        gamma: float = 1.0,
        lam: float = 0.95,
        loss_mean: LossMean = "tokens",
        clip_range: float = 0.2,
        value_clip_range: float = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        target_kl: float | None = None,
        ptx_coef: float = 0.0,
        ptx_data: LightningDataModule | None = None,
        ppo_epochs: int = 4,
        minibatch_size: int = 32,
        micro_batch_size: int | Literal["auto"] = 8,
        micro_batch_tokens: int | None = None,
        learning_rate: float = 3e-6,
        critic_learning_rate: float = 3e-6,
        lr_schedule: Schedule = "linear",
        lr_floor: float = 0.0,
        warmup_steps: int = 0,
        warmup_from: float = 0.0,
        max_grad_norm: float = 1.0,
        ema_decay: float | None = None,
        optimizer: OptimizerName = "adamw",
        max_bad_updates: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        sampler: Sampler = "builtin",
        rescore: bool = True,
        top_p: float = 1.0,
        seed: int = 0,
        gather_weights: Gathering = "auto",
        offload: bool = False,
        preflight: bool = True,
    ) -> None:
        """Load the policy; the other roles are made in `setup`, when the tokenizer is known.

        ``beta`` is the price of a nat in units of the score; with the penalty in the loss, "gae" and "grpo" make it one
        in units of the standard deviation that they divide advantages by.
        Sizes count sequences of one process: ``minibatch_size`` for each optimizer step, which must divide the rollout,
        and ``micro_batch_size`` for each forward, of which "auto" finds the largest that fits when training starts.
        With ``micro_batch_tokens`` no forward of several sequences has more tokens than that, padding included.
        Without ``rescore`` the log-probabilities that the ratio starts from are those that tokens were drawn with, and
        the policy does not read its responses before the updates.
        Raises `InputError` where a setting is out of its range or two contradict each other, before anything is loaded.
        """
        check_settings(locals())
        super().__init__(model, tokenizer, max_bad_updates=max_bad_updates)
        self.automatic_optimization = False
        self.without_effect = without_effect(locals(), PPOModule)
        self.policy = load_policy(model).eval()
        self.lora = model.lora if isinstance(model, NetworkConfig) else None
        self.shares_backbone = isinstance(model, NetworkConfig) and model.roles == "shared"
        self._copy: Copy = on_the_same_backbone if self.shares_backbone else deepcopy
        self.reference = frozen(reference_of(self.policy) if self.shares_backbone else deepcopy(self.policy))
        self.ema = None if ema_decay is None else frozen(self._copy(self.policy))
        self.kl_penalty = kl_penalty
        self.adaptive_kl_target = adaptive_kl_target
        self.adaptive_kl_horizon = adaptive_kl_horizon
        self.shaping = Shaping(
            normalize_scores=normalize_scores,
            score_clip=score_clip,
            missing_eos=missing_eos,
            missing_eos_penalty=missing_eos_penalty,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
        )
        self.score_placement = score_placement
        self.advantage = advantage
        self.samples_per_prompt = samples_per_prompt
        self.baseline = baseline
        self.gamma = gamma
        self.lam = lam
        self.loss_mean = loss_mean
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.target_kl = target_kl
        self.ptx_coef = ptx_coef
        self.ptx_data = ptx_data
        self.ppo_epochs = ppo_epochs
        self.minibatch_size = minibatch_size
        self.finds_micro_batch_size = micro_batch_size == "auto"
        self.micro_batch_size = min(UNTIL_FOUND, minibatch_size) if micro_batch_size == "auto" else micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.learning_rate = learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.lr_schedule = lr_schedule
        self.lr_floor = lr_floor
        self.warmup_steps = warmup_steps
        self.warmup_from = warmup_from
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.optimizer = optimizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.sampler: Sampler = sampler
        self.rescore = rescore
        self.seed = seed
        self.gather_weights = gather_weights
        self.offload = offload
        self._host_weights = HostWeights()
        self.preflight = preflight
        # What changes from rollout to rollout beside weights; `on_save_checkpoint` lists it.
        self.beta = beta
        self.updates = 0
        self._share_made = 1.0
        self._updates_made = 0
        """Of the last rollout."""
        self._sampler_read_values = False
        self.seen_scores = RunningMoments()
        self.seen_rewards = RunningMoments()
        self.ptx_batches: BatchStream | None = None
        self.ptx_drawn = 0
        self._texts: list[SFTBatch] = []
        """That were read beside the last rollout."""
        # In a closure: a network that was given here is registered once, as part of `reward`.
        self._load_reward = lambda: load_reward(
            reward,
            self.required_tokenizer,
            tokenizer=reward_tokenizer,
            micro_batch_size=self.micro_batch_size,
            backbone=self.policy if self.shares_backbone else None,
        )
        self.reward: Reward | None = None
        self.shares_trunk = critic == "shared_trunk"
        self.critic: Critic | TrunkCritic | None = None
        self.scored_rollout: ScoredRollout | None = None
        if self.tokenizer is not None:
            self.configure_model()

    @property
    def network(self) -> nn.Module:
        """What is exported: the moving average of the policy where one is kept, else the policy."""
        network: nn.Module = self.policy if self.ema is None else self.ema
        return network

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a response."""
        return stop_token_ids(self.policy, self.required_tokenizer)

    def configure_callbacks(self) -> list[Callback]:
        """Refuse what the Trainer cannot do for PPO; no other hook runs before Lightning's own, poorer refusal."""
        callbacks = super().configure_callbacks()
        trainer = self.trainer
        check_ppo_strategy(type(trainer.strategy).__name__)
        if self.finds_micro_batch_size and shards_weights(trainer.strategy):
            raise InputError(
                f"micro_batch_size=auto tries a micro-batch on one process at a time, and under "
                f"{type(trainer.strategy).__name__} each forward needs all processes; set a number"
            )
        if self.micro_batch_tokens is not None and shards_weights(trainer.strategy):
            raise InputError(
                f"micro_batch_tokens={self.micro_batch_tokens} makes more forwards on one process than on another, and "
                f"under {type(trainer.strategy).__name__} each forward needs all processes; set micro_batch_size alone"
            )
        if self.offload and shards_weights(trainer.strategy):
            raise InputError(
                f"PPOModule(offload=True): {type(trainer.strategy).__name__} moves weights itself; set "
                "module.offload=false, or train on one device or with trainer.strategy=ddp"
            )
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
        return callbacks

    def configure_model(self) -> None:
        """Make the reward, and the critic where the estimator needs one, once the policy's tokenizer is known."""
        if self.reward is None:
            self._make_roles()
        self.shard(*self.roles)

    @property
    def roles(self) -> list[nn.Module]:
        """The networks: policy, reference, critic and average where there are any, and those of the reward."""
        networks = [self.policy, self.reference, self.critic, self.ema, *self.reward_models]
        return [network for network in networks if network is not None]

    @property
    def reward_models(self) -> list[nn.Module]:
        """The networks of the reward; of a function none."""
        return [part.reward_model for part in self._reward.models().values()]

    def _make_roles(self) -> None:
        self.reward = self._load_reward()  # type: ignore[no-untyped-call]
        if self.advantage == "gae":
            self.critic = self._new_critic(self.reward)
        if isinstance(self.critic, Critic) and is_checkpointed(self.policy):
            checkpoint_blocks(self.critic)
        train_adapter(self.policy)
        # Dropout would make the first ratio differ from 1.
        self.eval()
        without_dropout_on_purpose()

    def on_fit_start(self) -> None:
        """Open the stream of pretraining batches at the place where an earlier run left it."""
        if self.ptx_data is not None:
            self.ptx_batches = BatchStream(self.ptx_data, self.trainer)
            self.check_tokenizer(self.ptx_data)
            self.ptx_batches.drawn = self.ptx_drawn

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Look at the run before its first update; one that goes on from a checkpoint is past that."""
        self.check_batch(batch)
        if self.finds_micro_batch_size:
            self.use_micro_batches_of(largest_micro_batch(self, batch))
            log.info("micro_batch_size=auto: %d sequences fit", self.micro_batch_size)
        if self.preflight and self.trainer.global_step == 0 and self.trainer.ckpt_path is None:
            self._require_preflight(batch)
            # A second `fit` of this module goes on from weights that were trained.
            self.preflight = False

    def estimate_micro_batch_size(self, batch: PromptBatch) -> None:
        """Use the largest micro-batch that fits by the estimate, without trying it."""
        self.use_micro_batches_of(estimated_micro_batch(self, batch))

    def use_micro_batches_of(self, size: int) -> None:
        """Read so many sequences at a time; reward models no more than that."""
        self.micro_batch_size = size
        for model in self._reward.models().values():
            model.micro_batch_size = min(model.micro_batch_size, size)
        self.finds_micro_batch_size = False

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample a rollout, score it, estimate advantages, and update policy and critic."""
        self.check_minibatches(len(batch))
        self._texts = []
        rollout = self.generate(self.with_samples(batch), self.trainer.global_step)
        known = {} if self.rescore else {"logprobs": rollout.sampler_logprobs, "values": rollout.sampler_values}
        scored = self.score(rollout, **known)
        self._sampler_read_values = known.get("values") is not None
        parts = self.shaping(scored, self.seen_scores, sum_over_ranks=self.sum_over_ranks)
        experience = self.experience(scored, parts)
        metrics = rollout_metrics(scored, experience, parts, sum_over_ranks=self.sum_over_ranks)
        if self.rescore:
            metrics |= sampler_metrics(rollout, scored, sum_over_ranks=self.sum_over_ranks)
        if self.critic is not None:
            metrics |= critic_metrics(experience, sum_over_ranks=self.sum_over_ranks)
        if self.shaping.missing_eos != "subtract" and metrics["missing_eos"] == 1:
            log.warning("%s", ALL_CUT_OFF.format(self.max_new_tokens, self.shaping.missing_eos))
        with self._phase("updating", rollout):
            metrics |= self.update(experience)
        self._adapt_beta(metrics["kl"], len(scored))
        self._move_average()
        for name, value in metrics.items():
            self.log(f"ppo/{name}", value, prog_bar=name in ("score", "kl"), batch_size=len(batch))
        self.scored_rollout = scored

    @cached_property
    def flops(self) -> tuple[list[Flops], list[Flops]] | None:
        """The sizes that operations follow from, of what is trained, the policy first, and of what is not.

        None where they do not follow.
        """
        trained = [flops_of(network) for network in (self.policy, self.critic) if network is not None]
        frozen = [flops_of(network) for network in (self.reference, *self.reward_models)]
        known = [[sizes for sizes in part if sizes is not None] for part in (trained, frozen)]
        return (known[0], known[1]) if known == [trained, frozen] else None

    def work(self, batch: PromptBatch) -> Work:
        """Return how many tokens the last rollout has, with texts read beside it, and the operations that it took.

        The policy samples it, all networks read it for the scores (with ``rescore`` the policy, too), and policy and
        critic with each pass of the updates; a reward model is taken to read the policy's tokens.
        """
        rollout = self.scored_rollout
        assert rollout is not None
        read = Reading.of(rollout.attention_mask, rollout.response_mask, ends_are_read=True)
        scored = Reading.of(rollout.attention_mask, torch.zeros_like(rollout.response_mask), ends_are_read=True)
        texts = [Reading.of(text.attention_mask, text.loss_mask) for text in self._texts]
        tokens = torch.stack([read.tokens, *(text.tokens for text in texts)]).sum()
        if self.flops is None:
            return Work(tokens, None, sampled_tokens=read.predicted)
        trained, frozen = self.flops
        passes = self._updates_made * self.minibatch_size / len(rollout)
        scoring = trained
        if not self.rescore:
            # On one trunk the critic reads it in the policy's place if the sampler did not, and needs no vocabulary.
            by_critic = self.shares_trunk and not self._sampler_read_values
            scoring = [*([replace(trained[0], head=0)] if by_critic else []), *trained[1:]]
        reference, *reward_models = frozen
        parts = [sizes.forward(read) for sizes in (trained[0], *scoring, reference)]
        parts += [sizes.forward(scored) for sizes in reward_models]
        parts += [passes * sizes.training(read) for sizes in trained]
        parts += [trained[0].training(text) for text in texts]
        return Work(tokens, sum(parts[1:], start=parts[0]), sampled_tokens=read.predicted)

    def with_samples(self, batch: PromptBatch) -> PromptBatch:
        """Return each prompt ``samples_per_prompt`` times, the samples of one prompt next to each other."""
        prompts = torch.arange(len(batch), device=batch.prompt_tokens.device)
        return batch.rows(prompts.repeat_interleave(self.samples_per_prompt))

    def generate(self, batch: PromptBatch, draw: int) -> SampledRollout:
        """Sample a response for each row; ``draw`` selects the noise, which differs between ranks."""
        longest = self.max_positions
        needed = batch.prompt_tokens.shape[1] + self.max_new_tokens
        if longest is not None and needed > longest:
            raise InputError(
                f"a prompt of {batch.prompt_tokens.shape[1]} tokens and max_new_tokens={self.max_new_tokens} need "
                f"{needed} positions; the policy has {longest}"
            )
        with self._phase("sampling", batch), self._weights_for_sampling(batch):
            return generate(
                self.policy,
                batch,
                self.required_tokenizer,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                stop_tokens=self.stop_token_ids,
                generator=seeded_generator(self.seed, self.global_rank, draw, device=self.device),
                sampler=self.sampler,
                value_of=self._value_of,
            )

    @property
    def _value_of(self) -> Callable[[Tensor], Tensor] | None:
        """What finds the values of states while they are sampled from, None where the critic reads the responses."""
        trunk = self.critic if isinstance(self.critic, TrunkCritic) else None
        # The head of a sharded one is whole while the critic is called, and not before.
        return None if trunk is None or self.rescore or is_sharded(trunk) else trunk.value_of

    def _weights_for_sampling(self, batch: PromptBatch) -> AbstractContextManager[bool]:
        """Return the block in which a rollout is sampled: with sharded weights, gathered once where they fit."""
        tokens = len(batch) * (batch.prompt_tokens.shape[1] + self.max_new_tokens)
        return gathered_where_wanted(self.gather_weights, [self.policy], tokens=tokens, device=self.device)

    def score(self, rollout: Rollout, *, logprobs: Tensor | None = None, values: Tensor | None = None) -> ScoredRollout:
        """Add log-probabilities, those of the policy where they are not known (B, R), values (B, R + 1) and scores."""
        with self._phase("scoring", rollout), self._frozen_on_device():
            return score_rollout(
                rollout,
                policy=self.policy,
                reference=self.reference,
                critic=self.critic,
                reward=self._reward,
                temperature=self.temperature,
                micro_batch_size=self.micro_batch_size,
                micro_batch_tokens=self.micro_batch_tokens,
                logprobs=logprobs,
                values=values,
            )

    def _frozen_on_device(self) -> AbstractContextManager[None]:
        """Return the block in which reference and reward models are read; with ``offload`` they leave after it."""
        frozen = [self.reference, *self.reward_models]
        return self._host_weights.on(self.device, frozen) if self.offload else nullcontext()

    def experience(self, scored: ScoredRollout, parts: dict[str, Tensor]) -> Experience:
        """Return rewards, advantages and returns of a scored rollout whose shaped score has these parts."""
        scores = torch.stack(list(parts.values())).sum(dim=0)
        return estimate_advantages(
            scored, scores, self.advantage_settings, self.seen_rewards, sum_over_ranks=self.sum_over_ranks
        )

    @property
    def advantage_settings(self) -> AdvantageSettings:
        """How advantages are estimated now: beta may have been adapted."""
        return AdvantageSettings(
            advantage=self.advantage,
            beta=self.beta if self.kl_penalty == "reward" else 0.0,
            gamma=self.gamma,
            lam=self.lam,
            samples_per_prompt=self.samples_per_prompt,
            baseline=self.baseline,
            score_placement=self.score_placement,
            learn_from_cut_off=self.shaping.missing_eos != "mask",
        )

    def update(self, experience: Experience) -> dict[str, Tensor]:
        """Make ``ppo_epochs`` passes over the rollout, a step each minibatch; return the means of the metrics.

        With ``target_kl`` the step whose policy is already further from the one that sampled is the rollout's last.
        """
        rollouts_done = self.trainer.global_step
        generator = seeded_generator(self.seed, rollouts_done)
        planned = self._updates_per_rollout(len(experience))
        steps: list[dict[str, Tensor]] = []
        made: list[dict[str, Tensor]] = []
        for minibatch in self._minibatches(experience, generator):
            done = rollouts_done * planned + len(steps) - self.bad_updates.skipped
            self._set_learning_rates(done, planned)
            self.bad_updates.records = [minibatch]
            metrics = self._accumulate_gradients(minibatch)
            last = len(steps) + 1 == planned or self._moved_too_far(metrics["approx_kl"])
            steps.append(metrics | self._optimizer_step(last=last))
            self.updates += 1
            if not self.bad_updates.last_was_skipped:
                made.append(steps[-1])
            if last:
                break
        self._updates_made, self._share_made = len(steps), len(made) / len(steps)
        means = {name: torch.stack([step[name] for step in made or steps]).mean() for name in steps[0]}
        state = {"learning_rate": self._learning_rate, "updates": self.updates, "beta": self.beta}
        return means | {name: torch.tensor(float(value), dtype=torch.float32) for name, value in state.items()}

    def losses(self, experience: Experience) -> dict[str, Tensor]:
        """Return the policy's quantities of each sampled token (B, R), and the critic's of each state (B, R + 1)."""
        return self.policy_losses(experience) | self.value_losses(experience)

    def policy_losses(self, experience: Experience) -> dict[str, Tensor]:
        """Return the policy's quantities of each sampled token (B, R)."""
        tokens, attention_mask = experience.tokens, experience.attention_mask
        predicted = response_predictions(
            self.policy, tokens, attention_mask, experience.response_starts, experience.response_mask
        )
        found, entropies = predicted.logprobs_and_entropy(
            temperature=self.temperature, entropy_gradient=self.entropy_coef > 0
        )
        # Outside of the mask nothing counts, and a ratio of 1 keeps it finite.
        logprobs = experience.old_logprobs.masked_scatter(experience.response_mask, found)
        ratio = probability_ratio(logprobs.detach(), experience.old_logprobs)
        quantities = {
            "policy_loss": self._policy_loss(logprobs, experience),
            "entropy": spread(entropies, experience.response_mask),
            "approx_kl": k2(logprobs.detach(), experience.old_logprobs),
            "ratio": ratio,
            "clip_fraction": is_clipped(ratio, 1.0, clip_range=self.clip_range),
        }
        if self.kl_penalty != "reward":
            quantities["kl_loss"] = self._kl_loss(logprobs, experience)
        return quantities

    def value_losses(self, experience: Experience) -> dict[str, Tensor]:
        """Return the critic's quantities of each state (B, R + 1), none where there is no critic."""
        if self.critic is None:
            return {}
        values = response_values(
            self.critic,
            experience.tokens,
            experience.attention_mask,
            experience.response_starts,
            length=experience.response_mask.shape[1],
        )
        return {
            "value_loss": clipped_value_loss(
                values, experience.old_values, experience.returns, value_clip_range=self.value_clip_range
            ),
            "value_clip_fraction": is_clipped(values.detach(), experience.old_values, clip_range=self.value_clip_range),
        }

    def _policy_loss(self, logprobs: Tensor, experience: Experience) -> Tensor:
        if self.advantage == "reinforce":
            return reinforce_loss(logprobs, experience.advantages)
        return clipped_policy_loss(logprobs, experience.old_logprobs, experience.advantages, clip_range=self.clip_range)

    def _kl_loss(self, logprobs: Tensor, experience: Experience) -> Tensor:
        if self.kl_penalty == "loss_k1":
            return k1_weighted(logprobs, experience.ref_logprobs, experience.response_mask)
        return k2(logprobs, experience.ref_logprobs)

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
        groups = [{"params": trained_weights(self.policy), "lr": self.learning_rate}]
        if self.critic is not None:
            groups.append({"params": trained_weights(self.critic), "lr": self.critic_learning_rate})
        in_32_bits = embeddings_and_heads(self)
        return adamw(
            groups, optimizer=self.optimizer, in_32_bits=in_32_bits, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the unscaled gradients of policy and critic, each by its own norm; skip a step that is not finite."""
        # Of sharded gradients the norm is known in parts, too.
        norms = [whole(clip_grad_norm_(group["params"], self.max_grad_norm)) for group in optimizer.param_groups]
        self._grad_norms = dict(zip(("policy_grad_norm", "critic_grad_norm"), norms, strict=False))
        self.bad_updates.judge(self, optimizer, norms, update=self.updates)

    def repeat_update(self, records: list[Any]) -> None:
        """Find losses and gradient of an update from a minibatch, and the pretraining texts beside it if any."""
        minibatch, *texts = records
        if texts and self.ptx_batches is None:
            raise InputError("the update had pretraining texts beside it, and ptx_data is None (null)")
        if texts and self.ptx_batches is not None:
            self.ptx_batches.put_back(texts[0])
        self._accumulate_gradients(minibatch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what changes from rollout to rollout beside weights, as plain numbers that are equal on all ranks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {
            "beta": self.beta,
            "updates": self.updates,
            "seen_scores": asdict(self.seen_scores),
            "seen_rewards": asdict(self.seen_rewards),
            "ptx_drawn": self.ptx_drawn,
            "micro_batch_size": self.micro_batch_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what `on_save_checkpoint` added."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["ppo"]
        self.beta, self.updates, self.ptx_drawn = state["beta"], state["updates"], state["ptx_drawn"]
        self.seen_scores = RunningMoments(**state["seen_scores"])
        self.seen_rewards = RunningMoments(**state["seen_rewards"])
        if self.finds_micro_batch_size:
            # Another size would round differently.
            self.use_micro_batches_of(state["micro_batch_size"])

    def _require_preflight(self, batch: PromptBatch) -> None:
        """Log what is doubtful; raises `InputError` on all processes where one of them finds an error."""
        gathering = gathered_where_wanted(self.gather_weights, self.roles, tokens=0, device=self.device)
        with self.trainer.precision_plugin.train_step_context(), gathering as are_whole:
            # Some checks read more on one process than on another: they would wait for each other in vain.
            if not are_whole:
                log.warning("%s", NO_PREFLIGHT.format(self.gather_weights))
                return
            with self._frozen_on_device():
                findings = check_ppo(self, batch)
        if self.trainer.is_global_zero:
            for finding in of_status(findings, "warning"):
                log.warning("preflight: %s", finding)
        errors = of_all_processes(of_status(findings, "error"))
        if any(errors):
            raise refusal(errors, off="PPOModule(preflight=False), module.preflight=false, trains without this check")

    @contextmanager
    def _phase(self, name: str, batch: PromptBatch) -> Iterator[None]:
        """Hold the block of a phase of the rollout of a batch, which says so if it runs out of memory.

        The Trainer's profiler hears of it.
        """
        size = f"module.micro_batch_size={self.micro_batch_size}"
        sampled = f"data.batch_size or module.samples_per_prompt={self.samples_per_prompt}"
        naming = naming_phase(
            name,
            lambda: ppo_memory(self, self.device, sequences=len(batch), prompt_length=batch.prompt_tokens.shape[1]),
            helps=f"less of {sampled if name == 'sampling' else size}, or of module.max_new_tokens="
            f"{self.max_new_tokens}",
        )
        profiler: Any = None if self._trainer is None else self._trainer.profiler  # type: ignore[attr-defined]
        with naming, nullcontext() if profiler is None else profiler.profile(name):
            yield

    @property
    def _reward(self) -> Reward:
        assert self.reward is not None
        return self.reward

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizers()
        return cast(torch.optim.Optimizer, optimizer.optimizer)

    @property
    def _learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _new_critic(self, reward: Reward) -> Critic | TrunkCritic:
        generator = torch.Generator().manual_seed(self.seed)
        if self.shares_trunk:
            return TrunkCritic(self.policy, new_value_head(self.policy, generator))
        # Of a reward that is made of several: the first that can be one.
        models = [part.reward_model for part in reward.models().values() if part.shares_tokens]
        if self.shares_backbone:
            models = [model for model in models if have_one_backbone(model, self.policy)]
        if models:
            return Critic.from_reward_model(models[0], copy=self._copy, lora=self.lora)
        return Critic.from_policy(self.policy, generator, copy=self._copy, lora=self.lora)

    def check_minibatches(self, prompts: int) -> None:
        """Raise `InputError` where the rollout of so many prompts of one process cannot be cut into minibatches."""
        rollout_size = prompts * self.samples_per_prompt
        if rollout_size % self.minibatch_size:
            near = nearest_divisors(rollout_size, self.minibatch_size)
            raise InputError(
                f"minibatch_size={self.minibatch_size} must divide the rollout of {rollout_size} sequences "
                f"(data.batch_size * samples_per_prompt): {' or '.join(map(str, near))} would"
            )

    def _updates_per_rollout(self, rollout_size: int) -> int:
        return self.ppo_epochs * (rollout_size // self.minibatch_size)

    def _minibatches(self, experience: Experience, generator: torch.Generator) -> Iterator[Experience]:
        for _ in range(self.ppo_epochs):
            yield from minibatches(experience, minibatch_size=self.minibatch_size, generator=generator)

    def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
        """Add up the gradients of all micro-batches; return the means over the minibatch's tokens on all processes."""
        self._optimizer.zero_grad()
        pretraining = {} if self.ptx_batches is None else self._add_ptx_gradients(self.ptx_batches)
        # Means over the whole optimizer step: the counts must be known before the first micro-batch.
        mask = minibatch.response_mask
        own = [mask.sum(), minibatch.value_mask.sum(), mask.any(dim=1).sum()]
        counts = self.sum_over_ranks(torch.tensor([float(n) for n in own], dtype=torch.float32, device=self.device))
        # As plain numbers: a quotient of two of them is then as precise as the losses may be.
        tokens, states, sequences = counts.clamp(min=1.0).tolist()
        policy_scale = tokens / sequences if self.loss_mean == "sequences" else 1.0
        sums: dict[str, Tensor] = {}
        parts = list(
            trimmed_micro_batches(
                minibatch, micro_batch_size=self.micro_batch_size, micro_batch_tokens=self.micro_batch_tokens
            )
        )
        passes = self.passes
        for part, losses in product(parts, passes):
            means = {
                name: masked_sum(x, part.value_mask).sum() / states
                if name in OF_STATES
                else masked_sum(x, part.response_mask).sum() / tokens
                for name, x in losses(part).items()
            }
            with self._gradient_sync(part is parts[-1], begun=losses is not passes[0]):
                # Data-parallel strategies average over ranks, while these losses are parts of one global mean.
                self.manual_backward(self._loss(means, policy_scale) * self.trainer.world_size)
            sums |= {name: sums[name] + x.detach() if name in sums else x.detach() for name, x in means.items()}
        totals = self.sum_over_ranks(torch.stack(list(sums.values())))
        return dict(zip(sums, totals, strict=True)) | pretraining

    @property
    def passes(self) -> list[Callable[[Experience], dict[str, Tensor]]]:
        """What is read and differentiated in turn: the policy, then the critic, each in a backward of its own.

        They share no trained weight, so that the gradients are those of the sum, and one network's activations are held
        at a time. On one trunk they are read together, and so they are where DDP looks for weights that a loss does not
        need: those of the critic would be such in the policy's.
        """
        strategy = None if self._trainer is None else self.trainer.strategy
        ddp: Any = strategy.model if isinstance(strategy, DDPStrategy) else None
        looks_for_unused = ddp is not None and ddp.find_unused_parameters
        if self.critic is None or self.shares_trunk or looks_for_unused:
            return [self.losses]
        return [self.policy_losses, self.value_losses]

    def _loss(self, means: dict[str, Tensor], policy_scale: float) -> Tensor:
        """Return what is minimised of what there is: the policy's terms, and the critic's beside them."""
        terms: list[Tensor] = []
        if "policy_loss" in means:
            policy = means["policy_loss"] - self.entropy_coef * means["entropy"]
            if "kl_loss" in means:
                policy = policy + self.beta * means["kl_loss"]
            terms.append(policy_scale * policy)
        if "value_loss" in means:
            terms.append(self.value_coef * means["value_loss"])
        return sum(terms[1:], start=terms[0])

    def _add_ptx_gradients(self, batches: BatchStream) -> dict[str, Tensor]:
        """Add ptx_coef times the gradient of the next-token loss (Ouyang et al. 2022, eq. 2); return that loss."""
        batch = next(batches).to(self.device)
        self.bad_updates.records.append(batch)
        self.ptx_drawn = batches.drawn
        self._texts.append(batch)
        tokens = self.sum_over_ranks(batch.loss_mask.sum().float())
        losses: list[Tensor] = []
        for rows in torch.arange(len(batch), device=self.device).split(self.micro_batch_size):
            loss = -sft_predictions(self.policy, batch.rows(rows)).total_logprob() / tokens
            # The gradients travel between ranks with those of the minibatch's last part.
            with self._gradient_sync(False):
                self.manual_backward(self.ptx_coef * loss * self.trainer.world_size)
            losses.append(loss.detach())
        return {"ptx_loss": self.sum_over_ranks(torch.stack(losses).sum())}

    @contextmanager
    def _gradient_sync(self, wanted: bool, *, begun: bool = False) -> Iterator[None]:
        """Hold the block of a backward; the gradients travel between ranks where that is ``wanted``, once for each.

        Those of DDP travel as they appear, until all of them have: a backward that follows the one that has ``begun``
        it brings its own along, and must not begin anew.
        """
        strategy = self.trainer.strategy
        for network in (self.policy, self.critic):
            if network is not None:
                set_gradient_sync(network, wanted)
        if (wanted and not begun) or not isinstance(strategy, ParallelStrategy):
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

    def _moved_too_far(self, approx_kl: Tensor) -> bool:
        # The mean over all ranks, so that they agree.
        return self.target_kl is not None and float(approx_kl) > self.target_kl

    def _adapt_beta(self, kl: Tensor, responses: int) -> None:
        """Steer beta; of a rollout some of whose updates were skipped, by a share of its responses."""
        if self.adaptive_kl_target is not None and self._share_made and math.isfinite(kl):
            self.beta = adapted_beta(
                self.beta,
                float(kl),
                target=self.adaptive_kl_target,
                horizon=self.adaptive_kl_horizon,
                episodes=responses * self.trainer.world_size * self._share_made,
            )

    @torch.no_grad()
    def _move_average(self) -> None:
        """Move the averaged weights: ema <- d ema + (1 - d) policy, once a rollout (Ouyang et al. 2022, C.4)."""
        if self.ema is None or self.ema_decay is None or not self._share_made:
            return
        for average, weight in zip(self.ema.parameters(), self.policy.parameters(), strict=True):
            if weight.requires_grad:
                average.lerp_(weight, 1 - self.ema_decay)

    def _set_learning_rates(self, update: int, updates_per_rollout: int) -> None:
        """Set what the schedule says of this update out of all that the Trainer will make."""
        total = self.trainer.estimated_stepping_batches * updates_per_rollout
        warmup = self.warmup_steps * updates_per_rollout
        factor = learning_rate_factor(
            update,
            total,
            schedule=self.lr_schedule,
            warmup_steps=warmup,
            warmup_from=self.warmup_from,
            floor=self.lr_floor,
        )
        rates = (self.learning_rate, self.critic_learning_rate)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * factor


def seeded_generator(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on all numbers given, which are well mixed: nothing of it needs to be saved."""
    sequence = np.random.SeedSequence([number % 2**32 for number in entropy])
    seed = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(seed % 2**63)
