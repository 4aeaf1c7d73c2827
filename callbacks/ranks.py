"""Runs of several processes end together."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_agentrl.callbacks.checkpoint import IterationCheckpoint
from lit_agentrl.callbacks.watch import OWN_SECONDS, Watch
from lit_agentrl.errors import UserError

LAUNCHER = "LIT_AGENTRL_LAUNCHER"
"""The environment variable in which a rank finds the process that started it."""
CLOSE_SECONDS = 2.0
"""What the other ranks have to end by themselves when the first one is done."""


PARTING_SECONDS = 10.0
"""What a process whose connection is closed has to be gone: it may close environments and engines first."""


class RankLostError(UserError):
    """Another process of the run is gone, so the run cannot go on."""


class RankWatch(Callback):
    """Ends all processes of a run soon after one of them has died or was told to end, and says how to resume.

    Left alone, ranks whose peer was killed wait in a collective until its timeout (half an hour), or play a rollout of
    minutes to its end first; those whose launcher was killed stay behind. Changed against Lightning's observer of
    launched processes, which kills the launcher within 5 s without a word: what is saved is said, environments and
    engines are closed, and the launched ranks watch the launcher in return. SIGTERM is passed on to them; Lightning's
    handler starts a collective there, which deadlocks with the one that another rank may be in.

    Between machines only the collectives' timeout helps (`timeout` of the strategy). In a single process it does
    nothing.

    Args:
        patience: Seconds that a process has for an orderly end before it is ended at once.

    Example:
        ```yaml
        trainer:
          callbacks: [{class_path: lit_agentrl.callbacks.RankWatch, init_args: {patience: 60}}]
        ```
    """

    def __init__(self, patience: float = 20.0) -> None:
        if not patience > 0:
            raise UserError(f"RankWatch(patience={patience}): seconds, more than 0.")
        self.patience = patience
        self._watch: Watch | None = None
        self._ranks: Sequence[subprocess.Popen[bytes]] = ()
        self._hint: Callable[[], str] = str
        self._has_spoken = False
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        # torchrun's ranks have the agent above them, whoever left the variable in its environment
        is_ours = self._local_rank > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
        self._parent = int(os.environ.get(LAUNCHER, "0")) if is_ours else 0
        self._is_launched = bool(self._parent)
        if self._is_launched:
            self._start()  # the launcher may die while this process is still loading
        else:
            os.environ[LAUNCHER] = str(os.getpid())  # for those that this process is about to launch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch; all processes have met by now."""
        if trainer.world_size == 1:
            return
        self._local_rank = trainer.local_rank  # under SLURM it is in another variable
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
            self._ranks = launcher.procs
            _retire_observer()
            atexit.register(self._close_ranks)
        elif not self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
            self._parent = os.getppid()  # the agent of torchrun
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, IterationCheckpoint)), None)
        if checkpoint is not None:
            self._hint = lambda: checkpoint.resume_hint(trainer)
        if self._watch is None:
            self._start()
        assert self._watch is not None
        self._watch.listen()
        trainer._signal_connector._sigterm_notifier_fn = self._on_sigterm  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The processes part in peace."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the rank whose loss made a collective fail."""
        if self._watch is None:
            return
        self._watch.is_ending.set()
        # a socket is closed before its process is gone, one that ends with an error long before
        seconds = min(PARTING_SECONDS, self.patience) if _is_of_a_peer(exception) else OWN_SECONDS
        deadline = time.monotonic() + seconds
        while not self._watch.signal and time.monotonic() < deadline:
            if self._watch.reason or self._lost():
                if not isinstance(exception, RankLostError):
                    print(f"\nerror: {self._watch.reason or self._lost()}", file=sys.stderr, flush=True)
                if not trainer.is_global_zero:  # where `IterationCheckpoint` says it
                    self._speak()
                break
            time.sleep(0.05)
        self._has_spoken = True

    def _start(self) -> None:
        self._watch = Watch(self._lost, self._told, self._last_words, self.patience)
        self._watch.start()

    def _lost(self) -> str:
        """Which process of this run has failed; empty for none."""
        if self._parent and os.getppid() != self._parent:
            return f"process {self._parent}, which started this one (rank {self._local_rank} here), is gone."
        for rank, process in enumerate(self._ranks, start=1):
            if code := process.poll():
                return f"rank {rank} of this machine (process {process.pid}) {_end(code)}."
        return ""

    def _told(self, number: int) -> None:
        """Let the launched ranks end too. A terminal has sent them its Ctrl-C."""
        if number == signal.SIGTERM:
            self._send(signal.SIGTERM)

    def _on_sigterm(self, signum: int, _: FrameType) -> None:
        """Where the main thread learns from `Watch` what it should end for; otherwise other handlers decide."""
        if self._watch is not None and self._watch.reason:
            raise RankLostError(self._watch.reason)

    def _speak(self) -> None:
        """Say how to resume, once on every machine: the first rank of those that outlive what is lost."""
        if not self._has_spoken and self._local_rank == int(self._is_launched) and (hint := self._hint()):
            self._has_spoken = True
            print(f"\n{hint}", file=sys.stderr, flush=True)

    def _last_words(self) -> None:
        if self._watch is not None and self._watch.reason and not self._has_spoken:
            print(f"\nerror: {self._watch.reason}", file=sys.stderr, flush=True)
        if self._watch is None or not self._watch.signal or self._local_rank == 0:
            self._speak()
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _close_ranks(self) -> None:
        """Leave no launched rank behind, however this process ends."""
        for seconds, number in ((CLOSE_SECONDS, signal.SIGTERM), (CLOSE_SECONDS, signal.SIGKILL)):
            deadline = time.monotonic() + seconds
            while any(process.poll() is None for process in self._ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
            self._send(number)


def _is_of_a_peer(exception: BaseException) -> bool:
    """Whether a collective failed because another process left it."""
    return isinstance(exception, RuntimeError) and "by peer" in str(
        exception
    )  # closed or reset: Gloo has no type for it


def _retire_observer() -> None:
    """Let Lightning's observer of launched processes see none: it would kill this one before it can say a word."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def _end(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}; its own message is above"
    name = signal.Signals(-code).name
    killer = " (the system does that when memory runs out; `dmesg` tells)" if name == "SIGKILL" else ""
    return f"was killed by {name}{killer}"
