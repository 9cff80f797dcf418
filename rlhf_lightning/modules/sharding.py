"""Lightning's strategies for models of which no device holds all: FSDP2, FSDP, DeepSpeed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.sharded_checkpoint import is_sharded_checkpoint, load_sharded
from rlhf_lightning.networks.sharding import gathered, is_sharded, largest_on_any_process, under, whole_state
from rlhf_lightning.preflight.memory import cache_bytes, free_bytes

Gathering = Literal["auto", "always", "never"]
"""Whether sharded weights are gathered for a rollout: where they fit, always, never."""

SPARE = 2
"""How many times gathered weights and cache must fit into the free memory: what else a step needs is not known."""


class FSDP2Strategy(ModelParallelStrategy):
    """Shards every network over all processes of all nodes, each of which reads its own rows (FSDP2).

    Lightning's `ModelParallelStrategy` does that only where ``data_parallel_size`` is given as the number of processes;
    by default it is one for tensor parallelism, whose processes read the same rows.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        """Take how checkpoints are written: each process its part into a folder, or the first one all into a file."""
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """Count the processes, then meet them."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file, or a folder that any number of processes wrote; of a folder nothing is unpickled."""
        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded_checkpoint(path):
            return super().load_checkpoint(path, weights_only=weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        optimizers = {f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return load_sharded(path, self.model, optimizers, strict=self.lightning_module.strict_loading)


def check_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the data-parallel part of a mesh; raises `InputError` where there is another one."""
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise InputError(
            f"ModelParallelStrategy(tensor_parallel_size={size}): networks are sharded, not cut into parts for tensor "
            f"parallelism; use trainer=fsdp2, or ModelParallelStrategy(data_parallel_size={mesh.size()}, "
            "tensor_parallel_size=1)"
        )
    return mesh["data_parallel"]


@contextmanager
def gathered_where_wanted(
    wanted: Gathering, networks: Sequence[nn.Module], *, tokens: int, device: torch.device
) -> Iterator[bool]:
    """Hold the networks whole in the block where that is wanted, and with "auto" where they fit on every process.

    Says whether they are whole.

    ``tokens`` are those of all sequences in the cache of the first network meanwhile. Networks that are not sharded are
    whole anyway.
    """
    networks = [network for network in networks if is_sharded(network)]
    if networks and (wanted == "never" or (wanted == "auto" and not _fit(networks, tokens, device))):
        yield False
        return
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(gathered(network))
        yield True


def _fit(networks: Sequence[nn.Module], tokens: int, device: torch.device) -> bool:
    free = free_bytes(device)
    needed = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    needed += cache_bytes(networks[0], sequences=1, length=tokens) if tokens else 0
    short = free is not None and free < SPARE * needed
    # Either all processes gather, or none.
    return largest_on_any_process(int(short), device) == 0


def shards_weights(strategy: Strategy) -> bool:
    """Return whether no process holds all weights under a strategy."""
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def callable_outside_of_steps(module: LightningModule) -> nn.Module:
    """Return what a hook calls for the module's forward: some strategies gather weights only in their own model."""
    strategy = module.trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        assert strategy.model is not None
        return strategy.model
    return module


@contextmanager
def writable(module: LightningModule, part: nn.Module) -> Iterator[None]:
    """Hold the weights of a part of the module where a block may change them, alike on all processes."""
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        with FullyShardedDataParallel.summon_full_params(callable_outside_of_steps(module), writeback=True):
            yield
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from deepspeed import zero

        with zero.GatheredParameters(list(part.parameters()), modifier_rank=0):
            yield
    else:
        yield


def gathered_state(module: LightningModule, network: nn.Module) -> dict[str, Any] | None:
    """Return the weights of a network of the module where no process holds all: whole on the first, empty on others.

    None where every process holds the network, which can then be written as it is. All processes must call.
    """
    if is_sharded(network):
        return whole_state(network)
    strategy = None if module._trainer is None else module.trainer.strategy
    if isinstance(strategy, FSDPStrategy) and strategy.model is not None:
        return under(f"{name_of(network, module)}.", whole_state(strategy.model))
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        return gathered_from_deepspeed(network, first=strategy.is_global_zero)
    return None


def gathered_from_deepspeed(network: nn.Module, *, first: bool) -> dict[str, Any]:
    """Return what ZeRO 3 has spread: whole where ``first``, empty elsewhere."""
    from deepspeed import zero

    with zero.GatheredParameters(list(network.parameters())):
        return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()} if first else {}


def name_of(network: nn.Module, module: nn.Module) -> str:
    """Return the path of a network in a module."""
    names: Iterator[str] = (name for name, part in module.named_modules() if part is network)
    return next(names)
