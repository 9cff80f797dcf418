"""What is known of a reward model from its margins on held-out pairs: accuracy, calibration, taste for length."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MarginBin:
    """The pairs whose absolute margin falls into ``[low, high)``; the last bin has no upper limit (None)."""

    low: float
    high: float | None
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class ReliabilityBin:
    """The pairs of similar confidence: how sure the model says it is, and how often it is right."""

    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class LengthBin:
    """The pairs whose chosen response is longer than the rejected one, shorter, or of equal length."""

    chosen: Literal["longer", "shorter", "equal"]
    accuracy: float
    mean_margin: float
    pairs: int


@dataclass(frozen=True)
class RewardCard:
    """A reward model measured on held-out pairs; margins are score(chosen) - score(rejected)."""

    pairs: int
    accuracy: float
    """Share of positive margins, a tie counts half."""
    log_loss: float
    """Mean of -log sigmoid(margin), nats."""
    mean_margin: float
    expected_calibration_error: float
    """Mean distance of confidence and accuracy over `reliability`, weighted by pairs (Guo et al. 2017, eq. 3)."""
    margin_bins: list[MarginBin]
    reliability: list[ReliabilityBin]
    length_bins: list[LengthBin]
    """Empty where lengths were not given. One who loves length is right on the longer ones and wrong on the shorter."""
    length_correlation: float | None
    """Pearson correlation of a response's score and length, None where lengths were not given or nothing varies."""
    best_score_mean: float | None
    """Of the best responses, None where they were not given: about 0 for a reward model whose scores were shifted."""
    best_score_std: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers, as `report.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, card: Mapping[str, Any]) -> Self:
        """Return the card that `as_dict` was called on."""
        bins = {
            "margin_bins": [MarginBin(**b) for b in card["margin_bins"]],
            "reliability": [ReliabilityBin(**b) for b in card["reliability"]],
            "length_bins": [LengthBin(**b) for b in card["length_bins"]],
        }
        return cls(**{**card, **bins})


def reward_card(
    margins: Sequence[float],
    *,
    scores: Sequence[float] | None = None,
    lengths: Sequence[float] | None = None,
    length_differences: Sequence[float] | None = None,
    best_scores: Sequence[float] | None = None,
    num_bins: int = 10,
) -> RewardCard:
    """Measure the margins of held-out pairs.

    ``scores`` and ``lengths`` are those of single responses, ``best_scores`` of the best ones, and
    ``length_differences`` those of the pairs: length of the chosen response minus that of the rejected one. Raises
    `ValueError` where there are no margins, one is not finite, or there are not as many length differences.
    """
    found = np.asarray(margins, dtype=np.float64)
    if found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"margins must be finite numbers, at least one; found {found.size}")
    reliability = reliability_bins(found, num_bins=num_bins)
    best = None if best_scores is None else np.asarray(best_scores, dtype=np.float64)
    return RewardCard(
        pairs=found.size,
        accuracy=float(_wins(found).mean()),
        log_loss=float(np.logaddexp(0.0, -found).mean()),
        mean_margin=float(found.mean()),
        expected_calibration_error=calibration_error(reliability),
        margin_bins=margin_bins(found),
        reliability=reliability,
        length_bins=[] if length_differences is None else length_bins(found, length_differences),
        length_correlation=None if scores is None or lengths is None else correlation(scores, lengths),
        best_score_mean=None if best is None else float(best.mean()),
        best_score_std=None if best is None else float(best.std()),
    )


def reliability_bins(margins: Floats, *, num_bins: int = 10) -> list[ReliabilityBin]:
    """Group the pairs by confidence sigmoid(|margin|) in bins of equal width from 1/2 to 1; empty ones are left out."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    wins = _wins(margins)
    index = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    return [
        ReliabilityBin(float(confidence[index == i].mean()), float(wins[index == i].mean()), int((index == i).sum()))
        for i in np.unique(index)
    ]


def calibration_error(reliability: Sequence[ReliabilityBin]) -> float:
    """Mean of |accuracy - confidence| over pairs (Guo et al. 2017, eq. 3)."""
    pairs = sum(b.pairs for b in reliability)
    return sum(b.pairs * abs(b.accuracy - b.confidence) for b in reliability) / pairs


def margin_bins(margins: Floats, *, edges: Sequence[float] = (0.0, 0.5, 1.0, 2.0, 4.0)) -> list[MarginBin]:
    """Accuracy of the pairs by the size of their margin; empty bins are left out."""
    size, wins = np.abs(margins), _wins(margins)
    bins = []
    for low, high in zip(edges, [*edges[1:], math.inf], strict=True):
        inside = (size >= low) & (size < high)
        if inside.any():
            limit = None if math.isinf(high) else high
            bins.append(MarginBin(low, limit, float(wins[inside].mean()), int(inside.sum())))
    return bins


def length_bins(margins: Floats, length_differences: Sequence[float]) -> list[LengthBin]:
    """Accuracy and mean margin of the pairs by which of the two responses is longer; empty bins are left out."""
    difference, wins = np.asarray(length_differences, dtype=np.float64), _wins(margins)
    if difference.shape != margins.shape:
        raise ValueError(f"{margins.size} margins cannot be paired with {difference.size} length differences")
    parts: list[tuple[Literal["longer", "shorter", "equal"], NDArray[np.bool_]]] = [
        ("longer", difference > 0),
        ("shorter", difference < 0),
        ("equal", difference == 0),
    ]
    return [
        LengthBin(chosen, float(wins[inside].mean()), float(margins[inside].mean()), int(inside.sum()))
        for chosen, inside in parts
        if inside.any()
    ]


def correlation(scores: Sequence[float], lengths: Sequence[float]) -> float | None:
    """Pearson correlation, None where one of the two does not vary."""
    if len(scores) != len(lengths):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(lengths)} lengths")
    if len(scores) < 2 or np.std(scores) == 0 or np.std(lengths) == 0:
        return None
    return float(np.corrcoef(scores, lengths)[0, 1])


def _wins(margins: Floats) -> Floats:
    return (np.sign(margins) + 1) / 2
