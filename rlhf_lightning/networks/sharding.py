"""A network whose weights lie in parts on several processes (FSDP2), and the ways to see them whole."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from rlhf_lightning.networks.critic import Critic, TrunkCritic

_gathered: "WeakSet[nn.Module]" = WeakSet()


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process its part of every weight; a network that is sharded already stays as it is.

    Each of the blocks that the architecture does not split is gathered by itself when it is needed, and what lies
    outside of them together; so are layers whose weights are of another type, such as adapters and heads in float32,
    since what is gathered together must be of one type.
    """
    if isinstance(network, FSDPModule):
        return
    for part in [*_of_another_type(network), *blocks(network)]:
        fully_shard(part, mesh=mesh)
    # The outermost part would stay whole after a forward: a second copy of embeddings and output layer.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the layers that the architecture does not split, none where it does not say."""
    from transformers import PreTrainedModel

    names = {
        name for part in network.modules() if isinstance(part, PreTrainedModel) for name in part._no_split_modules or ()
    }
    return [part for part in network.modules() if type(part).__name__ in names]


def _of_another_type(network: nn.Module) -> list[nn.Module]:
    """Return the layers none of whose own weights has the type that most numbers of the network have."""
    numbers: Counter[torch.dtype] = Counter()
    for weight in network.parameters():
        numbers[weight.dtype] += weight.numel()
    kinds = {layer: {weight.dtype for weight in layer.parameters(recurse=False)} for layer in network.modules()}
    ((usual, _),) = numbers.most_common(1)
    return [layer for layer, own in kinds.items() if own and usual not in own]


def is_sharded(network: nn.Module) -> bool:
    """Return whether `shard` was called on the network."""
    return isinstance(network, FSDPModule)


def waits_for_others(network: nn.Module) -> bool:
    """Return whether a forward waits for the same forward of the other processes."""
    return is_sharded(network) and network not in _gathered


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Hold the weights of a network whole in the block, where no forward waits for other processes.

    All processes must enter the block. Training in it is not possible.
    """
    if not waits_for_others(network):
        yield
        return
    units = [part for part in network.modules() if isinstance(part, FSDPModule)]
    _set_resharding(units, False)
    try:
        # So that all weights are there before the processes go their own ways.
        _read_one_token(network)
        _gathered.add(network)
        yield
    finally:
        _gathered.discard(network)
        _set_resharding(units, True)
        for unit in units:
            unit.reshard()


def set_gradient_sync(network: nn.Module, wanted: bool) -> None:
    """Say whether the coming backwards send their gradients to the processes that hold the weights."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


def largest_on_any_process(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers, where there are several."""
    if not distributed.is_available() or not distributed.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return int(found)


def whole_state(network: nn.Module) -> dict[str, Any]:
    """Return all weights on the CPU of the first process, nothing on the others; all of them must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@torch.no_grad()
def _read_one_token(network: nn.Module) -> None:
    token = torch.zeros(1, 1, dtype=torch.long, device=next(network.parameters()).device)
    if isinstance(network, Critic | TrunkCritic):
        network(token, token == 0)
    else:
        network(input_ids=token, attention_mask=token + 1)


def _set_resharding(units: Sequence[FSDPModule], wanted: bool) -> None:
    for unit in units:
        unit.set_reshard_after_forward(wanted, recurse=False)
