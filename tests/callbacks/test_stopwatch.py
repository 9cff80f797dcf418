import time

import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

from rlhf_lightning.callbacks.stopwatch import OF_LIGHTNING, Stopwatch, now, seconds_between

CPU = torch.device("cpu")
FETCH, TRAIN = OF_LIGHTNING


def wait(seconds: float) -> None:
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        pass


def test_a_step_its_phases_and_the_wait_before_it_are_measured_until_they_are_read() -> None:
    profiler = PassThroughProfiler()
    stopwatch = Stopwatch(profiler, ["sampling", "updating"], CPU)
    for _ in range(2):
        with profiler.profile(FETCH):
            wait(0.005)
        with profiler.profile(TRAIN):
            with profiler.profile("sampling"):
                wait(0.01)
            with profiler.profile("updating"), profiler.profile("optimizer_step"):
                wait(0.02)
    found = stopwatch.read()
    assert list(found) == ["waiting", "step", "sampling", "updating"]
    assert all(seconds >= least for seconds, least in zip(found.values(), [0.01, 0.06, 0.02, 0.04], strict=True))
    assert found["sampling"] + found["updating"] <= found["step"]
    assert set(stopwatch.read().values()) == {0.0}


def test_phases_outside_of_a_step_do_not_count() -> None:
    profiler = PassThroughProfiler()
    stopwatch = Stopwatch(profiler, ["sampling"], CPU)
    with profiler.profile("run_validation"), profiler.profile("sampling"):
        wait(0.001)
    assert stopwatch.read()["sampling"] == 0


def test_a_step_that_fails_is_over() -> None:
    profiler = PassThroughProfiler()
    stopwatch = Stopwatch(profiler, ["sampling"], CPU)
    with pytest.raises(ZeroDivisionError), profiler.profile(TRAIN):
        raise ZeroDivisionError
    with profiler.profile("sampling"):
        wait(0.001)
    assert stopwatch.read()["sampling"] == 0


def test_the_users_profiler_hears_what_it_would_hear_and_is_left_as_it_was() -> None:
    profiler = SimpleProfiler()
    stopwatch = Stopwatch(profiler, ["sampling"], CPU)
    with profiler.profile(TRAIN), profiler.profile("sampling"):
        pass
    stopwatch.close()
    with profiler.profile(TRAIN):
        pass
    assert {name: len(durations) for name, durations in profiler.recorded_durations.items()} == {
        TRAIN: 2,
        "sampling": 1,
    }
    assert stopwatch.read()["step"] < sum(profiler.recorded_durations[TRAIN])
    assert not {"start", "stop"} & set(vars(profiler))
    # Another one may listen after it.
    again = Stopwatch(profiler, [], CPU)
    with profiler.profile(TRAIN):
        wait(0.001)
    assert again.read()["step"] >= 0.001


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_device_is_measured_and_not_waited_for() -> None:
    device = torch.device("cuda")
    one = torch.randn(8192, 8192, device=device)
    one @ one
    torch.cuda.synchronize()
    start = time.perf_counter()
    begun = now(device)
    for _ in range(20):
        one @ one
    ended = now(device)
    given = time.perf_counter() - start
    torch.cuda.synchronize()
    assert seconds_between(begun, ended) == pytest.approx(time.perf_counter() - start, rel=0.1)
    assert given < seconds_between(begun, ended) / 2
