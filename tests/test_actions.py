"""What a reply means: one decision, taken after the thoughts."""

import pytest

from lit_agentrl.envs.actions import as_reply, check_action_format, format_hint, parse_action
from lit_agentrl.errors import UserError


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("go north", "go north"),
        ("\n  go north \nbecause it is cold", "go north"),
        ("", None),
        (" \n\t", None),
        ("<action>go</action>", "<action>go</action>"),  # plain is plain: the environment will not know it
    ],
)
def test_plain_takes_the_first_line(reply, action):
    assert parse_action(reply, "plain") == action


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("<action>go north</action>", "go north"),
        ("<think>east?</think><action> go north\n</action>", "go north"),
        ("<ACTION>Go North</ACTION>", "Go North"),
        ("<action>a</action> no, <action>b</action>", "b"),  # the last decision counts
        ("<think><action>a</action></think> so <action>b</action>", "b"),
        ("<think><action>a</action></think>", None),  # an idea is no decision
        ("<think>for ever <action>a</action>", None),  # cut thoughts
        ("</action>a<action>", None),  # tags the wrong way round
        ("<action>a", None),
        ("<action> </action>", None),
        ("go north", None),
        ("", None),
    ],
)
def test_tagged_takes_the_last_block_after_the_thoughts(reply, action):
    assert parse_action(reply, "tagged") == action


@pytest.mark.parametrize("action_format", ["plain", "tagged"])
def test_a_walkthroughs_reply_means_its_action(action_format):
    assert parse_action(as_reply("put mug 1 in/on desk 1", action_format), action_format) == "put mug 1 in/on desk 1"
    assert format_hint(action_format)


def test_an_unknown_format_is_refused():
    with pytest.raises(UserError, match="plain, tagged"):
        check_action_format("json")
