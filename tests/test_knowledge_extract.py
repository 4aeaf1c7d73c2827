"""The extractor: each pattern gives its relation, what gave nothing is listed, the notes are read whole."""

import time

import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import RELATIONS, extract_edges, extract_with_model, facts, note_diseases, notes_part, state
from lit_agentrl.knowledge.grammar import MOST_OBJECT_WORDS
from lit_agentrl.knowledge.names import name_key
from lit_agentrl.knowledge.notes import read_notes

KNOWN = {"melanoma": "melanoma", "nevus": "melanocytic nevus", "melanocytic nevus": "melanocytic nevus"}


def find(name: str) -> str | None:
    return KNOWN.get(" ".join(name_key(name)))


def read(text: str) -> list[tuple[str, str, str]]:
    return [edge.triple for edge in extract_edges(text, "test", find).edges]


@pytest.mark.parametrize(
    ("sentence", "relation", "objects"),
    [
        ("Melanoma shows asymmetry and rapid growth.", "has_feature", ["asymmetry", "rapid growth"]),
        ("A melanoma may have an ulcer.", "has_feature", ["ulcer"]),
        (
            "Melanoma is characterized by bleeding, crusting, and a nodule.",
            "has_feature",
            ["bleeding", "crusting", "nodule"],
        ),
        ("The signs of melanoma include asymmetry.", "has_feature", ["asymmetry"]),
        ("Under dermoscopy, melanoma usually shows a blue-white veil.", "has_feature", ["blue-white veil"]),
        ("Melanoma has the colours black or blue.", "has_colour", ["black", "blue"]),
        ("The colors of melanomas are black and blue-grey.", "has_colour", ["black", "blue-grey"]),
        ("Melanoma is often colored black.", "has_colour", ["black"]),
        ("Melanoma has an irregular and notched border.", "has_border", ["irregular", "notched"]),
        ("The border of melanoma is irregular.", "has_border", ["irregular"]),
        ("Melanoma most men fear occurs on the back.", "", []),
        ("Melanoma usually occurs on the back and the legs.", "occurs_on", ["back", "legs"]),
        ("Melanoma is commonly found on the trunk.", "occurs_on", ["trunk"]),
        ("Melanoma is linked to sunburn and fair skin.", "has_risk_factor", ["sunburn", "fair skin"]),
        ("Sunburn and fair skin raise the risk of melanoma.", "has_risk_factor", ["sunburn", "fair skin"]),
        ("The main risk factors for melanoma are sunburn.", "has_risk_factor", ["sunburn"]),
        ("Melanoma can be treated by excision, if it is found early.", "treated_with", ["excision"]),
        ("Most nevi are removed with a scalpel.", "treated_with", ["scalpel"]),
        ("Nevi may rarely turn into melanoma.", "may_become", ["melanoma"]),
        ("Melanoma is a type of skin cancer that needs care.", "is_a", ["skin cancer"]),
        ("Nevi are coded as D22.9.", "coded_as", ["D22.9"]),
        ("Melanoma has the ICD-10 code C43.9.", "coded_as", ["C43.9"]),
        ("Melanoma is often mistaken for a nevus.", "differs_from", ["nevus"]),
        ("Melanoma resembles nevi but not warts.", "differs_from", ["nevi"]),
        ("Some melanomas mimic seborrheic keratosis.", "differs_from", ["seborrheic keratosis"]),
    ],
)
def test_patterns(sentence: str, relation: str, objects: list[str]) -> None:
    found = read(sentence)
    assert [(edge[1], edge[2]) for edge in found] == [(relation, name) for name in objects]
    assert {edge[0] for edge in found} <= {"melanoma", "melanocytic nevus"}


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("Melanoma is not treated with creams.", "it denies something"),
        ("Nevi never become melanoma.", "it denies something"),
        ("Melanoma shows no hairs.", "it denies something"),
        ("Melanoma can't be treated with creams.", "it denies something"),
        ("Sunburn does not raise the risk of melanoma.", "it denies something"),
        ("The colours of melanoma are never green.", "it denies something"),
        ("Is melanoma a skin cancer?", "it is a question"),
        ("The patient has a fever.", "its subject is no known disease"),
        ("Doctors cut it out.", "no pattern fits"),
        ("It shows asymmetry.", "its subject is no known disease"),
        ("Melanoma shows one two three four five six seven eight.", "its object is too long for a name"),
        (f"Melanoma shows {'very ' * 300}red spots.", "it is longer than 1000 characters"),
        ("", ""),
    ],
)
def test_what_gave_no_fact_is_listed_with_the_reason(sentence: str, reason: str) -> None:
    found = extract_edges(sentence, "test", find)
    assert found.edges == []
    assert [item.reason for item in found.unread] == ([reason] if reason else [])
    assert all(item.text in (sentence, sentence.strip()) or reason for item in found.unread)


def test_of_a_list_only_the_name_that_is_too_long_is_left_out() -> None:
    seven = "spots of two three four five six"
    found = extract_edges(f"Melanoma shows asymmetry, {seven} seven and {seven}.", "test", find)
    assert [edge.object for edge in found.edges] == ["asymmetry", seven]
    assert [(item.text, item.reason) for item in found.unread] == [
        (f"{seven} seven", "its object is too long for a name")
    ]
    assert len(seven.split()) == MOST_OBJECT_WORDS


def test_headings_pronouns_lines_and_frequency() -> None:
    text = """% a comment: Melanoma shows nothing of this.
# Rose spot

It is usually found on the face. Its colours
are red and pink. Melanoma shows ulceration. It may become metastatic.
- It is also called erythema rosarum.
- The lesion is treated with cryotherapy.

# Melanoma
It is a skin cancer."""
    found = extract_edges(text, "book", find)
    said = [(edge.subject, edge.relation, edge.object, edge.reference, edge.frequency) for edge in found.edges]
    assert said == [
        ("rose spot", "occurs_on", "face", "line 4", "usually"),
        ("rose spot", "has_colour", "red", "line 4", None),
        ("rose spot", "has_colour", "pink", "line 4", None),
        ("melanoma", "has_feature", "ulceration", "line 5", None),
        ("melanoma", "may_become", "metastatic", "line 5", None),  # it: the last that was named
        ("melanoma", "treated_with", "cryotherapy", "line 7", None),
        ("melanoma", "is_a", "skin cancer", "line 10", None),
    ]
    assert found.names == {"rose spot": [], "melanoma": ["erythema rosarum"]}
    assert found.num_sentences == 7
    assert found.unread == []
    assert found.edges[1].sentence == "Its colours are red and pink."


def test_equal_texts_give_equal_facts() -> None:
    text = "# Nevus\nIt shows hairs and symmetry. It may become melanoma."
    assert extract_edges(text, "a", find) == extract_edges(text, "a", find)


@pytest.mark.parametrize("text", ["word " * 40_000, "a" * 200_000, "is a " * 30_000, ", and " * 30_000, "# " * 50_000])
def test_hostile_texts_take_no_time(text: str) -> None:
    start = time.perf_counter()
    assert extract_edges(f"Melanoma shows {text}", "test", find).edges == []
    assert time.perf_counter() - start < 5


def test_the_notes_are_read_whole() -> None:
    found = read_notes()
    assert found.unread == []
    assert note_diseases() == [
        "actinic keratosis", "basal cell carcinoma", "dermatofibroma", "melanocytic nevus", "melanoma",
        "seborrheic keratosis", "vascular lesion",
    ]  # fmt: skip
    for disease in note_diseases():
        edges = [edge for edge in found.edges if edge.subject == disease]
        assert 12 <= len({edge.sentence for edge in edges}) <= 20
        assert len(edges) >= 10
        assert {edge.relation for edge in edges} >= set(RELATIONS) - {"may_become"}
        assert all(edge.reference.startswith(f"{disease.replace(' ', '_')}.txt, line ") for edge in edges)
        assert not {edge.object for edge in edges if edge.relation == "differs_from"} & {disease}
    assert notes_part().counts["sentences without a fact"] == 0


def test_what_is_stated_is_read_back() -> None:
    """`state` and the extractor are inverse on every fact of the notes."""
    for disease in note_diseases():
        for relation in RELATIONS:
            if names := facts(disease, relation):
                found = extract_edges(f"# {disease}\n{state(disease, relation, names)}", "test")
                assert [edge.triple for edge in found.edges] == [(disease, relation, name) for name in names]


def test_facts_by_any_name_of_a_class() -> None:
    assert facts("Melanocytic naevi", "may_become") == ["melanoma"]
    assert facts("BCC", "coded_as") == ["C44.91"]
    assert facts("dermatofibroma", "may_become") == []
    assert "irregular" in facts("melanoma", "has_border")
    facts("melanoma", "has_border").clear()  # a list of the caller's own
    assert facts("melanoma", "has_border")
    with pytest.raises(UserError, match=r"no note is about 'measles'. The notes are about: actinic keratosis"):
        facts("measles", "has_colour")
    with pytest.raises(UserError, match="not in the schema"):
        facts("melanoma", "cures")


def test_a_models_lines_are_checked() -> None:
    prompts = []

    def generate(given):
        prompts.extend(given)
        return [
            "Rose spot | has_colour | red\n"
            "- `rose spots | Treated with | Cold Water`\n"
            "rose spot | cures | red\n"
            "measles | has_colour | red\n"
            "rose spot | has_colour | green\n"
            "rose spot | is_a | rose spot\n"
            "rose spot | has_feature | red spots that are treated with cold water daily\n"
            "rose spot has a colour\n"
            "rose spot | has_colour | red\n"
            "rose spot | | red\n",
            "NONE",
        ]

    text = "# Rose spot\nRed spots that are treated with cold water daily. Two. Three. Four.\n\nFive."
    found = extract_with_model(text, "book", generate, find)
    assert [edge.triple for edge in found.edges] == [
        ("rose spot", "has_colour", "red"),
        ("rose spot", "treated_with", "cold water"),
    ]
    assert {(edge.source, edge.reference) for edge in found.edges} == {("book", "line 2, by a model")}
    assert [item.reason for item in found.unread] == [
        "its relation is not in the schema",
        "its subject is no known disease",
        "its object does not stand in the text",
        "its object is its subject",
        "its object is too long for a name",
        "it is not `subject | relation | object`",
        "it is not `subject | relation | object`",
    ]
    assert len(prompts) == 2
    assert "Text: Rose spot: Red spots that are treated with cold water daily. Two. Three. Four.\n" in prompts[0]
    assert "Text: Rose spot: Five.\n" in prompts[1]
    assert all(f"{name}: the object is" in prompts[0] for name in RELATIONS)


def test_a_model_answers_each_prompt() -> None:
    with pytest.raises(UserError, match="gave 1 answers to 2 prompts"):
        extract_with_model("A. B.", "book", lambda prompts: [""], find, sentences_a_prompt=1)
    assert extract_with_model("", "book", lambda prompts: pytest.fail("asked"), find).edges == []
