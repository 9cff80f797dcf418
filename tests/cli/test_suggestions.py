import pytest
from omegaconf import OmegaConf

from rlhf_lightning.cli.suggestions import BY_A_PLUS, did_you_mean, explain, flat_keys


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["module=ppo", "module.betta=0.1"],
            "module.betta is not a setting of `rlhf train`; did you mean module.beta?",
        ),
        (["module.beta=0.1"], "module.beta is a setting of module=ppo; this run has module=sft"),
        (["module.packing=true", "module=ppo"], "module.packing is a setting of module=reward or module=sft; this"),
        # Data and callbacks follow the module.
        (["data.opening_tokens=4"], "data.opening_tokens is a setting of module=ppo; this run has module=sft"),
        (["network.lora.r=4"], "network.lora.r is a setting of network=lora; this run has network=default"),
        (["module=pppo"], "module=pppo is not an option; did you mean module=ppo? (there are: "),
        (
            ["trainer.max_stepss=1"],
            f"trainer.max_stepss is not a setting of `rlhf train`; did you mean trainer.max_steps? {BY_A_PLUS}",
        ),
        (["trainer.qqqqqqqqqqqqqqqqqq=1"], f"trainer.qqqqqqqqqqqqqqqqqq is not a setting of `rlhf train`. {BY_A_PLUS}"),
        (["qqq=1"], "qqq is not a setting of `rlhf train`"),
        # The choice of a group comes first, wherever it stands: only PPO has a beta.
        (
            ["module.beta=0.1", "module=ppo", "trainerr=cpu"],
            "trainerr is not a setting of `rlhf train`; did you mean trainer?",
        ),
    ],
)
def test_the_override_to_blame_is_named_with_the_nearest_real_one(overrides: list[str], expected: str) -> None:
    assert explain(ValueError("Hydra's own words"), "train", [], overrides).startswith(expected)


def test_a_setting_of_no_stage_of_the_pipeline_is_answered_with_the_nearest() -> None:
    said = explain(ValueError(""), "pipeline", [], ["module.sft.leraning_rate=1", "experiment=world"])
    assert (
        said == "module.sft.leraning_rate is not a setting of `rlhf pipeline`; did you mean module.sft.learning_rate?"
    )
    said = explain(ValueError(""), "pipeline", [], ["experiment=world", "module.ppo.betta=1"])
    assert said == "module.ppo.betta is not a setting of `rlhf pipeline`; did you mean module.ppo.beta?"


def test_where_nothing_is_found_hydra_speaks() -> None:
    assert explain(ValueError(" Hydra's own words\n"), "train", [], ["module=ppo"]) == "Hydra's own words"


def test_far_names_are_not_suggested() -> None:
    assert did_you_mean("betta", ["beta", "gamma"], "module.") == "; did you mean module.beta?"
    assert did_you_mean("xyz", ["beta", "gamma"]) == ""


def test_keys_are_those_of_overrides_inner_nodes_among_them() -> None:
    config = OmegaConf.create({"module": {"beta": 1, "lora": {"r": 4}}, "seed": 0})
    assert flat_keys(config) == ["module", "module.beta", "module.lora", "module.lora.r", "seed"]
