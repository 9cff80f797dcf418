import gc
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from rlhf_lightning.cli.checks import check, fits, plain, target
from rlhf_lightning.errors import InputError


class Engine:
    def __init__(
        self,
        model: str | Path,
        *,
        rate: float = 0.1,
        steps: int = 3,
        on: bool = True,
        mode: Literal["fast", "slow"] = "fast",
        sizes: list[int] | None = None,
    ) -> None: ...


class Lenient:
    def __init__(self, **settings: Any) -> None: ...


def politeness(prompts: list[str], responses: list[str], *, weight: float = 1.0) -> list[float]:
    return [weight for _ in responses]


def node(target: Any, **settings: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{target.__qualname__}", **settings}


def test_settings_that_exist_and_fit_pass() -> None:
    settings = node(Engine, model="m", rate=1, steps=2, on=False, mode="slow", sizes=[1])
    check({"engine": settings, "list": [settings]}, known=["engine", "list"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "m", "rat": 1.0}, r"engine\.rat is not a setting .*did you mean engine\.rate\?"),
        ({}, r"engine\.model is required"),
        ({"model": "m", "rate": "abc"}, r"engine\.rate must be a number, not 'abc'"),
        ({"model": "m", "rate": None}, r"engine\.rate must be a number, not None"),
        ({"model": "m", "rate": True}, r"engine\.rate must be a number, not True"),
        ({"model": "m", "steps": 1.5}, r"engine\.steps must be a whole number, not 1\.5"),
        ({"model": "m", "on": "yes please"}, r"engine\.on must be true or false, not 'yes please'"),
        ({"model": "m", "mode": "quick"}, r"engine\.mode must be 'fast' or 'slow', not 'quick'"),
        ({"model": 3}, r"engine\.model must be text or a path, not 3"),
        ({"model": "m", "sizes": 3}, r"engine\.sizes must be .* or null, not 3"),
    ],
)
def test_wrong_settings_are_named_with_their_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check({"engine": node(Engine, **settings)}, known=["engine"])


def test_nodes_inside_of_nodes_and_lists_are_checked() -> None:
    wrong = node(Engine, model="m", rat=1.0)
    with pytest.raises(InputError, match=r"outer\.parts\.1\.rat is not a setting"):
        check({"outer": node(Lenient, parts=[node(Engine, model="m"), wrong])}, known=["outer"])


def test_class_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(InputError, match=r"engine\._target_=no\.such\.Thing cannot be imported"):
        check({"engine": {"_target_": "no.such.Thing"}}, known=["engine"])


def test_garbage_is_looked_for_again_once_a_class_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_once.py").write_text("import gc\nwas_on = gc.isenabled()\nclass Model: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert gc.isenabled()
    model = target("module", "imported_once.Model")
    assert not sys.modules[model.__module__].was_on
    assert gc.isenabled()
    with pytest.raises(InputError):
        target("module", "imported_once.Nothing")
    assert gc.isenabled()


def test_reward_function_need_not_have_what_it_is_called_with() -> None:
    check({"module": {"reward": node(politeness, weight=2.0)}}, known=["module"])
    with pytest.raises(
        InputError, match=r"module\.reward\.wight is not a setting.*did you mean module\.reward\.weight"
    ):
        check({"module": {"reward": node(politeness, wight=2.0)}}, known=["module"])


def test_functions_and_settings_of_several_rewards_are_checked_too() -> None:
    ensemble = {"_target_": "rlhf_lightning.rollout.Ensemble", "rewards": ["out/reward", node(politeness)]}
    several = {
        "_target_": "rlhf_lightning.rollout.WeightedSum",
        "rewards": {"polite": node(politeness, weight=2.0), "models": ensemble},
        "weights": {"polite": 1.0, "models": 1.0},
    }
    check({"module": {"reward": several}}, known=["module"])
    ensemble["std_coeff"] = 1.0
    with pytest.raises(InputError, match=r"models\.std_coeff is not a setting.*did you mean .*models\.std_coef\?"):
        check({"module": {"reward": several}}, known=["module"])
    ensemble |= {"rewards": "out/reward"}
    del ensemble["std_coeff"]
    with pytest.raises(InputError, match=r"module\.reward\.rewards\.models\.rewards must be .*not 'out/reward'"):
        check({"module": {"reward": several}}, known=["module"])


def test_root_key_near_a_real_one_is_refused_and_another_one_is_the_users_own() -> None:
    check({"my_own_variable": 1}, known=["module", "data"])
    with pytest.raises(InputError, match=r"modul is not a setting; did you mean module\?"):
        check({"modul": {"beta": 1}}, known=["module", "data"])


def test_every_missing_value_is_named() -> None:
    config = OmegaConf.create({"network": {"pretrained": "???"}, "data": {"path": "???"}})
    with pytest.raises(InputError, match=r"(?s)data\.path is required.*network\.pretrained is required"):
        plain(config)


def test_interpolation_without_a_value_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot be resolved"):
        plain(OmegaConf.create({"a": "${no.such.key}"}))


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (1.0, int, False),
        ("x", Path, True),
        (None, str | None, True),
        ([1], list[int], True),
        ({"a": 1}, dict[str, int], True),
        ("text", dict[str, int], False),
        ({"_target_": "x"}, Engine, True),
        (3, Engine, False),
        (3, Any, True),
    ],
)
def test_values_are_judged_by_basic_types_only(value: object, annotation: Any, expected: bool) -> None:
    assert fits(value, annotation) is expected


def test_place_of_the_data_that_is_not_there_is_named_with_its_setting(tmp_path: Path) -> None:
    config = {"data_root": str(tmp_path / "nowhere"), "data": {"path": str(tmp_path / "nowhere" / "rows.jsonl")}}
    with pytest.raises(
        InputError, match=r"data_root=.*nowhere does not exist, and data\.path lies in it.*RLHF_LIGHTNING_DATA"
    ):
        check(config, known=["data_root", "data"])
    check({**config, "data_root": str(tmp_path)}, known=["data_root", "data"])
    check({**config, "data": {"path": "elsewhere.jsonl"}}, known=["data_root", "data"])
