"""How much memory a run will need, by role, against what there is: an estimate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_lightning.functional.dtensors import local_numel
from rlhf_lightning.preflight.findings import Finding

GIB = 2**30
ADAMW_STATES = 2
ACTIVATION_BYTES = 34
"""Of a token in a layer and a dimension at 16 bits, attention matrix left out (Korthikanti et al. 2023, eq. 1)."""

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What a config must say for the work to be estimated."""


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


def role_memory(weights: Iterable[nn.Parameter], device: torch.device) -> RoleMemory:
    """Return what weights need on this process under AdamW; a frozen one has neither gradient nor state."""
    sizes = [(p, local_numel(p) * p.element_size()) for p in weights]
    trained = sum(size for p, size in sizes if p.requires_grad)
    there = sum(size for p, size in sizes if p.device == device)
    return RoleMemory(sum(size for _, size in sizes), trained, ADAMW_STATES * trained, there)


def unsaid(network: nn.Module) -> list[str]:
    """Return which of the numbers that the estimates of work need are not in a network's config."""
    config: Any = network.config
    return [name for name in SHAPE if not hasattr(config.get_text_config(), name)]


def update_bytes(network: nn.Module, *, sequences: int, length: int, logits: int, networks: int = 1) -> int:
    """Return roughly what the forward and backward of a micro-batch holds; ``logits`` positions of each row have some.

    ``networks`` bodies of equal size are in one backward.
    """
    config: Any = network.config
    text, bytes_each = config.get_text_config(), next(network.parameters()).element_size()
    per_token = ACTIVATION_BYTES * bytes_each // 2 * text.hidden_size * text.num_hidden_layers
    # The logits, and in float32 their scaled copy, its softmax and the gradient.
    per_logit = bytes_each + 3 * 4
    return sequences * (networks * length * per_token + logits * text.vocab_size * per_logit)


def score_bytes(network: nn.Module, *, sequences: int, length: int, logits: int) -> int:
    """Return roughly what a forward alone holds: one layer at a time, then the logits with two copies in float32."""
    config: Any = network.config
    text, bytes_each = config.get_text_config(), next(network.parameters()).element_size()
    layer = length * ACTIVATION_BYTES * bytes_each // 2 * text.hidden_size
    return sequences * max(layer, logits * text.vocab_size * (bytes_each + 2 * 4))


def cache_bytes(network: nn.Module, *, sequences: int, length: int) -> int:
    """Return the keys and values of a rollout while it is sampled."""
    config: Any = network.config
    text = config.get_text_config()
    # Networks with shared keys, or heads of another size, say so; the others have no such attribute.
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * sequences * length * text.num_hidden_layers * heads * width * next(network.parameters()).element_size()


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that can still be had on a device, None where that cannot be asked."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    line = next(line for line in meminfo.read_text("ascii").splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def check_memory(
    roles: Mapping[str, RoleMemory], work: Mapping[str, int], *, free: int | None, lacking: Sequence[str] = ()
) -> Finding:
    """Compare what is still needed with what is free.

    ``work`` holds what the phases need beside the networks; they follow each other, so the largest counts. Networks
    that do not fit are an error; work, which is known roughly, is a warning. Without ``work``, since ``lacking`` is not
    in a network's config, only the networks are compared.
    """
    name = "memory"
    lasting = sum(role.weights - role.there + role.gradients + role.optimizer for role in roles.values())
    phase, most = max(work.items(), key=lambda item: item[1], default=("", 0))
    parts = [f"{role} {_size(need.weights + need.gradients + need.optimizer)} ({need})" for role, need in roles.items()]
    phases = ", ".join(f"{what} about {_size(size)}" for what, size in work.items())
    working = phases if work else f"work not known, the config has no {', '.join(lacking)}"
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


def by_role_and_phase(roles: Mapping[str, RoleMemory], work: Mapping[str, int]) -> list[str]:
    """Return a line for each role, and one for what each phase needs beside them."""
    return [f"{role}: {need}" for role, need in roles.items()] + [
        f"{phase}: about {_size(size)} beside them" for phase, size in work.items()
    ]


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
