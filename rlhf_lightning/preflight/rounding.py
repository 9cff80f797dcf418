"""Whether the weights that are trained are fine enough for the steps that they are to take."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_lightning.preflight.findings import Finding, Status

LOOKED_AT = 100_000
"""Numbers of each weight that are looked at."""

FEW = 0.1
"""Share of the numbers that may stand still at first."""


def check_rounding(trained: Mapping[nn.Module, float]) -> Finding:
    """Say how many weights in 16 bits a step of the learning rate, about AdamW's largest, leaves where they are.

    ``trained`` are networks with their learning rates. What is added to a weight is lost where it is below half of the
    distance to the next number, which is 2^-8 of the weight in bfloat16 and 2^-11 in float16 (IEEE 754, round to
    nearest).
    """
    name = "rounding of updates"
    coarse = [(p, rate) for network, rate in trained.items() for p in network.parameters() if _is_coarse(p)]
    if not coarse:
        return Finding(name, "ok", "weights that are trained have 32 bits or more")
    still = torch.cat([_stand_still(p, rate) for p, rate in coarse]).float().mean()
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rate for _, rate in coarse))
    status: Status = "warning" if still > FEW else "note"
    return Finding(
        name,
        status,
        f"{float(still):.0%} of the trained weights in {_types(coarse)} are rounded back to what they were after a "
        f"step of learning_rate={rates}",
        "train in float32: network.dtype=float32 with trainer.precision=bf16-mixed, or network=lora, whose adapter is "
        "float32 beside weights of network.dtype=bfloat16 (trainer.precision=32-true or bf16-mixed, not bf16-true)",
    )


def _is_coarse(weight: nn.Parameter) -> bool:
    return weight.requires_grad and weight.is_floating_point() and weight.element_size() == 2


def _stand_still(weight: Tensor, rate: float) -> Tensor:
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    before = own.detach().flatten()[:LOOKED_AT]
    up, down = ((before.float() + step).to(before.dtype) for step in (rate, -rate))
    return ((up == before) & (down == before)).cpu()


def _types(weights: list[tuple[nn.Parameter, float]]) -> str:
    return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p, _ in weights}))
