import inspect
import math
import re
from typing import Any

import pytest
from lightning import LightningDataModule

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.ppo_checks import (
    ABOVE_0,
    ABOVE_0_OR_OFF,
    AT_LEAST_1,
    CHOICES,
    NOT_NEGATIVE,
    check_settings,
    nearest_divisors,
    without_effect,
)
from rlhf_lightning.networks import LoRA, NetworkConfig

DEFAULTS = {name: p.default for name, p in inspect.signature(PPOModule).parameters.items()}
NAN = float("nan")
TEXTS = LightningDataModule()
Settings = dict[str, Any]

OUT_OF_RANGE: list[tuple[Settings, str]] = [
    ({"gamma": 1.5}, "gamma=1.5 must lie in [0, 1]"),
    ({"gamma": -0.1}, "gamma=-0.1 must lie in [0, 1]"),
    ({"lam": 1.01}, "lam=1.01 must lie in [0, 1]"),
    ({"lam": -0.1}, "lam=-0.1 must lie in [0, 1]"),
    ({"lr_floor": 1.1}, "lr_floor=1.1 must lie in [0, 1]"),
    ({"lr_floor": -0.1}, "lr_floor=-0.1 must lie in [0, 1]"),
    ({"warmup_from": 1.0}, "warmup_from=1.0 must lie in [0, 1)"),
    ({"warmup_from": -0.1}, "warmup_from=-0.1 must lie in [0, 1)"),
    ({"ema_decay": 0.0}, "ema_decay=0.0 must lie in (0, 1), or be None to turn it off"),
    ({"ema_decay": 1.0}, "ema_decay=1.0 must lie in (0, 1), or be None to turn it off"),
    ({"top_p": 0.9}, "top_p=0.9 must be 1: with fewer tokens to draw from"),
    ({"temperature": 0.0}, "temperature=0.0 must be above 0: PPO learns from samples"),
    ({"clip_range": 0.0}, "clip_range=0.0 must be above 0: nothing could change"),
    ({"value_clip_range": 0.0}, "value_clip_range=0.0 must be above 0: nothing could change"),
    ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0: inf clips nothing"),
    *(({name: -1}, f"{name}=-1 must not be negative") for name in NOT_NEGATIVE),
    *(({name: -1}, f"{name}=-1 must be above 0") for name in ABOVE_0),
    *(({name: 0.0}, f"{name}=0.0 must be above 0, or None to turn it off") for name in ABOVE_0_OR_OFF),
    *(({name: 0}, f"{name}=0 must be at least 1") for name in AT_LEAST_1),
    ({"beta": math.inf}, "beta=inf must be finite"),
    ({"learning_rate": math.inf}, "learning_rate=inf must be finite"),
    ({"temperature": math.inf}, "temperature=inf must be finite"),
    ({"minibatch_size": 2.5}, "minibatch_size=2.5 must be a whole number"),
    ({"micro_batch_tokens": 0}, "micro_batch_tokens=0 must be at least 1"),
    ({"micro_batch_tokens": 1.5}, "micro_batch_tokens=1.5 must be a whole number"),
    ({"micro_batch_tokens": 64, "micro_batch_size": "auto"}, "micro_batch_tokens=64 says what fits"),
    ({"samples_per_prompt": 1.5}, "samples_per_prompt=1.5 must be a whole number"),
    ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be a whole number"),
    ({"minibatch_size": True}, "minibatch_size=True must be a whole number"),
    *(({name: "0.5"}, f"{name}='0.5' must be a ") for name in (*NOT_NEGATIVE, *ABOVE_0, *ABOVE_0_OR_OFF, *AT_LEAST_1)),
    *(
        ({name: [1]}, f"{name}=[1] must be a number")
        for name in ("gamma", "lam", "lr_floor", "warmup_from", "top_p", "ema_decay")
    ),
    *(({name: None}, f"{name}=None must be a number") for name in ABOVE_0),
    *(({"seed": seed}, f"seed={seed!r} must be a whole number from 0 to 4294967295") for seed in (-1, 2**32, 1.0, "1")),
    *(({name: "other"}, f"{name}=other must be one of {', '.join(choices)}") for name, choices in CHOICES.items()),
]

CONTRADICTIONS: list[tuple[Settings, str]] = [
    (
        {"advantage": "rloo", "samples_per_prompt": 1},
        "samples_per_prompt=1 must be at least 2 with advantage=rloo: a response is compared with others",
    ),
    ({"advantage": "grpo", "samples_per_prompt": 1}, "samples_per_prompt=1 must be at least 2 with advantage=grpo"),
    (
        {"advantage": "reinforce", "ppo_epochs": 2},
        "ppo_epochs=2 must be 1 with advantage=reinforce: without clipping a rollout can be used once",
    ),
    ({"beta": 0.0, "adaptive_kl_target": 6.0}, "beta=0.0 must be above 0 with adaptive_kl_target, which multiplies it"),
    (
        {"offload": True, "model": NetworkConfig("any", lora=LoRA(), roles="shared")},
        "offload=True with network.roles=shared: reference and reward model are the policy's own weights",
    ),
    ({"ptx_coef": 0.5}, "ptx_coef=0.5 and ptx_data=None belong together"),
    ({"ptx_data": TEXTS}, "ptx_coef=0.0 and ptx_data="),
    (
        {"ptx_coef": 0.5, "ptx_data": "text.jsonl"},
        "ptx_data='text.jsonl' must be a DataModule that reads the texts: SFTDataModule('text.jsonl'), on the command "
        "line\n  'module.ptx_data={_target_: rlhf_lightning.SFTDataModule, path: text.jsonl}'"
        "\n(of rlhf pipeline module.ppo.ptx_data)",
    ),
    ({"ptx_coef": 0.5, "ptx_data": [{"text": "a"}]}, "ptx_data=[{'text': 'a'}] must be a DataModule"),
]

AT_THE_EDGE: list[Settings] = [
    {},
    {"gamma": 0.0, "lam": 1.0},
    {"gamma": 1.0, "lam": 0.0},
    {"beta": 0.0},
    {"lr_floor": 0.0, "warmup_from": 0.0},
    {"lr_floor": 1.0, "warmup_from": 0.999},
    *({name: 0} for name in NOT_NEGATIVE),
    *({name: 1} for name in AT_LEAST_1),
    *({name: None} for name in ABOVE_0_OR_OFF),
    *({name: 1e-9} for name in (*ABOVE_0, *ABOVE_0_OR_OFF)),
    {"max_grad_norm": float("inf")},
    {"ema_decay": 0.992},
    {"ptx_coef": 27.8, "ptx_data": TEXTS},
    {"advantage": "rloo", "samples_per_prompt": 2},
    {"advantage": "grpo", "samples_per_prompt": 2},
    {"advantage": "reinforce", "ppo_epochs": 1},
]


@pytest.mark.parametrize(("settings", "message"), [*OUT_OF_RANGE, *CONTRADICTIONS])
def test_a_setting_that_cannot_work_is_named_with_its_value_and_its_rule(settings: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_settings({**DEFAULTS, **settings})


@pytest.mark.parametrize("settings", AT_THE_EDGE)
def test_the_edge_of_a_range_is_allowed(settings: Settings) -> None:
    check_settings({**DEFAULTS, **settings})


@pytest.mark.parametrize(
    "name", [*NOT_NEGATIVE, *ABOVE_0, *ABOVE_0_OR_OFF, "gamma", "lam", "warmup_from", "ema_decay", "top_p"]
)
def test_nan_is_in_no_range(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}=nan must"):
        check_settings({**DEFAULTS, name: NAN})


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_that_is_offered_is_taken(name: str) -> None:
    for choice in CHOICES[name]:
        check_settings({**DEFAULTS, name: choice, "samples_per_prompt": 2, "ppo_epochs": 1})


def test_every_number_of_the_constructor_is_looked_at() -> None:
    looked_at = {
        *NOT_NEGATIVE,
        *ABOVE_0,
        *ABOVE_0_OR_OFF,
        *AT_LEAST_1,
        *CHOICES,
        "gamma",
        "lam",
        "lr_floor",
        "warmup_from",
        "ema_decay",
        "micro_batch_tokens",
        "top_p",
    }
    others = {
        "self",
        "model",
        "reward",
        "tokenizer",
        "reward_tokenizer",
        "ptx_data",
        "seed",
        "max_bad_updates",
        "rescore",
        "offload",
        "preflight",
    }
    assert set(DEFAULTS) - others == looked_at


@pytest.mark.parametrize(("settings", "message"), [*OUT_OF_RANGE, *CONTRADICTIONS])
def test_settings_are_looked_at_before_anything_is_loaded(settings: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PPOModule(**{"model": "no/such/folder", "reward": "no/such/reward", **settings})


IDLE: list[tuple[Settings, Settings, str]] = [
    *(
        (
            {"advantage": "rloo", "samples_per_prompt": 2},
            {name: value},
            f"{name}={value} counts only with advantage=gae",
        )
        for name, value in {
            "critic": "shared_trunk",
            "gamma": 0.9,
            "lam": 1.0,
            "value_coef": 0.5,
            "value_clip_range": 0.1,
            "critic_learning_rate": 1e-5,
        }.items()
    ),
    ({}, {"baseline": "running"}, "baseline=running counts only with advantage=reinforce"),
    ({"advantage": "reinforce", "ppo_epochs": 1}, {"clip_range": 0.1}, "clip_range=0.1 counts only with an advantage"),
    ({}, {"adaptive_kl_horizon": 5.0}, "adaptive_kl_horizon=5.0 counts only with adaptive_kl_target"),
    ({"beta": 0.0}, {"kl_penalty": "loss_k2"}, "kl_penalty=loss_k2 counts only with beta above 0"),
    ({"lr_schedule": "constant"}, {"lr_floor": 0.5}, "lr_floor=0.5 counts only with lr_schedule=linear or cosine"),
    ({}, {"warmup_from": 0.1}, "warmup_from=0.1 counts only with warmup_steps above 0"),
    ({"missing_eos": "mask"}, {"missing_eos_penalty": 2.0}, "missing_eos_penalty=2.0 counts only with missing_eos="),
]


@pytest.mark.parametrize(("turned_off_by", "idle", "message"), IDLE)
def test_a_setting_that_another_turns_off_is_named(turned_off_by: Settings, idle: Settings, message: str) -> None:
    (found,) = without_effect(DEFAULTS | turned_off_by | idle, PPOModule)
    assert found.startswith(message)
    assert without_effect(DEFAULTS | turned_off_by, PPOModule) == []
    active = {
        "baseline": {"advantage": "reinforce"},
        "adaptive_kl_horizon": {"adaptive_kl_target": 6.0},
        "warmup_from": {"warmup_steps": 2},
    }
    assert without_effect(DEFAULTS | idle | active.get(next(iter(idle)), {}), PPOModule) == []


@pytest.mark.parametrize(
    ("number", "wanted", "expected"),
    [(12, 5, [4, 6]), (60, 32, [30, 60]), (13, 2, [1, 13]), (6, 7, [6]), (4, 3, [2, 4])],
)
def test_the_divisors_on_both_sides_of_a_number_are_named(number: int, wanted: int, expected: list[int]) -> None:
    assert nearest_divisors(number, wanted) == expected
