"""The end of the last block is computed where a state is read, and every state that is read is what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from rlhf_lightning.networks import LoRA
from rlhf_lightning.networks.checkpointing import checkpoint_blocks
from rlhf_lightning.networks.compiling import compile_blocks
from rlhf_lightning.networks.critic import Critic, TrunkCritic, new_value_head
from rlhf_lightning.networks.last_block import feed_forward, makes_some_states, reading_states
from rlhf_lightning.networks.lora import adapter_weights, add_adapter, train_adapter
from rlhf_lightning.networks.packing import last_hidden_state, pack
from rlhf_lightning.networks.sharding import shard
from rlhf_lightning.networks.unpadded import last_states

TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1, 0], [8, 4, 1, 0, 0, 0, 0], [40, 41, 42, 1, 3, 6, 2]])
MASK = TOKENS != 0
READ = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()


def body(policy: Callable[..., Any], kind: str = "llama", **config: Any) -> Any:
    return policy(kind, **config).base_model.double()


def tokens_of_the_last_part(network: Any) -> list[int]:
    """How many tokens it makes states of in each call from now on."""
    part, seen = feed_forward(network), []
    assert part is not None
    # Not by a hook: what is counted is what reaches its forward.
    forward = part.forward
    part.forward = lambda states: (seen.append(states[..., 0].numel()), forward(states))[1]
    return seen


def gradients(network: nn.Module, states: Tensor) -> list[Tensor]:
    network.zero_grad()
    (states * torch.linspace(-1, 1, states.numel()).double().view_as(states)).sum().backward()
    return [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_that_are_read_and_their_gradients_are_those_of_the_whole(
    kind: str, pads: bool, seed: int, policy: Callable[..., Any]
) -> None:
    network = body(policy, kind)
    mask = MASK if pads else torch.ones_like(MASK)
    wanted = torch.rand(MASK.shape, generator=torch.Generator().manual_seed(seed)) < 0.2 + 0.2 * seed
    kept = wanted & mask
    whole = last_states(network, TOKENS, mask)[kept]
    expected = gradients(network, whole)
    seen = tokens_of_the_last_part(network)
    some = last_states(network, TOKENS, mask, read=wanted)
    assert some.isfinite().all()
    torch.testing.assert_close(some[kept], whole, rtol=1e-6, atol=1e-9)
    for one, other in zip(gradients(network, some[kept]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert seen[-1] == int(kept.sum())


@pytest.mark.parametrize("in_one_row", [True, False])
def test_of_packed_rows_too(in_one_row: bool, policy: Callable[..., Any]) -> None:
    network, packed = body(policy), pack(TOKENS, MASK, in_one_row=in_one_row)
    rows, columns = packed.rows.expand_as(READ)[READ], packed.columns[READ]
    whole = last_hidden_state(network, packed)[rows, columns]
    seen = tokens_of_the_last_part(network)
    some = last_hidden_state(network, packed, read=READ)[rows, columns]
    torch.testing.assert_close(some, whole, rtol=1e-6, atol=1e-9)
    assert seen[-1] == int(READ.sum())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_adapters_whose_dropout_is_on(dropout: float, policy: Callable[..., Any]) -> None:
    network = body(policy)
    add_adapter(network, LoRA(r=2, dropout=dropout))
    train_adapter(network)
    for weight in adapter_weights(network).values():
        weight.data = torch.randn_like(weight) * 0.1
    network.train()
    seen = tokens_of_the_last_part(network)
    some = last_states(network, TOKENS, MASK, read=READ)[READ]
    assert network.training
    assert seen[-1] == int(READ.sum())
    if not dropout:
        torch.testing.assert_close(some, last_states(network, TOKENS, MASK)[READ], rtol=1e-6, atol=1e-9)


def test_reading_under_autocast_changes_nothing_but_rounding(policy: Callable[..., Any]) -> None:
    network = body(policy).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, some = (last_states(network, TOKENS, MASK, read=read)[READ] for read in (None, READ))
        seen = tokens_of_the_last_part(network)
        last_states(network, TOKENS, MASK, read=READ)
    assert seen == [int(READ.sum())]
    torch.testing.assert_close(some, whole, rtol=0.05, atol=0.05)


class LooksAround(nn.Module):
    """Reads one argument, and the token before."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, states: Tensor) -> Tensor:
        return self.mlp(states + states.roll(1, dims=1))


def test_all_states_are_made_where_a_token_needs_others_or_the_part_is_run_again_or_compiled(
    policy: Callable[..., Any], other_family: Callable[..., Any]
) -> None:
    looking, checkpointed, compiled = body(policy), body(policy), body(policy)
    looking.layers[-1].mlp = LooksAround(looking.layers[-1].mlp)
    checkpoint_blocks(checkpointed)
    compile_blocks(compiled)
    # The layers of OPT's feed-forward part stand beside its attention one by one.
    opt = other_family("opt").base_model
    assert makes_some_states(body(policy))
    assert feed_forward(opt) is None
    for network in (looking, checkpointed, compiled, opt, opt.decoder):
        assert not makes_some_states(network)
    for network in (looking, checkpointed):
        whole = last_states(network, TOKENS, MASK)
        torch.testing.assert_close(last_states(network, TOKENS, MASK, read=READ)[MASK], whole[MASK])
        last_states(network, TOKENS, MASK, read=READ).sum().backward()


def test_nothing_is_left_behind(policy: Callable[..., Any]) -> None:
    network = body(policy)
    part = feed_forward(network)
    with pytest.raises(RuntimeError, match="stop"), reading_states(network, READ):
        raise RuntimeError("stop")
    assert not part._forward_hooks
    assert not part._forward_pre_hooks
    whole = network(input_ids=TOKENS, use_cache=False).last_hidden_state
    torch.testing.assert_close(last_states(network, TOKENS, torch.ones_like(MASK)), whole)


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)])
def test_a_critic_on_the_trunk_takes_over_states_only_where_those_that_it_reads_were_made(
    mask: Tensor, policy: Callable[..., Any]
) -> None:
    network = policy()
    critic = TrunkCritic(network, new_value_head(network))
    expected = critic(TOKENS, mask)
    calls: list[int] = []
    network.base_model.register_forward_hook(lambda *_: calls.append(1))
    for read, taken_over in ((READ, True), (READ & (TOKENS > 2), True), (None, False), (READ | (TOKENS == 9), False)):
        calls.clear()
        last_states(network.base_model, TOKENS, mask, read=READ)
        found = critic(TOKENS, mask, read)
        kept = mask if read is None else read & mask
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)
        assert len(calls) == (1 if taken_over else 2)


def test_a_critic_in_shards_makes_all_states_and_the_same_values(
    policy: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    def work(rank: int) -> tuple[bool, bool, Tensor]:
        distributed.init_process_group("gloo")
        critic = Critic.from_policy(policy(), torch.Generator().manual_seed(0))
        before = makes_some_states(critic.backbone)
        shard(critic, init_device_mesh("cpu", (2,)))
        with torch.no_grad():
            return before, makes_some_states(critic.backbone), critic(TOKENS, MASK, READ)[READ]

    expected = Critic.from_policy(policy(), torch.Generator().manual_seed(0))(TOKENS, MASK)[READ].detach()
    for before, after, values in processes(2, work):
        assert before
        assert not after
        torch.testing.assert_close(values, expected)
