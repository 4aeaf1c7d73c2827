"""One function in a thread of its own, while the main thread does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from lit_agentrl.types import Completion, Engine, SamplingParams

if TYPE_CHECKING:
    from torch import nn

    from lit_agentrl.images import Image

T = TypeVar("T")


class StoppedError(RuntimeError):
    """Nobody wants the result any more."""


class Background(Generic[T]):
    """Runs a function in a daemon thread: it never holds up the end of the process.

    Args:
        function: Called at once with an event; when that is set it should end soon.
        name: Of the thread.
    """

    def __init__(self, function: Callable[[threading.Event], T], name: str) -> None:
        self._function = function
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._function(self._stopped)
        except BaseException as error:  # whatever it is, the thread that waits has to hear of it
            self._error = error
        finally:
            self._ended.set()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    def wait(self) -> None:
        """Until it has ended, one way or the other; Ctrl-C and SIGTERM interrupt the wait."""
        self._ended.wait()

    def result(self) -> T:
        """What the function gave, waiting for it; what it raised is raised here, with its own traceback."""
        self.wait()
        if self._error is not None:
            raise self._error
        return cast("T", self._result)

    def stop(self, seconds: float) -> bool:
        """Ask it to end, and wait so long for it; whether it has ended."""
        self._stopped.set()
        return self._ended.wait(seconds)


class StoppableEngine(Engine):
    """Another engine, until an event is set: then it raises in the place of the next call.

    Args:
        engine: Which.
        stopped: The event.
    """

    def __init__(self, engine: Engine, stopped: threading.Event) -> None:
        self.engine, self.stopped, self.version = engine, stopped, engine.version

    @property
    def shares_weights(self) -> bool:
        """The other's."""
        return self.engine.shares_weights

    def sync(self, policy: nn.Module) -> None:
        """Not from here: other threads' rollouts would change weights with it."""
        raise NotImplementedError("An engine is synced by the thread that trains.")

    def generate(
        self,
        contexts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[Completion]:
        """The other's completions."""
        if self.stopped.is_set():
            raise StoppedError("The rollouts are not needed any more.")
        shown = {} if images is None else {"images": images}  # engines of text need not know of images
        return self.engine.generate(contexts, params, seeds, **shown)
