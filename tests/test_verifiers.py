"""Environments of `verifiers`, played by its own harness; needs an interpreter that has the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_agentrl.envs.verifiers import VerifiersSuite
from lit_agentrl.errors import UserError

ROOT = Path(__file__).parent.parent

# As its users write them: a taskset alone, and one with an environment that talks back.
SUMS = """
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str = ""

class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply.strip() == task.answer)

class SumConfig(vf.TasksetConfig):
    largest: int = 4

class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for a in [1, 1, *range(2, self.config.largest + 1)]:  # the first comes twice
            yield SumTask(SumData(prompt=f"{a} + {a} = ?", answer=str(2 * a)), self.config.task)

__all__ = ["SumTaskset"]
"""
GUESS = """
import verifiers.v1 as vf

class GuessData(vf.TaskData):
    number: int = 0

class GuessTask(vf.Task[GuessData]):
    @vf.reward
    async def found(self, task, trace) -> float:
        return float(trace.last_reply.strip() == str(task.number))

class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            number = number % 8 + 1
            yield GuessTask(GuessData(prompt="From 1 to 8.", system_prompt="Say a number.", number=number))

class GuessConfig(vf.EnvConfig):
    guesser: vf.AgentConfig = vf.AgentConfig()

class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.guesser.interaction(task) as talk:
            said = await talk.turn()
            while not said.terminated and said.last_reply != str(task.data.number):
                said = await talk.turn("higher" if int(said.last_reply) < task.data.number else "lower")

__all__ = ["GuessTaskset", "GuessEnv"]
"""
PLAY = """
import json, pickle, sys, threading
from concurrent.futures import ThreadPoolExecutor

from lit_agentrl.envs.program import ProgramError
from lit_agentrl.envs.verifiers import VerifiersSuite
from lit_agentrl.errors import UserError

FEW = {"num_train": 2, "num_val": 1, "num_test": 1}

def play(suite, task, replies):
    environment = suite.make(task)
    first = environment.reset()
    seen, reward, done = [first.text], 0.0, False
    for reply in replies:
        observation, reward, done = environment.step(reply)
        seen.append(observation.text)
    environment.close()
    return [first.system, seen, reward, done, environment.success]

def failure(suite):
    try:
        pickle.loads(pickle.dumps(suite)).make("train-0").reset()
    except ProgramError as error:
        return str(error)

def mistake(**options):
    try:
        VerifiersSuite(**{"taskset": "sums", **FEW, **options}).tasks("train")
    except UserError as error:
        return str(error)

sums = VerifiersSuite("sums", {"largest": 4}, **FEW)
guess = VerifiersSuite("guess", role="guesser", **FEW)
shell = VerifiersSuite("sums", config={"agent": {"harness": {"id": "bash"}}}, **FEW)
cut = VerifiersSuite("guess", config={"guesser": {"max_turns": 1}}, role="guesser", **FEW)
games = {
    "sums": (sums, "train-0", ["2"]),
    "wrong": (sums, "test-0", ["9"]),
    "guess": (guess, "val-0", ["4", "2", "3"]),
    "left": (guess, "train-1", ["8"]),
    "cut": (cut, "train-0", ["8"]),
}
tasks = {split: list(sums.tasks(split)) for split in ("train", "val", "test")}
with ThreadPoolExecutor(len(games)) as pool:
    played = dict(zip(games, pool.map(lambda game: play(*game), games.values())))
for thread in threading.enumerate():
    if thread.name == "program":
        thread.join(20)
json.dump({
    "tasks": tasks, "played": played, "failure": failure(shell),
    "running": [thread.name for thread in threading.enumerate() if thread.name == "program"],
    "mistakes": [
        mistake(num_train=9), mistake(taskset="no_such_taskset"), mistake(role="solver"),
        mistake(options={"smallest": 1}), mistake(config={"agent": {"speed": 1}}),
        mistake(config={"id": "user-sim"}, role="assistant"),
    ],
}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the script above says, run where verifiers is."""
    python = os.environ.get("VERIFIERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import verifiers.v1"], capture_output=True, check=False).returncode:
        pytest.skip("verifiers is not installed; VERIFIERS_PYTHON may name an interpreter that has it")
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "sums.py").write_text(SUMS)
    (folder / "guess.py").write_text(GUESS)
    (folder / "play.py").write_text(PLAY)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "PATH": os.pathsep.join([str(Path(python).parent), os.environ["PATH"]]),  # uv comes with verifiers
    }
    command = [python, str(folder / "play.py"), str(folder / "report.json")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_a_taskset_is_played_by_the_harness(report):
    """`verifiers` pays: 1 + 1 is 2, and 4 + 4 is not 9."""
    assert report["played"]["sums"] == ["", ["1 + 1 = ?", ""], 1.0, True, True]
    assert report["played"]["wrong"] == ["", ["4 + 4 = ?", ""], 0.0, True, False]


@pytest.mark.slow
def test_an_environment_that_talks_back_is_played_turn_by_turn(report):
    """Number 3 is the third task: train-0, train-1, val-0."""
    assert report["played"]["guess"] == ["Say a number.", ["From 1 to 8.", "lower", "higher", ""], 1.0, True, True]


@pytest.mark.slow
def test_an_episode_that_is_left_ends_its_program(report):
    assert report["played"]["left"] == ["Say a number.", ["From 1 to 8.", "lower"], 0.0, False, False]
    assert report["running"] == []


@pytest.mark.slow
def test_options_of_verifiers_are_heeded(report):
    assert report["played"]["cut"] == ["Say a number.", ["From 1 to 8.", ""], 0.0, True, False]


@pytest.mark.slow
def test_a_harness_with_tools_is_refused(report):
    """In a copy of the suite too, as worker processes get it."""
    assert report["failure"].startswith("the program failed: RuntimeError: verifiers' episode of train-0 failed")
    assert "`tools`: the policy answers in text only" in report["failure"]


@pytest.mark.slow
def test_splits_hold_different_tasks(report):
    """Of five sums one repeats: four are left, and a fifth is not to be had."""
    assert report["tasks"] == {"train": ["train-0", "train-1"], "val": ["val-0"], "test": ["test-0"]}
    assert "has 4 different tasks among its first 5" in report["mistakes"][0]


@pytest.mark.slow
def test_mistakes_are_named_at_once(report):
    _, taskset, role, options, config, others = report["mistakes"]
    assert "'no_such_taskset' not found" in taskset
    assert "sums is played by agent." in role
    assert "smallest" in options
    assert "speed" in config
    assert "user would be played by the policy too" in others


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(UserError, match=r"lit-agentrl\[verifiers\]"):
        VerifiersSuite("sums")
