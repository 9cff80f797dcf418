"""How much memory a run will need, by role, against what there is: an estimate."""

import math
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlhf_lightning.functional.dtensors import local_numel
from rlhf_lightning.functional.muon import by_kind
from rlhf_lightning.networks.configs import heads_of
from rlhf_lightning.preflight.allocations import PhaseMemory
from rlhf_lightning.preflight.findings import Finding

GIB = 2**30
ADAMW_STATES = 2
SMALLEST_IN_8_BITS = 4096
BLOCK_IN_8_BITS = 256
"""Numbers that share a scale of 4 bytes, in each of AdamW's states; a weight with fewer numbers than the smallest stays
in 32 bits (`bitsandbytes`)."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one network."""

    weights: int
    gradients: int
    optimizer: int
    there: int
    """Of the weights: on the device already."""

    def __str__(self) -> str:
        """Return what each part needs."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        return ", ".join(f"{part} {_size(size)}" for part, size in parts.items())


@dataclass(frozen=True)
class Estimate:
    """What a run needs by role, and by phase beside the roles."""

    roles: Mapping[str, RoleMemory]
    work: Mapping[str, PhaseMemory]
    """Empty where it is not known."""
    unknown: str = ""
    """Why it is not known."""

    @property
    def lasting(self) -> int:
        """Bytes that are still needed for weights, gradients and optimizer."""
        return sum(role.weights - role.there + role.gradients + role.optimizer for role in self.roles.values())

    @property
    def needed(self) -> int | None:
        """Bytes that are still needed in all, None where the work is not known."""
        return self.lasting + max(need.total for need in self.work.values()) if self.work else None

    @property
    def peak(self) -> int:
        """Bytes of the run at its peak, weights that are there already included."""
        there = sum(role.there for role in self.roles.values())
        return there + self.lasting + max((need.total for need in self.work.values()), default=0)


def role_memory(
    weights: Iterable[nn.Parameter],
    device: torch.device,
    *,
    optimizer: str = "adamw",
    special: Iterable[nn.Parameter] = (),
) -> RoleMemory:
    """Return what weights need on this process; a frozen one has neither gradient nor state.

    The ``special`` ones, embeddings and heads, have the states of AdamW in 32 bits under each optimizer.
    """
    held, special = list(weights), list(special)
    trained = [weight for weight in held if weight.requires_grad]
    return RoleMemory(
        weights=sum(map(_size_of, held)),
        gradients=sum(map(_size_of, trained)),
        optimizer=_states(trained, optimizer, special),
        there=sum(_size_of(p) for p in held if p.device == device),
    )


def cache_bytes(network: nn.Module, *, sequences: int, length: int) -> int:
    """Return the keys and values of a rollout while it is sampled."""
    of_a_token = 2 * sum(heads.of_keys * heads.width for heads in heads_of(network))
    return sequences * length * of_a_token * next(network.parameters()).element_size()


def cublas_bytes(device: torch.device, *, workspaces: int) -> int:
    """Return what cuBLAS works in on a CUDA device: torch gives it so much for each thread and stream."""
    if device.type != "cuda":
        return 0
    is_hopper_or_later = torch.cuda.get_device_capability(device) >= (9, 0)
    return workspaces * (2**25 if is_hopper_or_later else 2**23 + 2**17)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that can still be had on a device, None where that cannot be asked.

    On a CPU no more than the process may take (`ulimit -v`).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    available = _kib(meminfo, "MemAvailable:")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return available
    return min(available, max(0, limit - _kib(Path("/proc/self/status"), "VmSize:")))


def check_memory(estimate: Estimate, *, free: int | None) -> Finding:
    """Compare what is still needed with what is free.

    The phases follow each other, so the largest counts. Networks that do not fit are an error; work, which shares the
    memory with what others allocate, is a warning.
    """
    name = "memory"
    roles, work = estimate.roles, estimate.work
    lasting = estimate.lasting
    phase, most = max(((what, need.total) for what, need in work.items()), key=lambda item: item[1], default=("", 0))
    parts = [f"{role} {_size(need.weights + need.gradients + need.optimizer)} ({need})" for role, need in roles.items()]
    phases = ", ".join(f"{what} {_size(need.total)} ({_parts(need)})" for what, need in work.items())
    working = phases if work else f"work not known: {estimate.unknown}"
    measured = f"estimate: {', '.join(parts)}; {working}; still needed {_size(lasting + most)}"
    if free is None:
        return Finding(name, "note", f"{measured}; how much is free is not known on this device")
    measured = f"{measured}, free {_size(free)}"
    if lasting + most <= free:
        return Finding(name, "ok" if work else "note", measured)
    smaller = "a smaller network, network=lora with network.dtype=bfloat16, or a larger device"
    if lasting > free:
        return Finding(name, "error", f"{measured}: weights, gradients and optimizer do not fit", smaller)
    return Finding(name, "warning", f"{measured}: {phase} may not fit", f"smaller batches of {phase}; {smaller}")


def by_role_and_phase(estimate: Estimate) -> list[str]:
    """Return a line for each role, and one for what each phase needs beside them."""
    lines = [f"{role}: {need}" for role, need in estimate.roles.items()]
    lines += [f"{phase}: {_size(need.total)} beside them ({_parts(need)})" for phase, need in estimate.work.items()]
    return lines if estimate.work else [*lines, f"work: not known, {estimate.unknown}"]


def _kib(table: Path, name: str) -> int:
    line = next(line for line in table.read_text("utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _size_of(weight: nn.Parameter) -> int:
    return local_numel(weight) * weight.element_size()


def _states(trained: Iterable[nn.Parameter], optimizer: str, special: Iterable[nn.Parameter]) -> int:
    if optimizer == "adamw":
        return ADAMW_STATES * sum(map(_size_of, trained))
    if optimizer == "muon":
        matrices, others = by_kind(trained, special)
        return sum(map(_size_of, matrices)) + ADAMW_STATES * sum(map(_size_of, others))
    in_32 = {id(weight) for weight in special}
    return sum(_states_in_8_bits(weight, in_32=id(weight) in in_32) for weight in trained)


def _states_in_8_bits(weight: nn.Parameter, *, in_32: bool) -> int:
    numbers = local_numel(weight)
    if in_32 or numbers < SMALLEST_IN_8_BITS:
        return ADAMW_STATES * 4 * numbers
    return ADAMW_STATES * (numbers + 4 * math.ceil(numbers / BLOCK_IN_8_BITS))


def _parts(need: PhaseMemory) -> str:
    parts = {
        "activations": need.activations,
        "logits": need.logits,
        "cache": need.cache,
        "kept by sampling": need.kept,
        "libraries": need.libraries,
    }
    return ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
