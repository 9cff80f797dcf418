"""What PPO's settings may be, looked at before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import InputError

NOT_NEGATIVE = (
    "beta",
    "value_coef",
    "entropy_coef",
    "ptx_coef",
    "learning_rate",
    "critic_learning_rate",
    "warmup_steps",
    "missing_eos_penalty",
    "length_penalty",
    "repetition_penalty",
)
ABOVE_0 = ("clip_range", "value_clip_range", "max_grad_norm", "adaptive_kl_horizon", "temperature")
ABOVE_0_OR_OFF = ("score_clip", "adaptive_kl_target", "target_kl")
AT_LEAST_1 = ("ppo_epochs", "minibatch_size", "micro_batch_size", "max_new_tokens", "samples_per_prompt")
CHOICES = {
    "advantage": ("gae", "reinforce", "rloo", "grpo"),
    "baseline": ("batch", "running"),
    "kl_penalty": ("reward", "loss_k1", "loss_k2"),
    "loss_mean": ("tokens", "sequences"),
    "missing_eos": ("replace", "subtract", "mask"),
    "normalize_scores": ("none", "scale", "shift_and_scale"),
    "score_placement": ("after_end", "end_token"),
}
WHY = {
    "temperature": "PPO learns from samples",
    "clip_range": "nothing could change",
    "value_clip_range": "nothing could change",
    "max_grad_norm": "inf clips nothing",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `InputError` where a setting is out of its range, or two contradict each other."""
    _check_ranges(settings)
    _check_together(settings)


def _check_ranges(settings: Mapping[str, Any]) -> None:
    for name, choices in CHOICES.items():
        _require(settings[name] in choices, name, settings[name], f"must be one of {', '.join(choices)}")
    for name in ("gamma", "lam", "lr_floor"):
        _require(0 <= settings[name] <= 1, name, settings[name], "must lie in [0, 1]")
    for name in NOT_NEGATIVE:
        _require(settings[name] >= 0, name, settings[name], "must not be negative")
    for name in ABOVE_0:
        reason = f": {WHY[name]}" if name in WHY else ""
        _require(settings[name] > 0, name, settings[name], f"must be above 0{reason}")
    for name in ABOVE_0_OR_OFF:
        off = settings[name] is None
        _require(off or settings[name] > 0, name, settings[name], "must be above 0, or None to turn it off")
    for name in AT_LEAST_1:
        _require(settings[name] >= 1, name, settings[name], "must be at least 1")
    ema = settings["ema_decay"]
    _require(ema is None or 0 < ema < 1, "ema_decay", ema, "must lie in (0, 1), or be None to turn it off")
    _require(
        settings["top_p"] == 1,
        "top_p",
        settings["top_p"],
        "must be 1: with fewer tokens to draw from, the log-probabilities of the whole vocabulary are not those that "
        "the responses were drawn with, and the ratio is not that of PPO; lower temperature instead",
    )


def _check_together(settings: Mapping[str, Any]) -> None:
    advantage, samples = settings["advantage"], settings["samples_per_prompt"]
    if advantage in ("rloo", "grpo"):
        _require(
            samples >= 2,
            "samples_per_prompt",
            samples,
            f"must be at least 2 with advantage={advantage}: a response is compared with others to the same prompt",
        )
    if advantage == "reinforce":
        _require(
            settings["ppo_epochs"] == 1,
            "ppo_epochs",
            settings["ppo_epochs"],
            "must be 1 with advantage=reinforce: without clipping a rollout can be used once",
        )
    if settings["adaptive_kl_target"] is not None:
        _require(
            settings["beta"] > 0,
            "beta",
            settings["beta"],
            "must be above 0 with adaptive_kl_target, which multiplies it",
        )
    if (settings["ptx_data"] is None) != (settings["ptx_coef"] == 0):
        raise InputError(
            f"ptx_coef={settings['ptx_coef']} and ptx_data={settings['ptx_data']} belong together: the weight of the "
            "pretraining gradient and the DataModule that it is taken on"
        )


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise InputError(f"{name}={value} {rule}")
