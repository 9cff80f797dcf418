"""Whether a reward reads the response to its end, tells responses apart, and answers in time."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from rlhf_lightning.preflight.findings import Finding, Status
from rlhf_lightning.preflight.policy import OTHER_CALL, PAD_COLUMNS, largest, precision
from rlhf_lightning.rollout.reward import SHORTER, ModelReward
from rlhf_lightning.types import PromptBatch, Rollout

Score = Callable[[Tensor, Tensor], Tensor]
"""Scores (B,) of tokens (B, T), padded on the right, and their boolean mask."""

ROWS = 4
LEAST_TOLERANCE = 1e-3
"""Of the score's own size; what reads the padding is far beyond that."""
LAST_TOKENS = 16
"""So many last tokens are tried: in a coarse type some of them score the same."""
SLOW_SECONDS = 1.0
"""A rollout's rewards may take so long, however short sampling is."""


def check_positions(
    model: ModelReward, prompts: PromptBatch, rollout: Rollout, *, max_new_tokens: int, name: str = ""
) -> Finding:
    """Check that the reward model can read prompts with the longest responses, and the ``rollout`` that was sampled."""
    positions, prompt, longest = model.positions, model.longest_prompt(prompts), model.longest(rollout)
    name = f"positions of the reward model {name}".rstrip()
    if positions is None:
        return Finding(name, "ok", "they have no end")
    needed = max(prompt + max_new_tokens, longest)
    roughly = "" if model.shares_tokens else "about "
    measured = (
        f"a prompt of {prompt} tokens and max_new_tokens={max_new_tokens} need {roughly}{needed} positions; "
        f"it has {positions}"
    )
    if needed <= positions:
        return Finding(name, "ok", measured)
    # How many of its own tokens a response will have is known only once it is there.
    status: Status = "error" if model.shares_tokens or longest > positions else "warning"
    return Finding(name, status, f"{measured}, and a longer sequence stops the run", SHORTER)


def check_last_token(
    network: nn.Module,
    score: Score,
    tokens: Tensor,
    mask: Tensor,
    *,
    pad: int,
    max_positions: int | None,
    name: str = "",
) -> Finding:
    """Check that the score is that of the last real token: padding does not move it, and a pad id inside is no end."""
    name = f"reward model {name}".rstrip()
    room = tokens.shape[1] if max_positions is None else max_positions - PAD_COLUMNS
    rows = [row[keep][:room] for row, keep in zip(tokens[:ROWS], mask[:ROWS], strict=True)]
    alone = torch.cat([_score_one(score, row) for row in rows])
    moved = largest(_beside_a_longer_one(score, rows, pad) - alone) / max(1.0, largest(alone))
    measured = f"padding on the right moves scores by {moved:.2g}"
    if moved > max(LEAST_TOLERANCE, OTHER_CALL[precision(network)]):
        return Finding(
            name,
            "error",
            measured,
            "it must score the last real token: set pad_token_id in its config to the tokenizer's, and use the mask",
        )
    row = max(rows, key=len)
    if not _depends_on_its_last_token(score, _with_pad_inside(row, pad), pad):
        inside = _depends_on_its_last_token(score, row, pad)
        what = "a pad id inside of the sequence ends it" if inside else "the last token does not move the score"
        return Finding(
            name,
            "error",
            f"{what}: another last token gives the same score",
            "it must score the last token that is not padding: pad with a token that no text has (network.pad_token)",
        )
    return Finding(name, "ok", f"{measured}, a pad id inside is no end")


def check_spread(
    scores: Tensor, responses: Sequence[str], prompts: Sequence[Hashable], *, model: bool, name: str = ""
) -> Finding:
    """Check that not all responses score the same, nor all of those to the same prompt."""
    name = f"spread of scores {name}".rstrip()
    spread = float(scores.double().std(correction=0))
    measured = f"mean {float(scores.mean()):.3g}, standard deviation {spread:.3g} over {len(scores)} responses"
    different = len(set(responses))
    apart = _apart_within_prompts(scores, responses, prompts)
    if apart:
        measured = f"{measured}, at most {max(apart):.3g} apart within a prompt"
    if scores.max() > scores.min():
        if not apart or max(apart) > 0:
            return Finding(name, "ok", measured)
        return Finding(
            name,
            "warning",
            f"{measured}, though {len(apart)} prompts have different responses",
            "a reward that the prompt alone decides teaches nothing: does it read the response?",
        )
    if different == 1:
        return Finding(name, "note", f"{measured}, which are all the same", "look at more prompts, or at the policy")
    status: Status = "error" if model else "warning"
    return Finding(
        name,
        status,
        f"{measured}, {different} of them different",
        "a reward that is always the same teaches nothing: "
        + ("is its head trained?" if model else "does it fit what the policy writes?"),
    )


def _apart_within_prompts(scores: Tensor, responses: Sequence[str], prompts: Sequence[Hashable]) -> list[float]:
    """Return how far scores of the same prompt are apart, for each prompt that has different responses."""
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    found = [scores[of] for of in rows.values() if len({responses[row] for row in of}) > 1]
    return [float(of_prompt.max() - of_prompt.min()) for of_prompt in found]


def check_cost(*, seconds: float, responses: int, rollout_size: int, sampling_seconds: float) -> Finding:
    """Say what the reward costs in a call and in a rollout; ``sampling_seconds`` are those of a whole rollout."""
    name = "cost of the reward"
    rollout = seconds * rollout_size / responses
    measured = (
        f"{seconds * 1000:.1f} ms for {responses} responses, at most {rollout:.2g} s for a rollout of {rollout_size} "
        f"(sampling it: about {sampling_seconds:.2g} s)"
    )
    if rollout <= max(SLOW_SECONDS, sampling_seconds):
        return Finding(name, "ok", measured)
    return Finding(
        name,
        "warning",
        measured,
        "training waits for it: let the function work on all responses at once, or use a smaller reward model",
    )


def _score_one(score: Score, row: Tensor) -> Tensor:
    return score(row.unsqueeze(0), torch.ones(1, len(row), dtype=torch.bool, device=row.device))


def _beside_a_longer_one(score: Score, rows: list[Tensor], pad: int) -> Tensor:
    """Return the scores of the rows, padded to the length of a longer sequence that is scored with them."""
    longest = max(rows, key=len)
    together = [*rows, torch.cat([longest, longest[-1:].expand(PAD_COLUMNS)])]
    lengths = torch.tensor([len(row) for row in together], device=longest.device)
    mask = torch.arange(int(lengths.max()), device=longest.device) < lengths.unsqueeze(1)
    tokens = torch.full(mask.shape, pad, device=longest.device)
    tokens[mask] = torch.cat(together)
    return score(tokens, mask)[: len(rows)]


def _with_pad_inside(row: Tensor, pad: int) -> Tensor:
    # A row of two tokens has no inside.
    row = row.repeat(2) if len(row) < 3 else row.clone()
    row[len(row) // 2] = pad
    return row


def _depends_on_its_last_token(score: Score, row: Tensor, pad: int) -> bool:
    before, last = row[:-1], int(row[-1])
    others = [i for i in dict.fromkeys([*row.tolist(), 0, 1, 2]) if i not in (last, pad)][:LAST_TOKENS]
    own = _score_one(score, row)
    # One by one: rows of a batch may be rounded differently.
    return any(bool(_score_one(score, torch.cat([before, before.new_tensor([i])])) != own) for i in others)
