"""The environment pool: order, failures, deadlines, abandoned threads, interruption, exit."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from lit_agentrl.envs.pool import EnvironmentFailure, EnvironmentPool
from lit_agentrl.errors import UserError
from lit_agentrl.types import StopReason


def wait_until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def release():
    """An event that calls hang on, set at the end so that no test leaves a thread behind."""
    event = threading.Event()
    yield event
    event.set()


def test_results_come_in_the_order_of_the_calls():
    pool = EnvironmentPool(num_workers=4, deadline_seconds=10)
    delays = [0.08, 0.0, 0.04, 0.02, 0.0, 0.06]
    results = pool.call([lambda i=i, d=d: (time.sleep(d), i)[1] for i, d in enumerate(delays)])
    assert results == list(range(6))
    assert pool.call([]) == []


def test_calls_run_side_by_side():
    """All four meet at the barrier, which only threads that run at the same time can."""
    barrier = threading.Barrier(4)
    pool = EnvironmentPool(num_workers=4, deadline_seconds=5)
    assert sorted(pool.call([barrier.wait] * 4)) == [0, 1, 2, 3]


def test_no_more_than_num_workers_run_at_a_time():
    lock, running, most = threading.Lock(), 0, 0

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    EnvironmentPool(num_workers=3).call([call] * 12)
    assert most == 3


def test_an_environment_that_raises_fails_alone():
    def broken():
        raise KeyError("no such room")

    def leaves():
        raise SystemExit(3)

    pool = EnvironmentPool(num_workers=1, deadline_seconds=5)
    first, error, exit_, last = pool.call([lambda: 1, broken, leaves, lambda: 2])
    assert (first, last) == (1, 2)
    assert error.reason is StopReason.ENV_ERROR
    assert error.message.startswith("KeyError: 'no such room'")
    assert "test_pool.py" in error.message
    assert exit_.reason is StopReason.ENV_ERROR
    assert pool.num_leaked == 0


def test_an_environment_that_hangs_times_out_and_is_replaced(release):
    pool = EnvironmentPool(num_workers=2, deadline_seconds=0.2)
    began = time.monotonic()
    results = pool.call([release.wait, lambda: 1, release.wait, lambda: 2])
    assert time.monotonic() - began < 2
    assert [results[1], results[3]] == [1, 2]
    for failure in (results[0], results[2]):
        assert isinstance(failure, EnvironmentFailure)
        assert failure.reason is StopReason.ENV_TIMEOUT
        assert "0.2 s" in failure.message
        assert failure.seconds >= 0.2
    assert pool.num_leaked == 2

    barrier = threading.Barrier(2)
    assert sorted(pool.call([barrier.wait] * 2)) == [0, 1], "the pool shrank"


def test_more_hangs_than_threads_each_get_their_own_deadline(release):
    """The deadline runs from when a call starts, so a call that waits for a thread is not blamed for the wait."""
    pool = EnvironmentPool(num_workers=1, deadline_seconds=0.1)
    results = pool.call([release.wait, release.wait, lambda: "played"])
    assert [getattr(r, "reason", r) for r in results] == [StopReason.ENV_TIMEOUT, StopReason.ENV_TIMEOUT, "played"]


def test_a_late_answer_is_dropped_and_its_thread_ends(release):
    threads = []

    def hang() -> None:
        threads.append(threading.current_thread())
        release.wait()

    pool = EnvironmentPool(num_workers=1, deadline_seconds=0.1)
    (failure,) = pool.call([hang])
    assert failure.reason is StopReason.ENV_TIMEOUT
    assert threads[0].is_alive()
    release.set()
    threads[0].join(5)
    assert not threads[0].is_alive()
    assert pool.call([lambda: "next"]) == ["next"]


def test_no_deadline_waits(release):
    threading.Timer(0.2, release.set).start()
    assert EnvironmentPool(1, deadline_seconds=None).call([release.wait]) == [True]


def test_close_ends_the_threads_and_the_pool_can_go_on():
    before = set(threading.enumerate())
    pool = EnvironmentPool(num_workers=3)
    pool.call([lambda: 0])
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    pool.close()
    assert pool.call([lambda: 1] * 5) == [1] * 5
    pool.close()
    assert wait_until(lambda: not set(threading.enumerate()) - before)


def test_idle_threads_keep_no_environment_alive():
    class Held:
        def play(self) -> None: ...

    held = Held()
    pool, gone = EnvironmentPool(1), weakref.ref(held)
    pool.call([held.play])
    del held
    assert wait_until(lambda: gc.collect() >= 0 and gone() is None)


def test_interrupt_passes_at_once_and_the_pool_keeps_its_size(release):
    pool = EnvironmentPool(num_workers=2, deadline_seconds=30)
    never = []
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.call([release.wait, release.wait, lambda: never.append(1)])
    assert time.monotonic() - began < 5
    barrier = threading.Barrier(2)
    assert sorted(pool.call([barrier.wait] * 2)) == [0, 1]
    assert not never, "a call of the interrupted batch ran after it"


def test_a_hanging_thread_does_not_hold_up_the_exit():
    code = (
        "import threading; from lit_agentrl.envs.pool import EnvironmentPool\n"
        "pool = EnvironmentPool(1, 0.1); print(pool.call([threading.Event().wait])[0].reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == "env_timeout"


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"deadline_seconds": 0}, {"deadline_seconds": -1.0}])
def test_refuses_options_that_can_not_work(options):
    with pytest.raises(UserError, match=next(iter(options))):
        EnvironmentPool(**options)
