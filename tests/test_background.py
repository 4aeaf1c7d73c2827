"""Work in a thread of its own: its result, its error, and its end."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from lit_agentrl.datamodules.background import Background, StoppableEngine, StoppedError
from lit_agentrl.types import Completion, Engine, SamplingParams


def test_the_result_is_waited_for() -> None:
    def work(stopped: threading.Event) -> str:
        time.sleep(0.05)
        return threading.current_thread().name

    assert Background(work, "worker-7").result() == "worker-7"


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def deep_inside(stopped: threading.Event) -> None:
        raise ZeroDivisionError("by zero")

    background = Background(deep_inside, "worker")
    background.wait()  # says nothing: whoever only waits is not the one to blame
    with pytest.raises(ZeroDivisionError, match="by zero") as raised:
        background.result()
    assert "deep_inside" in "".join(traceback.format_tb(raised.value.__traceback__))


@pytest.mark.parametrize("listens", [True, False])
def test_stopping_waits_no_longer_than_it_is_told(listens: bool) -> None:
    release = threading.Event()
    background = Background(lambda stopped: (stopped if listens else release).wait(10), "worker")
    began = time.monotonic()
    assert background.stop(0.2) == listens
    assert time.monotonic() - began < 5
    release.set()


class Counting(Engine):
    """Answers nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def sync(self, policy: object) -> None:
        raise AssertionError

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds=None, **more: object
    ) -> list[Completion]:
        self.asked.append(more)
        return []


def test_an_engine_stops_between_two_calls() -> None:
    counting, stopped = Counting(), threading.Event()
    engine = StoppableEngine(counting, stopped)
    engine.generate([[1]], SamplingParams())
    engine.generate([[1]], SamplingParams(), images=[()])
    stopped.set()
    with pytest.raises(StoppedError):
        engine.generate([[1]], SamplingParams())
    assert counting.asked == [{}, {"images": [()]}]  # an engine of text need not know of images
    with pytest.raises(NotImplementedError):
        engine.sync(None)
