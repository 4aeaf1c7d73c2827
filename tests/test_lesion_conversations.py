"""Conversations about synthetic lesions: true where they say so, and wrong only on record."""

import json
import logging
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lit_agentrl.datamodules import ConversationDataModule, LesionConversations
from lit_agentrl.envs.dermatology import ConversationSuite, SyntheticLesions, SyntheticQuestions
from lit_agentrl.envs.dermatology.lesion_attributes import draw_lesion
from lit_agentrl.envs.dermatology.lesion_classes import LESION_LABELS
from lit_agentrl.envs.dermatology.synthetic_answers import (
    KINDS,
    OPENING,
    QUESTIONS,
    Answer,
    Statement,
    compose,
    corrupt,
)
from lit_agentrl.envs.dermatology.synthetic_questions import LesionTalk, talks
from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import Edge, FactScorer, KnowledgeGraph, build_graph, facts
from lit_agentrl.models.image_reader import load_image_reader
from vlm_folders import build_vlm_folder

MELANOMA = next(lesion for n in range(7) if (lesion := draw_lesion(0, "train", n, "easy")).label == "melanoma")


def made_up(disease: str, relation: str) -> list[str]:
    """Facts that only these tests know: two of each relation for each disease, no two diseases alike."""
    return [f"{relation} {number} of {disease}" for number in (1, 2)]


def records(error_rate: float, grade: str = "medium", count: int = 210, turns: int = 6) -> list[LesionTalk]:
    return talks(SyntheticLesions(count, 0, 0, grade), "train", error_rate, turns)


@pytest.fixture(scope="module")
def scorer() -> FactScorer:
    return FactScorer(build_graph(["notes"])[0])


def test_answers_state_the_facts_they_are_given():
    rng = random.Random(0)
    texts = {kind: compose(kind, MELANOMA, made_up, rng).text() for kind in KINDS}
    assert texts["treatment"] == "Melanoma is treated with treated_with 1 of melanoma and treated_with 2 of melanoma."
    assert texts["risk"].startswith("The risk factors of melanoma are has_risk_factor 1 of melanoma and")
    assert re.fullmatch(
        r"Melanoma is an? is_a \d of melanoma\. It may become may_become \d of melanoma\.", texts["outlook"]
    )
    assert texts["confusion"].startswith("Melanoma may be confused with differs_from 1")


def test_answers_say_what_the_picture_shows():
    what = MELANOMA.attributes
    for kind in ("name", "features"):
        text = compose(kind, MELANOMA, facts, random.Random(0)).text()
        assert what.border in text
        assert all(name in text for name in what.structures)
    assert all(name in text for name in what.colours)


def test_what_is_seen_but_not_typical_is_not_said_to_be_a_sign():
    """A melanoma with borrowed cysts is described without them."""
    lesion = replace(
        MELANOMA, attributes=replace(MELANOMA.attributes, structures=("milia-like cysts",), border="sharp")
    )
    text = compose("name", lesion, facts, random.Random(0)).text()
    assert "cysts" not in text
    assert "sharp" not in text
    assert "melanoma" in text


@pytest.mark.parametrize("grade", ["easy", "hard"])
def test_without_errors_no_answer_contradicts_the_graph(scorer, grade):
    for record in records(0.0, grade):
        for turn in record.turns:
            assert turn.answer.error is None
            score = scorer.score(turn.answer.text(), record.lesion.label, turn.question)
            assert score.contradiction == 0, turn.answer.text()
            stated = [name for part in turn.answer.statements for name in part.objects]
            assert score.support == (1 if stated else 0), turn.answer.text()


def test_every_error_contradicts_the_graph(scorer):
    for record in records(1.0):
        for turn in record.turns:
            score = scorer.score(turn.answer.text(), record.lesion.label, turn.question)
            assert (score.contradiction > 0) == (turn.answer.error is not None), turn.answer.text()


def test_errors_are_what_differs_from_clean_text_and_nothing_else():
    clean, wrong = records(0.0), records(0.4)
    assert len(clean) == len(wrong)
    num_errors = 0
    for before, after in zip(clean, wrong, strict=True):
        assert [turn.question for turn in before.turns] == [turn.question for turn in after.turns]
        for was, now in zip(before.turns, after.turns, strict=True):
            error = now.answer.error
            if error is None:
                assert was.answer == now.answer
                continue
            num_errors += 1
            pairs = [
                (a, b)
                for old, new in zip(was.answer.statements, now.answer.statements, strict=True)
                for a, b in zip(old.objects, new.objects, strict=True)
                if a != b
            ]
            assert pairs == [(error.right, error.wrong)]
            assert error.wrong in now.answer.text()
    total = sum(len(record.turns) for record in clean)
    assert num_errors / total == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / total) ** 0.5)


def test_a_wrong_fact_is_true_of_its_source_and_not_of_the_disease_or_the_picture():
    for record in records(1.0, "hard"):
        what, label = record.lesion.attributes, record.lesion.label
        for turn in record.turns:
            if (error := turn.answer.error) is not None:
                assert error.source in LESION_LABELS
                assert error.wrong in facts(error.source, error.relation)
                assert error.wrong not in facts(label, error.relation)
                assert error.wrong not in (label, *what.colours, *what.structures, what.border)


def test_an_answer_without_facts_stays_as_it_is():
    answer = Answer((Statement("This looks like melanoma."),))
    assert corrupt(answer, MELANOMA, facts, random.Random(0)) == answer


def test_all_diseases_are_asked_about_in_all_openings():
    opened = Counter((record.lesion.label, record.turns[0].kind) for record in records(0.0))
    assert opened == {(label, kind): 10 for label in LESION_LABELS for kind in OPENING}
    for record in records(0.0):
        kinds = [turn.kind for turn in record.turns]
        assert len(set(kinds)) == len(kinds) <= len(KINDS)
        assert all(turn.question in QUESTIONS[turn.kind] for turn in record.turns)


def test_provenance_is_json_and_counts_every_error():
    source = LesionConversations(SyntheticLesions(70, 0, 0), error_rate=0.5)
    found = json.loads(json.dumps([record.provenance() for record in source.records]))
    assert sum(len(item["errors"]) for item in found) == source.num_errors > 0
    for item, record in zip(found, source.records, strict=True):
        assert item["source"] == "synthetic"
        assert item["image"] == record.sample.id
        for error in item["errors"]:
            assert error["wrong"] in record.turns[error["turn"]].answer.text()


def test_conversations_show_the_picture_once_and_say_how_many_answers_are_wrong(caplog):
    source = LesionConversations(SyntheticLesions(21, 0, 0), most_turns=3, system="S")
    with caplog.at_level(logging.INFO):
        conversations = list(source.conversations())
    assert f"{source.num_answers} answers, {source.num_errors} with a wrong fact" in caplog.text
    assert {len(turns) for turns in conversations} == {1, 2, 3}
    for record, turns in zip(source.records, conversations, strict=True):
        observations = [observation for observation, _ in turns]
        assert [len(observation.images) for observation in observations] == [1] + [0] * (len(turns) - 1)
        assert isinstance(observations[0].images[0], np.ndarray)
        assert (observations[0].images[0] == record.sample.shown()).all()
        assert [observation.system for observation in observations] == ["S"] + [""] * (len(turns) - 1)
        assert [answer for _, answer in turns] == [turn.answer.text() for turn in record.turns]


def test_held_out_questions_are_judged_true(scorer):
    source = SyntheticQuestions(SyntheticLesions(7, 0, 14))
    suite = ConversationSuite(source, scorer_as_judge(scorer))
    tasks = suite.tasks("test")
    assert len(tasks) == 14 * len(OPENING)
    assert {suite.sample(task).label for task in tasks[:7]} == set(LESION_LABELS)
    for task in tasks:
        environment = suite.make(task)
        assert len(environment.reset().images) == 1
        ((_, answer),) = suite.walkthrough(task, held_out=True)
        environment.step(answer)
        assert environment.metrics["contradiction"] == 0
        assert environment.metrics["reference_f1"] == 1


def scorer_as_judge(scorer: FactScorer):
    class Judge:
        def knows(self, disease: str) -> bool:
            return disease in LESION_LABELS

        def score(self, answer: str, disease: str, question: str):
            return scorer.score(answer, disease, question)

    return Judge()


def test_held_out_questions_are_of_other_lesions():
    lesions = SyntheticLesions(21, 0, 21)
    trained = {record.sample.id for record in talks(lesions, "train", 0.0, 1)}
    asked = {sample.id for sample in SyntheticQuestions(lesions).samples("test")}
    assert len(asked) == 63
    assert not any(id.startswith(tuple(trained)) for id in asked)


def test_a_graph_of_ones_own_is_asked(tmp_path):
    edges = [
        Edge(disease, relation, name, "mine")
        for disease in LESION_LABELS
        for relation in ("treated_with", "has_feature", "is_a", "has_risk_factor", "differs_from")
        for name in (f"thing {relation.replace('_', ' ')} {disease}",)
    ]
    path = tmp_path / "mine.graphml"
    KnowledgeGraph(edges).save(path)
    source = LesionConversations(SyntheticLesions(21, 0, 0), graph=str(path), error_rate=0, most_turns=6)
    treatments = {
        (record.lesion.label, turn.answer.text())
        for record in source.records
        for turn in record.turns
        if turn.kind == "treatment"
    }
    assert treatments
    for label, text in treatments:
        assert text == f"{label[0].upper()}{label[1:]} is treated with thing treated with {label}."


def test_a_graph_that_lacks_a_disease_is_refused(tmp_path):
    path = tmp_path / "small.graphml"
    KnowledgeGraph([Edge("melanoma", "treated_with", "surgery", "mine")]).save(path)
    with pytest.raises(UserError, match="knows nothing about 'actinic keratosis'"):
        SyntheticQuestions(SyntheticLesions(), graph=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_rate": -0.1}, "error_rate=-0.1"),
        ({"error_rate": 1.5}, "0 \\(none\\) to 1"),
        ({"error_rate": float("nan")}, "error_rate=nan"),
        ({"most_turns": 0}, "most_turns=0"),
        ({"most_turns": 7}, "1 to 6"),
        ({"graph": "missing.graphml"}, "cannot be read"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LesionConversations(SyntheticLesions(7, 0, 0), **options)


def test_rows_of_a_vision_model_hold_the_picture_and_train_the_answers(tmp_path):
    """The picture's placeholders stand in the row once, whatever the number of turns, and outside the loss."""
    folder = build_vlm_folder(tmp_path / "vlm", "llava")
    source = LesionConversations(SyntheticLesions(7, 0, 0, size=32), most_turns=2, error_rate=0)
    data = ConversationDataModule(source, folder, max_length=2048)
    data.setup("fit")
    reader = load_image_reader(folder)
    assert reader is not None
    assert data.iteration_metrics == {"conversations": 7.0, "too_long": 0.0}
    for record, (row,) in zip(source.records, data.rows, strict=True):
        picture = reader.read(record.sample.shown())
        assert len(row.images) == 1
        places = [at for at, token in enumerate(row.token_ids) if token == reader.image_token_id]
        assert len(places) == picture.text.count(reader.placeholder) > 0
        trained = data.tokenizer.decode(
            [row.token_ids[at] for at, is_action in enumerate(row.action_mask) if is_action]
        )
        assert all(turn.answer.text() in trained for turn in record.turns)
        assert record.turns[0].question not in trained
