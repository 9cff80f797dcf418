"""The figures of the report, drawn with Matplotlib's objects alone: no window, no global state."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_lightning.evaluation.reward_card import RewardCard
from rlhf_lightning.evaluation.win_rate import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Mapping[str, Sequence[float | None]]
"""``{"step": [...], "value": [...]}`` as `History.curves` holds it; None leaves a gap."""

LABELS = {
    "pretrained": "pre-trained",
    "start": "before PPO",
    "sft": "fine-tuned",
    "ppo": "PPO",
    "demonstrations": "demonstration",
}
"""How a policy is called where people read it."""

STAGES = {
    "world": "Making the world",
    "pretrain": "Pre-training",
    "sft": "Fine-tuning",
    "comparisons": "Comparing responses",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
    "total": "Total",
}
"""How a stage is called where people read it."""

PPO_PANELS = {
    "ppo/score": ("Score", "of the reward, what PPO maximises", "#c8571b"),
    "ppo/judge_score": ("Judge's score", "never seen by training", "#2a7f62"),
    "ppo/kl": ("KL to the reference", "nats a response", "#5b5f97"),
}
"""Title, subtitle and colour of what is drawn of PPO, from left to right."""

PARTS = {
    "waiting": ("waiting for data", "#9aa5b1"),
    "sampling": ("sampling", "#c8571b"),
    "scoring": ("scoring", "#2a7f62"),
    "updating": ("updating", "#3a7ebf"),
    "rest": ("the rest of the step", "#d9dee4"),
}
"""Name and colour of what the time of training is spent on, from left to right."""

# Told apart by colour-blind readers, and in grey by their lightness (after Okabe and Ito 2008).
COLORS = {"pretrained": "#9aa5b1", "start": "#9aa5b1", "sft": "#3a7ebf", "ppo": "#c8571b"}
SCORE, JUDGE, KL = "#c8571b", "#2a7f62", "#5b5f97"
INK, QUIET, GRID = "#1f2933", "#616e7c", "#e4e7eb"


def label(policy: str) -> str:
    """Return how a policy is called where people read it."""
    return LABELS.get(policy, policy)


def color(policy: str) -> str:
    """Return the colour of a policy, the same in all figures."""
    return COLORS.get(policy, KL)


def win_rate_figure(win_rates: Mapping[str, Interval]) -> "Figure":
    """Draw how often each policy beats the demonstrations, with 95 % intervals and a line where they are even."""
    figure, (axes,) = _figure(6.0, 3.4)
    positions = range(len(win_rates))
    means = [100 * rate.mean for rate in win_rates.values()]
    axes.bar(positions, means, width=0.58, color=[color(name) for name in win_rates], zorder=2)
    for x, rate in zip(positions, win_rates.values(), strict=True):
        _interval(axes, x, rate)
    axes.axhline(50, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    right = len(win_rates) - 0.42
    axes.text(right, 51, "as good as the\ndemonstrations", ha="left", va="bottom", fontsize=9, color=QUIET)
    axes.set_xticks(positions, [label(name) for name in win_rates], fontsize=11, color=INK)
    axes.set_xlim(-0.55, right + 0.62)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    _title(axes, "Win rate against demonstrations", "held-out prompts, ties count half, 95 % intervals")
    return figure


def ppo_curves_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw score, judge's score where there is one, and KL over rollouts, each under its logged name."""
    shown = [name for name in PPO_PANELS if name in curves]
    figure, all_axes = _figure(3.1 * len(shown) + 0.4, 2.8, columns=len(shown))
    for axes, name in zip(all_axes, shown, strict=True):
        title, subtitle, hue = PPO_PANELS[name]
        _curve(axes, curves[name], hue)
        _title(axes, title, subtitle)
        axes.set_xlabel("rollouts", color=QUIET, fontsize=9)
    return figure


def distance_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw the score that PPO maximises and the judge's over the distance from the reference, the root of the KL.

    Where the first still rises and the second falls, the policy lives on the reward's errors (Gao et al. 2023).
    """
    figure, all_axes = _figure(6.6, 2.8, columns=2)
    kl = dict(zip(curves["ppo/kl"]["step"], curves["ppo/kl"]["value"], strict=True))
    for axes, name in zip(all_axes, ("ppo/score", "ppo/judge_score"), strict=True):
        title, subtitle, hue = PPO_PANELS[name]
        curve = curves[name]
        both = _points([kl.get(step) for step in curve["step"]], curve["value"])
        width = len(both) // 12
        # The KL of a rollout's samples may lie a little below 0.
        distances = [math.sqrt(max(0.0, distance)) for distance in moving_mean([x for x, _ in both], width=width)]
        axes.scatter(distances, [y for _, y in both], s=12, color=hue, alpha=0.35, linewidth=0)
        axes.plot(distances, moving_mean([y for _, y in both], width=width), color=hue, linewidth=2)
        _title(axes, title, subtitle)
        axes.set_xlabel("root of the KL to the reference, nats", color=QUIET, fontsize=9)
    return figure


def reward_figure(card: RewardCard, *, ceiling: float | None = None) -> "Figure":
    """Draw accuracy by the size of the margin, beside how right the model is when it says how sure it is."""
    figure, (left, right) = _figure(7.6, 3.2, columns=2)
    _accuracy_by_margin(left, card, ceiling)
    _reliability(right, card)
    return figure


def training_curves_figure(curves: Mapping[str, Mapping[str, Curve]]) -> "Figure":
    """Draw the losses of each stage: ``{"sft": {"sft/loss": ..., "sft/val_loss": ...}}``."""
    figure, all_axes = _figure(3.1 * len(curves) + 0.4, 2.8, columns=len(curves))
    for axes, (stage, named) in zip(all_axes, curves.items(), strict=True):
        for name, curve in named.items():
            held_out = name.rpartition("/")[2].startswith("val_")
            # Two numbers at about the same height must not cover each other.
            lift = 0 if len(named) == 1 else 7 if held_out else -7
            hue, text = (JUDGE, " held-out") if held_out else (COLORS["sft"], "")
            _curve(axes, curve, hue, text=text, lift=lift)
        _title(axes, STAGES.get(stage, stage), "loss, nats")
        axes.set_xlabel("steps", color=QUIET, fontsize=9)
    return figure


def time_figure(throughput: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Draw what the time of each stage was spent on: `time_shares` of what `Throughput.summary` says of each."""
    figure, (axes,) = _figure(7.6, 0.42 * len(throughput) + 1.1)
    drawn: dict[str, Any] = {}
    for place, found in enumerate(throughput.values()):
        left = 0.0
        for part, share in time_shares(found).items():
            width = 100 * share
            drawn[part] = axes.barh(place, width, left=left, height=0.62, color=PARTS[part][1], zorder=2)
            if width >= 6:
                ink = INK if part in ("rest", "waiting") else "white"
                axes.text(left + width / 2, place, f"{width:.0f} %", ha="center", va="center", fontsize=9, color=ink)
            left += width
    axes.set_yticks(range(len(throughput)), [STAGES.get(stage, stage) for stage in throughput], fontsize=10, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    axes.grid(visible=False, axis="y")
    parts = [part for part in PARTS if part in drawn]
    named = [PARTS[part][0] for part in parts]
    handles = [drawn[part] for part in parts]
    figure.legend(handles, named, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    return figure


def time_shares(throughput: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of the time of training by the names of `PARTS`; they add up to 1.

    A step without phases is an update.
    """
    phases = [name for name in ("sampling", "scoring", "updating") if f"share_{name}" in throughput]
    step = throughput["share_step"]
    found = {name: throughput[f"share_{name}"] for name in ("waiting", *phases)}
    if not phases:
        return found | {"updating": step}
    return found | {"rest": step - sum(found[name] for name in phases)}


def _accuracy_by_margin(axes: "Axes", card: RewardCard, ceiling: float | None) -> None:
    positions = range(len(card.margin_bins))
    axes.bar(positions, [100 * b.accuracy for b in card.margin_bins], width=0.66, color=COLORS["sft"], zorder=2)
    for x, b in zip(positions, card.margin_bins, strict=True):
        text = f"{100 * b.accuracy:.0f}"
        axes.text(x, 100 * b.accuracy + 2, text, ha="center", va="bottom", fontsize=9, color=INK)
        axes.text(x, 3, f"{b.pairs}", ha="center", va="bottom", fontsize=8, color="white")
    names = [f"{b.low:g}+" if b.high is None else f"{b.low:g}–{b.high:g}" for b in card.margin_bins]
    axes.set_xticks(positions, names)
    axes.set_xlabel("size of the margin (in white: pairs)", color=QUIET, fontsize=9)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    overall = f"all pairs {100 * card.accuracy:.1f} %"
    _title(axes, "Accuracy by margin", overall if ceiling is None else f"{overall}, ceiling {100 * ceiling:.1f} %")


def _reliability(axes: "Axes", card: RewardCard) -> None:
    confidence = [100 * b.confidence for b in card.reliability]
    accuracy = [100 * b.accuracy for b in card.reliability]
    largest = max(b.pairs for b in card.reliability)
    axes.plot([50, 100], [50, 100], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    note = "dashed: as right as it is sure"
    axes.text(0.99, 0.04, note, ha="right", va="bottom", fontsize=8.5, color=QUIET, transform=axes.transAxes)
    axes.plot(confidence, accuracy, color=SCORE, linewidth=1.5, zorder=2)
    sizes = [14 + 70 * b.pairs / largest for b in card.reliability]
    axes.scatter(confidence, accuracy, s=sizes, color=SCORE, edgecolor="white", linewidth=0.8, zorder=3)
    axes.set_xlim(48, 102)
    axes.set_ylim(min(48.0, *accuracy) - 2, 104)
    axes.set_xticks(range(50, 101, 10), [f"{tick} %" for tick in range(50, 101, 10)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel("how sure the model is", color=QUIET, fontsize=9)
    _title(axes, "How often it is right", f"calibration error {100 * card.expected_calibration_error:.1f} points")


def _figure(width: float, height: float, *, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """Return an empty figure of so many inches, and its panels from left to right."""
    # Slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axes in all_axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(QUIET)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9, labelcolor=QUIET)
    return figure, all_axes


def _title(axes: "Axes", title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold", color=INK)
    place: dict[str, Any] = {"xytext": (0, 6), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), fontsize=9, color=QUIET, **place)


def _interval(axes: "Axes", x: float, rate: Interval) -> None:
    """Draw the interval, and the number above it."""
    low, high = (100 * rate.mean if math.isnan(limit) else 100 * limit for limit in (rate.low, rate.high))
    axes.plot([x, x], [low, high], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=3)
    for limit in (low, high):
        axes.plot([x - 0.06, x + 0.06], [limit, limit], color=INK, linewidth=1.4, zorder=3)
    # On white, because the line of even odds may run behind it.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    text = f"{100 * rate.mean:.0f} %"
    axes.text(x, high + 3, text, ha="center", va="bottom", fontsize=12, weight="bold", color=INK, bbox=box, zorder=2)


def _curve(axes: "Axes", curve: Curve, hue: str, *, text: str = "", lift: float = 0) -> None:
    """Draw the values faintly, their moving mean clearly, and the last mean as a number, ``lift`` points higher."""
    points = _points(curve["step"], curve["value"])
    if not points:
        axes.text(0.5, 0.5, "nothing was logged", ha="center", color=QUIET, fontsize=9, transform=axes.transAxes)
        return
    steps, values = zip(*points, strict=True)
    smooth = moving_mean(values, width=len(values) // 12)
    axes.plot(steps, values, color=hue, alpha=0.3, linewidth=1)
    axes.plot(steps, smooth, color=hue, linewidth=2)
    axes.plot(steps[-1:], smooth[-1:], color=hue, marker="o", markersize=4)
    end = f"{smooth[-1]:.3g}{text}"
    place: dict[str, Any] = {"xytext": (5, lift), "textcoords": "offset points", "va": "center"}
    axes.annotate(end, (steps[-1], smooth[-1]), fontsize=9, color=hue, **place)
    axes.margins(x=0.02, y=0.12)


def _points(xs: Sequence[float | None], ys: Sequence[float | None]) -> list[tuple[float, float]]:
    """Return the pairs of which both are finite numbers."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def moving_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Return the mean of each value with up to ``width`` values on either side, fewer towards the ends."""
    windows = [values[max(0, i - width) : i + width + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]
