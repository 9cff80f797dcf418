from typing import Any

import pytest
import torch

from rlhf_lightning.cli.build import build, build_all
from rlhf_lightning.errors import InputError
from rlhf_lightning.rollout import WeightedSum


def length(prompts: list[str], responses: list[str], scale: float = 1.0) -> list[float]:
    return [scale * len(response) for response in responses]


REWARD = {"_target_": f"{__name__}.length", "scale": 2.0}
COUNTER = {"_target_": "collections.Counter", "a": 2}


def test_a_node_becomes_its_object_with_further_arguments() -> None:
    assert build("data", {"_target_": "collections.Counter", "a": 2}, b=1) == {"a": 2, "b": 1}


def test_a_reward_function_is_not_called_but_bound_to_its_settings() -> None:
    made = build("module.reward", dict(REWARD))
    assert made(["p"], ["four"]) == [8.0]


def test_functions_among_several_rewards_are_bound_too() -> None:
    several = {
        "_target_": "rlhf_lightning.rollout.WeightedSum",
        "rewards": {
            "long": dict(REWARD),
            "models": {"_target_": "rlhf_lightning.Ensemble", "rewards": ["out/reward", dict(REWARD)], "std_coef": 0.5},
        },
        "weights": {"long": 1.0, "models": 2.0},
    }
    made = build("module.reward", several)
    assert isinstance(made, WeightedSum)
    assert made.rewards["long"](["p"], ["four"]) == [8.0]
    assert made.rewards["models"].rewards[0] == "out/reward"
    assert made.rewards["models"].rewards[1](["p"], ["four"]) == [8.0]
    assert (made.rewards["models"].std_coef, made.weights) == (0.5, {"long": 1.0, "models": 2.0})


def test_several_rewards_that_do_not_fit_together_are_an_input_error_with_the_place() -> None:
    wrong = {"_target_": "rlhf_lightning.WeightedSum", "rewards": {"long": dict(REWARD)}, "weights": {"short": 1.0}}
    with pytest.raises(InputError, match=r"module\.reward: .*rewards: long; weights: short"):
        build("module.reward", wrong)


def test_what_a_constructor_refuses_is_an_input_error_with_the_place() -> None:
    node = {"_target_": "rlhf_lightning.data.SFTDataModule", "path": "rows.jsonl", "batch_size": 0}
    with pytest.raises(InputError, match=r"data\.sft: data\.batch_size=0 must be at least 1"):
        build("data.sft", node)


def test_a_precision_that_lightning_would_silently_replace_is_an_input_error() -> None:
    node = {"_target_": "lightning.Trainer", "accelerator": "cpu", "precision": "16-mixed"}
    with pytest.raises(InputError, match="trainer: precision=16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true"):
        build("trainer", node)


def test_lightnings_quantisation_on_a_cpu_is_an_input_error_with_ours() -> None:
    plugin = {"_target_": "lightning.pytorch.plugins.BitsandbytesPrecision", "mode": "nf4"}
    node = {"_target_": "lightning.Trainer", "accelerator": "cpu", "plugins": [plugin]}
    with pytest.raises(InputError, match=r"trainer: BitsandbytesPrecision needs a GPU; network\.quantization does not"):
        build("trainer", node)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_input_error_with_what_runs_without() -> None:
    with pytest.raises(InputError, match=r"trainer: torch sees no GPU .* on a CPU use trainer=cpu"):
        build("trainer", {"_target_": "lightning.Trainer", "accelerator": "gpu"})


def test_what_the_trainer_refuses_is_an_input_error() -> None:
    with pytest.raises(InputError, match="trainer: "):
        build("trainer", {"_target_": "lightning.Trainer", "accelerator": "abacus"})


def test_an_error_of_the_code_is_not_the_users() -> None:
    with pytest.raises(Exception, match="takes no keyword arguments") as error:
        build("module", {"_target_": "rlhf_lightning.errors.InputError", "text": "x"})
    assert not isinstance(error.value, InputError)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (None, {}),
        ({"one": COUNTER, "none": None}, {"one": {"a": 2}}),
        (COUNTER, {"": {"a": 2}}),
    ],
)
def test_named_nodes_become_named_objects(nodes: Any, expected: dict[str, Any]) -> None:
    assert build_all("callbacks", nodes) == expected
