import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_lightning.cli.main import VERBS, main, usage

# In a process of its own: other tests of the session have imported torch long ago.
RUN_AND_LIST_IMPORTS = """
import sys
from rlhf_lightning.cli.main import main
try:
    main(sys.argv[1:])
finally:
    slow = {"torch", "lightning", "transformers", "hydra"} & set(sys.modules)
    print("imported:", *sorted(slow))
"""


def rlhf(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_IMPORTS, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def seconds(*arguments: str, cwd: Path) -> float:
    """Return the shortest of three runs: the machine may be busy, the command is not."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        rlhf(*arguments, cwd=cwd)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_and_imports_nothing_slow(arguments: list[str], tmp_path: Path) -> None:
    result = rlhf(*arguments, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(usage())
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    assert result.stdout.rstrip().endswith("imported:")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_settings_of_a_verb_are_shown_without_torch(verb: str, flags: list[str], tmp_path: Path) -> None:
    result = rlhf(verb, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed: 1" in result.stdout
    assert result.stdout.rstrip().endswith("imported: hydra")
    assert list(tmp_path.iterdir()) == []


def test_help_says_where_the_settings_of_other_modules_and_the_meanings_are(tmp_path: Path) -> None:
    said = " ".join(rlhf("train", "--help", cwd=tmp_path).stdout.split())
    assert "PPO's are shown by rlhf train module=ppo --help" in said
    assert "meaning and unit stand in that file, below conf/" in said
    assert "beta: 0.05" in rlhf("train", "module=ppo", "--help", cwd=tmp_path).stdout


def test_help_answers_within_half_a_second(tmp_path: Path) -> None:
    assert seconds("--help", cwd=tmp_path) < 0.5


def test_help_of_a_verb_answers_within_two_seconds(tmp_path: Path) -> None:
    assert seconds("train", "--help", cwd=tmp_path) < 2.0


def test_misspelt_verb_is_an_error_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["trian"])
    assert exit_.value.code == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_names_of_the_package_are_imported_at_their_first_use() -> None:
    code = (
        "import sys, rlhf_lightning as r; assert 'torch' not in sys.modules; r.NetworkConfig; print(sorted(r.__all__))"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert "PPOModule" in result.stdout
