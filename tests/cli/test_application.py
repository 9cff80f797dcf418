import sys
from pathlib import Path

import pytest

from rlhf_lightning.cli.application import quoted, run_verb

READY = ["network.pretrained=folder", "data.path=rows.jsonl"]


def refused(verb: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed on stderr; the exit code must be 2 and there must be no traceback."""
    assert run_verb(verb, arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("module.betta=0.1", "module.betta is not a setting of `rlhf train`; did you mean module.beta?"),
        ("network.pretraned=x", "network.pretraned is not a setting of `rlhf train`; did you mean network.pretrained?"),
        ("modul=ppo", "modul is not a setting of `rlhf train`; did you mean module?"),
        ("trainer=gpuu", "trainer=gpuu is not an option; did you mean trainer=gpu?"),
        ("experiment=hh_harmles", "did you mean experiment=hh_harmless?"),
        ("module.beta", "module.beta"),
        ("trainer=null", "trainer=None is not an option (there are: cpu"),
    ],
)
def test_misspelt_override_is_an_error_that_names_the_nearest_real_key(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused("train", override, "module=ppo", *READY, capsys=capsys)


def test_key_added_with_a_plus_sign_must_exist_too(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("train", *READY, "+module.learning_rat=0.1", capsys=capsys)
    assert "module.learning_rat is not a setting" in message
    assert "did you mean module.learning_rate?" in message


def test_missing_network_is_named_with_what_to_pass(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("train", "data.path=rows.jsonl", capsys=capsys)
    assert message == (
        "network.pretrained is required (a Hugging Face folder or hub name): pass network.pretrained=VALUE\n"
    )


def test_value_of_the_wrong_type_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("train", *READY, "module.learning_rate=fast", capsys=capsys)
    assert message == "module.learning_rate must be a number, not 'fast'\n"


def test_network_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    message = refused("train", "network.pretrained=./nowhere", "data.path=rows.jsonl", capsys=capsys)
    assert "network.pretrained='./nowhere'" in message


def test_output_directory_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a_file").write_text("")
    message = refused("train", *READY, "output_dir=a_file/run", capsys=capsys)
    assert "output_dir" in message
    assert "a_file/run" in message


def test_checkpoint_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ckpt_path=last" in refused("train", *READY, "ckpt_path=last", "output_dir=new", capsys=capsys)
    assert "ckpt_path=x.ckpt does not exist" in refused("train", *READY, "ckpt_path=x.ckpt", capsys=capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1 must be a whole number from 0 to 4294967295"),
        ("module.learning_rate=${data.nothing}", "module.learning_rate: the config cannot be resolved: Interpolation"),
        ("data.path=${oc.env:NOT_SET_ANYWHERE}", "data.path: the config cannot be resolved: KeyError"),
        # It can be resolved: what is missing is the folder.
        ("module.warmup_steps=${data.batch_size}", "network.pretrained='folder' cannot be loaded"),
    ],
)
def test_an_override_that_leads_nowhere_is_named(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused("train", *READY, override, capsys=capsys)


def test_flags_may_stand_behind_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("train", ["module=ppo", "--cfg", "job", "module.beta=0.5"]) == 0
    assert "beta: 0.5" in capsys.readouterr().out


def test_users_configs_stand_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path("my_configs/experiment")
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /module: ppo\nseed: 77\n")
    for more in (["--config-dir", "my_configs"], ["hydra.searchpath=[file://my_configs]"]):
        assert run_verb("train", [*more, "experiment=mine", "--cfg", "job"]) == 0
        shown = capsys.readouterr().out
        assert "seed: 77" in shown
        assert "PPODataModule" in shown  # the data follow the module that the experiment chose
    assert "did you mean experiment=mine?" in refused(
        "train", "--config-dir", "my_configs", "experiment=min", capsys=capsys
    )


def test_error_that_is_not_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf_lightning.cli.train

    def broken(config: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(rlhf_lightning.cli.train, "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        run_verb("train", READY)


def test_quoted_values_survive_hydras_grammar() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for value in ("/plain/path", "with space", "it's", "a=b,c", "back\\slash", "${x}"):
        override = OverridesParser.create().parse_override(f"output_dir={quoted(value)}")
        assert override.value() == value
