"""Breaks the functional core, one fault at a time, and looks whether the tests notice.

    uv run python tests/mutants.py            run all, print the table of docs/details.md
    uv run python tests/mutants.py clip ...   only those whose name holds "clip", or one of the others

A mutant is one line of the package as it must not be. The tests named with it run on a copy of the tree that holds the
fault; it is killed when one of them fails, and survives when they pass. Exits with 1 where one survives.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 900


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` stands once in ``file`` and becomes ``new``; ``tests`` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    detail: int
    """The number in docs/details.md."""


FUNCTIONAL = "rlhf_lightning/functional/"
ROLLOUT = "rlhf_lightning/rollout/"
BY_SEQUENCE = "rlhf_lightning/networks/by_sequence.py"
PPO = "rlhf_lightning/modules/ppo.py"
PPO_TESTS = "tests/modules/test_ppo.py::"
INVARIANCES = "tests/modules/test_invariances.py::"
SHIFT = INVARIANCES + "test_a_shift_of_every_score_leaves_advantages_and_the_policys_gradient"

MUTANTS = (
    Mutant(
        "k1 has the wrong sign",
        FUNCTIONAL + "kl.py",
        "    return logprobs - ref_logprobs\n",
        "    return ref_logprobs - logprobs\n",
        ("tests/functional/test_kl.py",),
        1,
    ),
    Mutant(
        "k2 is not halved",
        FUNCTIONAL + "kl.py",
        ".square() / 2\n",
        ".square()\n",
        ("tests/functional/test_kl.py",),
        2,
    ),
    Mutant(
        "k3 of the other direction",
        FUNCTIONAL + "kl.py",
        "log_ratio = ref_logprobs - logprobs",
        "log_ratio = logprobs - ref_logprobs",
        ("tests/functional/test_kl.py",),
        3,
    ),
    Mutant(
        "k1 differentiated in the loss",
        FUNCTIONAL + "kl.py",
        "    return to_go * logprobs\n",
        "    return k1(logprobs, ref_logprobs)\n",
        ("tests/functional/test_kl.py",),
        2,
    ),
    Mutant(
        "the weight of the score function is not detached",
        FUNCTIONAL + "kl.py",
        "k1(logprobs, ref_logprobs).detach()",
        "k1(logprobs, ref_logprobs)",
        ("tests/functional/test_kl.py",),
        2,
    ),
    Mutant(
        "KL to come counted from the wrong end",
        FUNCTIONAL + "masking.py",
        "kept.flip(1).cumsum(dim=1).flip(1)",
        "kept.cumsum(dim=1)",
        ("tests/functional/test_masking.py",),
        2,
    ),
    Mutant(
        "beta steered the wrong way",
        FUNCTIONAL + "kl.py",
        "max(kl / target - 1, -0.2)",
        "max(1 - kl / target, -0.2)",
        ("tests/functional/test_kl.py",),
        5,
    ),
    Mutant(
        "beta steered without a bound",
        FUNCTIONAL + "kl.py",
        "error = min(max(kl / target - 1, -0.2), 0.2)",
        "error = kl / target - 1",
        ("tests/functional/test_kl.py",),
        5,
    ),
    Mutant(
        "beta counts the sequences of one process",
        PPO,
        "episodes=responses * self.trainer.world_size",
        "episodes=responses",
        (PPO_TESTS + "test_two_processes_stop_together_and_keep_one_average_one_beta_and_one_scale_of_scores",),
        5,
    ),
    Mutant(
        "the reference is the policy itself",
        PPO,
        "self.reference = frozen(reference_of(self.policy) if self.shares_backbone else deepcopy(self.policy))",
        "self.reference = self.policy",
        (PPO_TESTS + "test_the_first_rollout_logs_a_kl_of_0_and_the_next_one_does_not",),
        6,
    ),
    Mutant(
        "positions count padding",
        FUNCTIONAL + "masking.py",
        "return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)",
        "return torch.arange(attention_mask.shape[1]).expand(attention_mask.shape).clone()",
        ("tests/functional/test_masking.py",),
        7,
    ),
    Mutant(
        "responses are decoded and encoded again",
        ROLLOUT + "generate.py",
        "    is_stop = torch.isin(response_tokens, stops) & response_mask\n",
        "    is_stop = torch.isin(response_tokens, stops) & response_mask\n"
        "    texts = tokenizer.batch_decode(response_tokens)\n"
        "    rows = [(ids + [0] * max_new_tokens)[: response_mask.shape[1]] for ids in tokenizer(texts).input_ids]\n"
        "    response_tokens = torch.tensor(rows)\n",
        (PPO_TESTS + "test_the_sampled_ids_reach_the_loss_where_the_tokenizer_would_write_their_text_with_others",),
        8,
    ),
    Mutant(
        "the mask ends before the end token",
        FUNCTIONAL + "masking.py",
        "    return stops_before == 0\n",
        "    return stops.long().cumsum(dim=1) == 0\n",
        ("tests/functional/test_masking.py", "tests/rollout/test_generate.py"),
        10,
    ),
    Mutant(
        "the mask goes on after the end token",
        FUNCTIONAL + "masking.py",
        "    return stops_before == 0\n",
        "    return torch.ones_like(stops)\n",
        ("tests/functional/test_masking.py",),
        10,
    ),
    Mutant(
        "what follows the end token stays in the ids",
        ROLLOUT + "generate.py",
        "response_tokens = sampled.tokens.masked_fill(~response_mask, _pad_token_id(tokenizer))",
        "response_tokens = sampled.tokens.clone()",
        ("tests/rollout/test_generate.py",),
        11,
    ),
    Mutant(
        "a response without an end is penalised when it has one",
        FUNCTIONAL + "rewards.py",
        "change.masked_fill(ended, 0.0)",
        "change.masked_fill(~ended, 0.0)",
        ("tests/functional/test_rewards.py",),
        12,
    ),
    Mutant(
        "replace subtracts",
        FUNCTIONAL + "rewards.py",
        "-penalty - scores if replace else",
        "torch.full_like(scores, -penalty) if replace else",
        ("tests/functional/test_rewards.py",),
        12,
    ),
    Mutant(
        "the value after the end is not 0",
        FUNCTIONAL + "advantages.py",
        "    values = values.masked_fill(~state_mask, 0.0)\n",
        "",
        ("tests/functional/test_advantages.py",),
        13,
    ),
    Mutant(
        "what was cut off is learned from although it is left out",
        PPO,
        'learn_from_cut_off=self.shaping.missing_eos != "mask"',
        "learn_from_cut_off=True",
        (PPO_TESTS + "test_responses_that_were_cut_off_can_be_left_out_of_the_loss",),
        13,
    ),
    Mutant(
        "the share of what was cut off stays in the mean",
        PPO,
        "mask.any(dim=1).sum()]",
        "torch.tensor(len(mask))]",
        (PPO_TESTS + "test_responses_that_were_cut_off_can_be_left_out_of_the_loss",),
        13,
    ),
    Mutant(
        "temperature left out of the log-probabilities",
        FUNCTIONAL + "head_logprobs.py",
        "return logits if temperature == 1 else logits.div_(temperature)",
        "return logits",
        ("tests/functional/test_head_logprobs.py",),
        14,
    ),
    Mutant(
        "temperature left out of the gradient",
        FUNCTIONAL + "head_logprobs.py",
        "return slopes if temperature == 1 else slopes.div_(temperature)",
        "return slopes",
        ("tests/functional/test_head_logprobs.py",),
        14,
    ),
    Mutant(
        "temperature left out of the gradient by fused kernels",
        FUNCTIONAL + "head_logprobs.py",
        "return (slopes / temperature).to(logits.dtype)",
        "return slopes.to(logits.dtype)",
        ("tests/functional/test_fused.py",),
        14,
    ),
    Mutant(
        "a joined layer returns what its neighbour found",
        ROLLOUT + "joined.py",
        "self.given, self.number = first.given, place - 1",
        "self.given, self.number = first.given, 0",
        ("tests/rollout/test_joined.py",),
        18,
    ),
    Mutant(
        "joined layers keep the weights of the rollout before",
        ROLLOUT + "joined.py",
        "        kept[0].fill(layers)\n",
        "",
        ("tests/rollout/test_joined.py",),
        18,
    ),
    Mutant(
        "one token attends to what stands behind it",
        ROLLOUT + "one_token_kernel.py",
        "* SCALING + seen[None, :]",
        "* SCALING",
        ("tests/rollout/test_one_token_kernel.py",),
        18,
    ),
    Mutant(
        "temperature left out of the updates",
        PPO,
        "            temperature=self.temperature, entropy_gradient=",
        "            entropy_gradient=",
        (PPO_TESTS + "test_on_its_own_fresh_rollout_the_ratio_is_1",),
        14,
    ),
    Mutant(
        "temperature left out of the draw",
        ROLLOUT + "draw.py",
        "scaled if temperature == 1 else scaled / temperature",
        "scaled",
        ("tests/rollout/test_draw.py", "tests/rollout/test_generate.py"),
        14,
    ),
    Mutant(
        "top-p is let through",
        "rlhf_lightning/modules/ppo_checks.py",
        'settings["top_p"] == 1',
        'settings["top_p"] <= 1',
        ("tests/modules/test_ppo_checks.py",),
        15,
    ),
    Mutant(
        "log-softmax in half precision",
        FUNCTIONAL + "precision.py",
        "torch.promote_types(x.dtype, torch.float32)",
        "x.dtype",
        ("tests/functional/test_precision.py", "tests/functional/test_head_logprobs.py"),
        17,
    ),
    Mutant(
        "the gradient of the output layer is rounded to 16 bits",
        FUNCTIONAL + "head_logprobs.py",
        "None if x is None else x.to(kind)",
        "None if x is None else x.to(self.weight.dtype).to(kind)",
        ("tests/functional/test_head_logprobs.py",),
        17,
    ),
    Mutant(
        "states taken one position late",
        "rlhf_lightning/networks/predictions.py",
        "index_select(0, row * tokens.shape[1] + column)",
        "index_select(0, row * tokens.shape[1] + column + 1)",
        ("tests/rollout/test_score.py",),
        10,
    ),
    Mutant(
        "logits taken one position late",
        "rlhf_lightning/networks/predictions.py",
        "logits[row, column - left_out]",
        "logits[row, column + 1 - left_out]",
        ("tests/networks/test_predictions.py",),
        10,
    ),
    Mutant(
        "gradients of a prompt that responses share are those of one response",
        BY_SEQUENCE,
        ".index_add_(0, leader, of_group",
        ".index_copy_(0, leader, of_group",
        ("tests/networks/test_by_sequence.py",),
        50,
    ),
    Mutant(
        "scores of attention are rounded to 16 bits",
        "rlhf_lightning/networks/short_attention.py",
        "at_least_float32(queries), at_least_float32(keys)",
        "queries, keys",
        ("tests/networks/test_short_attention.py",),
        50,
    ),
    Mutant(
        "what fills up a row is trained",
        BY_SEQUENCE,
        ".index_fill_(0, sequences.fill, 0)",
        "",
        ("tests/networks/test_by_sequence.py",),
        50,
    ),
    Mutant(
        "tokens that are not read give gradients to those that are",
        BY_SEQUENCE,
        ".index_fill_(0, sequences.not_kept, 0)",
        "",
        ("tests/networks/test_by_sequence.py", "tests/networks/test_unpadded.py"),
        50,
    ),
    Mutant(
        "sequences in groups get the tokens of others",
        "rlhf_lightning/networks/length_groups.py",
        "index_copy_(0, order, padded.cumsum(0) - padded)",
        "copy_(padded.cumsum(0) - padded)",
        ("tests/networks/test_length_groups.py", "tests/networks/test_by_sequence.py"),
        50,
    ),
    Mutant(
        "short sequences see the token behind",
        "rlhf_lightning/networks/short_attention.py",
        ".triu(1)",
        ".triu(2)",
        ("tests/networks/test_short_attention.py",),
        50,
    ),
    Mutant(
        "the gradient of a norm is that of a product with its scale",
        FUNCTIONAL + "few_passes.py",
        "of_x.addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(scale)",
        "of_x.mul_(scale)",
        ("tests/functional/test_few_passes.py", "tests/networks/test_few_passes.py"),
        50,
    ),
    Mutant(
        "gradients are rotated forward again",
        FUNCTIONAL + "few_passes.py",
        "_turned(gradient, cos, of_second, -of_first)",
        "_turned(gradient, cos, -of_first, of_second)",
        ("tests/functional/test_few_passes.py", "tests/networks/test_few_passes.py"),
        50,
    ),
    Mutant(
        "the gradient of a gate's other factor is that of a product without silu",
        FUNCTIONAL + "few_passes.py",
        "of_up = torch.nn.functional.silu(gate).mul_(gradient)",
        "of_up = gate * gradient",
        ("tests/functional/test_few_passes.py",),
        50,
    ),
    Mutant(
        "the gradient of a norm is rounded to 16 bits under autocast",
        FUNCTIONAL + "few_passes.py",
        "with torch.autocast(x.device.type, enabled=False):",
        "with torch.autocast(x.device.type, dtype=torch.bfloat16):",
        ("tests/functional/test_few_passes.py",),
        50,
    ),
    Mutant(
        "Muon steps along its momentum without Nesterov's look ahead",
        "rlhf_lightning/modules/muon.py",
        "return gradient.lerp(momentum, MOMENTUM)",
        "return momentum",
        ("tests/modules/test_muon.py",),
        39,
    ),
    Mutant(
        "a step of Muon goes by the smaller side of a matrix",
        "rlhf_lightning/modules/muon.py",
        "max(weight.shape) ** 0.5",
        "min(weight.shape) ** 0.5",
        ("tests/modules/test_muon.py",),
        39,
    ),
    Mutant(
        "two coefficients of Muon's iteration are swapped",
        FUNCTIONAL + "muon.py",
        "beta=of_s3, alpha=of_s5",
        "beta=of_s5, alpha=of_s3",
        ("tests/functional/test_muon.py",),
        39,
    ),
    Mutant(
        "sampling leaves out biases",
        ROLLOUT + "reordered.py",
        'self.copy, self.bias, "none"',
        'self.copy, None, "none"',
        ("tests/rollout/test_reordered.py",),
        18,
    ),
    Mutant(
        "sequences in one row go on counting their positions",
        "rlhf_lightning/networks/unpadded.py",
        "count(attention_mask)[attention_mask]",
        "torch.arange(len(padded.real))",
        ("tests/networks/test_unpadded.py",),
        7,
    ),
    Mutant(
        "states that are read get a place too early",
        "rlhf_lightning/networks/last_block.py",
        "index_copy_(0, places, rows)",
        "index_copy_(0, places - 1, rows)",
        ("tests/networks/test_last_block.py",),
        20,
    ),
    Mutant(
        "a critic takes over states that were not made",
        "rlhf_lightning/networks/critic.py",
        "not (wanted & ~self.made).any()",
        "True",
        ("tests/networks/test_last_block.py",),
        1,
    ),
    Mutant(
        "an adapter gives no gradient to what it reads",
        "rlhf_lightning/networks/adapted_linear.py",
        "(gradient @ weight).addmm_(of_inner, down)",
        "(gradient @ weight)",
        ("tests/networks/test_adapted_linear.py",),
        5,
    ),
    Mutant(
        "all ranks sample the same noise",
        PPO,
        "seeded_generator(self.seed, self.global_rank, draw, device=self.device)",
        "seeded_generator(self.seed, 0, draw, device=self.device)",
        (PPO_TESTS + "test_two_processes_have_the_gradient_and_metrics_of_one_with_both_rollouts",),
        21,
    ),
    Mutant(
        "every rollout samples the same noise",
        PPO,
        "seeded_generator(self.seed, self.global_rank, draw, device=self.device)",
        "seeded_generator(self.seed, self.global_rank, 0, device=self.device)",
        (PPO_TESTS + "test_the_rollout_depends_on_seed_and_step_alone",),
        21,
    ),
    Mutant(
        "the reward model finds the last token by the pad id of its config",
        ROLLOUT + "reward.py",
        "    config.pad_token_id = padding\n",
        "",
        ("tests/rollout/test_reward.py",),
        22,
    ),
    Mutant(
        "a score without padding is that of the token before the last",
        "rlhf_lightning/networks/scores.py",
        "ends = scored_tokens(reward_model, tokens, attention_mask)",
        "ends = scored_tokens(reward_model, tokens, attention_mask) - 1",
        ("tests/networks/test_scores.py",),
        22,
    ),
    Mutant(
        "a head behind another layer is taken for all that follows",
        "rlhf_lightning/networks/plain_head.py",
        ' and torch.equal(seen["read"], states)\n',
        "\n",
        ("tests/networks/test_plain_head.py",),
        22,
    ),
    Mutant(
        "the score comes at the first token",
        FUNCTIONAL + "rewards.py",
        "return rewards.scatter_add(1, last_index(states).unsqueeze(1), scores",
        "return rewards.scatter_add(1, 0 * last_index(states).unsqueeze(1), scores",
        ("tests/functional/test_rewards.py",),
        23,
    ),
    Mutant(
        "the score comes at two steps",
        FUNCTIONAL + "rewards.py",
        "    return rewards.scatter_add(1, last_index(states)",
        "    rewards[:, 0] += scores\n    return rewards.scatter_add(1, last_index(states)",
        ("tests/functional/test_rewards.py",),
        23,
    ),
    Mutant(
        "the score counts double",
        FUNCTIONAL + "rewards.py",
        "scores.unsqueeze(1).to(rewards.dtype))",
        "2 * scores.unsqueeze(1).to(rewards.dtype))",
        ("tests/functional/test_rewards.py",),
        23,
    ),
    Mutant(
        "KL is charged on padding",
        FUNCTIONAL + "rewards.py",
        "penalties = (-beta * kl).masked_fill(~response_mask, 0.0)",
        "penalties = -beta * kl",
        ("tests/functional/test_rewards.py",),
        23,
    ),
    Mutant(
        "scaling shifts the scores",
        ROLLOUT + "shaping.py",
        'taken_off = 0.0 if self.normalize_scores == "scale" else seen.mean',
        "taken_off = seen.mean",
        ("tests/rollout/test_shaping.py",),
        24,
    ),
    Mutant(
        "demonstrations and those ranked next score 0",
        "rlhf_lightning/modules/reward.py",
        "                if rank == 0\n",
        "                if rank <= 1\n",
        ("tests/modules/test_reward.py::test_after_training_the_best_responses_of_the_training_data_average_0",),
        24,
    ),
    Mutant(
        "scores are clipped before they are normalised",
        ROLLOUT + "shaping.py",
        "self._clipped(self._normalized(scores, seen))",
        "self._normalized(self._clipped(scores), seen)",
        ("tests/rollout/test_shaping.py",),
        24,
    ),
    Mutant(
        "the running moments are those of one process",
        ROLLOUT + "shaping.py",
        "seen.add(sum_over_ranks(moments_of(scores)))",
        "seen.add(moments_of(scores))",
        ("tests/rollout/test_shaping.py",),
        24,
    ),
    Mutant(
        "the length penalty is a bonus",
        ROLLOUT + "shaping.py",
        "-self.length_penalty * scored",
        "self.length_penalty * scored",
        ("tests/rollout/test_shaping.py",),
        27,
    ),
    Mutant(
        "advantages leave the future out",
        FUNCTIONAL + "advantages.py",
        "(delta + gamma * lam * advantage)",
        "(delta + gamma * advantage)",
        ("tests/functional/test_advantages.py",),
        28,
    ),
    Mutant(
        "advantages are carried over padding",
        FUNCTIONAL + "advantages.py",
        "advantage = (delta + gamma * lam * advantage).masked_fill(~state_mask[:, t], 0.0)",
        "advantage = delta + gamma * lam * advantage",
        ("tests/functional/test_advantages.py",),
        29,
    ),
    Mutant(
        "whitened on each process by itself",
        ROLLOUT + "experience.py",
        "moments = sum_over_ranks(masked_moments(raw[:, :-1], learned_tokens))",
        "moments = masked_moments(raw[:, :-1], learned_tokens)",
        ("tests/rollout/test_experience.py",),
        30,
    ),
    Mutant(
        "whitened without centring",
        FUNCTIONAL + "masking.py",
        "scaled = (x.double() - total / count) /",
        "scaled = x.double() /",
        ("tests/functional/test_masking.py",),
        30,
    ),
    Mutant(
        "mean over pads",
        FUNCTIONAL + "masking.py",
        "    return x.masked_fill(~mask, 0.0).sum(dim=1)\n",
        "    return x.sum(dim=1)\n",
        ("tests/modules/test_ppo_reference.py",),
        46,
    ),
    Mutant(
        "the mean counts pads",
        PPO,
        "own = [mask.sum(), minibatch.value_mask.sum(),",
        "own = [torch.tensor(mask.numel()), minibatch.value_mask.sum(),",
        (INVARIANCES + "test_padding_on_either_side",),
        46,
    ),
    Mutant(
        "the clip fraction is that of another range",
        PPO,
        "is_clipped(ratio, 1.0, clip_range=self.clip_range)",
        "is_clipped(ratio, 1.0, clip_range=2 * self.clip_range)",
        ("tests/modules/test_ppo_reference.py",),
        36,
    ),
    Mutant(
        "each process validates for itself",
        PPO,
        "self.log_dict(metrics, on_epoch=True, sync_dist=True,",
        "self.log_dict(metrics, on_epoch=True, sync_dist=False,",
        (INVARIANCES + "test_validation_by_one_process_or_two",),
        37,
    ),
    Mutant(
        "an error of preflight stops its own process only",
        PPO,
        "        if any(errors):\n",
        "        if errors[self.global_rank]:\n",
        (PPO_TESTS + "test_an_error_that_preflight_finds_on_one_process_stops_both",),
        45,
    ),
    Mutant(
        "a value reads the state after its token",
        ROLLOUT + "score.py",
        "response_starts.unsqueeze(1) - 1\n",
        "response_starts.unsqueeze(1)\n",
        ("tests/rollout/test_score.py",),
        31,
    ),
    Mutant(
        "a response leaves before its last state is read",
        ROLLOUT + "in_slots.py",
        "self.slots.running if self.values is None else self.was_running",
        "self.slots.running",
        ("tests/rollout/test_in_slots.py",),
        31,
    ),
    Mutant(
        "values of the steps stand a token late",
        ROLLOUT + "in_slots.py",
        "values.take(rows, drawn[[*slots]], torch.tensor(slots))",
        "values.take(rows, self.slots.drawn[[*slots]], torch.tensor(slots))",
        ("tests/rollout/test_in_slots.py",),
        31,
    ),
    Mutant(
        "values of the steps behind the end are kept",
        ROLLOUT + "score.py",
        "known.where(of_states, 0.0)",
        "known",
        ("tests/rollout/test_score.py",),
        31,
    ),
    Mutant(
        "the value loss takes the smaller error",
        FUNCTIONAL + "losses.py",
        "0.5 * torch.maximum((values",
        "0.5 * torch.minimum((values",
        ("tests/functional/test_losses.py",),
        32,
    ),
    Mutant(
        "values are not clipped around the old ones",
        FUNCTIONAL + "losses.py",
        "clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)",
        "clipped = values",
        ("tests/functional/test_losses.py",),
        32,
    ),
    Mutant(
        "returns from whitened advantages",
        ROLLOUT + "experience.py",
        "        returns = raw + values\n",
        "        returns = torch.cat([advantages, raw[:, -1:]], dim=1) + values\n",
        ("tests/rollout/test_experience.py",),
        34,
    ),
    Mutant(
        "the policy loss takes the larger of both",
        FUNCTIONAL + "losses.py",
        "-torch.minimum(ratio * advantages, clipped_ratio * advantages)",
        "-torch.maximum(ratio * advantages, clipped_ratio * advantages)",
        ("tests/functional/test_losses.py",),
        36,
    ),
    Mutant(
        "the ratio is clipped on one side",
        FUNCTIONAL + "losses.py",
        "ratio.clamp(1 - clip_range, 1 + clip_range)",
        "ratio.clamp(max=1 + clip_range)",
        ("tests/functional/test_losses.py",),
        36,
    ),
    Mutant(
        "the policy loss has the wrong sign",
        FUNCTIONAL + "losses.py",
        "    return -advantages * logprobs\n",
        "    return advantages * logprobs\n",
        ("tests/functional/test_losses.py",),
        36,
    ),
    Mutant(
        "each micro-batch is a mean of its own",
        PPO,
        "else masked_sum(x, part.response_mask).sum() / tokens",
        "else masked_sum(x, part.response_mask).sum() / part.response_mask.sum()",
        (PPO_TESTS + "test_losses_and_gradients_do_not_depend_on_the_size_of_the_micro_batch",),
        37,
    ),
    Mutant(
        "the mean of the processes is not undone",
        PPO,
        "self.manual_backward(self._loss(means, policy_scale) * self.trainer.world_size)",
        "self.manual_backward(self._loss(means, policy_scale))",
        (PPO_TESTS + "test_two_processes_have_the_gradient_and_metrics_of_one_with_both_rollouts",),
        37,
    ),
    Mutant(
        "dropout stays on",
        PPO,
        "        self.eval()\n        without_dropout_on_purpose()\n",
        "        self.train()\n        without_dropout_on_purpose()\n",
        (PPO_TESTS + "test_dropout_of_the_networks_has_no_part",),
        38,
    ),
    Mutant(
        "Adam's usual eps",
        PPO,
        "betas=(0.9, 0.999), eps=1e-5,",
        "betas=(0.9, 0.999), eps=1e-8,",
        (PPO_TESTS + "test_the_optimizer_is_adam_without_weight_decay_and_with_the_eps_of_huang_et_al",),
        39,
    ),
    Mutant(
        "the schedule counts rollouts, not updates",
        PPO,
        "total = self.trainer.estimated_stepping_batches * updates_per_rollout",
        "total = self.trainer.estimated_stepping_batches",
        (PPO_TESTS + "test_the_learning_rates_fall_linearly_to_0_over_all_updates",),
        40,
    ),
    Mutant(
        "one norm for policy and critic",
        PPO,
        '[whole(clip_grad_norm_(group["params"], self.max_grad_norm)) for group in optimizer.param_groups]',
        '[clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.max_grad_norm)] * 2',
        (PPO_TESTS + "test_gradients_of_policy_and_critic_are_clipped_each_by_its_own_norm",),
        41,
    ),
    Mutant(
        "minibatches are not shuffled",
        ROLLOUT + "experience.py",
        "order = torch.randperm(len(experience), generator=generator)",
        "order = torch.arange(len(experience))",
        ("tests/rollout/test_experience.py",),
        42,
    ),
    Mutant(
        "the pretraining gradient is not weighted",
        PPO,
        "self.manual_backward(self.ptx_coef * loss * self.trainer.world_size)",
        "self.manual_backward(loss * self.trainer.world_size)",
        ("tests/modules/test_ptx.py",),
        44,
    ),
    Mutant(
        "the updates never stop early",
        PPO,
        "float(approx_kl) > self.target_kl",
        "float(approx_kl) < 0",
        (PPO_TESTS + "test_a_policy_that_moved_too_far_is_not_updated_again_with_the_same_rollout",),
        45,
    ),
    Mutant(
        "the entropy bonus is a price",
        PPO,
        'means["policy_loss"] - self.entropy_coef * means["entropy"]',
        'means["policy_loss"] + self.entropy_coef * means["entropy"]',
        ("tests/modules/test_ppo_reference.py",),
        47,
    ),
    Mutant(
        "entropy without the temperature",
        FUNCTIONAL + "head_logprobs.py",
        "entropies = log_total - logits.mul_(softmax).sum(dim=1) if",
        "entropies = log_total - temperature * logits.mul_(softmax).sum(dim=1) if",
        ("tests/functional/test_head_logprobs.py",),
        47,
    ),
    Mutant(
        "the gradient of the entropy has the wrong sign",
        FUNCTIONAL + "head_logprobs.py",
        "slopes -= slope.mul_(of_entropies.unsqueeze(1))",
        "slopes += slope.mul_(of_entropies.unsqueeze(1))",
        ("tests/functional/test_head_logprobs.py",),
        47,
    ),
    Mutant(
        "the moving average is the policy",
        PPO,
        "average.lerp_(weight, 1 - self.ema_decay)",
        "average.lerp_(weight, 1.0)",
        (PPO_TESTS + "test_the_moving_average_moves_once_a_rollout_and_is_what_is_exported",),
        48,
    ),
    Mutant(
        "a response is compared with nothing",
        FUNCTIONAL + "advantages.py",
        "    return (groups - others).flatten()\n",
        "    return groups.flatten()\n",
        (SHIFT,),
        28,
    ),
    Mutant(
        "no baseline",
        FUNCTIONAL + "advantages.py",
        "    return rewards - (total / count.clamp(min=1.0)).to(rewards)\n",
        "    return rewards\n",
        (SHIFT,),
        28,
    ),
    Mutant(
        "a response is compared with itself, too",
        FUNCTIONAL + "advantages.py",
        "others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)",
        "others = groups.mean(dim=1, keepdim=True)",
        ("tests/functional/test_advantages.py",),
        28,
    ),
    Mutant(
        "a choice among what is ranked above, not below",
        FUNCTIONAL + "losses.py",
        "below = same_prompt & (ranks.unsqueeze(1) < ranks.unsqueeze(0))",
        "below = same_prompt & (ranks.unsqueeze(1) > ranks.unsqueeze(0))",
        ("tests/functional/test_losses.py",),
        51,
    ),
    Mutant(
        "a choice that leaves out what is chosen",
        FUNCTIONAL + "losses.py",
        "masked_fill(~(below | itself), -torch.inf)",
        "masked_fill(~below, -torch.inf)",
        ("tests/functional/test_losses.py",),
        51,
    ),
    Mutant(
        "ties are pairs",
        FUNCTIONAL + "losses.py",
        "better = ranks.unsqueeze(1) < ranks.unsqueeze(0)",
        "better = ranks.unsqueeze(1) <= ranks.unsqueeze(0)",
        ("tests/functional/test_losses.py",),
        51,
    ),
    Mutant(
        "pairs across prompts",
        FUNCTIONAL + "losses.py",
        "same_prompt & better",
        "better",
        ("tests/functional/test_losses.py",),
        51,
    ),
    Mutant(
        "a mean over pairs, not over prompts",
        FUNCTIONAL + "losses.py",
        "(losses / pairs_of_prompt[prompt_index[winners]]).sum() / (pairs_of_prompt > 0).sum().clamp(min=1)",
        "losses.mean()",
        ("tests/functional/test_losses.py",),
        51,
    ),
    Mutant(
        "margins are added",
        "rlhf_lightning/modules/reward.py",
        "scores - self.margin_coef * batch.ratings",
        "scores + self.margin_coef * batch.ratings",
        ("tests/modules/test_reward.py",),
        51,
    ),
    Mutant(
        "the head is drawn with variance 1",
        "rlhf_lightning/networks/scalar_head.py",
        "generator=generator) * std",
        "generator=generator)",
        ("tests/networks/test_scalar_head.py",),
        52,
    ),
    Mutant(
        "the running moments are not in the checkpoint",
        PPO,
        '        self.seen_scores = RunningMoments(**state["seen_scores"])\n',
        "",
        (PPO_TESTS + "test_with_everything_on_a_run_goes_on_from_its_checkpoint_bit_for_bit",),
        55,
    ),
)


CONTROL = "nothing is broken"


def control_of(mutants: list[Mutant]) -> Mutant:
    """Return all of their tests on a copy as it is: where these fail, a mutant's failure says nothing."""
    return Mutant(CONTROL, PPO, "", "", tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests)), 0)


class Attempt:
    """A mutant whose tests are running on a copy of the tree."""

    def __init__(self, mutant: Mutant) -> None:
        """Write the copy and start the tests in a process that has imported the slow libraries already."""
        self.mutant = mutant
        self.start = time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        copy = Path(self.folder.name)
        for name in ("rlhf_lightning", "tests", "conf"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / mutant.file
        source = file.read_text("utf-8")
        if mutant.name != CONTROL:
            assert source.count(mutant.old) == 1, mutant.name
            file.write_text(source.replace(mutant.old, mutant.new), "utf-8")
        self.child = os.fork()
        if self.child == 0:
            run_tests(copy, mutant.tests)

    def result(self) -> str | None:
        """Return "killed" or "survived", None while the tests run."""
        done, status = os.waitpid(self.child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - self.start < TIMEOUT:
            return None
        else:
            # A fault that hangs the tests is noticed.
            os.killpg(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            code = 1
        self.folder.cleanup()
        # 1: tests failed; 2: the fault stops their collection.
        return {0: "survived", 1: "killed", 2: "killed"}.get(code, f"exit code {code}")


def run_tests(copy: Path, tests: tuple[str, ...]) -> None:
    """Run pytest on a copy and leave the process with its exit code."""
    os.setsid()
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import pytest

    # Plugins that were imported before the fork cannot be rewritten: nothing to be told of.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(int(pytest.main([*quiet, "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])))


def results_of(mutants: list[Mutant], jobs: int) -> dict[str, str]:
    """Return what came of each mutant by its name, ``jobs`` at a time."""
    waiting, running, found = list(mutants), [], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Attempt(waiting.pop(0)))
        for attempt in list(running):
            result = attempt.result()
            if result is not None:
                running.remove(attempt)
                found[attempt.mutant.name] = result
                seconds = time.monotonic() - attempt.start
                print(f"{result:<10}{seconds:6.1f} s  {attempt.mutant.name}", file=sys.stderr, flush=True)
        time.sleep(0.1)
    return found


def table(mutants: list[Mutant], found: dict[str, str]) -> str:
    """Return the results as a Markdown table."""
    rows = [f"| {m.detail} | {m.name} | `{Path(m.file).stem}` | {found[m.name]} |" for m in mutants]
    return "\n".join(["| detail | fault | file | |", "|---|---|---|---|", *rows])


def main() -> None:
    """Run the mutants that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[""], help="only mutants whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=2)
    wanted = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    # What every child needs and takes seconds to import; the package itself must come from each copy.
    import lightning  # noqa: F401
    import torchmetrics.text  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    assert not any(name.startswith("rlhf_lightning") for name in sys.modules)
    mutants = [mutant for mutant in MUTANTS if any(name in mutant.name for name in wanted.names)]
    found = results_of([control_of(mutants), *mutants], wanted.jobs)
    if found.pop(CONTROL) != "survived":
        sys.exit("the tests fail on a copy in which nothing is broken: no mutant says anything")
    print(table(mutants, found))
    killed = sum(result == "killed" for result in found.values())
    print(f"\n{killed} of {len(found)} killed")
    sys.exit(killed != len(found))


if __name__ == "__main__":
    main()
