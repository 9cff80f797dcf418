import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from rlhf_lightning.callbacks.checkpoint_file import LAST_OF_FOLDER
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.sharded_checkpoint import is_sharded_checkpoint, load_sharded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled.*"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated.*"),
]


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


class Trained(nn.Linear):
    """A network with an optimizer that has made a step."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(3, 2)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        self(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in parts."""
    network = Trained(0)
    write(tmp_path / "it.ckpt", network, network.optimizer.state_dict()["param_groups"][0]["lr"])
    return tmp_path / "it.ckpt"


def write(folder: Path, network: Trained, lr: object) -> None:
    names = [name for name, _ in network.named_parameters()]
    states = network.optimizer.state.values()
    optimizer = {
        "state": {name: dict(state) for name, state in zip(names, states, strict=True)},
        "param_groups": [{**network.optimizer.param_groups[0], "params": names, "lr": lr}],
    }
    save({"state_dict": network.state_dict(), "optimizer": optimizer}, checkpoint_id=folder)
    torch.save({"epoch": 3}, folder / LAST_OF_FOLDER)


def test_weights_optimizer_and_all_else_are_loaded(folder: Path) -> None:
    assert is_sharded_checkpoint(folder)
    expected, network = Trained(0), Trained(1)
    network.optimizer.param_groups[0]["lr"] = 0.5
    assert load_sharded(folder, network, {"optimizer": network.optimizer}, strict=True) == {"epoch": 3}
    assert all(map(torch.equal, network.state_dict().values(), expected.state_dict().values()))
    assert network.optimizer.param_groups[0]["lr"] == 0.1
    for one, other in zip(network.optimizer.state.values(), expected.optimizer.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])


def test_a_folder_with_a_part_cut_off_is_an_input_error(folder: Path) -> None:
    (part,) = folder.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(InputError, match=r"it\.ckpt cannot be loaded"):
        load_sharded(folder, Trained(1), {}, strict=True)


def test_a_file_is_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    assert not is_sharded_checkpoint(tmp_path / "a.ckpt")
    assert not is_sharded_checkpoint(tmp_path)


def test_a_list_of_parts_that_would_run_something_is_refused(folder: Path, tmp_path: Path) -> None:
    ran, network = tmp_path / "ran", Trained(1)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(ran)))
    with pytest.raises(InputError, match=r"names posix\.mkdir, which no checkpoint holds"):
        load_sharded(folder, network, {}, strict=True)
    assert not ran.exists()


def test_a_name_with_a_dot_leads_nowhere(folder: Path) -> None:
    inner = b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\x09os.system\x93."
    (folder / ".metadata").write_bytes(inner)
    with pytest.raises(InputError, match=r"os\.system, which no checkpoint holds"):
        load_sharded(folder, Trained(1), {}, strict=True)


def test_an_object_in_place_of_a_number_is_refused(tmp_path: Path) -> None:
    ran, network = tmp_path / "ran", Trained(0)
    write(tmp_path / "it.ckpt", network, Runs(ran))
    with pytest.raises(InputError, match=r"cannot be loaded: UnpicklingError: Weights only load failed"):
        load_sharded(tmp_path / "it.ckpt", network, {"optimizer": network.optimizer}, strict=True)
    assert not ran.exists()
