"""Card games: exact formulas, disjoint numbers, what a play pays, an independent referee for blackjack, pictures."""

import random
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest

from lit_agentrl.envs.blackjack import (
    BlackjackEnvironment,
    BlackjackRewards,
    BlackjackSuite,
    is_natural,
    is_soft,
    total,
)
from lit_agentrl.envs.cards import RANKS, ranks_of, value
from lit_agentrl.envs.formula import evaluate, make_target
from lit_agentrl.envs.points import EZPointsSuite, Points24Suite
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment

SPLITS = ("train", "val", "test")
EZ_PAIRS = {(2, 6), (2, 10), (3, 4), (3, 9), (4, 8), (5, 7), (6, 6)}  # 2 + 10, 3 + 9, 4 + 8, 5 + 7, 6 + 6, 2 * 6, 3 * 4


def test_what_cards_count():
    assert [value(rank) for rank in RANKS] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10]
    assert [value(rank, faces_as_ten=False) for rank in RANKS] == list(range(1, 14))
    assert ranks_of(10) == ["10", "J", "Q", "K"]
    assert ranks_of(12, faces_as_ten=False) == ["Q"]


@pytest.mark.parametrize(
    ("formula", "result"),
    [
        ("2 + 3 * 4", 14),
        ("( 2 + 3 ) * 4", 20),
        ("8 / ( 3 - 8 / 3 )", 24),
        ("7 - 2 - 1", 4),
        ("8 / 4 / 2", 1),
        ("1 / 3 * 3", 1),  # exactly
        ("1 2", None),  # not 12: the original joins the tokens and lets Python read them
        ("2 * * 3", None),  # not 8
        ("8 / / 3", None),
        ("5 / ( 3 - 3 )", None),
        ("( 2 + 3", None),
        ("2 + 3 )", None),
        ("2 +", None),
        ("- 2", None),
        ("( )", None),
        ("", None),
    ],
)
def test_the_value_of_a_formula(formula, result):
    assert evaluate(formula.split()) == result


def test_formulas_are_worth_what_python_says():
    """Random formulas against Python's own arithmetic on exact numbers."""
    rng = random.Random(0)
    for _ in range(200):
        tokens = [str(rng.randint(1, 9))]
        for _ in range(rng.randint(1, 5)):
            tokens += [rng.choice("+-*"), str(rng.randint(1, 9))]
        position = rng.randrange(0, len(tokens), 2)
        tokens[position:] = ["(", *tokens[position:], ")"]
        assert evaluate(tokens) == Fraction(eval(" ".join(tokens)))


def test_which_numbers_make_a_target():
    """Two cards by hand; four by the known count of the 24 game."""
    pairs = {p for p in combinations_with_replacement(range(1, 11), 2) if make_target(p, 12, "+*")}
    assert pairs == EZ_PAIRS
    assert sum(len(Points24Suite().numbers(split)) for split in SPLITS) == 566
    for numbers in [(1, 5, 5, 5), (3, 3, 8, 8), (1, 3, 4, 6), (6, 6, 6, 6)]:
        tokens = make_target(numbers, 24, "+-*/")
        assert evaluate(tokens) == 24
        assert sorted(int(token) for token in tokens if token.isdecimal()) == sorted(numbers)
    assert make_target((1, 1, 1, 1), 24, "+-*/") is None
    assert make_target((4, 2, 3), 24, "*+") == ["4", "*", "2", "*", "3"]  # no bracket that is not needed


@pytest.mark.parametrize("suite", [EZPointsSuite(), EZPointsSuite(faces_as_ten=False), Points24Suite()])
def test_no_numbers_are_in_two_splits(suite):
    drawn = {}
    for split in SPLITS:
        hands = [suite._cards(task) for task in suite.tasks(split)]
        drawn[split] = {tuple(sorted(value(rank, suite._faces_as_ten) for rank in hand)) for hand in hands}
        assert drawn[split] <= set(suite.numbers(split))
        assert drawn[split]
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


def test_the_little_that_ezpoints_has():
    """5, 1 and 1 of its 7 pairs; all of them everywhere where that is asked for, from seeds that differ."""
    assert [len(EZPointsSuite().numbers(split)) for split in SPLITS] == [5, 1, 1]
    shared = EZPointsSuite(disjoint=False)
    assert all(set(shared.numbers(split)) == EZ_PAIRS for split in SPLITS)
    hands = {split: [shared._cards(task) for task in shared.tasks(split)[:64]] for split in SPLITS}
    assert hands["train"] != hands["val"] != hands["test"] != hands["train"]
    seen = {rank for hand in hands["train"] for rank in hand}
    assert {"J", "Q", "K"} <= seen


@pytest.mark.parametrize("suite", [EZPointsSuite(), EZPointsSuite(action_format="tagged"), Points24Suite()])
def test_walkthroughs_win_with_offered_tokens(suite):
    for split in SPLITS:
        for task in suite.tasks(split)[:40]:
            environment, rewards = suite.make(task), []
            environment.reset()
            for observation, reply in suite.walkthrough(task, held_out=True):
                assert any(reply in (token, f"<action>{token}</action>") for token in observation.actions)
                observation, reward, done = environment.step(reply)
                rewards.append(reward)
                assert observation.valid is True
            assert (rewards, done) == ([0.0] * (len(rewards) - 1) + [10.0], True)
            assert environment.success


def ez(*cards: str, **options):
    """An episode with these two cards."""
    suite = EZPointsSuite(**options)
    suite._cards = lambda task: cards
    environment = suite.make("train-0")
    environment.reset()
    return environment


@pytest.mark.parametrize(
    ("tokens", "reward", "said"),
    [
        ("10 + 2 =", 10.0, "That is 12."),  # the king counts 10
        ("2 + 10 =", 10.0, "That is 12."),
        ("2 * 10 =", 0.0, "That is 20."),
        ("10 =", 0.0, "Not every card is used."),
    ],
)
def test_what_a_formula_pays(tokens, reward, said):
    environment = ez("K", "2")
    for token in tokens.split()[:-1]:
        assert environment.step(token)[1:] == (0.0, False)
    observation, paid, done = environment.step("=")
    assert (paid, done, environment.success) == (reward, True, reward == 10.0)
    assert observation.text.startswith(f"{said}\nCards: K, 2\nFormula: {tokens}")


def test_rewards_are_options():
    environment = ez("K", "2", wrong_reward=-1.0, invalid_reward=-0.5, solved_reward=1.0)
    assert environment.step("11")[1:] == (-0.5, False)
    assert [environment.step(token)[1] for token in ["2", "*", "10", "="]] == [0.0, 0.0, 0.0, -1.0]
    winner = ez("K", "2", solved_reward=1.0)
    assert [winner.step(token)[1] for token in ["2", "+", "10", "="]] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("before", "token"),
    [("", "+"), ("", "="), ("", "3"), ("", "K"), ("2", "10"), ("2", "2"), ("2 +", "2"), ("2 +", "="), ("2 + 10", "+")],
)
def test_tokens_that_cannot_come_next_change_nothing(before, token):
    """No two numbers in a row, no card twice, no operator without a number after it."""
    environment = ez("K", "2")
    for played in before.split():
        assert environment.step(played)[0].valid is True
    anchor = environment.anchor
    observation, reward, done = environment.step(token)
    assert (observation.valid, reward, done, environment.anchor) == (False, 0.0, False, anchor)
    assert token not in observation.actions


@pytest.mark.parametrize("reply", ["2 + 10 =", "2 or 10", "12", "two", "", "the number 2"])
def test_a_reply_is_one_token(reply):
    assert ez("K", "2").step(reply)[0].valid is False


def test_a_random_player_always_comes_to_an_end():
    """Whatever is offered can be taken: no formula is endless, none gets stuck; each state has its own anchor."""
    suite = Points24Suite()
    for seed, task in enumerate(suite.tasks("train")[:100]):
        rng, environment, done = random.Random(seed), suite.make(task), False
        observation, anchors = environment.reset(), []
        while not done:
            anchors.append(environment.anchor)
            observation, _, done = environment.step(rng.choice(observation.actions))
            assert observation.valid is True
        assert len(set(anchors)) == len(anchors) <= 12
        assert observation.actions == ()


def test_what_is_said_of_points():
    suite = Points24Suite()
    first = suite.make("train-0").reset()
    cards = ", ".join(suite._cards("train-0"))
    assert first.text == f"Cards: {cards}\nFormula: empty\nActions: {', '.join(first.actions)}"
    assert (first.task, first.state) == (f"Make 24 of {cards}.", f"Cards: {cards}\nFormula: empty")
    assert "worth 24" in first.system


def referee(player: list[int], dealer: list[int]) -> float:
    """Who wins, from the values of the final hands, counting every ace both ways."""

    def best(hand: list[int]) -> int:
        sums = [sum(hand) + 10 * aces for aces in range(hand.count(1) + 1)]
        return max((s for s in sums if s <= 21), default=0)

    if best(player) == 0:
        return -1.0
    return float(best(player) > best(dealer)) - float(best(player) < best(dealer))


def test_blackjack_agrees_with_an_independent_referee():
    """Over random play: the pay is what the shown hands are worth, and the dealer stops at 17 and not before."""
    suite, outcomes = BlackjackSuite(num_train=400), {-1.0: 0, 0.0: 0, 1.0: 0}
    for seed, task in enumerate(suite.tasks("train")):
        rng, environment, done = random.Random(seed), suite.make(task), False
        environment.reset()
        while not done:
            observation, reward, done = environment.step(rng.choice(["hit", "stick"]))
        hands = [line.split(": ")[1].split(" (")[0].split(", ") for line in observation.state.splitlines()]
        dealer, player = ([value(rank) for rank in hand if rank != "?"] for hand in hands)
        assert reward == referee(player, dealer)
        assert environment.success is (reward == 1.0)
        assert player == [value(rank) for rank in environment._deck[2 : 2 + len(player)]]
        if total(hands[1]) <= 21:
            assert total(hands[0]) >= 17 > total(hands[0][:-1]) or len(hands[0]) == 2
            assert hands[0][2:] == list(environment._deck[2 + len(player) :][: len(hands[0]) - 2])
        outcomes[reward] += 1
    assert min(outcomes.values()) > 10


def deal(*deck: str, natural: float = 1.0, bust: float = -1.0) -> BlackjackEnvironment:
    """An episode with the dealer's two cards, the player's two, and what follows."""
    environment = BlackjackEnvironment(
        deck, rewards=BlackjackRewards(1.0, -1.0, bust, natural), invalid_reward=0.0, scale=0, action_format="plain"
    )
    environment.reset()
    return environment


@pytest.mark.parametrize(
    ("deck", "actions", "reward", "options"),
    [
        ("10 7 10 8", "stick", 1.0, {}),
        ("10 7 10 7", "stick", 0.0, {}),
        ("10 8 10 7", "stick", -1.0, {}),
        ("10 6 10 2 10", "stick", 1.0, {}),  # the dealer has to draw and goes over
        ("10 6 10 2 5", "stick", -1.0, {}),  # draws to 21
        ("A 6 10 8", "stick", 1.0, {}),  # a soft 17 is 17: the dealer stops
        ("10 7 10 6 9", "hit", -1.0, {}),
        ("10 7 10 6 9", "hit", 0.0, {"bust": 0.0}),  # as the copy in verl-agent pays
        ("10 7 A 6 10 2", "hit hit stick", 1.0, {}),  # 17 soft, 17 hard, 19
        ("10 7 A K", "stick", 1.0, {}),
        ("10 7 A K", "stick", 1.5, {"natural": 1.5}),
        ("10 7 5 6 10", "hit stick", 1.0, {"natural": 1.5}),  # 21 of three cards is no natural
        ("A K A K", "stick", 0.0, {"natural": 1.5}),
    ],
)
def test_deals_worked_out_by_hand(deck, actions, reward, options):
    environment = deal(*deck.split(), **options)
    *first, last = [environment.step(action) for action in actions.split()]
    assert all(outcome[1:] == (0.0, False) for outcome in first)
    assert last[1:] == (reward, True)
    assert environment.success is (reward > 0)


def test_what_hands_count():
    hands = {"A K": 21, "A A": 12, "A A 9": 21, "A A 10": 12, "A 5 6": 12, "10 5 6": 21, "K Q 5": 25}
    assert {hand: total(hand.split()) for hand in hands} == hands
    assert [is_soft(hand.split()) for hand in hands] == [True, True, True, False, False, False, False]
    assert [is_natural(hand.split()) for hand in hands] == [True] + [False] * 6


def test_what_is_said_of_a_deal():
    """The dealer's second card stays hidden until the player sticks."""
    environment = deal("9", "8", "A", "6", "3")
    assert environment._observe("", None).text == "Dealer: 9\nYou: A, 6 (17, an ace counts 11)\nActions: hit, stick"
    assert environment.step("hit")[0].text == "Dealer: 9\nYou: A, 6, 3 (20, an ace counts 11)\nActions: hit, stick"
    for reply in ["hit or stick", "hits", "stand", ""]:
        observation, reward, done = environment.step(reply)
        assert (observation.valid, reward, done) == (False, 0.0, False)
    text = environment.step("STICK.")[0].text
    assert text.startswith("You win.\nDealer: 9, 8 (17)\nYou: A, 6, 3 (20, an ace counts 11)")


def test_deals_depend_on_the_seed_alone_and_splits_share_no_deck():
    suite, small = BlackjackSuite(), BlackjackSuite(num_train=1, num_val=0, num_test=3)
    decks = [suite.make(task)._deck for split in SPLITS for task in suite.tasks(split)]
    assert len(set(decks)) == len(decks) == 704
    assert small.make("test-2").anchor == suite.make("test-2").anchor
    assert {rank for deck in decks for rank in deck} == set(RANKS)


@pytest.mark.parametrize(
    ("text", "image"),
    [
        (EZPointsSuite(), EZPointsSuite(observation="image", scale=1)),
        (Points24Suite(), Points24Suite(observation="image", scale=1)),
        (BlackjackSuite(), BlackjackSuite(observation="image", scale=1)),
    ],
)
def test_pictures_show_what_the_text_says(text, image):
    """Two pictures are equal exactly if the cards and formulas are; the text beside them names no card."""
    pictures: dict[str, bytes] = {}
    for task in text.tasks("train")[:60]:
        rng, one, other = random.Random(0), text.make(task), image.make(task)
        observations, done = (one.reset(), other.reset()), False
        while not done:
            shown, (picture,) = observations[0].state, observations[1].images
            assert pictures.setdefault(shown, picture.tobytes()) == picture.tobytes()
            assert (picture.dtype, picture.ndim, picture.shape[2]) == ("uint8", 3, 3)
            assert observations[1].state == ""
            assert observations[0].task.startswith(observations[1].task[:-1])
            action = rng.choice(observations[0].actions)
            (first, reward, done), second = one.step(action), other.step(action)
            assert second[1:] == (reward, done)
            observations = first, second[0]
    assert len(set(pictures.values())) == len(pictures) > 30


@pytest.mark.parametrize("suite", [EZPointsSuite(), Points24Suite(), BlackjackSuite()])
def test_snapshot_and_restore(suite):
    for task in suite.tasks("val")[:20]:
        environment = suite.make(task)
        assert isinstance(environment, RestorableEnvironment)
        saved, anchor, futures = environment.snapshot(), environment.anchor, []
        first = environment.reset()
        for _ in range(2):
            rng, observation, done, future = random.Random(1), first, False, []
            while not done:
                observation, reward, done = environment.step(rng.choice(observation.actions))
                future.append((observation, reward, environment.anchor, environment.success))
            futures.append(future)
            environment.restore(saved)
            assert (environment.anchor, environment.success) == (anchor, False)
        assert futures[0] == futures[1]


@pytest.mark.parametrize("suite", [EZPointsSuite, Points24Suite, BlackjackSuite])
def test_refuses_what_can_not_work(suite):
    for options, message in [
        ({"num_test": -1}, "num_test=-1"),
        ({"scale": 33}, "scale=33"),
        ({"observation": "video"}, "observation='video'"),
        ({"action_format": "json"}, "action_format='json'"),
    ]:
        with pytest.raises(UserError, match=message):
            suite(**options)
    with pytest.raises(UserError, match="'train-512' is not a task"):
        suite().make("train-512")
    if suite is not BlackjackSuite:
        with pytest.raises(UserError, match="'test-0' is held out"):
            suite().walkthrough("test-0")
