import math
import subprocess
import sys
from typing import Any

import pytest

from rlhf_lightning.evaluation.figures import (
    PARTS,
    distance_figure,
    moving_mean,
    ppo_curves_figure,
    reward_figure,
    time_figure,
    time_shares,
    training_curves_figure,
    win_rate_figure,
)
from rlhf_lightning.evaluation.reward_card import reward_card
from rlhf_lightning.evaluation.win_rate import Interval

RATES = {"pretrained": Interval(0.02, 0.01, 0.05), "sft": Interval(0.44, 0.38, 0.51), "ppo": Interval(0.84, 0.78, 0.89)}


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_the_bars_are_as_high_as_the_win_rates() -> None:
    (axes,) = win_rate_figure(RATES).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2, 44, 84])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["pre-trained", "fine-tuned", "PPO"]


def test_the_whiskers_are_the_intervals_and_the_line_is_at_one_half() -> None:
    (axes,) = win_rate_figure(RATES).axes
    drawn = [tuple(line.get_ydata()) for line in axes.lines]
    for rate in RATES.values():
        assert any(y == pytest.approx((100 * rate.low, 100 * rate.high)) for y in drawn)
    assert (50, 50) in drawn


def test_a_policy_has_the_same_colour_with_and_without_the_others() -> None:
    alone, together = win_rate_figure({"ppo": RATES["ppo"]}), win_rate_figure(RATES)
    assert alone.axes[0].patches[0].get_facecolor() == together.axes[0].patches[2].get_facecolor()


def test_a_rate_without_an_interval_is_drawn_as_a_point() -> None:
    (axes,) = win_rate_figure({"ppo": Interval(1.0, math.nan, math.nan)}).axes
    assert axes.patches[0].get_height() == 100


def test_each_panel_draws_its_own_curve(report: dict[str, Any]) -> None:
    curves = report["curves"]["ppo"]
    panels = ppo_curves_figure(curves).axes
    drawn = [list(axes.lines[0].get_ydata()) for axes in panels]
    assert drawn == [curves["ppo/score"]["value"], curves["ppo/judge_score"]["value"], curves["ppo/kl"]["value"]]


def test_without_a_judge_there_is_no_panel_for_it(report: dict[str, Any]) -> None:
    curves = report["curves"]["ppo"]
    del curves["ppo/judge_score"]
    figure = ppo_curves_figure(curves)
    assert len(figure.axes) == 2
    assert "Judge" not in texts(figure)


def test_score_and_judge_stand_over_the_root_of_the_kl_of_their_own_rollout() -> None:
    curves = {
        "ppo/score": {"step": [1, 2, 3], "value": [0.0, 1.0, 2.0]},
        "ppo/judge_score": {"step": [1, 3], "value": [0.5, None]},
        "ppo/kl": {"step": [0, 1, 2, 3], "value": [None, -0.01, 4.0, 9.0]},
    }
    score, judge = distance_figure(curves).axes
    assert list(score.lines[0].get_xdata()) == [0.0, 2.0, 3.0]
    assert list(score.lines[0].get_ydata()) == [0.0, 1.0, 2.0]
    assert list(judge.lines[0].get_xdata()) == [0.0]
    assert "root of the KL to the reference" in texts(score)


def test_gaps_are_left_out_and_nothing_at_all_is_said() -> None:
    figure = ppo_curves_figure(
        {"ppo/score": {"step": [1, 2, 3], "value": [None, math.nan, 2.0]}, "ppo/kl": {"step": [], "value": []}}
    )
    assert list(figure.axes[0].lines[0].get_xdata()) == [3]
    assert "nothing was logged" in texts(figure)


def test_the_reward_figure_shows_accuracy_by_margin_and_the_ceiling() -> None:
    card = reward_card([0.2, -0.3, 1.5, 5.0])
    left, right = reward_figure(card, ceiling=0.78).axes
    assert [bar.get_height() for bar in left.patches] == [50, 100, 100]
    assert "ceiling 78.0 %" in texts(left)
    points = right.collections[0].get_offsets()
    assert points[:, 1].tolist() == [100 * b.accuracy for b in card.reliability]
    assert "ceiling" not in texts(reward_figure(card))


def test_training_and_held_out_losses_stand_in_one_panel_a_stage(report: dict[str, Any]) -> None:
    figure = training_curves_figure(
        {"sft": report["curves"]["sft"], "reward": {"reward/loss": {"step": [1], "value": [0.7]}}}
    )
    assert len(figure.axes) == 2
    assert "Fine-tuning" in texts(figure.axes[0])
    assert "2 held-out" in texts(figure.axes[0])


def test_each_stage_has_a_bar_of_what_its_time_was_spent_on(report: dict[str, Any]) -> None:
    figure = time_figure(report["throughput"])
    (axes,) = figure.axes
    bars = [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in axes.patches]
    of_ppo = [(0, 10), (10, 30), (40, 15), (55, 40), (95, 5)]
    expected = [(0, 0, 2), (0, 2, 98), *((1, left, width) for left, width in of_ppo)]
    assert [bar for found in bars for bar in found] == pytest.approx([x for bar in expected for x in bar])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Fine-tuning", "PPO"]
    (legend,) = figure.legends
    # Each once, though both stages wait and update.
    assert [text.get_text() for text in legend.get_texts()] == [name for name, _ in PARTS.values()]


def test_the_shares_of_the_time_add_up(report: dict[str, Any]) -> None:
    for found in report["throughput"].values():
        assert sum(time_shares(found).values()) == pytest.approx(1)
    assert time_shares(report["throughput"]["sft"]) == {"waiting": 0.02, "updating": 0.98}


def test_the_moving_mean_keeps_a_line_and_smooths_a_zigzag() -> None:
    assert moving_mean([1.0, 2.0, 3.0, 4.0], width=0) == [1.0, 2.0, 3.0, 4.0]
    assert moving_mean([0.0, 3.0, 0.0, 3.0], width=1) == [1.5, 1.0, 2.0, 1.5]


def test_no_window_system_and_no_global_figures_are_used() -> None:
    code = (
        "import sys; from rlhf_lightning.evaluation.figures import *; assert 'matplotlib' not in sys.modules;"
        "win_rate_figure({'ppo': Interval(.8, .7, .9)}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
