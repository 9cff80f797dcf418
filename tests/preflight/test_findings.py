import random

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.preflight import Finding, of_status, refusal, untouched

FINDINGS = [
    Finding("fine", "ok", "0"),
    Finding("pad token", "error", "it is the end token", "name another"),
    Finding("length", "warning", "3 rows"),
]


def test_a_finding_is_one_line() -> None:
    assert str(FINDINGS[1]) == "pad token: it is the end token -> name another"
    assert str(FINDINGS[2]) == "length: 3 rows"


def test_the_refusal_lists_the_errors_alone_and_how_to_turn_it_off() -> None:
    error = refusal([FINDINGS], off="preflight=false turns this off")
    assert isinstance(error, InputError)
    lines = str(error).splitlines()
    assert lines[1:] == ["  pad token: it is the end token -> name another", "preflight=false turns this off"]
    assert of_status(FINDINGS, "warning") == [FINDINGS[2]]


def test_the_refusal_says_on_which_ranks_an_error_was_found_unless_on_all() -> None:
    both, one = FINDINGS[1], Finding("KL to the reference", "error", "0.3 nats")
    lines = str(refusal([[both], [one, both], [both, one]], off="off")).splitlines()
    assert lines == [
        "preflight found 2 error(s) before the first update:",
        "  pad token: it is the end token -> name another",
        "  on rank 1, 2: KL to the reference: 0.3 nats",
        "off",
    ]


def test_modes_and_random_states_are_as_before_also_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2))).eval()
    network[1].train()

    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    with pytest.raises(KeyError), untouched(network.modules(), torch.device("cpu")):  # noqa: PT012
        draws()
        network.train()
        assert not torch.is_grad_enabled()
        raise KeyError
    assert draws() == expected
    assert [part.training for part in network.modules()] == [False, False, True, True]
