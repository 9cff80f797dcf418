from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf_lightning.functional.dtensors import laid_out_as, local_numel, whole


def test_a_plain_tensor_is_whole_and_laid_out_already() -> None:
    x = torch.arange(3.0)
    assert whole(x) is x
    assert laid_out_as(x, torch.zeros(3)) is x
    assert laid_out_as(x, torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert local_numel(x) == 3


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_parts_of_two_processes_make_the_whole(rows: int, processes: Callable[..., list[Any]]) -> None:
    x = torch.arange(rows * 2.0).view(rows, 2)

    def work(rank: int) -> tuple[int, Tensor, Tensor]:
        distributed.init_process_group("gloo")
        weight = distribute_tensor(torch.ones(rows, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
        moved = weight + laid_out_as(x, weight)
        return local_numel(moved), moved.to_local().clone(), whole(moved)

    found = processes(2, work)
    assert [numel for numel, _, _ in found] == [2 * ((rows + 1) // 2), 2 * (rows // 2)]
    for _, _, total in found:
        assert torch.equal(total, x + 1)
    assert torch.equal(torch.cat([part for _, part, _ in found]), x + 1)
