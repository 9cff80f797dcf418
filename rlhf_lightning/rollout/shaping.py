"""From what the reward says to the score that is maximised: normalised, clipped, and with penalties for form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.functional.masking import masked_moments
from rlhf_lightning.functional.rewards import missing_eos_part, repeated_share
from rlhf_lightning.types import ScoredRollout

Normalization = Literal["none", "scale", "scale_around_mean", "shift_and_scale"]
MissingEOS = Literal["replace", "subtract", "mask"]

ROUNDING = 1e-12
"""Share of the mean square below which a variance from sums in float64 is nothing but rounding."""


@dataclass
class RunningMoments:
    """Count, mean and variance of a stream of numbers, from the sums of all ranks; plain numbers in a checkpoint."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, moments: Float[Tensor, "3"]) -> None:
        """Add `masked_moments` of new numbers, already summed over ranks."""
        count, total, squares = moments.tolist()
        self.count += count
        self.total += total
        self.squares += squares

    @property
    def mean(self) -> float:
        """The mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """The biased standard deviation; 0 of nothing, and of numbers that are equal up to rounding."""
        if not self.count:
            return 0.0
        variance, square = self.squares / self.count - self.mean**2, self.squares / self.count
        return variance**0.5 if variance > ROUNDING * square else 0.0


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What is made of a score; the parts of the result add up to what is maximised beside the KL penalty."""

    normalize_scores: Normalization
    """"scale" divides by the running standard deviation, "shift_and_scale" takes the running mean off before.

    "scale_around_mean" divides the distances from the running mean alone, and so keeps it (Huang et al. 2024: whitening
    without a shift). Scores that never varied are not divided.
    """
    score_clip: float | None
    """Scores count up to plus or minus this, after they are normalised."""
    missing_eos: MissingEOS
    """Of a response without an end token: its score is replaced, the penalty subtracted, or, of "mask", nothing."""
    missing_eos_penalty: float
    length_penalty: float
    """Taken off for each token of the response."""
    repetition_penalty: float
    """Taken off times the share of the response's runs of four tokens that repeat an earlier one."""

    def __call__(
        self, scored: ScoredRollout, seen: RunningMoments, *, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, Float[Tensor, " B"]]:
        """Return the parts of each response's score by name, in float64; ``seen`` takes in the new scores first."""
        # In float32 the sum of parts that replace a score would depend on it by rounding.
        scores = scored.scores.double()
        seen.add(sum_over_ranks(moments_of(scores)))
        parts = {"shaped_score": self._clipped(self._normalized(scores, seen))}
        penalty = 0.0 if self.missing_eos == "mask" else self.missing_eos_penalty
        parts["missing_eos_part"] = missing_eos_part(
            parts["shaped_score"], scored.ended, penalty=penalty, replace=self.missing_eos == "replace"
        )
        parts["length_part"] = -self.length_penalty * scored.response_mask.sum(dim=1).to(scores)
        if self.repetition_penalty:
            repeated = repeated_share(scored.response_tokens, scored.response_mask)
            parts["repetition_part"] = -self.repetition_penalty * repeated.to(scores)
        return parts

    def _normalized(self, scores: Float[Tensor, " B"], seen: RunningMoments) -> Float[Tensor, " B"]:
        if self.normalize_scores == "none":
            return scores
        taken_off = 0.0 if self.normalize_scores == "scale" else seen.mean
        put_back = seen.mean if self.normalize_scores == "scale_around_mean" else 0.0
        return (scores - taken_off) / (seen.std or 1.0) + put_back

    def _clipped(self, scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        return scores if self.score_clip is None else scores.clamp(-self.score_clip, self.score_clip)


def moments_of(numbers: Float[Tensor, " B"]) -> Float[Tensor, "3"]:
    """Return count, sum and sum of squares in float64."""
    everything = torch.ones(1, len(numbers), dtype=torch.bool, device=numbers.device)
    return masked_moments(numbers.unsqueeze(0), everything)
