"""Agent programs as environments: what a program asks is shown, what the policy says is its answer."""

import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_agentrl.envs.endpoint import MAX_BODY, chat_server
from lit_agentrl.envs.pool import EnvironmentPool, EnvironmentTimeoutError
from lit_agentrl.envs.program import ProgramEnvironment, ProgramError, ProgramResult, ProgramSuite
from lit_agentrl.errors import UserError
from lit_agentrl.types import Environment, StopReason
from runs import fit

SYSTEM = {"role": "system", "content": "Say a number."}


def post(url: str, body: bytes, content_type: str = "application/json") -> bytes:
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


def ask(url: str, messages: list[dict[str, object]], **fields: object) -> str:
    """The model's answer, as any client reads it."""
    answer = json.loads(post(url, json.dumps({"model": "policy", "messages": messages, **fields}).encode()))
    return answer["choices"][0]["message"]["content"]


def refused(url: str, body: bytes, content_type: str = "application/json") -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, body, content_type)
    with caught.value as error:
        return error.code, json.loads(error.read())["error"]["message"]


def guessing(secret: int, tries: int = 3):
    """A program: the policy guesses a number, told higher or lower."""

    def program(url: str) -> ProgramResult:
        messages = [SYSTEM, {"role": "user", "content": "From 1 to 8."}]
        for _ in range(tries):
            said = ask(url, messages)
            if said == str(secret):
                return ProgramResult(1.0, True)
            hint = "higher" if int(said) < secret else "lower"
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": hint}]
        return ProgramResult(0.0, False)

    return program


def play(program, replies: list[str], **options):
    """The environment, what it showed, and the last (reward, done)."""
    environment = ProgramEnvironment(program, **options)
    seen, last = [environment.reset()], None
    for reply in replies:
        observation, *last = environment.step(reply)
        seen.append(observation)
    environment.close()
    return environment, seen, last


def test_a_program_is_played_to_its_end():
    """7 of 8: 4 is too low, 6 is too low, 7 is it."""
    environment, seen, last = play(guessing(7), ["4", "6", "7"])
    assert isinstance(environment, Environment)
    assert [observation.text for observation in seen] == ["From 1 to 8.", "higher", "higher", ""]
    assert [observation.system for observation in seen] == ["Say a number.", "", "", ""]
    assert last == [1.0, True]
    assert environment.success is True


def test_rewards_come_with_the_end_alone():
    environment = ProgramEnvironment(guessing(7))
    environment.reset()
    assert environment.step("1")[1:] == (0.0, False)
    assert environment.success is False
    assert environment.step("2")[1:] == (0.0, False)
    assert environment.step("8")[1:] == (0.0, True)
    assert environment.success is False


def test_equal_anchors_are_equal_conversations():
    """Twice `higher` after different guesses is not the same state."""
    anchors = []
    for guesses in (["4"], ["5"], ["4"]):
        environment = ProgramEnvironment(guessing(7))
        environment.reset()
        for guess in guesses:
            environment.step(guess)
        anchors.append(environment.anchor)
        environment.close()
    assert anchors[0] == anchors[2] != anchors[1]
    assert hash(anchors[0]) == hash(anchors[2])


def test_episodes_side_by_side_do_not_meet():
    """Eight at a time, each with a number of its own: binary search finds all in at most 4 guesses."""

    def search(secret: int) -> tuple[float, int]:
        environment = ProgramEnvironment(guessing(secret, tries=4))
        environment.reset()
        low, high, count, reward, done = 1, 8, 0, 0.0, False
        while not done:
            guess = (low + high) // 2
            observation, reward, done = environment.step(str(guess))
            low, high = (guess + 1, high) if observation.text == "higher" else (low, guess - 1)
            count += 1
        return reward, count

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(search, range(1, 9))) == [(1.0, n) for n in (3, 2, 3, 1, 3, 2, 3, 4)]


def test_a_stream_says_the_same():
    def program(url: str) -> ProgramResult:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        first, second = post(url, json.dumps(body).encode()).decode().split("\n\n")[:2]
        chunk = json.loads(first.removeprefix("data: "))
        assert second == "data: [DONE]"
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["choices"] == [
            {"index": 0, "delta": {"role": "assistant", "content": 'a "b"\né'}, "finish_reason": "stop"}
        ]
        return ProgramResult(1.0, True)

    assert play(program, ['a "b"\né'])[2] == [1.0, True]


def test_all_new_messages_are_shown():
    """Tool results and text parts too; with someone else's answers among them, who said what."""

    def program(url: str) -> ProgramResult:
        parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
        messages = [SYSTEM, {"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
        said = ask(url, messages)
        messages += [{"role": "assistant", "content": f" {said}\n"}]  # trimmed or not is the same
        messages += [{"role": "tool", "content": "42", "tool_call_id": "x"}, {"role": "user", "content": "and?"}]
        said = ask(url, messages)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "q"}]
        messages += [{"role": "assistant", "content": "example"}, {"role": "user", "content": "p"}]
        ask(url, messages)
        return ProgramResult(0.0, False)

    _, seen, _ = play(program, ["a", "b", "c"])
    assert seen[0].system == "Say a number.\n\nBe brief."
    shown = [observation.text for observation in seen]
    assert shown == ["two parts", "42\n\nand?", "User: q\n\nAssistant: example\n\nUser: p", ""]


def rewriting(url: str) -> ProgramResult:
    """Forgets what was said; then another of its agents asks."""
    ask(url, [SYSTEM, {"role": "user", "content": "one"}])
    ask(url, [SYSTEM, {"role": "user", "content": "summary"}])
    ask(url, [{"role": "system", "content": "Judge."}, {"role": "user", "content": "two"}])
    return ProgramResult(0.5, False)


def test_a_rewritten_history_is_an_error_that_says_so():
    environment = ProgramEnvironment(rewriting)
    environment.reset()
    with pytest.raises(ProgramError, match=r"message 2 is user 'summary', and user 'one' was said.*history: whole"):
        environment.step("x")


def test_a_rewritten_history_is_shown_whole_where_that_is_asked_for():
    _, seen, last = play(rewriting, ["x", "y", "z"], history="whole")
    shown = [observation.text for observation in seen]
    assert shown == ["User: one", "User: summary", "System: Judge.\n\nUser: two", ""]
    assert last == [0.5, True]


def test_asking_twice_the_same_is_an_error_that_says_so():
    def program(url: str) -> ProgramResult:
        for _ in range(2):
            ask(url, [{"role": "user", "content": "one"}])
        return ProgramResult(1.0, True)

    environment = ProgramEnvironment(program)
    environment.reset()
    with pytest.raises(ProgramError, match=r"it has 1 messages after 2 were said.*time limit"):
        environment.step("x")


def test_questions_at_the_same_time_wait_their_turn():
    """Each gets its own answer."""

    def program(url: str) -> ProgramResult:
        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(lambda n: ask(url, [{"role": "user", "content": str(n)}]), range(4)))
        return ProgramResult(float(said == ["0!", "1!", "2!", "3!"]), True)

    environment = ProgramEnvironment(program, history="whole")
    observation, reward, done = environment.reset(), 0.0, False
    while not done:
        observation, reward, done = environment.step(observation.text.removeprefix("User: ") + "!")
    assert reward == 1.0


def crash(url: str) -> ProgramResult:
    raise SystemExit("no memory")


def crash_later(url: str) -> ProgramResult:
    ask(url, [SYSTEM])
    raise KeyError("answer")


def with_tools(url: str) -> ProgramResult:
    ask(url, [SYSTEM], tools=[{"type": "function"}])
    return ProgramResult(1.0, True)


@pytest.mark.parametrize(
    ("program", "replies", "message"),
    [
        (crash, [], "SystemExit: no memory"),
        (crash_later, ["x"], "KeyError: 'answer'"),
        (with_tools, [], r"HTTP Error 400.*refused: `tools`: the policy answers in text only"),
        (lambda url: ProgramResult(0.5, True), [], r"ended \(reward 0.5\) without asking"),
        (lambda url: 1.0, [], "ProgramResult"),
        (lambda url: ProgramResult(float("nan"), True), [], "finite"),
    ],
)
def test_what_goes_wrong_in_a_program_is_said(program, replies, message):
    with pytest.raises(ProgramError, match=message):
        play(program, replies)


def test_a_program_that_never_asks_misses_its_deadline():
    """As a time limit in the pool's books, and before the pool's own."""
    done = threading.Event()

    def program(url: str) -> ProgramResult:
        done.wait(20)
        return ProgramResult(1.0, True)

    environment = ProgramEnvironment(program, seconds=0.2)
    pool = EnvironmentPool(1, 10.0)
    (failure,) = pool.call([environment.reset])
    done.set()
    assert (failure.reason, pool.num_leaked) == (StopReason.ENV_TIMEOUT, 0)
    assert "neither asked nor ended within 0.2 s" in failure.message
    with pytest.raises(EnvironmentTimeoutError):
        ProgramEnvironment(lambda url: time.sleep(1), seconds=0.1).reset()


def test_a_closed_episode_ends_its_program():
    """Its waiting request and all later ones fail with 410."""
    codes, ended = [], threading.Event()

    def program(url: str) -> ProgramResult:
        for _ in range(2):
            try:
                ask(url, [SYSTEM])
            except urllib.error.HTTPError as error:
                codes.append(error.code)
                error.close()
        ended.set()
        return ProgramResult(1.0, True)

    environment = ProgramEnvironment(program)
    environment.reset()
    environment.close()
    environment.close()
    assert ended.wait(10)
    assert codes == [410, 410]
    with pytest.raises(ProgramError, match="closed"):
        environment.step("x")


@pytest.fixture
def url():
    endpoint = chat_server().open(lambda request: request.answer("yes"))
    yield endpoint.url
    endpoint.close()


MESSAGES = [{"role": "user", "content": "?"}]
PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "object"),
        ({}, "`messages` must be"),
        ({"messages": []}, "not empty"),
        ({"messages": ["hi"]}, "a `role` of"),
        ({"messages": [{"role": "robot", "content": ""}]}, "a `role` of"),
        ({"messages": [{"role": "user", "content": 7}]}, "list of text parts"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "images"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}, *MESSAGES]}, "tool calls"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "So"}]}, "assistant's own"),
        ({"messages": MESSAGES, "tools": [{}]}, "`tools`: the policy answers in text only"),
        ({"messages": MESSAGES, "functions": [{}]}, "`functions`"),
        ({"messages": MESSAGES, "n": 2}, "one answer"),
        ({"messages": MESSAGES, "logprobs": True}, "one answer"),
    ],
)
def test_what_cannot_be_served_is_refused(url, body, message):
    code, said = refused(url, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert code == 400
    assert message in said


def test_empty_tools_and_options_of_sampling_are_let_through_and_logged(url, caplog):
    """Once for the process, however often they come."""
    chat_server()._told.clear()
    for _ in range(2):
        assert ask(url, MESSAGES, tools=[], n=1, temperature=0.0, stop=None) == "yes"
    assert [record.getMessage() for record in caplog.records] == [
        "a program's requests set temperature: not heeded, the run decides how to sample"
    ]


def test_only_the_episodes_own_address_is_served(url):
    body = json.dumps({"messages": MESSAGES}).encode()
    token = url.split("/")[3]
    assert refused(url.replace(token, "x" * len(token)), body)[0] == 410
    assert refused(url.replace("/v1", "/v2"), body)[0] == 404
    assert refused(url, body, "text/plain")[0] == 415
    assert len(token) >= 20
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/models", timeout=20)
    with caught.value as error:
        assert error.code == 404


def test_the_server_listens_on_the_loopback_interface_alone():
    assert chat_server().server_address[0] == "127.0.0.1"
    assert chat_server() is chat_server()


@pytest.mark.parametrize(("length", "status"), [(str(MAX_BODY + 1), "413"), ("", "411"), ("-1", "411")])
def test_a_body_is_limited_before_it_is_read(url, length, status):
    host, port = url.split("/")[2].split(":")
    head = f"POST /{url.split('/', 3)[3]}/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert connection.recv(64).decode().split()[1] == status


class CountingSuite(ProgramSuite):
    """A question and its answer."""

    def tasks(self, split):
        return [f"{split}-{number}" for number in range(3)]

    def run(self, task: str, base_url: str) -> ProgramResult:
        number = task.rpartition("-")[2]
        said = ask(base_url, [{"role": "user", "content": f"What comes after {number}?"}])
        is_right = said == str(int(number) + 1)
        return ProgramResult(float(is_right), is_right)


def test_a_suite_runs_the_program_of_its_task():
    environment = CountingSuite().make("train-2")
    assert environment.reset().text == "What comes after 2?"
    assert environment.step("3")[1:] == (1.0, True)


def test_the_example_of_the_documentation_trains(tiny_lm, tmp_path, monkeypatch):
    """From the command line: two iterations of 2 questions x 4 answers, and every question reaches the transcripts."""
    text = (Path(__file__).parent.parent / "docs" / "other_environments.md").read_text()
    (block,) = re.findall(r"```python\n(.*?class DoublingSuite.*?)```", text, re.DOTALL)
    (tmp_path / "doubling.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--data.environment=doubling.DoublingSuite", "--data.rollout.cut_actions=continue")
    assert fit(tiny_lm, tmp_path, *options)["global_step"] == 2
    files = list((tmp_path / "transcripts").glob("iteration_*"))
    told = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(told) == 2 * 2 * 4
    for episode in told:
        task = episode["prompt_id"]
        assert episode["steps"][0]["observation"] == f"What is {task} + {task}?"
        assert (episode["stop_reason"], episode["success"]) == ("done", False)


@pytest.mark.parametrize(("options", "message"), [({"history": "none"}, "append, whole"), ({"seconds": 0}, "positive")])
def test_mistakes_are_named_at_once(options, message):
    with pytest.raises(UserError, match=message):
        CountingSuite(**options)
