"""What a device or a strategy cannot do, said at the start with what to take instead."""

from typing import Literal, Protocol

from lightning import Trainer
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import is_quantized
from rlhf_lightning.networks.compiling import is_compiled

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
"""AdamW with its moments in 32 or in 8 bits (Dettmers et al. 2022); paged: they move to the CPU where room is short."""
SupervisedOptimizerName = Literal[OptimizerName, "muon"]
"""The same, and Muon for matrices (Jordan et al. 2024)."""
BITSANDBYTES_DEVICES = ("cpu", "cuda")

_PAGED = "paged_"


def has_same_state(one: str, other: str) -> bool:
    """Return whether an optimizer can go on from the state of another: paged or not, it is the same."""
    return one.removeprefix(_PAGED) == other.removeprefix(_PAGED)


class Trained(Protocol):
    """A module with one trained network."""

    @property
    def optimizer(self) -> SupervisedOptimizerName:
        """Which optimizer trains it."""

    shares_backbone: bool

    @property
    def network(self) -> nn.Module:
        """The network."""


def check_hardware(trainer: Trainer, module: Trained) -> None:
    """Raise `InputError` where precision, bits, optimizer, device and strategy do not go together."""
    device = trainer.strategy.root_device.type
    _check_precision(trainer)
    _check_optimizer(module.optimizer, device)
    bits = []
    if is_quantized(module.network):
        bits.append("network.quantization")
        if device not in BITSANDBYTES_DEVICES:
            raise InputError(f"network.quantization needs trainer.accelerator=cpu or gpu (CUDA), not {device}")
    if module.shares_backbone:
        bits.append("network.roles=shared")
    if module.optimizer != "adamw":
        bits.append(f"module.optimizer={module.optimizer}")
    if is_compiled(module.network):
        bits.append("network.compile")
    if bits and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"{', '.join(bits)}: {type(trainer.strategy).__name__} cuts weights into shards, which bitsandbytes, Muon, "
            "roles on one backbone and compiled blocks cannot be; use one device or trainer.strategy=ddp"
        )


def _check_precision(trainer: Trainer) -> None:
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise InputError(
            "BitsandbytesPrecision quantises every linear layer, adapters and heads too, and refuses the CPU; use "
            "network.quantization=nf4 or int8 with network.lora, on both"
        )
    if trainer.precision == "16-true":
        raise InputError(
            "trainer.precision=16-true: AdamW's eps is 0 in float16, and the weights become NaN; use 16-mixed, "
            "bf16-true or bf16-mixed"
        )


def _check_optimizer(optimizer: SupervisedOptimizerName, device: str) -> None:
    if optimizer == "paged_adamw_8bit" and device != "cuda":
        raise InputError(
            f"optimizer=paged_adamw_8bit pages between CUDA devices and the CPU, there is no {device} to page from; "
            "use optimizer=adamw_8bit"
        )
    if optimizer == "adamw_8bit" and device not in BITSANDBYTES_DEVICES:
        raise InputError(f"optimizer=adamw_8bit needs a CPU or a CUDA device, not {device}; use optimizer=adamw")
