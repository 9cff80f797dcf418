from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy, load_tokenizer, save_pretrained
from rlhf_lightning.networks.lora import adapter_weights, has_adapter, remove_adapter
from rlhf_lightning.networks.roles import frozen, on_the_same_backbone
from rlhf_lightning.preflight import Finding, check_ppo
from rlhf_lightning.preflight.policy import SAME_CALL, check_left_padding, precision
from rlhf_lightning.preflight.probe import sample_probe
from rlhf_lightning.rollout.score import response_predictions, spread
from rlhf_lightning.types import Experience, PromptBatch, Rollout, ScoredRollout

Faults = Callable[[list[Finding]], dict[str, Finding]]
Make = Callable[..., PPOModule]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_healthy_run_has_no_fault(
    kind: str, temperature: float, make: Make, prompts: PromptBatch, faults: Faults, request: pytest.FixtureRequest
) -> None:
    findings = check_ppo(make(request.getfixturevalue(kind)(), temperature=temperature), prompts)
    assert faults(findings) == {}
    statuses = {finding.name: finding.status for finding in findings}
    for name in ("KL to the reference", "first ratio", "left padding", "sampler and trainer"):
        assert statuses[name] == "ok"


# Dropout ---------------------------------------------------------------------


def test_dropout_of_a_policy_in_training_mode_is_named(
    make: Make, gpt2: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    module = make(gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    assert faults(check_ppo(module, prompts)) == {}
    module.policy.train()
    found = faults(check_ppo(module, prompts))
    for name in ("KL to the reference", "first ratio"):
        assert found[name].status == "error"
        assert "dropout left on: the whole network is in training mode" in found[name].measured
        assert ".eval()" in found[name].remedy


class NeverEval(LlamaForCausalLM):
    """Drops out of its logits, whatever mode it is in."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.nn.functional.dropout(output.logits, 0.1, training=True)
        return output


def test_dropout_that_ignores_the_mode_is_named(
    make: Make, llama: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    found = faults(check_ppo(make(llama(NeverEval)), prompts))
    assert {"KL to the reference", "first ratio", "left padding", "sampler and trainer"} <= set(found)
    assert all("dropout" in found[name].measured for name in ("KL to the reference", "first ratio"))


# Reference -------------------------------------------------------------------


def test_a_reference_that_differs_is_named_with_its_first_weight(
    make: Make, prompts: PromptBatch, faults: Faults
) -> None:
    module = make()
    with torch.no_grad():
        module.reference.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 0.1
    found = faults(check_ppo(module, prompts))
    assert set(found) == {"KL to the reference"}
    assert "1 weights differ" in found["KL to the reference"].measured
    assert "model.layers.1.mlp.up_proj.weight" in found["KL to the reference"].measured


def test_a_reference_that_reads_otherwise_with_equal_weights_is_named(
    make: Make, prompts: PromptBatch, faults: Faults
) -> None:
    """As with an adapter that is off, or a config that differs: here the scale of the rotary positions."""
    module = make()
    rotary: Any = module.reference.get_submodule("model.rotary_emb")
    rotary.inv_freq = rotary.inv_freq * 1.5
    found = faults(check_ppo(module, prompts))
    assert set(found) == {"KL to the reference"}
    assert "weights are equal" in found["KL to the reference"].measured
    assert "adapters" in found["KL to the reference"].remedy


def moved(network: Any) -> Any:
    """The network with an adapter that adds something, as one that was trained."""
    generator = torch.Generator().manual_seed(0)
    for weight in adapter_weights(network).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return network


def test_a_reference_whose_adapter_was_left_on_is_named(
    wide_model: Path, make: Make, prompts: PromptBatch, faults: Faults
) -> None:
    """The policy goes on from merged weights under a new adapter; the reference has the old one on top of them."""
    module = make(NetworkConfig(str(wide_model), lora=LoRA(r=4), roles="shared"))
    assert not has_adapter(module.reference)
    assert faults(check_ppo(module, prompts)) == {}
    module.reference = frozen(moved(on_the_same_backbone(module.policy)))
    found = faults(check_ppo(module, prompts))
    assert set(found) == {"KL to the reference"}
    assert found["KL to the reference"].status == "error"
    assert "weights differ from the reference's, the first is " in found["KL to the reference"].measured
    assert ".lora_" in found["KL to the reference"].measured


def test_a_reference_whose_adapter_was_left_off_is_named(
    wide_model: Path, make: Make, prompts: PromptBatch, faults: Faults, tmp_path: Path
) -> None:
    """The policy starts with a trained adapter, which is part of p_FT too."""
    network = NetworkConfig(str(wide_model), lora=LoRA(r=4))
    save_pretrained(moved(load_policy(network)), load_tokenizer(wide_model), tmp_path, export="adapter")
    module = make(NetworkConfig(str(tmp_path), lora=LoRA(r=4), roles="shared"))
    assert has_adapter(module.reference)
    assert faults(check_ppo(module, prompts)) == {}
    remove_adapter(module.reference)
    found = faults(check_ppo(module, prompts))
    assert set(found) == {"KL to the reference"}
    assert ".lora_" in found["KL to the reference"].measured


def test_dropout_of_an_adapter_that_was_left_on_is_named(
    wide_model: Path, make: Make, prompts: PromptBatch, faults: Faults, tmp_path: Path
) -> None:
    lora = LoRA(r=4, dropout=0.5)
    trained = moved(load_policy(NetworkConfig(str(wide_model), lora=lora)))
    save_pretrained(trained, load_tokenizer(wide_model), tmp_path, export="adapter")
    module = make(NetworkConfig(str(tmp_path), lora=lora, roles="shared"))
    assert faults(check_ppo(module, prompts)) == {}
    layer = next(name for name, _ in module.policy.named_modules() if name.endswith("lora_dropout"))
    for part in module.policy.modules():
        part.training = isinstance(part, torch.nn.Dropout)
    found = faults(check_ppo(module, prompts))
    for name in ("KL to the reference", "first ratio"):
        assert found[name].status == "error"
        assert f"dropout left on: {layer}" in found[name].measured


# Temperature -----------------------------------------------------------------


def logprobs_of(network: Any, rollout: Rollout, temperature: float) -> Tensor:
    predicted = response_predictions(
        network, rollout.tokens, rollout.attention_mask, rollout.response_starts, rollout.response_mask
    )
    return spread(predicted.logprobs(temperature=temperature), rollout.response_mask)


def scored_at(module: PPOModule, rollout: Rollout, policy: float, reference: float) -> ScoredRollout:
    scores = {
        "values": torch.zeros(len(rollout), rollout.response_mask.shape[1] + 1),
        "scores": torch.arange(len(rollout)).float(),
    }
    return ScoredRollout(
        **{each.name: getattr(rollout, each.name) for each in fields(Rollout)},
        logprobs=logprobs_of(module.policy, rollout, policy),
        ref_logprobs=logprobs_of(module.reference, rollout, reference),
        **scores,
    )


class ScoresCold(PPOModule):
    def score(self, rollout: Rollout) -> ScoredRollout:
        return scored_at(self, rollout, 1.0, 1.0)


class ReadsTheReferenceCold(PPOModule):
    def score(self, rollout: Rollout) -> ScoredRollout:
        return scored_at(self, rollout, self.temperature, 1.0)


class UpdatesCold(PPOModule):
    def losses(self, experience: Experience) -> dict[str, Tensor]:
        kept, self.temperature = self.temperature, 1.0
        try:
            return super().losses(experience)
        finally:
            self.temperature = kept


@pytest.mark.parametrize(
    ("module_class", "names", "says"),
    [
        (ScoresCold, {"first ratio", "sampler and trainer"}, "scoring reads the policy at another temperature"),
        (UpdatesCold, {"first ratio"}, "the updates seem to read the policy at another temperature"),
        (ReadsTheReferenceCold, {"KL to the reference"}, "the reference is read at temperature 1"),
    ],
)
def test_a_temperature_that_is_missing_in_one_place_is_named_with_the_place(
    module_class: type[PPOModule], names: set[str], says: str, make: Make, prompts: PromptBatch, faults: Faults
) -> None:
    assert faults(check_ppo(make(None, module_class), prompts)) == {}
    found = faults(check_ppo(make(None, module_class, temperature=0.7), prompts))
    assert set(found) == names
    assert any(says in finding.measured for finding in found.values())


class ShiftsTheUpdates(PPOModule):
    """Its updates read each response one token early, from the last token of the prompt on."""

    def losses(self, experience: Experience) -> dict[str, Tensor]:
        return super().losses(replace(experience, response_starts=experience.response_starts - 1))


def test_updates_that_are_shifted_by_one_token_are_named(make: Make, prompts: PromptBatch, faults: Faults) -> None:
    # A prompt of one token has none before it to predict that from.
    longer = prompts.rows((prompts.prompt_mask.sum(dim=1) > 1).nonzero().flatten()[:3])
    assert faults(check_ppo(make(), longer)) == {}
    found = faults(check_ppo(make(None, ShiftsTheUpdates), longer))
    assert set(found) == {"first ratio"}
    assert "shift by one token" in found["first ratio"].remedy


# Padding ---------------------------------------------------------------------


class IgnoresPositions(GPT2LMHeadModel):
    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class IgnoresTheMask(LlamaForCausalLM):
    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)


@pytest.mark.parametrize(("kind", "model_class"), [("gpt2", IgnoresPositions), ("llama", IgnoresTheMask)])
def test_a_policy_that_pad_columns_move_is_named(
    kind: str, model_class: Any, make: Make, prompts: PromptBatch, faults: Faults, request: pytest.FixtureRequest
) -> None:
    found = faults(check_ppo(make(request.getfixturevalue(kind)(model_class)), prompts))
    assert found["left padding"].status == "error"
    assert "position_ids" in found["left padding"].remedy


def without_mask(forward: Callable[..., Any], *, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    return forward(attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **kwargs)


def test_a_critic_that_pad_columns_move_is_named(make: Make, prompts: PromptBatch, faults: Faults) -> None:
    module = make()
    assert module.critic is not None
    module.critic.backbone.forward = partial(without_mask, module.critic.backbone.forward)
    found = faults(check_ppo(module, prompts))
    assert set(found) == {"left padding"}


@pytest.mark.parametrize("seed", range(5))
def test_values_of_a_coarse_critic_are_allowed_their_rounding(
    seed: int, make: Make, llama: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    reward = llama(LlamaForSequenceClassification, num_labels=1, hidden_size=32)
    torch.manual_seed(seed)
    for weight in reward.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    module = make(reward=reward.bfloat16())
    assert module.critic is not None
    assert (precision(module.policy), precision(module.critic)) == (torch.float32, torch.bfloat16)
    assert "left padding" not in faults(check_ppo(module, prompts))


def moved_by_padding(forward: Callable[..., Any], *, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    output = forward(attention_mask=attention_mask, **kwargs)
    # Where there is no mask, no padding is read.
    if attention_mask is not None:
        output.last_hidden_state = output.last_hidden_state * (1 + 1e-3 * attention_mask.shape[1])
    return output


def test_a_precise_critic_of_a_coarse_policy_is_judged_by_its_own_type(
    make: Make, llama: Callable[..., Any], classifier: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    module = make(llama(initializer_range=0.1).bfloat16(), reward=classifier())
    assert module.critic is not None
    assert faults(check_ppo(module, prompts)) == {}
    module.critic.backbone.forward = partial(moved_by_padding, module.critic.backbone.forward)
    assert faults(check_ppo(module, prompts))["left padding"].status == "error"


def test_without_a_position_to_spare_padding_is_not_measured(
    make: Make, gpt2: Callable[..., Any], prompts: PromptBatch
) -> None:
    width = prompts.prompt_tokens.shape[1] + 6
    findings = {f.name: f for f in check_ppo(make(gpt2(n_positions=width)), prompts)}
    assert findings["left padding"].status == "note"
    assert findings["KL to the reference"].status == "ok"


def test_what_coarse_arithmetic_moves_is_a_warning(
    make: Make, llama: Callable[..., Any], prompts: PromptBatch, tokenizer: Any
) -> None:
    class Coarse(LlamaForCausalLM):
        """Its logits depend a little on the width of the batch, as with sums in another order."""

        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            output = super().forward(*args, attention_mask=attention_mask, **kwargs)
            output.logits = output.logits * (1 + 1e-5 * attention_mask.shape[1])
            return output

    policy = llama(Coarse)
    settings: Any = {"max_new_tokens": 6, "temperature": 1.0, "stop_tokens": [1]}
    probe = sample_probe(policy, prompts, tokenizer, **settings)
    with torch.no_grad():
        finding = check_left_padding(
            policy, None, probe.rollout, temperature=1.0, micro_batch_size=2, max_positions=None
        )
    assert finding.status == "warning"


# Decoding --------------------------------------------------------------------


class OtherSteps(LlamaForCausalLM):
    """A step with the cache computes something else than the whole sequence."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        later = past_key_values is not None and past_key_values.get_seq_length() > 0
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if later:
            output.logits = output.logits * 1.05
        return output


def test_a_sampler_that_disagrees_with_the_trainer_is_named(
    make: Make, llama: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    found = faults(check_ppo(make(llama(OtherSteps)), prompts))
    assert set(found) == {"sampler and trainer"}
    assert found["sampler and trainer"].status == "error"
    assert "cache" in found["sampler and trainer"].remedy


# Precision -------------------------------------------------------------------


def test_a_policy_in_bfloat16_is_allowed_its_rounding(
    make: Make, llama: Callable[..., Any], prompts: PromptBatch, faults: Faults
) -> None:
    policy = llama(initializer_range=0.1).bfloat16()
    assert precision(policy) == torch.bfloat16
    assert SAME_CALL[torch.bfloat16] > SAME_CALL[torch.float32]
    assert faults(check_ppo(make(policy), prompts)) == {}


def test_autocast_counts_as_the_precision(llama: Callable[..., Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert precision(llama()) == torch.bfloat16
    assert precision(llama()) == torch.float32
