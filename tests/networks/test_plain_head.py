from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    ModernBertDecoderForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_lightning.networks.plain_head import plain_head, plain_scalar_head
from rlhf_lightning.networks.scalar_head import keep_fine

# The output layer of a language model -----------------------------------------


def test_a_plain_layer_is_found_and_all_others_are_not(
    policy: Callable[..., Any], other_family: Callable[..., Any]
) -> None:
    uncapped = other_family("gemma", final_logit_softcapping=None)
    for plain in (policy(), policy("gpt2"), policy(tie_word_embeddings=True), uncapped):
        assert plain_head(plain) is plain.lm_head
    capped = [other_family("gemma", final_logit_softcapping=cap) for cap in (3.0, 1e4)]
    for other in (*capped, other_family("cohere", logit_scale=0.25), other_family("opt")):
        assert plain_head(other) is None


class IgnoresPositions(LlamaForCausalLM):
    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_network_that_changes_what_its_body_reads_is_not_plain(policy: Callable[..., Any]) -> None:
    network = IgnoresPositions(policy().config)
    assert plain_head(network, takes_positions=True) is None
    assert plain_head(network, takes_positions=False) is network.lm_head


def test_the_look_at_a_network_is_taken_once_and_draws_no_noise(
    policy: Callable[..., Any], classifier: Callable[..., Any]
) -> None:
    for network, look in ((policy, plain_head), (classifier, plain_scalar_head)):
        model, calls = network("gpt2", resid_pdrop=0.5).train(), []
        model.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        before = torch.get_rng_state()
        assert look(model) is look(model) is not None
        assert torch.equal(torch.get_rng_state(), before)
        assert calls == [1]


# The scalar head of a reward model --------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_head_on_the_last_state_is_plain_with_a_bias_and_held_in_more_bits_too(
    kind: str, padding: int, classifier: Callable[..., Any]
) -> None:
    plain, biased, coarse = (classifier(kind, pad_token_id=padding) for _ in range(3))
    biased.score = nn.Linear(16, 1)
    keep_fine(coarse.bfloat16().score)
    for network in (plain, biased, coarse):
        assert plain_scalar_head(network) is network.score


class Scored(LlamaForSequenceClassification):
    """Scores as `score` says, of all states (B, T, H), the mask and the ids of padding."""

    def forward(self, input_ids: Any, attention_mask: Any, **kwargs: Any) -> Any:
        states = self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        logits, is_pad = self.score(states), input_ids == self.config.pad_token_id
        return SequenceClassifierOutput(logits=self.scored(states, logits, attention_mask, is_pad))


class ByTheMask(Scored):
    def scored(self, states: Any, logits: Any, mask: Any, is_pad: Any) -> Any:
        return logits[torch.arange(len(logits)), mask.sum(dim=1) - 1]


class TheLastColumn(Scored):
    def scored(self, states: Any, logits: Any, mask: Any, is_pad: Any) -> Any:
        return logits[:, -1]


class BeforeTheFirstPadding(Scored):
    def scored(self, states: Any, logits: Any, mask: Any, is_pad: Any) -> Any:
        return logits[torch.arange(len(logits)), is_pad.long().argmax(dim=1) - 1]


class Capped(Scored):
    def scored(self, states: Any, logits: Any, mask: Any, is_pad: Any) -> Any:
        length = (~is_pad * torch.arange(is_pad.shape[1])).argmax(dim=1)
        return 50 * torch.tanh(logits[torch.arange(len(logits)), length] / 50)


class OfTheMeanState(Scored):
    def scored(self, states: Any, logits: Any, mask: Any, is_pad: Any) -> Any:
        return self.score(states.mean(dim=1))


@pytest.mark.parametrize("kind", [ByTheMask, TheLastColumn, BeforeTheFirstPadding, Capped, OfTheMeanState])
def test_a_score_that_is_read_or_made_otherwise_has_no_plain_head(
    kind: type[Scored], classifier: Callable[..., Any]
) -> None:
    assert plain_scalar_head(kind(classifier().config)) is None


SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def test_more_layers_between_body_and_score_and_encoders_have_no_plain_head() -> None:
    settings = {**SIZES, "num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0}
    assert plain_scalar_head(BertForSequenceClassification(BertConfig(**settings))) is None
    decoder = ModernBertDecoderConfig(**settings, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    assert plain_scalar_head(ModernBertDecoderForSequenceClassification(decoder)) is None


def test_nothing_is_taken_apart_whose_call_somebody_waits_for_or_that_knows_no_padding(
    classifier: Callable[..., Any],
) -> None:
    network = classifier()
    hook = network.register_forward_hook(lambda *_: None)
    assert plain_scalar_head(network) is None
    hook.remove()
    assert plain_scalar_head(network) is network.score
    assert plain_scalar_head(classifier(pad_token_id=None)) is None
    assert plain_scalar_head(nn.Linear(2, 1)) is None


def test_nothing_is_taken_apart_whose_layers_gather_their_weights_when_they_are_called(
    policy: Callable[..., Any], classifier: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    def work(rank: int) -> list[Any]:
        distributed.init_process_group("gloo")
        networks = [policy(), classifier()]
        for network in networks:
            layers = network.model.layers
            layers[0] = FullyShardedDataParallel(layers[0], device_id=torch.device("cpu"))
        return [plain_head(networks[0]), plain_scalar_head(networks[1])]

    assert processes(2, work) == [[None, None]] * 2


def test_a_head_of_another_kind_is_not_plain(classifier: Callable[..., Any]) -> None:
    class Quantised(nn.Linear):
        """As those of `bitsandbytes` are."""

    network = classifier()
    network.score = Quantised(16, 1)
    assert plain_scalar_head(network) is None
