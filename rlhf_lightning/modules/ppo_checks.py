"""What PPO's settings may be, looked at before anything is loaded."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lightning import LightningDataModule

from rlhf_lightning.errors import InputError, check_number, check_seed
from rlhf_lightning.functional.schedules import Schedule
from rlhf_lightning.modules.hardware import OptimizerName
from rlhf_lightning.modules.language import idle_settings
from rlhf_lightning.modules.sharding import Gathering
from rlhf_lightning.networks import NetworkConfig
from rlhf_lightning.rollout.experience import Baseline, Estimator, Placement
from rlhf_lightning.rollout.generate import Sampler
from rlhf_lightning.rollout.shaping import MissingEOS, Normalization

CriticKind = Literal["separate", "shared_trunk"]
"""Whether the critic is a network of its own, or a head on the policy's last hidden states."""
KLPenalty = Literal["reward", "loss_k1", "loss_k2"]
"""Where the KL to the reference is charged, and in the loss by which estimator."""
LossMean = Literal["tokens", "sequences"]
"""Whether each token or each response counts alike in the policy's loss."""

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
    "advantage": get_args(Estimator),
    "baseline": get_args(Baseline),
    "critic": get_args(CriticKind),
    "gather_weights": get_args(Gathering),
    "kl_penalty": get_args(KLPenalty),
    "loss_mean": get_args(LossMean),
    "lr_schedule": get_args(Schedule),
    "missing_eos": get_args(MissingEOS),
    "normalize_scores": get_args(Normalization),
    "optimizer": get_args(OptimizerName),
    "sampler": get_args(Sampler),
    "score_placement": get_args(Placement),
}
MAY_BE_INFINITE = ("max_grad_norm", "clip_range", "value_clip_range")
WHY = {
    "temperature": "PPO learns from samples",
    "clip_range": "nothing could change",
    "value_clip_range": "nothing could change",
    "max_grad_norm": "inf clips nothing",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `InputError` where a setting is out of its range, or two contradict each other."""
    if settings["micro_batch_size"] == "auto" and settings["micro_batch_tokens"] is not None:
        raise InputError(
            f"micro_batch_tokens={settings['micro_batch_tokens']} says what fits, and micro_batch_size=auto looks for "
            "it; set one of them"
        )
    if settings["micro_batch_size"] == "auto":
        # It will be a number that is found.
        settings = {**settings, "micro_batch_size": 1}
    _check_types(settings)
    _check_ranges(settings)
    _check_together(settings)


def without_effect(settings: Mapping[str, Any], constructor: Callable[..., Any]) -> list[str]:
    """Return what PPO's settings turn off, as `idle_settings` does."""
    gae_alone = ("critic", "gamma", "lam", "value_coef", "value_clip_range", "critic_learning_rate")
    counts_with = dict.fromkeys(gae_alone, ("advantage=gae", settings["advantage"] == "gae")) | {
        "baseline": ("advantage=reinforce", settings["advantage"] == "reinforce"),
        "clip_range": ("an advantage other than reinforce", settings["advantage"] != "reinforce"),
        "adaptive_kl_horizon": ("adaptive_kl_target", settings["adaptive_kl_target"] is not None),
        "kl_penalty": ("beta above 0", settings["beta"] > 0),
        "missing_eos_penalty": ("missing_eos=replace or subtract", settings["missing_eos"] != "mask"),
    }
    return idle_settings(settings, constructor, **counts_with)


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """Return the largest divisor of ``number`` below ``wanted`` and the smallest above it, where there is one."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below = [size for size in divisors if size < wanted]
    above = [size for size in divisors if size > wanted]
    return below[-1:] + above[:1]


def _check_types(settings: Mapping[str, Any]) -> None:
    for name in (*NOT_NEGATIVE, *ABOVE_0, *AT_LEAST_1, "gamma", "lam", "lr_floor", "warmup_from", "top_p"):
        check_number(name, settings[name], whole=name in (*AT_LEAST_1, "warmup_steps"))
    for name in (*ABOVE_0_OR_OFF, "ema_decay", "micro_batch_tokens"):
        if settings[name] is not None:
            check_number(name, settings[name], whole=name == "micro_batch_tokens")
    check_seed("seed", settings["seed"])


def _check_ranges(settings: Mapping[str, Any]) -> None:
    for name, choices in CHOICES.items():
        reason = ": Muon is for fine-tuning and reward models" if settings[name] == "muon" else ""
        _require(settings[name] in choices, name, settings[name], f"must be one of {', '.join(choices)}{reason}")
    for name in ("gamma", "lam", "lr_floor"):
        _require(0 <= settings[name] <= 1, name, settings[name], "must lie in [0, 1]")
    start = settings["warmup_from"]
    _require(0 <= start < 1, "warmup_from", start, "must lie in [0, 1)")
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
    for name in (*NOT_NEGATIVE, *ABOVE_0, *ABOVE_0_OR_OFF):
        finite = settings[name] is None or math.isfinite(settings[name])
        _require(finite or name in MAY_BE_INFINITE, name, settings[name], "must be finite")
    tokens = settings["micro_batch_tokens"]
    _require(tokens is None or tokens >= 1, "micro_batch_tokens", tokens, "must be at least 1, or None for no limit")
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
    model = settings["model"]
    if settings["offload"] and isinstance(model, NetworkConfig) and model.roles == "shared":
        raise InputError(
            "offload=True with network.roles=shared: reference and reward model are the policy's own weights, which "
            "must stay; set module.offload=false"
        )
    _check_ptx_data(settings["ptx_data"])
    if (settings["ptx_data"] is None) != (settings["ptx_coef"] == 0):
        raise InputError(
            f"ptx_coef={settings['ptx_coef']} and ptx_data={settings['ptx_data']} belong together: the weight of the "
            "pretraining gradient and the DataModule that it is taken on"
        )


def _check_ptx_data(texts: object) -> None:
    if texts is not None and not isinstance(texts, LightningDataModule):
        path = texts if isinstance(texts, str | Path) else "FILE"
        raise InputError(
            f"ptx_data={texts!r} must be a DataModule that reads the texts: SFTDataModule({str(path)!r}), on the "
            f"command line\n  'module.ptx_data={{_target_: rlhf_lightning.SFTDataModule, path: {path}}}'"
            "\n(of rlhf pipeline module.ppo.ptx_data)"
        )


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise InputError(f"{name}={value} {rule}")
