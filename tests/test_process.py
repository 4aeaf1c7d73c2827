"""Environments in worker processes: the same episodes, and no misbehaviour that a trainer does not survive."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile import HostileSuite, LockedSuite, PidSuite
from lit_agentrl.datamodules import RolloutDataModule
from lit_agentrl.envs import EchoSuite
from lit_agentrl.envs.pool import EnvironmentFailure, EnvironmentPool, EnvironmentTimeoutError
from lit_agentrl.envs.process import EnvironmentProcessError, ProcessHost
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment, StopReason
from runs import fit, metrics

WORD = EchoSuite().tasks("train")[0]


@pytest.fixture
def host():
    """Two workers, a second for each call."""
    made = ProcessHost(HostileSuite(), 2, 1.0)
    yield made
    made.close()


def test_an_episode_is_the_same_as_in_this_process(host):
    near, far = EchoSuite().make(WORD), host.make(WORD)
    assert far.reset() == near.reset()
    for word in (WORD, "ba"):
        assert far.step(word) == near.step(word)
        assert (far.anchor, far.success) == (near.anchor, near.success)
        assert far.metrics == {"replies": len(near.replies)}


def test_episodes_are_spread_over_the_workers():
    host = ProcessHost(PidSuite(), 2, 5.0)
    environments = [host.make("any") for _ in range(4)]
    pids = [e.reset().text.split()[-1] for e in environments]
    assert [pids.count(pid) for pid in sorted(set(pids))] == [2, 2]
    assert str(os.getpid()) not in pids
    environments[0].close()
    assert host.make("any").reset().text.split()[-1] == pids[0]  # the worker that holds the fewest
    host.close()


def test_snapshots_travel(host):
    environment = host.make(WORD)
    assert isinstance(environment, RestorableEnvironment)
    environment.reset()
    saved = environment.snapshot()
    first = environment.step(WORD)
    environment.restore(saved)
    assert environment.anchor == (WORD, 0)
    assert environment.step(WORD) == first


@pytest.mark.parametrize("word", ["hang", "sleep"])
def test_a_hang_is_ended_by_the_deadline(host, word):
    """`hang` keeps the interpreter lock of its process: no thread could time it out."""
    hung, other = host.make(WORD), host.make(WORD)
    hung.reset()
    other.reset()
    began = time.monotonic()
    with pytest.raises(EnvironmentTimeoutError, match="1 s"):
        hung.step(word)
    assert time.monotonic() - began < 10  # the hang lasts 60
    assert other.step(WORD)[1] == 0.5
    hung.close()
    assert host.make(WORD).reset()
    assert host.num_replaced == 1


def test_what_shares_a_lost_process_is_lost_too_and_says_so():
    host = ProcessHost(HostileSuite(), 1, 1.0)
    first, second = host.make(WORD), host.make(WORD)
    first.reset()
    with pytest.raises(EnvironmentProcessError, match="exit code 3"):
        first.step("die")
    with pytest.raises(EnvironmentProcessError, match="process was lost"):
        second.reset()
    host.close()


@pytest.mark.parametrize(("word", "text"), [("raise", "ValueError: no such word"), ("exit", "SystemExit")])
def test_an_error_costs_one_episode(host, word, text):
    broken, other = host.make(WORD), host.make(WORD)
    third = host.make(WORD)  # in the worker of the first
    broken.reset()
    with pytest.raises(EnvironmentProcessError, match=text):
        broken.step(word)
    assert other.reset() == third.reset()
    assert host.num_replaced == 0


def test_the_pool_knows_a_timeout_from_an_error(host):
    hung, broken = host.make(WORD), host.make(WORD)
    results = EnvironmentPool(2, None).call([lambda: hung.step("hang"), lambda: broken.step("raise")])
    assert all(isinstance(result, EnvironmentFailure) for result in results)
    assert [result.reason for result in results] == [StopReason.ENV_TIMEOUT, StopReason.ENV_ERROR]
    assert results[0].seconds >= 1


def test_a_timeout_that_the_environment_reports_stays_one(host):
    """An environment that waits for something of its own knows best; its process is none the worse."""
    (failure,) = EnvironmentPool(1, None).call([lambda: host.make(WORD).step("late")])
    assert (failure.reason, failure.message, failure.seconds) == (
        StopReason.ENV_TIMEOUT,
        "the server was too slow",
        7.0,
    )
    assert host.num_replaced == 0


def test_a_task_that_cannot_be_made_fails_alone(host):
    with pytest.raises(EnvironmentProcessError, match="not a word"):
        host.make("xyz")
    assert host.make(WORD).reset()


def test_a_suite_that_cannot_be_sent_is_refused():
    with pytest.raises(UserError, match="LockedSuite cannot be sent"):
        ProcessHost(LockedSuite(), 1, 1.0)


def test_a_suite_that_workers_cannot_import_is_refused(monkeypatch):
    """Its module is known here and nowhere else, as that of a script is."""
    module = type(sys)("only_here")
    module.Suite = type("Suite", (EchoSuite,), {"__module__": "only_here"})
    monkeypatch.setitem(sys.modules, "only_here", module)
    host = ProcessHost(module.Suite(), 1, 1.0)
    with pytest.raises(UserError, match="only_here"):
        host.start()


PARENT = """
from lit_agentrl.envs import process
from hostile import HostileSuite

process.GRACE_SECONDS = 0.5
host = process.ProcessHost(HostileSuite(), 1, 0.5)
environment = host.make("bade")
environment.reset()
environment._worker._deadline_seconds = 60  # this side never gives up: it will be dead
print(environment._worker._process.pid, flush=True)
environment.step("hang")
"""


def test_no_worker_outlives_a_killed_trainer():
    """Even one that hangs with the interpreter lock held, as its watchdog needs no lock."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    worker = int(parent.stdout.readline())
    time.sleep(0.2)  # into the hang
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    until = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(worker)


def test_training_is_the_same_in_processes(tiny_lm, tmp_path):
    """Bit by bit: where an environment runs is not part of the result."""
    once = ("--trainer.max_epochs", "1")
    threads = fit(tiny_lm, tmp_path / "threads", *once)
    apart = ("--data.workers", "processes", "--data.num_workers", "2")
    processes = fit(tiny_lm, tmp_path / "processes", *once, *apart)
    assert threads["state_dict"].keys() == processes["state_dict"].keys()
    assert all((threads["state_dict"][k] == v).all() for k, v in processes["state_dict"].items())
    assert logged(tmp_path / "processes", "workers_leaked") == 0


def test_suites_that_need_processes_get_them(tiny_lm, tmp_path):
    """The suite asks; the class of its environments tells where they ran."""
    suites = [EchoSuite(), HostileSuite()]
    modules = [RolloutDataModule(suite, tiny_lm, max_tokens=2048) for suite in suites]
    assert [module.host is not None for module in modules] == [False, True]
    assert RolloutDataModule(suites[1], tiny_lm, max_tokens=2048, workers="threads").host is None
    fit(tiny_lm, tmp_path, "--trainer.max_epochs", "1", "--data.environment", "hostile.HostileSuite")
    assert logged(tmp_path, "failed") == 0


def logged(run: Path, name: str) -> float:
    """What the iteration logged as `name`."""
    (value,) = [row[name] for row in metrics(run) if row.get(name)]
    return float(value)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
