"""Random generators and curricula of all ranks are in checkpoints, and a resumed run draws what the whole one drew."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_agentrl import distributed
from lit_agentrl.datamodules import rank_state
from lit_agentrl.datamodules.rank_state import (
    check_suite,
    random_state,
    rank_states,
    restore_random,
    restore_suite,
    set_random_state,
    unloadable,
)
from lit_agentrl.envs import EchoSuite
from lit_agentrl.errors import UserError
from runs import checkpoint, fit, options, run_alone
from state_parts import Level

DRAWN = ("--data.environment", "state_parts.Level", "--data.num_workers", "1", "--data.rewards")
REWARDS = '[{"function": "state_parts.drawn"}]'
THREE = ("--trainer.max_epochs", "3", "--export.at_end", "false", "--evaluation.every_n_epochs", "0")
TWO_RANKS = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.randn(()))]


def at_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(distributed, "world", lambda: (rank, size))


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    draw()  # half of a pair of normal numbers is kept inside of two of the generators
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_a_new_rank_draws_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    states = rank_states(EchoSuite())
    expected = draw()
    found = []
    for rank in (0, 1, 2, 1):
        at_rank(monkeypatch, rank, 3)
        restore_random(states, [0, 8])
        found.append(draw())
    assert found[0] == expected
    assert found[1] == found[3]
    firsts = [numbers[i] for numbers in found[:3] for i in range(5)]
    assert len(set(firsts)) == 15
    restore_random(states, [0, 16])
    assert draw() != found[1]  # and other ones later in the run


@pytest.mark.parametrize(("size", "expected"), [(1, [10]), (2, [10, 11]), (3, [10, 11, 10]), (5, [10, 11, 10, 11, 10])])
def test_curricula_are_dealt_out_over_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int, expected: list[int]
) -> None:
    states: list[dict[str, Any]] = [
        {"environment": {"level": 10, "played": 0}},
        {"environment": {"level": 11, "played": 0}},
    ]
    levels = []
    for rank in range(size):
        at_rank(monkeypatch, rank, size)
        suite = Level()
        restore_suite(suite, states)
        levels.append(suite.level)
    assert levels == expected
    assert ("is of 2 ranks" in caplog.text) == (size != 2)
    assert ("ranks 1 to 1 are dropped" in caplog.text) == (size == 1)


def test_a_suite_without_a_state_has_none_to_restore(caplog: pytest.LogCaptureFixture) -> None:
    assert rank_states(EchoSuite())[0]["environment"] is None
    restore_suite(EchoSuite(), [{"environment": {"level": 1}}])
    suite = Level()
    restore_suite(suite, rank_states(EchoSuite()))
    assert suite.level == 0
    assert "starts afresh" in caplog.text
    restore_suite(suite, [])  # a checkpoint of an older version


def test_a_state_that_could_not_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unloadable({"a": [1, (2.0, None, "x")], "b": torch.ones(2)}) == ""
    assert unloadable({"a": Path("x")})
    assert unloadable({"a": lambda: 0})
    suite = Level()
    check_suite(suite, in_processes=False)
    monkeypatch.setattr(Level, "state_dict", lambda _: {"path": Path("x")})
    with pytest.raises(UserError, match=r"Level.state_dict\(\).*Use numbers"):
        check_suite(suite, in_processes=False)
    with pytest.raises(UserError, match=r"Level.state_dict\(\).*Use numbers"):
        rank_states(suite)


def test_the_others_hear_of_a_rank_whose_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would wait for it in the next collective."""
    monkeypatch.setattr(rank_state.distributed, "gather", lambda value: [value, "no luck"])
    with pytest.raises(UserError, match="no luck"):
        rank_states(Level())


def test_a_curriculum_in_worker_processes_is_refused(tiny_lm: str, tmp_path: Path, capsys: Any) -> None:
    check_suite(EchoSuite(), in_processes=True, is_ahead=True)
    with pytest.raises(UserError, match="staleness 0"):
        check_suite(Level(), in_processes=False, is_ahead=True)
    with pytest.raises(SystemExit):
        fit(tiny_lm, tmp_path, *DRAWN, REWARDS, "--data.workers", "processes")
    assert "--data.workers to threads" in capsys.readouterr().err


def same(one: Path, other: Path, rank_count: int) -> None:
    """Two runs ended with the same weights, levels and random numbers."""
    first, second = checkpoint(one), checkpoint(other)
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)
    left, right = (found["RolloutDataModule"]["ranks"] for found in (first, second))
    assert len(left) == len(right) == rank_count
    assert [rank["environment"] for rank in left] == [rank["environment"] for rank in right]
    torch.testing.assert_close([r["random"]["torch"] for r in left], [r["random"]["torch"] for r in right])
    assert [r["random"]["python"][1].tolist() for r in left] == [r["random"]["python"][1].tolist() for r in right]


def test_a_resumed_run_draws_what_the_whole_one_drew(tiny_lm: str, tmp_path: Path) -> None:
    """Rewards from all three global generators, and tasks that become harder."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    fit(tiny_lm, whole, *DRAWN, REWARDS, *THREE)
    fit(tiny_lm, again, *DRAWN, REWARDS, *THREE, "--ckpt_path", str(whole / "checkpoints" / "iteration_000001.ckpt"))
    same(whole, again, 1)
    assert checkpoint(whole)["RolloutDataModule"]["ranks"][0]["environment"] == {"level": 6, "played": 24}


@pytest.mark.slow
def test_two_ranks_have_their_own_levels_and_numbers(tiny_lm: str, tmp_path: Path) -> None:
    more = (*DRAWN, REWARDS, *THREE, *TWO_RANKS)
    saved = str(tmp_path / "whole" / "checkpoints" / "iteration_000001.ckpt")
    for folder, resume in (("whole", ()), ("again", ("--ckpt_path", saved))):
        code, output = run_alone(options(tiny_lm, tmp_path / folder, *more, *resume))
        assert code == 0, output
    same(tmp_path / "whole", tmp_path / "again", 2)
    ranks = checkpoint(tmp_path / "whole")["RolloutDataModule"]["ranks"]
    assert [rank["environment"]["played"] for rank in ranks] == [12, 12]
    assert not torch.equal(*(rank["random"]["torch"] for rank in ranks))
