"""A process that waits for others in a call that no signal gets through to is ended from beside it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import RankWatch
from lit_agentrl.callbacks.ranks import LAUNCHER, _end, _retire_observer
from lit_agentrl.callbacks.watch import Watch
from lit_agentrl.errors import UserError


class Interrupt(Exception):
    pass


@pytest.fixture
def interrupted() -> Iterator[None]:
    """SIGTERM raises in the main thread, as on the command line."""

    def handler(*_: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, previous)


def block() -> None:
    """Wait for ever where Python handles no signals, as in a collective: a mutex that is locked twice."""
    mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def forked(body: Callable[[int], object]) -> tuple[int, int]:
    """A copy of this process that runs `body` with the writing end of a pipe; its id and the reading end."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        try:
            body(write)
        finally:
            os._exit(77)
    os.close(write)
    return process, read


def wait(process: int, seconds: float = 15) -> int:
    """The exit code; a process that does not end is killed, and the test fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError("it did not end")


def test_a_loss_interrupts_the_main_thread(interrupted):
    gone: list[str] = []
    watch = Watch(lambda: "".join(gone), lambda _: None, lambda: None, patience=60)
    watch.start()
    time.sleep(0.5)
    assert watch.reason == ""  # and nothing was raised
    gone.append("rank 1 is gone")
    with pytest.raises(Interrupt):
        time.sleep(30)
    assert watch.reason == "rank 1 is gone"
    watch.stop()
    watch.join(5)
    assert not watch.is_alive()


@pytest.mark.parametrize("what", ["is_ending", "stopped"])
def test_a_main_thread_on_its_way_out_is_left_alone(interrupted, what):
    watch = Watch(lambda: "rank 1 is gone", lambda _: None, lambda: None, patience=60)
    watch.start()
    (watch.is_ending.set if what == "is_ending" else watch.stop)()
    time.sleep(1.5)  # an interrupt would come here
    watch.stop()


def test_a_blocked_process_ends_after_its_patience_and_has_a_last_word():
    def body(pipe: int) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        Watch(lambda: "gone", lambda _: None, lambda: os.write(pipe, b"last words"), patience=0.5).start()
        block()

    process, read = forked(body)
    assert wait(process) == 1
    assert os.read(read, 100) == b"last words"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_blocked_process_hears_a_signal_at_once(sent, code):
    def body(pipe: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os.write(pipe, b"handler"))  # never: the main thread is blocked
        told = Watch(str, lambda number: os.write(pipe, bytes([number])), lambda: os.write(pipe, b"!"), patience=1.0)
        told.listen()
        told.start()
        os.write(pipe, b"ready")
        block()

    process, read = forked(body)
    assert os.read(read, 5) == b"ready"
    time.sleep(0.3)
    os.kill(process, sent)
    start = time.monotonic()
    assert os.read(read, 1) == bytes([sent])
    assert time.monotonic() - start < 1.0
    assert wait(process) == code
    assert os.read(read, 100) == b"!"


def test_a_launched_rank_ends_when_its_launcher_is_killed():
    """Before it has met the others, too: it may still be loading."""

    def launcher(pipe: int) -> None:
        os.environ |= {"LOCAL_RANK": "1", LAUNCHER: str(os.getpid())}

        def rank(_: int) -> None:
            os.dup2(pipe, 2)
            sys.stderr = os.fdopen(2, "w")
            signal.signal(signal.SIGTERM, lambda *_: None)  # never: the main thread is blocked
            RankWatch(patience=0.3)
            os.write(pipe, b"ready")
            block()

        forked(rank)
        time.sleep(60)

    process, read = forked(launcher)
    assert os.read(read, 5) == b"ready"
    os.kill(process, signal.SIGKILL)
    wait(process)
    os.set_blocking(read, False)
    deadline, said = time.monotonic() + 15, b""
    while True:  # until nobody holds the other end
        try:
            part = os.read(read, 1000)
            if not part:
                break
            said += part
        except BlockingIOError:
            assert time.monotonic() < deadline, "the rank still lives"
            time.sleep(0.02)
    assert f"process {process}, which started this one (rank 1 here), is gone".encode() in said


def test_a_single_process_is_not_watched(tmp_path):
    watch, before = RankWatch(), signal.set_wakeup_fd(-1)
    seen = []

    class Module(FakeModule):
        def on_train_start(self):
            seen.append((watch._watch, signal.set_wakeup_fd(-1)))

    trainer(tmp_path, watch, max_epochs=1).fit(Module(), datamodule=FakeRollouts())
    assert seen == [(None, -1)]
    signal.set_wakeup_fd(before)


def test_lightnings_own_observer_kills_nobody():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    dead.wait()
    observer = _ChildProcessObserver(bystander.pid, [dead], sleep_period=1)
    observer.start()
    _retire_observer()
    observer.join(15)
    assert not observer.is_alive()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_how_a_rank_ended_is_said():
    assert _end(3) == "ended with exit code 3; its own message is above"
    assert _end(-signal.SIGSEGV) == "was killed by SIGSEGV"
    assert "memory" in _end(-signal.SIGKILL)
    with pytest.raises(UserError, match=r"RankWatch\(patience=0\)"):
        RankWatch(patience=0)
