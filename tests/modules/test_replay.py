from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.batch_file import write_records
from rlhf_lightning.modules.replay import watching
from rlhf_lightning.types import PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]


class Replay(Callback):
    """Replays a file where the command does, and keeps what is said; training is then cut short."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[str] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.lines = module.replay(self.file)
        trainer.should_stop = True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    mask = torch.ones(2, 4, dtype=torch.bool)
    batch = SFTBatch(
        tokens=torch.arange(8).reshape(2, 4) + 10, attention_mask=mask, loss_mask=mask & (torch.arange(4) > 0)
    )
    write_records([batch], tmp_path / "a.safetensors", {"update": "7", "what": "the loss is not finite"})
    return tmp_path / "a.safetensors"


def test_the_first_output_that_is_not_finite_and_the_weights_are_named(
    policy: Callable[..., Any], fit: Callable[..., Any], file: Path
) -> None:
    module = SFTModule(policy())
    norm = module.policy.model.layers[1].post_attention_layernorm
    with torch.no_grad():
        norm.weight[3] = torch.inf
    replayed = Replay(file)
    fit(module, [None], max_steps=1, callbacks=[replayed])
    assert replayed.lines[0] == f"{file}: update 7, which was skipped because the loss is not finite"
    assert replayed.lines[1] == "not finite among the weights: policy.model.layers.1.post_attention_layernorm.weight"
    assert replayed.lines[2] == "loss: nan"
    first = "policy.model.layers.1.post_attention_layernorm (LlamaRMSNorm)"
    assert replayed.lines[3] == f"first output that is not finite: {first}"
    assert "gradients that are not finite: policy.model.embed_tokens.weight" in replayed.lines[4]


def test_finite_numbers_are_said_to_be_finite_and_nothing_is_changed(
    policy: Callable[..., Any], fit: Callable[..., Any], weights: Callable[..., Any], file: Path
) -> None:
    module = SFTModule(policy())
    before = weights(module)
    replayed = Replay(file)
    fit(module, [None], max_steps=1, callbacks=[replayed])
    assert "loss and gradient are finite with these weights" in replayed.lines[-1]
    assert all(torch.equal(before[name], weight) for name, weight in module.state_dict().items())


def test_a_gradient_that_alone_is_not_finite_is_named(
    policy: Callable[..., Any], fit: Callable[..., Any], file: Path
) -> None:
    module = SFTModule(policy())
    module.policy.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * torch.inf)
    replayed = Replay(file)
    fit(module, [None], max_steps=1, callbacks=[replayed])
    name = "policy.model.layers.0.mlp.up_proj.weight"
    assert replayed.lines[-1] == f"gradients that are not finite: {name}; the first on the way back: {name}"


def test_a_file_of_another_stage_is_refused(
    classifier: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any], file: Path
) -> None:
    with pytest.raises(InputError, match=r"holds \['SFTBatch'\], and RewardModule is updated from ComparisonBatch"):
        fit(RewardModule(classifier(), tokenizer=tokenizer), [None], max_steps=1, callbacks=[Replay(file)])


def test_a_minibatch_of_ppo_says_what_of_it_is_not_finite(
    policy: Callable[..., Any], tokenizer: Any, prompts: PromptBatch, fit: Callable[..., Any], tmp_path: Path
) -> None:
    def make() -> PPOModule:
        module = PPOModule(
            policy(),
            tokenizer=tokenizer,
            reward=lambda prompts, responses: [float(len(r)) for r in responses],
            preflight=False,
            max_new_tokens=4,
            minibatch_size=6,
            ppo_epochs=1,
        )
        torch.nn.init.constant_(list(module.critic.parameters())[-1], torch.nan)  # type: ignore[union-attr]
        return module

    fit(make(), [prompts], max_steps=1)
    (file,) = (tmp_path / "bad_updates").iterdir()
    replayed = Replay(file)
    fit(make(), [prompts], max_steps=1, callbacks=[replayed])
    assert replayed.lines[1].startswith("not finite in the batch: Experience.old_values, Experience.advantages")
    assert replayed.lines[2].startswith("not finite among the weights: critic.")
    # Of the policy, whose advantages are not finite, and of the critic.
    assert replayed.lines[3] == "loss: nan, nan"
    assert "first output that is not finite: critic." in replayed.lines[4]


def test_the_first_gradient_is_that_of_the_last_layer() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with watching(network) as seen:
        (network(torch.ones(1, 2)).sum() * torch.inf).backward()
    assert seen.output is None
    assert seen.gradient is not None
    assert seen.gradient.startswith("1.")
