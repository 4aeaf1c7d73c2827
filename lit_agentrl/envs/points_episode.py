"""One formula of EZPoints or Points24: which tokens can come next, what they make, and what that pays."""

from __future__ import annotations

from collections.abc import Hashable

from lit_agentrl.envs.actions import ActionFormat, format_hint
from lit_agentrl.envs.cards import value
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.formula import PRECEDENCE, evaluate
from lit_agentrl.envs.sprites import GREEN, WHITE, Image, draw_cards, draw_text, stack
from lit_agentrl.types import Observation


class PointsEnvironment:
    """One formula.

    Args:
        cards: The ranks.
        target: What to make.
        operators: Those allowed.
        faces_as_ten: J, Q and K count 10.
        scale: The size of the pictures; 0 for text.
        action_format: What a reply has to look like.
        rewards: For a right formula, a wrong one, and a reply that is no possible token.
    """

    def __init__(
        self,
        cards: tuple[str, ...],
        *,
        target: int,
        operators: str,
        faces_as_ten: bool,
        scale: int,
        action_format: ActionFormat,
        rewards: tuple[float, float, float],
    ) -> None:
        self._cards = cards
        self._numbers = [str(value(rank, faces_as_ten)) for rank in cards]
        self._target = target
        self._operators = operators
        self._faces_as_ten = faces_as_ten
        self._scale = scale
        self._action_format = action_format
        self._rewards = rewards
        self._formula: tuple[str, ...] = ()

    def reset(self) -> Observation:
        """The cards; the rules are the system prompt."""
        faces = "10" if self._faces_as_ten else "11, 12 and 13"
        system = (
            f"Make a formula that uses each card once and is worth {self._target}. A counts 1; J, Q, K count {faces}. "
            f"Add one token at a time: a number, one of {' '.join(self._operators)}"
            f"{', a bracket' if self._num_brackets else ''}, or = to finish.\n{format_hint(self._action_format)}"
        )
        return self._observe("", None, system)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The formula with the new token; what it pays; and whether it was `=`."""
        solved, wrong, invalid = self._rewards
        token = choose(action, self._offered(), self._action_format)
        if token is None:
            return self._observe("That is not one of the actions.", False), invalid, False
        self._formula = (*self._formula, token)
        if token != "=":
            return self._observe("", True), 0.0, False
        made = evaluate(self._formula[:-1])
        result = "That divides by zero." if made is None else f"That is {made}."
        result = "Not every card is used." if self._left() else result
        return self._observe(result, True), solved if self.success else wrong, True

    @property
    def anchor(self) -> Hashable:
        """The cards and the formula."""
        return self._cards, self._formula

    @property
    def success(self) -> bool:
        """Whether the formula is finished, uses every card and is worth the target."""
        return self._formula[-1:] == ("=",) and not self._left() and evaluate(self._formula[:-1]) == self._target

    def snapshot(self) -> object:
        """The formula so far."""
        return self._formula

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot."""
        assert isinstance(snapshot, tuple)
        self._formula = snapshot

    def close(self) -> None:
        """Nothing is held."""

    @property
    def _num_brackets(self) -> int:
        """Pairs of brackets that are ever needed: more would only make endless formulas."""
        return len(self._cards) - 2

    def _left(self) -> list[str]:
        """The numbers of the cards that are not used yet."""
        left = list(self._numbers)
        for token in self._formula:
            if token.isdecimal():
                left.remove(token)
        return left

    def _offered(self) -> tuple[str, ...]:
        """The tokens that can come next."""
        last, left = self._formula[-1:], tuple(dict.fromkeys(self._left()))
        if last == ("=",):
            return ()
        opened = self._formula.count("(")
        unclosed = opened - self._formula.count(")")
        if not last or last[0] == "(" or last[0] in PRECEDENCE:
            return (*left, *(("(",) if opened < self._num_brackets else ()))
        return (
            *(self._operators if left else ()),
            *((")",) if unclosed else ("=",)),
        )

    def _observe(self, feedback: str, valid: bool | None, system: str = "") -> Observation:
        task = f"Make {self._target}." if self._scale else f"Make {self._target} of {', '.join(self._cards)}."
        state = "" if self._scale else f"Cards: {', '.join(self._cards)}\nFormula: {' '.join(self._formula) or 'empty'}"
        offered = self._offered()
        actions = f"Actions: {', '.join(offered)}" if offered else ""
        return Observation(
            "\n".join(filter(None, [feedback, state or task, actions])),
            system,
            state=state,
            task=task,
            actions=offered,
            valid=valid,
            images=(self._draw(),) if self._scale else (),
        )

    def _draw(self) -> Image:
        """The cards, and below them the formula, in a picture that is as large for every formula."""
        longest = 5 * len(self._cards)  # two digits, an operator and two brackets a card
        formula = draw_text("".join(self._formula).ljust(longest), WHITE, GREEN, self._scale)
        return stack([draw_cards(self._cards, self._scale, len(self._cards)), formula], GREEN, 4 * self._scale)
