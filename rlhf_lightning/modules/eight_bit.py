"""AdamW with moments in 8 bits, by `bitsandbytes`."""

from collections.abc import Iterable
from typing import Any

from bitsandbytes.optim.optimizer import Optimizer2State
from torch import nn


class AdamW8bit(Optimizer2State):  # type: ignore[misc]
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022), 32-bit ones for some and for small weights."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        in_32_bits: Iterable[nn.Parameter],
        *,
        is_paged: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameter groups; the weights ``in_32_bits`` that are not among them do not matter."""
        super().__init__("adam", groups, lr, betas, eps, weight_decay, optim_bits=8, is_paged=is_paged)
        self._in_32_bits = {id(weight) for weight in in_32_bits}

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of one weight."""
        # Not the library's global table of exceptions: it goes by ids of objects that may be gone.
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        if id(self.param_groups[gindex]["params"][pindex]) in self._in_32_bits:
            config["optim_bits"] = 32
        return config
