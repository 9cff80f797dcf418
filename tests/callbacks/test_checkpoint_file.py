import logging
import os
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.callbacks import AtomicCheckpointIO, newest_whole
from rlhf_lightning.callbacks.checkpoint_file import fault
from rlhf_lightning.errors import InputError

STATE = {"weights": torch.arange(5000.0), "counters": {"step": 3, "names": ("a", None)}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-3.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


def test_what_was_written_is_whole_and_read_as_it_was(path: Path) -> None:
    assert fault(path) is None
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(found["weights"], STATE["weights"])
    assert found["counters"] == STATE["counters"]
    assert [file.name for file in path.parent.iterdir()] == ["step-3.ckpt"]


def test_a_torn_file_is_recognised_wherever_it_was_torn(path: Path) -> None:
    content = path.read_bytes()
    for length in [0, 1, 100, *random.Random(0).sample(range(len(content)), 30), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "torn" in str(fault(path))


def test_a_changed_bit_that_torch_reads_without_a_word_is_recognised(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.find(torch.tensor(1234.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], STATE["weights"])
    assert "corrupted: the checksum of" in str(fault(path))


def test_no_changed_bit_is_more_than_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "small.ckpt"
    torch.save({"weights": torch.arange(3.0)}, path)
    content = path.read_bytes()
    found = []
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        found.append(fault(path))
    # A bit of a date or of what fills up a record changes nothing.
    assert {None} < set(found)
    for reason in ("encrypted", "codec can't decode", "decompressing", "compression", "checksum"):
        assert any(reason in str(one) for one in found), reason


def test_a_folder_of_shards_is_whole_when_its_last_file_is(tmp_path: Path) -> None:
    folder = tmp_path / "step-3.ckpt"
    folder.mkdir()
    assert "meta.pt, which is written last, is not there" in str(fault(folder))
    torch.save({"epoch": 1}, folder / "meta.pt")
    assert fault(folder) is None


def test_the_newest_whole_one_is_found_and_the_others_are_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torn, junk = path.with_name("step-4.ckpt"), path.with_name("step-5.ckpt")
    torn.write_bytes(path.read_bytes()[:1000])
    junk.write_text("no checkpoint")
    for seconds, file in enumerate((path, torn, junk)):
        os.utime(file, (seconds, seconds))
    path.with_name("last.ckpt").symlink_to("nowhere")
    path.with_name("step-6.ckpt.partial").touch()
    with caplog.at_level(logging.WARNING):
        assert newest_whole(path.parent) == path
    assert f"{torn} is passed over: torn" in caplog.text
    assert f"{junk} is passed over" in caplog.text
    os.utime(junk, (0, 0))
    assert newest_whole(path.parent / "nowhere") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_leaves_what_was_there_whole_and_nothing_else(path: Path) -> None:
    path.with_name("step-3.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({**STATE, "weights": torch.ones(5000)}, path)
    assert [file.name for file in path.parent.iterdir()] == ["step-3.ckpt"]
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["weights"], STATE["weights"])


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return (Path.touch, (self.victim,))


def test_ctrl_c_in_the_middle_of_writing_takes_effect_behind_it(path: Path) -> None:
    stopped = 0
    old = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    # A suite that was started in the background ignores SIGINT.
    old_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for delay in random.Random(0).choices(range(20, 2000), k=300):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay * 1e-6)
                AtomicCheckpointIO().save_checkpoint(STATE, path)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                stopped += 1
            assert fault(path) is None
    finally:
        signal.signal(signal.SIGALRM, old)
        signal.signal(signal.SIGINT, old_int)
    assert stopped > 100
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_ctrl_c_while_an_old_file_is_deleted_is_not_lost(
    scheme: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = os.stat

    def interrupted(*arguments: Any, **named: Any) -> os.stat_result:
        monkeypatch.setattr(os, "stat", look_up)
        signal.raise_signal(signal.SIGINT)
        return look_up(*arguments, **named)

    # A suite that was started in the background ignores SIGINT.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(os, "stat", interrupted)
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().remove_checkpoint(f"{scheme}{path}")
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_and_folders_are_deleted_and_what_is_not_there_is_no_error(scheme: str, path: Path) -> None:
    for target in (path, path, path.parent):
        AtomicCheckpointIO().remove_checkpoint(f"{scheme}{target}")
        assert not target.exists()


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_refused_and_runs_nothing(save: str, tmp_path: Path) -> None:
    path, victim = tmp_path / "evil.ckpt", tmp_path / "victim"
    if save == "torch":
        torch.save({"state_dict": Malicious(victim)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(victim), protocol=2))
    for weights_only in (None, True, False):
        with pytest.raises(InputError, match="nothing of it was run"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim), protocol=2))
    assert victim.exists()
