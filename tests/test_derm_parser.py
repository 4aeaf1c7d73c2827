"""What an answer names, and whether a reply has the form that was asked for."""

import pytest

from lit_agentrl.envs.dermatology.form import Form
from lit_agentrl.envs.dermatology.labels import DISEASES, SYNONYMS
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.envs.dermatology.prompts import HEADINGS
from lit_agentrl.errors import UserError


@pytest.fixture
def parse() -> AnswerParser:
    return AnswerParser(DISEASES)


@pytest.mark.parametrize("label", DISEASES)
def test_every_label_is_read_in_any_dress(parse, label):
    for text in (label, label.upper(), f" {label}.\n", f"**{label}**", label.replace(" ", "-"), f"It is a {label}!"):
        assert parse(f"<think>hm</think><answer>{text}</answer>") == label


def test_synonyms_of_the_standard_table_name_one_label_each(parse):
    for label in DISEASES:
        for word in SYNONYMS[label]:
            assert parse(f"<answer>{word}</answer>") == label


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("<answer>seborrheic keratosis</answer>", "seborrheic keratosis"),
        ("<answer>An actinic keratosis, I think</answer>", "actinic keratosis"),
        ("<answer>keratosis</answer>", None),  # either
        ("<answer>seborrheic keratosis or actinic keratosis</answer>", None),
        ("<answer>melanoma or nevus</answer>", None),
        ("<answer>melanoma, a malignant melanoma</answer>", "melanoma"),  # two names of one
        ("<answer>melanocytic</answer>", None),
        ("<answer>moleskin</answer>", None),  # not a whole word
        ("<answer>melanomata</answer>", None),
        ("<answer>melanocytic nevus, not melanoma</answer>", "melanocytic nevus"),
        ("<answer>non-melanoma</answer>", None),
        ("<answer>not a melanoma</answer>", None),
        ("<answer>a knot; melanoma</answer>", "melanoma"),
        ("<answer>mole</answer>", "melanocytic nevus"),
        ("<answer>BCC</answer>", "basal cell carcinoma"),
        ("<answer></answer>", None),
        ("<answer>...</answer>", None),
        ("<answer>psoriasis</answer>", None),
        ("melanoma", None),
        ("", None),
    ],
)
def test_traps_inside_the_answer(parse, reply, label):
    assert parse(reply) == label


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("<answer>melanoma</answer> no: <answer>nevus</answer>", "melanocytic nevus"),  # the last one wins
        ("<answer>melanoma</answer><answer>psoriasis</answer>", None),  # even where it names nothing
        ("<answer>melanoma</answer><answer></answer>", None),
        ("<answer>melanoma</answer><answer>nevus", "melanoma"),  # an open one is none
        ("<answer>melanoma <answer>nevus</answer>", "melanocytic nevus"),
        ("<think><answer>melanoma</answer></think>", None),  # an idea, not an answer
        ("<think>maybe <answer>melanoma</answer></think><answer>nevus</answer>", "melanocytic nevus"),
        ("<think>never closed <answer>melanoma</answer>", "melanoma"),
        ("<ANSWER>melanoma</Answer>", "melanoma"),
        ("<think>a</think>\n<answer>\nmelanoma\n</answer>\n", "melanoma"),
        ("<thinking>melanoma</thinking>", None),
        ("melanoma</answer>", None),
    ],
)
def test_traps_around_the_answer(parse, reply, label):
    assert parse(reply) == label


def test_the_prompt_is_never_read():
    """A prompt that shows the tags and all names would be an answer: a parser is given the reply alone."""
    from derm_parts import Pixels
    from lit_agentrl.envs import RecognitionSuite

    suite = RecognitionSuite(Pixels(), prompt="{labels}. Reply as <{think}>..</{think}><{answer}>melanoma</{answer}>")
    task = next(task for task in suite.tasks("train") if suite.sample(task).label == "melanoma")
    environment = suite.make(task)
    shown = environment.reset()
    assert suite.parser(shown.system) == "melanoma"
    _, reward, _ = environment.step("I do not know.")
    assert (reward, environment.success, environment.metrics["parsed"]) == (0.0, False, 0.0)


def test_without_strictness_a_reply_without_tags_is_read_whole_but_for_its_thoughts():
    parse = AnswerParser(DISEASES, strict=False)
    assert parse("This is a melanoma.") == "melanoma"
    assert parse("<think>no nevus</think> This is a melanoma.") == "melanoma"
    assert parse("<think>nevus</think>") is None
    assert parse("melanoma? <answer>psoriasis</answer>") is None  # a tag that is there is what counts


def test_the_longest_name_is_taken_where_one_lies_in_another():
    parse = AnswerParser(["keratosis", "seborrheic keratosis", "eczema"])
    assert parse.match("a seborrheic keratosis") == "seborrheic keratosis"
    assert parse.match("some keratosis") == "keratosis"
    assert parse.match("seborrheic keratosis, a keratosis") is None


def test_tags_and_synonyms_are_the_users():
    parse = AnswerParser(["a b", "c"], {"a b": ["Grüße"], "c": ["x-y"]}, think_tag="thinking", answer_tag="final")
    assert parse("<thinking>c</thinking><final>GRÜSSE</final>") == "a b"
    assert parse("<final>(x y)</final>") == "c"
    assert parse("<answer>c</answer>") is None


@pytest.mark.parametrize(
    ("labels", "synonyms", "message"),
    [
        (["melanoma"], {}, "at least two"),
        (["melanoma", "Melanoma"], {}, "no other one has"),
        (["melanoma", "..."], {}, "no other one has"),
        (["melanoma", "nevus"], {"eczema": ["rash"]}, "eczema"),
        (["melanoma", "nevus"], {"melanoma": ["spot"], "nevus": ["spot"]}, "already means"),
        (["melanoma", "nevus"], {"melanoma": ["nevus"]}, "already means"),
    ],
)
def test_names_that_would_mean_two_things_are_refused(labels, synonyms, message):
    with pytest.raises(UserError, match=message):
        AnswerParser(labels, synonyms)


def test_a_given_synonym_comes_before_the_standard_one():
    parse = AnswerParser(["melanocytic nevus", "halo nevus"], {"halo nevus": ["mole"]})
    assert parse.match("mole") == "halo nevus"
    assert parse.match("nevi") == "melanocytic nevus"


@pytest.mark.parametrize(
    ("reply", "score", "is_exact"),
    [
        ("<think>dark</think><answer>melanoma</answer>", 1.0, True),
        ("\n<think>dark</think>\n <answer>melanoma</answer>\n", 1.0, True),
        ("<think>dark</think> so <answer>melanoma</answer>", 0.8, False),
        ("<think> </think><answer>melanoma</answer>", 0.7, False),
        ("<think>dark</think><answer></answer>", 1.0, False),
        ("Well <think>dark</think><answer>melanoma</answer>", -0.5, False),
        ("<think>dark</think><answer>melanoma</answer>.", -0.5, False),
        ("<answer>melanoma</answer><think>dark</think>", -0.5, False),
        ("<think>dark</think><answer>a</answer><answer>b</answer>", -0.5, False),
        ("<think>a<think>b</think></think><answer>c</answer>", -0.5, False),
        ("<Think>dark</Think><answer>melanoma</answer>", -0.5, False),
        ("<answer>melanoma</answer>", -0.5, False),
        ("<think>dark</think><answer>melanoma", -0.5, False),
        ("", -0.5, False),
    ],
)
def test_form(reply, score, is_exact):
    form = Form()
    assert form.score(reply) == pytest.approx(score)
    assert form.is_exact(reply) is is_exact


def test_headings_count_by_share():
    form = Form("thinking", "answer", HEADINGS)
    both = "1. Colour and pigmentation: brown. 2. TEXTURE AND SURFACE: smooth."
    assert form.score(f"<thinking>{both}</thinking><answer>x</answer>") == pytest.approx(0.5 + 0.2 + 0.3 * 2 / 3)
    assert form.score("<thinking>brown</thinking><answer>x</answer>") == pytest.approx(0.7)
    assert form.score("<think>brown</think><answer>x</answer>") == -0.5
