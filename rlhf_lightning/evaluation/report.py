"""The report of a pipeline: numbers for programs, and a page for people that needs nothing beside itself."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.evaluation.figures import (
    PPO_PANELS,
    distance_figure,
    ppo_curves_figure,
    reward_figure,
    time_figure,
    training_curves_figure,
    win_rate_figure,
)
from rlhf_lightning.evaluation.page import page
from rlhf_lightning.evaluation.reward_card import RewardCard
from rlhf_lightning.evaluation.win_rate import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = 6
"""Significant digits of the numbers in report.json."""

Report = Mapping[str, Any]


def write_report(report: Report, folder: str | Path) -> Path:
    """Write report.json, report.html and figures/*.png below ``folder``; return the path of the page.

    Needed keys: ``judge`` ("world", "reward model" or "reward function"), ``seed``, ``win_rate``, ``judge_score``,
    ``reward``, ``ppo``, ``seconds``, ``throughput``, ``peak_memory_gb``, ``curves``, ``samples``, ``versions``; they
    are empty where a stage was not run.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    plain = rounded(report)
    figures = report_figures(plain)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=200, metadata={"Software": None})
    text = json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", "utf-8")
    target = folder / "report.html"
    target.write_text(page(plain, {name: svg(figure) for name, figure in figures.items()}), "utf-8")
    return target


def report_figures(report: Report) -> dict[str, "Figure"]:
    """Return the figures that can be drawn of the report by name: win_rate, reward, ppo, distance, training, time."""
    figures: dict[str, Figure] = {}
    if report["win_rate"]:
        figures["win_rate"] = win_rate_figure({name: interval(rate) for name, rate in report["win_rate"].items()})
    if "card" in report["reward"]:
        ceiling = report["reward"].get("ceiling")
        figures["reward"] = reward_figure(RewardCard.from_dict(report["reward"]["card"]), ceiling=ceiling)
    curves = report["curves"]
    if "ppo" in curves and any(name in curves["ppo"] for name in PPO_PANELS):
        figures["ppo"] = ppo_curves_figure(curves["ppo"])
        if PPO_PANELS.keys() <= curves["ppo"].keys():
            figures["distance"] = distance_figure(curves["ppo"])
    losses = {stage: _losses(curves[stage]) for stage in curves if _losses(curves[stage])}
    if losses:
        figures["training"] = training_curves_figure(losses)
    if report["throughput"]:
        figures["time"] = time_figure(report["throughput"])
    return figures


def interval(rate: Mapping[str, float | None]) -> Interval:
    """Return the interval of its plain form, where None is what was not a number."""
    return Interval(**{name: math.nan if value is None else value for name, value in rate.items()})


def rounded(value: Any) -> Any:
    """Return plain containers with floats to `DIGITS` significant digits, and None for what is not a finite number."""
    if isinstance(value, Mapping):
        return {str(name): rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def svg(figure: "Figure") -> str:
    """Return the figure as an SVG image, the same text for the same figure."""
    import io

    from matplotlib import rc_context

    buffer = io.StringIO()
    # Without the salt, ids would be drawn at random.
    with rc_context({"svg.hashsalt": "rlhf_lightning"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _losses(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves whose name ends in loss or val_loss."""
    return {name: curve for name, curve in curves.items() if name.rpartition("/")[2] in ("loss", "val_loss")}
