"""The objectives of reward model and PPO; losses of tokens stay per token: their count is that of the whole step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


def probability_ratio(logprobs: Float[Tensor, "B R"], old_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return p / p_old of each token, by which its probability has changed since it was sampled."""
    return (logprobs - old_logprobs).exp()


def is_clipped(
    x: Float[Tensor, "B S"], center: Float[Tensor, "B S"] | float, *, clip_range: float
) -> Float[Tensor, "B S"]:
    """Return 1 where x lies further than ``clip_range`` from ``center``, else 0: its mean is the clip fraction.

    For ratios of tokens the center is 1, for values of states their old ones.
    """
    return ((x - center).abs() > clip_range).to(x)


def clipped_policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    *,
    clip_range: float,
) -> Float[Tensor, "B R"]:
    """Return -min(ratio * A, clip(ratio, 1 - c, 1 + c) * A) of each token (Schulman et al. 2017, eq. 7)."""
    ratio = probability_ratio(logprobs, old_logprobs)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def reinforce_loss(logprobs: Float[Tensor, "B R"], advantages: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return -A log p of each token: its gradient is that of REINFORCE (Williams 1992, eq. 11), nothing is clipped."""
    return -advantages * logprobs


def clipped_value_loss(
    values: Float[Tensor, "B S"],
    old_values: Float[Tensor, "B S"],
    returns: Float[Tensor, "B S"],
    *,
    value_clip_range: float,
) -> Float[Tensor, "B S"]:
    """Return half the larger of the squared errors of the value and of the value clipped around its old one.

    The pessimistic value loss of the PPO implementations that RLHF grew from (Huang et al. 2024).
    """
    clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def ranked_pairs(
    prompt_index: Int[Tensor, " B"], ranks: Int[Tensor, " B"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return row indices (better, worse) of all pairs of a prompt's responses: C(K, 2) of K that do not tie."""
    same_prompt = prompt_index.unsqueeze(1) == prompt_index.unsqueeze(0)
    better = ranks.unsqueeze(1) < ranks.unsqueeze(0)
    winners, losers = torch.nonzero(same_prompt & better, as_tuple=True)
    return winners, losers


def pairwise_logistic_loss(
    chosen_scores: Float[Tensor, " N"], rejected_scores: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return -log sigmoid(chosen - rejected) of each pair (Stiennon et al. 2020, sec. 3.4)."""
    return -logsigmoid(chosen_scores - rejected_scores)


def ranking_loss(
    scores: Float[Tensor, " B"], prompt_index: Int[Tensor, " B"], ranks: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Return the mean over prompts of the mean loss of a prompt's pairs, 0 without (Ouyang et al. 2022, eq. 1)."""
    winners, losers = ranked_pairs(prompt_index, ranks)
    losses = pairwise_logistic_loss(scores[winners], scores[losers])
    pairs_of_prompt = torch.bincount(prompt_index[winners])
    return (losses / pairs_of_prompt[prompt_index[winners]]).sum() / (pairs_of_prompt > 0).sum().clamp(min=1)


def k_wise_loss(
    scores: Float[Tensor, " B"], prompt_index: Int[Tensor, " B"], ranks: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Return the mean over prompts of the mean of -log p(the response wins against all that are ranked below it).

    The likelihood of a whole ranking (Plackett 1975; as the loss of a reward model Zhu, Jiao & Jordan 2023), over its
    K - 1 choices: of two responses it is that of their pair. Responses that tie are compared with those below them, and
    not with each other. 0 where nothing is ranked below anything.
    """
    same_prompt = prompt_index.unsqueeze(1) == prompt_index.unsqueeze(0)
    below = same_prompt & (ranks.unsqueeze(1) < ranks.unsqueeze(0))
    itself = torch.eye(len(ranks), dtype=torch.bool, device=ranks.device)
    chances = scores.expand(len(scores), -1).masked_fill(~(below | itself), -torch.inf)
    wins = below.any(dim=1)
    losses = (chances.logsumexp(dim=1) - scores)[wins]
    choices_of_prompt = torch.bincount(prompt_index[wins])
    return (losses / choices_of_prompt[prompt_index[wins]]).sum() / (choices_of_prompt > 0).sum().clamp(min=1)
