from pathlib import Path

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.batch_file import read_records, write_records
from rlhf_lightning.types import Experience, SFTBatch


def test_records_come_back_as_they_were_in_their_order(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False]])
    texts = SFTBatch(tokens=torch.tensor([[3, 4]]), attention_mask=mask, loss_mask=mask)
    numbers = torch.tensor([[torch.nan, 1.0]])
    experience = Experience(
        tokens=torch.tensor([[5, 6]]),
        attention_mask=mask,
        response_starts=torch.tensor([1]),
        response_mask=mask,
        value_mask=mask,
        # Two fields may share their memory, and a field may be a view.
        **dict.fromkeys(("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages"), numbers),
        returns=torch.arange(4.0).reshape(2, 2).T[:1],
    )
    write_records([experience, texts], tmp_path / "new" / "a.safetensors", {"update": "7"})
    records, notes = read_records(tmp_path / "new" / "a.safetensors")
    assert notes == {"update": "7"}
    assert [type(record) for record in records] == [Experience, SFTBatch]
    for written, read in zip([experience, texts], records, strict=True):
        for name, tensor in vars(written).items():
            torch.testing.assert_close(vars(read)[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_another_file_is_refused_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "pickled.safetensors")
    save_file({"0.tokens": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"0.tokens": torch.zeros(1)}, tmp_path / "short.safetensors", {"records": '["SFTBatch"]'})
    for name in ("pickled", "other", "short", "missing"):
        with pytest.raises(InputError, match=rf"replay=.*{name}\.safetensors is no file that a skipped update left"):
            read_records(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "ran").exists()
