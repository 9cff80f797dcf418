import random
from pathlib import Path

import numpy as np
import torch

from rlhf_lightning.random_states import random_state, set_random_state

CPU = torch.device("cpu")


def draws() -> list[float]:
    # One normal of each: those of Python and NumPy are drawn in pairs, of which one half waits.
    return [random.gauss(0, 1), float(np.random.normal()), float(torch.randn(())), random.random()]


def test_every_generator_goes_on_where_it_was_after_a_way_through_a_file(tmp_path: Path) -> None:
    draws()
    torch.save(random_state(CPU), tmp_path / "state.pt")
    first = draws()
    second = draws()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert draws() == first
    assert draws() == second
    assert not set(first) & set(second)
