"""A network whose norms, positions and gates take few passes makes what `transformers` makes of it."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel

from rlhf_lightning.networks.checkpointing import checkpoint_blocks
from rlhf_lightning.networks.compiling import compile_blocks
from rlhf_lightning.networks.few_passes import in_few_passes
from rlhf_lightning.networks.packing import last_hidden_state, pack
from rlhf_lightning.networks.predictions import predictions
from rlhf_lightning.networks.sharding import shard
from rlhf_lightning.networks.unpadded import last_states

TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1, 3], [8, 4, 1, 6, 0, 0, 0]])
MASK = TOKENS != 0


def body(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(kind, **{**small, "vocab_size": 50, "pad_token_id": 0, **settings})
    made = AutoModel.from_config(config).float().eval()
    for weight in made.parameters():
        # A norm's is 1 or 0 at first, which hides what it is multiplied with.
        weight.data += 0.1 * torch.randn_like(weight)
    return made


def replaced(network: nn.Module) -> dict[str, int]:
    """How many parts of each kind have another forward now."""
    kinds = [type(part).__name__ for part in network.modules() if "forward" in vars(part)]
    return {kind: kinds.count(kind) for kind in kinds}


def states_and_gradients(network: Any) -> list[Tensor]:
    network.zero_grad()
    states = network(input_ids=TOKENS, attention_mask=MASK.long(), use_cache=False).last_hidden_state[MASK]
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return [states.detach(), *(weight.grad.clone() for weight in network.parameters() if weight.grad is not None)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}),
        ("mistral", {"MistralRMSNorm": 5, "MistralMLP": 2, "MistralAttention": 2}),
        ("qwen2", {"Qwen2RMSNorm": 5, "Qwen2MLP": 2, "Qwen2Attention": 2}),
        # Its queries and keys are normed, too.
        ("qwen3", {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, "Qwen3Attention": 2}),
        # The weight of its norms is 1 + w, and its gate no SiLU.
        ("gemma", {"GemmaAttention": 2}),
        # It rotates neighbouring units, and gate and up are one layer.
        ("glm", {"GlmRMSNorm": 5}),
        # It rotates some of the units.
        ("stablelm", {"StableLmAttention": 2, "StableLmMLP": 2}),
        # Its angles are half as many.
        ("gpt_oss", {"GptOssRMSNorm": 5}),
        ("gpt2", {}),
    ],
)
def test_states_and_gradients_are_those_of_transformers(kind: str, expected: dict[str, int]) -> None:
    # Of such an epsilon much is seen.
    norms = {"rms_norm_eps": 0.1} if any("RMSNorm" in name for name in expected) else {}
    network = body(kind, **({} if kind == "gpt2" else {"num_key_value_heads": 1, **norms}))
    plain = states_and_gradients(network)
    with in_few_passes(network):
        found = replaced(network)
        ours = states_and_gradients(network)
    assert found == expected
    for one, other in zip(ours, plain, strict=True):
        # A gradient is the sum of many that are larger than it is.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * float(other.abs().max()) + 1e-6)


def test_whoever_reads_states_reads_them_so(policy: Callable[..., Any]) -> None:
    network, seen = policy("llama").float(), []
    counted = MASK.clone()
    counted[:, 0] = False
    in_rows = {"position_ids": torch.arange(7).expand(2, -1)}
    # Each looks at the output layer once.
    predictions(network, TOKENS, MASK, counted)
    predictions(network, TOKENS, None, counted, **in_rows)
    layers = network.base_model.layers
    layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(replaced(network)))
    no_pads = torch.ones_like(MASK)
    last_states(network.base_model, TOKENS, MASK)
    last_states(network.base_model, TOKENS, no_pads)
    last_hidden_state(network.base_model, pack(TOKENS, MASK))
    predictions(network, TOKENS, MASK, counted)
    predictions(network, TOKENS, None, counted, **in_rows)
    blocks = len(layers)
    whole = {"LlamaRMSNorm": 2 * blocks + 1, "LlamaMLP": blocks, "LlamaAttention": blocks}
    assert seen == [whole] * 5
    assert replaced(network) == {}


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_are_computed_as_before(kind: torch.dtype) -> None:
    # Half precision is normed in float32, and so is float64 by `transformers`.
    network = body().to(kind)
    plain = states_and_gradients(network)
    with in_few_passes(network):
        assert replaced(network)
        ours = states_and_gradients(network)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_under_autocast_states_move_by_no_more_than_bfloat16_moves_them() -> None:
    network = body()
    exact = states_and_gradients(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = states_and_gradients(network)
        with in_few_passes(network):
            assert replaced(network) == {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}
            ours = states_and_gradients(network)
    assert not all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    for one, other, wanted in zip(ours, plain, exact, strict=True):
        assert (one - wanted).norm() <= 1.5 * (other - wanted).norm()


@pytest.mark.parametrize(("kind", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")])
def test_what_is_found_does_not_depend_on_what_new_tensors_are(kind: torch.dtype, device: str) -> None:
    network, before = body(), torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.device(device), torch.autocast("cpu", dtype=torch.bfloat16), in_few_passes(network):
            found = replaced(network)
    finally:
        torch.set_default_dtype(before)
    assert found == {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}


def test_blocks_that_are_compiled_or_run_again_and_other_forwards_are_left_alone() -> None:
    compiled, checkpointed, by_transformers, others = body(), body(), body(), body()
    compile_blocks(compiled)
    checkpoint_blocks(checkpointed)
    by_transformers.layers[0].gradient_checkpointing = True
    for network in (compiled, checkpointed, by_transformers):
        before = replaced(network)
        with in_few_passes(network):
            assert replaced(network) == before
    norm = others.layers[0].input_layernorm
    norm.forward = torch.zeros_like
    with in_few_passes(others):
        assert norm.forward is torch.zeros_like
    assert norm.forward is torch.zeros_like
    assert replaced(others) == {"LlamaRMSNorm": 1}


class AnotherRMSNorm(nn.RMSNorm):
    """By the name of one, and with what one has: epsilon stands elsewhere."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True).sqrt() + self.variance_epsilon)


class TwoRMSNorm(AnotherRMSNorm):
    """One that may be given more."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.variance_epsilon)
        return factor * self.weight * x * scale


def test_a_part_that_makes_something_else_by_the_same_name_keeps_it() -> None:
    network = body()
    network.norm, network.layers[0].input_layernorm = AnotherRMSNorm(16), TwoRMSNorm(16)
    network.layers[0].mlp.act_fn = nn.GELU()
    with in_few_passes(network):
        assert replaced(network) == {"LlamaRMSNorm": 3, "LlamaMLP": 1, "LlamaAttention": 2}


def test_a_gate_with_another_activation_since_is_that_one() -> None:
    network = body()
    before = states_and_gradients(network)
    with in_few_passes(network):
        states_and_gradients(network)
    for layer in network.layers:
        layer.mlp.act_fn = nn.GELU()
    plain = states_and_gradients(network)
    with in_few_passes(network):
        ours = states_and_gradients(network)
    torch.testing.assert_close(ours[0], plain[0])
    assert (plain[0] - before[0]).abs().max() > 0.01


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    """That of `transformers`, also of some of the units alone."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    size = cos.shape[-1]
    rotated = []
    for x in (q, k):
        a, b = x[..., :size].chunk(2, dim=-1)
        turned = x[..., :size] * cos + torch.cat([-b, a], dim=-1) * sin
        rotated.append(torch.cat([turned, x[..., size:]], dim=-1))
    return tuple(rotated)


class Rotations(nn.Module):
    """All ways in which a network may call it."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[tuple[Tensor, ...]]:
        swapped = [x.transpose(1, 2) for x in (q, k)]
        return [
            apply_rotary_pos_emb(q, k, cos, sin),
            apply_rotary_pos_emb(q, k=k, cos=cos, sin=sin),
            apply_rotary_pos_emb(*swapped, cos, sin, 2),
            apply_rotary_pos_emb(*swapped, cos, sin, unsqueeze_dim=2),
            apply_rotary_pos_emb(q, k, cos[..., :2], sin[..., :2]),
            apply_rotary_pos_emb(q, k, cos[:, :1], sin[:, :1]),
            apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double()),
        ]


def test_a_rotation_may_be_called_in_any_way() -> None:
    network = nn.ModuleList([Rotations(), nn.Linear(1, 1)])
    q, k, cos, sin = (torch.randn(shape) for shape in ((2, 3, 5, 4), (2, 1, 5, 4), (2, 5, 4), (2, 5, 4)))
    plain = network[0](q, k, cos, sin)
    with in_few_passes(network):
        assert replaced(network) == {"Rotations": 1}
        ours = network[0](q, k, cos, sin)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_learnt_angles_get_their_gradients() -> None:
    network = nn.ModuleList([Rotations(), nn.Linear(1, 1)])
    q, k, cos, sin = (torch.randn(shape) for shape in ((2, 3, 5, 4), (2, 1, 5, 4), (2, 5, 4), (2, 5, 4)))
    cos.requires_grad_()
    with in_few_passes(network):
        network[0](q, k, cos, sin)[0][0].sum().backward()
    assert cos.grad is not None


def test_a_network_in_parts_whose_norms_are_gathered_by_themselves(processes: Callable[..., Any]) -> None:
    def work(_: int) -> tuple[dict[str, int], Tensor]:
        distributed.init_process_group("gloo")
        network, mesh = body(), init_device_mesh("cpu", (2,))
        for part in network.modules():
            if type(part).__name__ == "LlamaRMSNorm":
                # As layers are whose weights have another type.
                fully_shard(part, mesh=mesh)
        shard(network, mesh)
        with in_few_passes(network):
            return replaced(network), last_states(network, TOKENS, MASK)[MASK].detach()

    expected = last_states(body(), TOKENS, MASK)[MASK].detach()
    for found, states in processes(2, work):
        assert found == {"FSDPLlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}
        torch.testing.assert_close(states, expected)


def test_a_network_that_nobody_needs_is_not_held() -> None:
    network = body()
    with in_few_passes(network):
        pass
    gone = ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_nothing_is_left_behind_and_other_networks_of_the_class_are_not_touched() -> None:
    network, other = body(), body()
    with in_few_passes(network):
        assert replaced(network)
        assert not replaced(other)
    with pytest.raises(RuntimeError, match="stop"), in_few_passes(network):
        raise RuntimeError("stop")
    assert not replaced(network)
    # One block within another ends without taking away what the other put in.
    with in_few_passes(network):
        before = replaced(network)
        with in_few_passes(network):
            pass
        assert replaced(network) == before
    assert not replaced(network)


def kept(work: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made = work()
    # It holds them till here, so that no two were in one place.
    assert made.grad_fn is not None
    return sum(found.values())


def test_less_is_kept_for_the_backward() -> None:
    network = body()

    def work() -> Tensor:
        made: Tensor = network(input_ids=TOKENS, use_cache=False).last_hidden_state
        return made

    plain = kept(work)
    with in_few_passes(network):
        ours = kept(work)
    tokens, blocks = TOKENS.numel(), 2
    # silu(gate) of 24 units, and the states of 16 without their norms' weights: two of a block, and the last.
    assert plain - ours >= 4 * tokens * (24 * blocks + 16 * (2 * blocks + 1))
