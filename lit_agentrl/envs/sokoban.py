"""Sokoban: push boxes onto targets. Boards come from seeds, each with its shortest solution."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lit_agentrl.envs.actions import ActionFormat, check_action_format, format_hint
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.seeded import SeededTasks, refuse_held_out, replay
from lit_agentrl.envs.sokoban_boards import ACTIONS, State, digest, is_solved, move, push_distances, render
from lit_agentrl.envs.sokoban_rooms import BoardOptions, Puzzle, make_puzzle
from lit_agentrl.envs.sprites import ObservationKind, check_observation, draw_tiles
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Observation, Split, WalkthroughSuite

TASK = "Push every box onto a target."
RULES = (
    "You play Sokoban. Step against a box to push it; it moves if there is no wall and no other box behind it. "
    "Boxes cannot be pulled."
)
LEGENDS: dict[ObservationKind, str] = {
    "text": "Symbols: # wall, _ floor, O target, X box, √ box on a target, P you, S you on a target.",
    "image": (
        "The picture shows brick walls, dark floor, targets as red rings, boxes in yellow (with a red frame on a "
        "target), and you in green (with red corners on a target)."
    ),
}


@dataclass(frozen=True, slots=True)
class SokobanRewards:
    """What a step pays: the numbers of gym-sokoban."""

    step: float
    box: float
    solved: float


class SokobanSuite(WalkthroughSuite):
    """Sokoban boards, in splits that share none, not even shifted, turned or mirrored.

    A board belongs to one split by a hash of its content (3/5 of all boards train, 1/5 val, 1/5 test), and each split
    draws from seeds of its own. Boards are made on demand, in about a millisecond with the defaults.

    Every one of the four actions is `valid` at any time; one that is blocked changes nothing but costs its step. A
    reply that is not exactly an action (in `action_format`) is not valid, changes nothing and costs the same.

    Args:
        size: Rows and columns of the board, the border included.
        num_boxes: Boxes, and targets.
        min_moves: The fewest moves that a board's shortest solution may have.
        max_moves: The most.
        num_train: Training boards.
        num_val: Validation boards.
        num_test: Test boards.
        observation: `text`, a symbol a cell, or `image`, [size * 8 * scale] pixels squared.
        scale: Pixels of the picture for each of the 8 x 8 of a tile.
        action_format: What a reply has to look like.
        step_reward: Paid for every step.
        box_reward: Paid for a box that comes onto a target; taken back for one that leaves.
        solved_reward: Paid when all boxes are on targets.
        end_on_deadlock: End the episode when a box is where it can never reach a target, such as a corner.
        max_search: States that the search for a solution may look at; boards that need more are not used.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        size: int = 6,
        num_boxes: int = 1,
        min_moves: int = 3,
        max_moves: int = 10,
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 128,
        observation: ObservationKind = "text",
        scale: int = 4,
        action_format: ActionFormat = "plain",
        step_reward: float = -0.1,
        box_reward: float = 1.0,
        solved_reward: float = 10.0,
        end_on_deadlock: bool = False,
        max_search: int = 20_000,
    ) -> None:
        check_action_format(action_format)
        check_observation(observation)
        for name, value, low, high in (
            ("size", size, 5, 20),
            ("num_boxes", num_boxes, 1, (size - 2) ** 2 // 4),
            ("min_moves", min_moves, 1, max_moves),
            ("scale", scale, 1, 32),
            ("max_search", max_search, 100, 10_000_000),
        ):
            if not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: allowed are {low} to {high}.")
        self._tasks = SeededTasks(num_train, num_val, num_test)
        self._options = BoardOptions(size, num_boxes, min_moves, max_moves, max_search)
        self._rewards = SokobanRewards(step_reward, box_reward, solved_reward)
        self._observation: ObservationKind = observation
        self._scale = scale
        self._action_format: ActionFormat = action_format
        self._end_on_deadlock = end_on_deadlock
        self._puzzles: dict[str, Puzzle] = {}

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's boards, the same for the same options however many the other splits have."""
        return self._tasks.ids(split)

    def make(self, task: str) -> SokobanEnvironment:
        """A fresh episode of the board."""
        return SokobanEnvironment(
            self._puzzle(task),
            rewards=self._rewards,
            scale=self._scale if self._observation == "image" else 0,
            action_format=self._action_format,
            end_on_deadlock=self._end_on_deadlock,
        )

    def kind(self, task: str) -> str:
        """How long the shortest solution is, in fives: `moves_1_5`, `moves_6_10`, ..."""
        first = (len(self._puzzle(task).solution) - 1) // 5 * 5 + 1
        return f"moves_{first}_{first + 4}"

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """A shortest solution, each reply with the observation before it.

        Args:
            task: The board.
            held_out: Allow a board that is not of the train split.

        Raises:
            UserError: The board is held out and `held_out` is False, so that no demonstration leaks by accident.
        """
        refuse_held_out(task, held_out)
        return replay(self.make(task), self._puzzle(task).solution, self._action_format)

    def digest(self, task: str) -> str:
        """A hash that two tasks share exactly if one board is the other, shifted, turned or mirrored."""
        puzzle = self._puzzle(task)
        return digest(puzzle.room, puzzle.start)

    def _puzzle(self, task: str) -> Puzzle:
        split, seed = self._tasks.seed(task)
        puzzle = self._puzzles.get(task)
        if puzzle is None:  # two threads may both get here: they make equal boards, and the first is kept
            puzzle = self._puzzles.setdefault(task, make_puzzle(seed, split, self._options))
        return puzzle


class SokobanEnvironment:
    """One episode of a board.

    Args:
        puzzle: The board.
        rewards: What a step pays.
        scale: The size of the pictures; 0 for text.
        action_format: What a reply has to look like.
        end_on_deadlock: End when a box can never reach a target.
    """

    def __init__(
        self, puzzle: Puzzle, *, rewards: SokobanRewards, scale: int, action_format: ActionFormat, end_on_deadlock: bool
    ) -> None:
        self._room = puzzle.room
        self._state = puzzle.start
        self._rewards = rewards
        self._scale = scale
        self._action_format = action_format
        self._alive = push_distances(puzzle.room) if end_on_deadlock else puzzle.room.floor

    def reset(self) -> Observation:
        """The task and the board; the rules are the system prompt."""
        legend = LEGENDS["image" if self._scale else "text"]
        system = f"{RULES}\n{legend}\n{format_hint(self._action_format)}"
        return self._observe(f"Task: {TASK}", None, system)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The board after the action, what it pays, and whether all is solved (or stuck, where that ends it)."""
        before, room = self._state, self._room
        chosen = choose(action, ACTIONS, self._action_format)
        if chosen is not None:
            self._state = move(room, before, room.moves[chosen])
        reward = self._rewards.step
        reward += self._rewards.box * (len(self._state.boxes & room.targets) - len(before.boxes & room.targets))
        if self.success:
            return self._observe("Every box is on a target.", True), reward + self._rewards.solved, True
        if any(box not in self._alive for box in self._state.boxes):
            return self._observe("A box is stuck.", chosen is not None), reward, True
        feedback = "That is not one of the actions." if chosen is None else ""
        if chosen is not None and self._state == before:
            feedback = f"You cannot go {chosen}."
        return self._observe(feedback, chosen is not None), reward, False

    @property
    def anchor(self) -> Hashable:
        """The board, exactly, whatever is shown of it."""
        return "\n".join(render(self._room, self._state))

    @property
    def success(self) -> bool:
        """Whether every box is on a target."""
        return is_solved(self._room, self._state)

    def snapshot(self) -> object:
        """The state of the episode."""
        return self._state

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this board."""
        assert isinstance(snapshot, State)
        self._state = snapshot

    def close(self) -> None:
        """Nothing is held."""

    def _observe(self, feedback: str, valid: bool | None, system: str = "") -> Observation:
        rows = render(self._room, self._state)
        state = "" if self._scale else "\n".join(map(" ".join, rows))
        text = "\n".join(filter(None, [feedback, state, f"Actions: {', '.join(ACTIONS)}"]))
        images = (draw_tiles(rows, self._scale),) if self._scale else ()
        return Observation(text, system, state=state, task=TASK, actions=ACTIONS, valid=valid, images=images)
