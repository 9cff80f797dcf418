"""The random states of one process, as plain data that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators, of those on ``device`` too."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    # An array would need unpickling.
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from what `random_state` returned."""
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
