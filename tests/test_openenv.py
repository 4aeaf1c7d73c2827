"""OpenEnv's wire protocol: a server of openenv-core itself where it is installed, else one that speaks like it."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lit_agentrl.envs.openenv import OpenEnvSuite
from lit_agentrl.errors import UserError

websockets = pytest.importorskip("websockets", reason="pip install 'lit-agentrl[openenv]'")

# The environment, written for openenv-core: count down from seed % 3 + 2 by saying "down".
REAL_SERVER = """
import sys
import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Say(Action):
    message: str
    loud: bool = False

class Left(Observation):
    left: int
    said: str = ""

class Countdown(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.left = seed % 3 + 2
        return Left(left=self.left)

    def step(self, action, timeout_s=None, **kwargs):
        if action.message == "crash":
            raise RuntimeError("no such number")
        self.left -= action.message == "down"
        done = self.left == 0
        return Left(left=self.left, said=action.message + "!" * action.loud, done=done, reward=float(done))

    @property
    def state(self):
        return State()

app = create_fastapi_app(Countdown, Say, Left, max_concurrent_envs=2)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


class Twin:
    """The same, over the messages that openenv-core 0.3 sends, two sessions at a time."""

    def __init__(self) -> None:
        self.sessions = threading.Semaphore(2)

    def __call__(self, socket) -> None:
        if not self.sessions.acquire(blocking=False):
            socket.send(self.message("error", {"message": "full", "code": "CAPACITY_REACHED"}))
            return
        try:
            left = 0
            for text in socket:
                call = json.loads(text)
                if call["type"] == "close":
                    return
                said = call["data"].get("message", "")
                if said == "crash":
                    socket.send(self.message("error", {"message": "no such number", "code": "EXECUTION_ERROR"}))
                    continue
                left = call["data"]["seed"] % 3 + 2 if call["type"] == "reset" else left - (said == "down")
                shown = {"left": left, "said": said + "!" * bool(call["data"].get("loud"))}
                done = call["type"] == "step" and left == 0
                socket.send(self.message("observation", {"observation": shown, "reward": float(done), "done": done}))
        finally:
            self.sessions.release()

    @staticmethod
    def message(kind: str, data: dict[str, object]) -> str:
        return json.dumps({"type": kind, "data": data})


@pytest.fixture(scope="module", params=["twin", "openenv-core"])
def url(request):
    if request.param == "twin":
        from websockets.sync.server import serve

        with serve(Twin(), "127.0.0.1", 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
            server.shutdown()
        return
    python = os.environ.get("OPENENV_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import openenv, uvicorn"], capture_output=True, check=False).returncode:
        pytest.skip("openenv-core is not installed; OPENENV_PYTHON may name an interpreter that has it")
    port = 18473
    server = subprocess.Popen([python, "-c", REAL_SERVER, str(port)])
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def play(url: str, task: str, replies: list[str], **options):
    """The episode, the observations and the last (reward, done)."""
    environment = OpenEnvSuite(url, "message", **options).make(task)
    for attempt in range(100):  # the server may still be starting
        try:
            seen = [environment.reset()]
            break
        except ConnectionError:
            if attempt == 99:
                raise
            time.sleep(0.1)
    last = None
    for reply in replies:
        observation, *last = environment.step(reply)
        seen.append(observation)
    return environment, seen, last


def test_an_episode_is_played_to_its_end(url):
    """Seed 0: two to go."""
    environment, seen, last = play(url, "train-0", ["down", "up", "down"], text_fields=["left"])
    assert [observation.text for observation in seen] == ["2", "1", "1", "0"]
    assert last == [1.0, True]
    assert environment.success is True
    environment.close()


def test_all_fields_are_shown_but_the_bookkeeping(url):
    environment, seen, _ = play(url, "train-1", ["down"], action_values={"loud": True}, instructions="Count.")
    assert seen[1].text == "left: 2\nsaid: down!"  # seed 1: three to go
    assert seen[0].system.startswith("Count.")
    assert environment.success is False
    environment.close()


def test_the_servers_errors_reach_the_transcript(url):
    environment, _, _ = play(url, "train-0", [])
    with pytest.raises(ConnectionError, match="no such number"):
        environment.step("crash")
    environment.close()


def test_a_reply_without_an_action_is_not_sent(url):
    environment, seen, last = play(url, "train-0", ["down"], action_format="tagged", text_fields=["left"])
    assert (seen[1].valid, seen[1].text, last) == (False, "2", [0.0, False])
    environment.close()


def test_a_full_server_says_what_to_do(url):
    open_ones = [play(url, "train-0", [])[0] for _ in range(2)]
    with pytest.raises(ConnectionError, match=r"max_concurrent_envs|did not answer"):
        OpenEnvSuite(url, "message", seconds=5).make("train-0").reset()
    for environment in open_ones:
        environment.close()
    time.sleep(0.2)
    environment, _, _ = play(url, "train-0", [])
    environment.close()


def test_an_unknown_field_names_those_there_are(url):
    with pytest.raises(KeyError, match="left"):
        play(url, "train-0", [], text_fields=["right"])
    time.sleep(0.2)


def test_no_server_is_an_error_at_reset():
    environment = OpenEnvSuite("http://127.0.0.1:9", "message", seconds=2).make("train-0")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        environment.reset()
    environment.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost"}, "http://localhost:8000"),
        ({"url": "ftp://x"}, "http://localhost:8000"),
        ({"action_field": ""}, "name a field"),
        ({"seconds": 0}, "positive"),
        ({"action_format": "json"}, "plain, tagged"),
    ],
)
def test_mistakes_are_named_at_once(options, message):
    with pytest.raises(UserError, match=message):
        OpenEnvSuite(**{"url": "http://localhost:1", "action_field": "message", **options})
