"""What each rank has of its own in a checkpoint: its global random generators, and its environment's state."""

from __future__ import annotations

import io
import logging
import pickle
import random
from typing import Any

import numpy as np
import torch

from lit_agentrl import distributed
from lit_agentrl.errors import UserError
from lit_agentrl.types import EnvironmentSuite, StatefulSuite

log = logging.getLogger(__name__)


def rank_states(suite: EnvironmentSuite) -> list[dict[str, Any]]:
    """Every rank's state, in rank order; all ranks call it, because rank 0 alone writes.

    Raises:
        UserError: On all ranks, where the state of any rank's suite could not be loaded again.
    """
    own = {"random": random_state(), "environment": suite_state(suite)}
    reasons = distributed.gather(unloadable(own["environment"]))
    if reason := next((reason for reason in reasons if reason), None):
        raise UserError(_refusal(suite, reason))
    return distributed.gather(own)


def check_suite(suite: EnvironmentSuite, *, in_processes: bool, is_ahead: bool = False) -> None:
    """Refuse a suite whose state would be lost, before anything is played.

    Raises:
        UserError: It changes in worker processes, or for rollouts ahead of training that a resumed run collects again,
            or its state could not be loaded again.
    """
    if not isinstance(suite, StatefulSuite):
        return
    if in_processes:
        raise UserError(
            f"{type(suite).__name__} has a state that episodes change, but each worker process has a copy of its own, "
            "which no checkpoint sees. Set --data.workers to threads."
        )
    if is_ahead:
        raise UserError(
            f"{type(suite).__name__} has a state that episodes change, but rollouts collected ahead are in no "
            "checkpoint: a resumed run would play them a second time. Set --data.staleness 0."
        )
    if reason := unloadable(suite_state(suite)):
        raise UserError(_refusal(suite, reason))


def restore_suite(suite: EnvironmentSuite, states: list[dict[str, Any]]) -> None:
    """Give this rank's suite its state; on another number of ranks, rank r that of rank r modulo those saved."""
    if not states or not isinstance(suite, StatefulSuite):
        return
    rank, size = distributed.share()
    if size != len(states) and rank == 0:
        lost = f", and those of ranks {size} to {len(states) - 1} are dropped" if size < len(states) else ""
        log.warning(
            "The checkpoint is of %d ranks and this run has %d: rank r goes on with the state that %s had on rank r "
            "modulo %d%s.",
            *(len(states), size, type(suite).__name__, len(states), lost),
        )
    if (state := states[rank % len(states)]["environment"]) is None:
        log.warning("The checkpoint holds no state of %s: it starts afresh.", type(suite).__name__)
    else:
        suite.load_state_dict(state)


def restore_random(states: list[dict[str, Any]], seed: list[int]) -> None:
    """Set this rank's global generators; a rank that the saved run did not have seeds its own by `seed` and number."""
    rank, _ = distributed.share()
    if rank < len(states):
        set_random_state(states[rank]["random"])
        return
    word = int(np.random.SeedSequence([*seed, rank]).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)  # the global generator is what other people's code draws from
    torch.manual_seed(word)


def random_state() -> dict[str, Any]:
    """The global generators of Python, NumPy and PyTorch, in plain containers and tensors."""
    version, words, gauss = random.getstate()
    drawn: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (
            torch.from_numpy(drawn["state"]["key"].astype(np.int64)),
            int(drawn["state"]["pos"]),
            int(drawn["has_gauss"]),
            float(drawn["gauss"]),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what `random_state` gave; a generator that it does not hold is left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def suite_state(suite: EnvironmentSuite) -> dict[str, Any] | None:
    """The suite's state; None of one that has none."""
    return suite.state_dict() if isinstance(suite, StatefulSuite) else None


def unloadable(state: object) -> str:
    """Why a checkpoint that holds `state` could be written but not read; empty where it can."""
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def _refusal(suite: EnvironmentSuite, reason: str) -> str:
    return (
        f"{type(suite).__name__}.state_dict() gives what a checkpoint could not be loaded with: {reason}. Use numbers, "
        "strings, None, tensors, and lists, tuples and dicts of them."
    )
