import sys

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.cli.interrupts import NOTHING_KEPT, Stopped, resumable, this_command
from rlhf_lightning.errors import NotResumable


def test_error_that_is_not_the_users_carries_the_hint_below_its_traceback() -> None:
    with pytest.raises(MemoryError) as error, resumable(lambda: "the last checkpoint is here"):
        raise MemoryError
    assert error.value.__notes__ == ["the last checkpoint is here"]


def test_interrupts_of_every_kind_carry_the_hint() -> None:
    def by_lightning() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(Stopped) as stop, resumable(lambda: "kept"):
        by_lightning()
    assert (stop.value.hint, stop.value.exit_code) == ("kept", 130)
    with pytest.raises(SystemExit), resumable(lambda: "kept"):
        sys.exit(3)


def test_command_to_go_on_replaces_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/rlhf", "train", "ckpt_path=old.ckpt", "a=b c"])
    assert this_command("ckpt_path=last") == "rlhf train 'a=b c' ckpt_path=last"


def test_where_nothing_was_kept_a_stop_says_so_and_an_error_is_left_as_it_is() -> None:
    with pytest.raises(Stopped, match=NOTHING_KEPT), resumable(lambda: None):
        raise KeyboardInterrupt
    with pytest.raises(MemoryError) as error, resumable(lambda: None):
        raise MemoryError
    assert not hasattr(error.value, "__notes__")


def test_no_way_to_go_on_is_named_where_the_same_command_would_be_refused() -> None:
    with pytest.raises(NotResumable) as error, resumable(lambda: "kept"):
        raise NotResumable("other settings")
    assert not hasattr(error.value, "__notes__")


def test_the_inner_hint_has_the_last_word() -> None:
    with pytest.raises(Stopped, match="inner"), resumable(lambda: "outer"), resumable(lambda: "inner"):
        raise KeyboardInterrupt


def test_a_process_that_lightning_started_leaves_the_exit_code_to_the_first_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def terminated() -> int:
        with pytest.raises((Stopped, SystemExit)) as stop, resumable(lambda: "kept"):
            raise SIGTERMException
        return stop.value.exit_code if isinstance(stop.value, Stopped) else int(stop.value.code)

    assert terminated() == 143
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert terminated() == 143
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert terminated() == 0
