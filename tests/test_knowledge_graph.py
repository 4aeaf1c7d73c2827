"""The graph: names that mean one thing are one node, the hash knows no order, files bring back every fact."""

import json
import pickle
import random

import networkx as nx
import pytest

from knowledge_parts import NAMES, TRIPLES, small_graph
from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import RELATIONS, Edge, KnowledgeGraph, Part, UnknownDiseaseError, join
from lit_agentrl.knowledge.names import name_key, tidy

FORMATS = ("graphml", "parquet")


@pytest.fixture(params=FORMATS)
def ending(request) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow", reason="needs the parquet extra")
    return request.param


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("melanocytic nevi", "Melanocytic Naevus"),
        ("actinic keratoses", "actinic keratosis"),
        ("tumours of the skin", "tumor of the skin"),
        ("Seborrhoeic keratosis", "seborrheic keratosis"),
        ("Bowen's disease", "bowen disease"),
        ("well-defined", "well defined"),
        ("dermatofibromata", "dermatofibroma"),
        ("biopsies", "biopsy"),
        ("Leser-Trélat", "leser trelat"),
        ("patches", "patch"),
        ("maculae", "macula"),
        ("haemangioma", "hemangiomas"),
    ],
)
def test_spellings_of_a_name_are_one(one: str, other: str) -> None:
    assert name_key(one) == name_key(other) != ()


@pytest.mark.parametrize(
    ("one", "other"),
    [("C43.9", "C43"), ("nevus", "neve"), ("pus", "pu"), ("abscess", "absces"), ("blue nevus", "nevus")],
)
def test_other_names_stay_apart(one: str, other: str) -> None:
    assert name_key(one) != name_key(other)


def test_a_name_is_kept_in_lower_case_and_a_code_as_it_is() -> None:
    assert tidy("  Malignant\n Melanoma. ") == "malignant melanoma"
    assert tidy("C43.9") == "C43.9"
    assert tidy("OMIM:155600") == "OMIM:155600"
    assert tidy("nul\x00 and \ud800 half") == "nul and half"


def test_the_schema_is_fixed() -> None:
    assert list(RELATIONS) == [
        "has_feature", "has_colour", "has_border", "occurs_on", "has_risk_factor",
        "treated_with", "may_become", "is_a", "coded_as", "differs_from",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"'cures' is not in the schema. Relations: has_feature"):
        Edge("a", "cures", "b", "hand")


@pytest.mark.parametrize("name", ["", " ", "?!", "word " * 25])
def test_a_name_needs_words(name: str) -> None:
    with pytest.raises(UserError, match="1 to 24 words"):
        Edge("melanoma", "is_a", name, "hand")
    with pytest.raises(UserError, match="the subject of a fact"):
        Edge(name, "is_a", "tumour", "hand")


def test_relations_and_sources_of_a_pair_are_all_kept() -> None:
    edges = [
        Edge("nevus", "may_become", "melanoma", "notes"),
        Edge("nevus", "differs_from", "melanoma", "notes"),
        Edge("Nevi", "may_become", "melanoma", "book", "page 3", "rarely"),
        Edge("nevi", "may_become", "melanoma", "notes"),
    ]
    graph = KnowledgeGraph(edges)
    assert len(graph) == 3  # the last says what the first does
    assert graph.network.number_of_edges("nevus", "melanoma") == 3
    assert graph.objects("naevus", "may_become") == ["melanoma"]
    assert {(edge.source, edge.frequency) for edge in graph.edges} == {("notes", None), ("book", "rarely")}
    assert isinstance(graph.network, nx.MultiDiGraph)


def test_find_knows_plurals_spellings_and_synonyms() -> None:
    graph = small_graph()
    assert graph.find("Rose Spots") == "rose spot"
    assert graph.find("erythema-rosarum") == "rose spot"
    assert graph.find("gray tumors") == "grey tumour"
    assert graph.find("excision") == "surgical excision"
    assert graph.find("rose") is None
    assert graph.find("") is None
    assert graph.diseases() == ["blue spot", "grey tumour", "rose spot"]


def test_a_synonym_of_two_names_or_with_facts_of_its_own_is_none() -> None:
    edges = [Edge("a", "is_a", "x", "hand"), Edge("b", "is_a", "x", "hand")]
    graph = KnowledgeGraph(edges, {"a": ["mole", "b", "alpha"], "b": ["moles"], "stranger": ["beta"]})
    assert graph.synonyms == {"a": ("alpha",)}
    assert graph.find("mole") is None
    assert graph.find("b") == "b"


def test_hops_follow_the_direction_nearest_first() -> None:
    graph = small_graph()
    one = graph.edges_of("rose spot")
    assert [edge.triple for edge in one] == sorted((t[0].lower(), *t[1:]) for t in TRIPLES if t[0] == "Rose spot")
    two = graph.edges_of("rose spot", hops=2)
    assert two[: len(one)] == one
    assert {edge.subject for edge in two[len(one) :]} == {"blue spot", "grey tumour"}
    assert len(two) == len(TRIPLES)
    assert graph.edges_of("rose spot", hops=3) == two  # no fact twice, and cycles end
    loop = KnowledgeGraph([Edge("a", "differs_from", "b", "hand"), Edge("b", "differs_from", "a", "hand")])
    assert len(loop.edges_of("a", hops=3)) == 2
    with pytest.raises(UserError, match="hops=4 is out of range: allowed are 1 to 3"):
        graph.edges_of("rose spot", hops=4)


def test_an_unknown_disease_is_said_with_what_is_near() -> None:
    graph = small_graph()
    with pytest.raises(UnknownDiseaseError, match=r"19 facts, 3 diseases.*'rose spott'. Near it: rose spot.*build-kg"):
        graph.disease("rose spott")
    with pytest.raises(UserError, match="No name in it is near"):
        graph.edges_of("measles")
    with pytest.raises(UnknownDiseaseError):
        graph.disease("red")  # a name, but nothing is said about it


def test_a_graph_needs_facts() -> None:
    with pytest.raises(UserError, match="needs facts"):
        KnowledgeGraph([])
    with pytest.raises(UserError, match="needs facts"):
        KnowledgeGraph([Edge("nevus", "is_a", "nevi", "hand")])  # about itself


def test_the_hash_knows_no_order_and_sees_every_change() -> None:
    edges = [Edge(*triple, "hand") for triple in TRIPLES]
    want = KnowledgeGraph(edges, NAMES).sha256
    for seed in range(5):
        random.Random(seed).shuffle(edges)
        names = dict(random.Random(seed).sample(sorted(NAMES.items()), len(NAMES)))
        assert KnowledgeGraph(edges + edges[:3], names).sha256 == want
    others = [
        KnowledgeGraph(edges[1:], NAMES),
        KnowledgeGraph([*edges[1:], Edge(*edges[0].triple, "elsewhere")], NAMES),
        KnowledgeGraph([*edges[1:], Edge(*edges[0].triple, "hand", frequency="often")], NAMES),
        KnowledgeGraph(edges, NAMES | {"ulceration": ["sore"]}),
        KnowledgeGraph(edges),
    ]
    assert len({want, *(graph.sha256 for graph in others)}) == 6


def test_a_file_brings_back_every_fact_with_its_provenance(tmp_path, ending) -> None:
    awkward = "says \"<&>' ]]> \u00e9 \u4e2d\U0001f600"
    edges = [
        Edge("nevus", "may_become", "melanoma", "notes", "a.txt, line 3", "rarely", awkward),
        Edge("nevus", "may_become", "melanoma", "book"),
        Edge("nevus", "differs_from", "melanoma", "notes"),
        Edge("melanoma", "coded_as", "C43.9", "icd", "C43.9"),
        Edge('<"quoted"> & co', "is_a", "tumour]]>", "hand", "\x00\x0b tabs\tand\r\nlines", "1/2"),
    ]
    graph = KnowledgeGraph(edges, {"nevus": ['mole "x"', "naevus & <mark>"], "melanoma": ["é"]})
    path = tmp_path / "deep" / f"kg.{ending}"
    graph.save(path)
    again = KnowledgeGraph.load(path)
    assert again.edges == graph.edges
    assert again.synonyms == graph.synonyms
    assert again.sha256 == graph.sha256
    assert {edge.sentence for edge in again.edges} == {None, awkward}
    assert again.find('mole "x"') == "nevus"
    assert [item.name for item in path.parent.iterdir()] == [path.name]  # no temporary file is left
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_graphml_is_read_by_others(tmp_path) -> None:
    """networkx alone gets nodes and relations: nothing of ours is needed to read the file."""
    small_graph().save(tmp_path / "kg.graphml")
    plain = nx.read_graphml(tmp_path / "kg.graphml", force_multigraph=True)
    relations = {(start, data["relation"], end) for start, end, data in plain.edges(data=True)}
    assert relations == {(start.lower(), relation, end) for start, relation, end in TRIPLES}
    assert json.loads(plain.nodes["rose spot"]["synonyms"]) == ["erythema rosarum"]


XMLNS = "http://graphml.graphdrawing.org/xmlns"
NODE = f'<graphml xmlns="{XMLNS}"><graph edgedefault="directed"><node id="&b;"/></graph></graphml>'
BOMB = f'<!DOCTYPE graphml [<!ENTITY a "{"a" * 1000}"><!ENTITY b "{"&a;" * 1000}">]>{NODE}'.encode()
OUTSIDE = f'<!DOCTYPE graphml [<!ENTITY b SYSTEM "file:///etc/passwd">]>{NODE}'.encode()


@pytest.mark.parametrize("content", [BOMB, OUTSIDE])
def test_xml_with_entities_is_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "kg.graphml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="declares a document type"):
        KnowledgeGraph.load(path)


def graphml(edge: str = "", node: str = "") -> bytes:
    kinds = (("r", "edge", "relation"), ("o", "edge", "source"), ("s", "node", "synonyms"))
    keys = "".join(f'<key id="{id}" for="{of}" attr.name="{name}" attr.type="string"/>' for id, of, name in kinds)
    nodes = f'<node id="a">{node}</node><node id="b"/>'
    return f'<graphml xmlns="{XMLNS}">{keys}<graph edgedefault="directed">{nodes}{edge}</graph></graphml>'.encode()


GOOD = '<edge source="a" target="b"><data key="r">is_a</data><data key="o">hand</data></edge>'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no element"),
        (b"<graphml", "unclosed|not well"),
        (b"\x89PNG\r\n", "not well"),
        (b"<html></html>", "No graph|not hold"),
        (graphml(), "needs facts"),
        (graphml('<edge source="a" target="b"/>'), "a fact lacks relation, source"),
        (graphml(GOOD.replace("is_a", "cures")), "'cures' is not in the schema"),
        (graphml('<edge source="a"><data key="r">is_a</data></edge>'), "an edge lacks its source or target"),
        (graphml(GOOD, '<data key="s">not json</data>'), "Expecting value"),
        (graphml(GOOD, '<data key="s">{"a": 1}</data>'), "JSON list"),
        (graphml(GOOD, f'<data key="s">{"[" * 100_000}</data>'), "recursion"),
    ],
)
def test_what_is_no_graph_is_said(tmp_path, content: bytes, reason: str) -> None:
    path = tmp_path / "kg.graphml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not hold a knowledge graph") as caught:
        KnowledgeGraph.load(path)
    caught.match(reason)


def test_a_fact_without_a_source_is_not_read(tmp_path) -> None:
    """Provenance is part of a fact."""
    path = tmp_path / "kg.graphml"
    path.write_bytes(graphml(GOOD))
    assert [edge.triple for edge in KnowledgeGraph.load(path).edges] == [("a", "is_a", "b")]
    path.write_bytes(graphml(GOOD.replace('<data key="o">hand</data>', "")))
    with pytest.raises(UserError, match="a fact lacks source"):
        KnowledgeGraph.load(path)


def test_parquet_that_is_no_graph_is_said(tmp_path) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the parquet extra")
    import pyarrow.parquet as pq

    path = tmp_path / "kg.parquet"
    for content, reason in (
        ({"subject": ["a"], "object": ["b"]}, "relation, source are missing"),
        ({"subject": ["a"], "relation": ["is_a"], "object": [None], "source": ["x"]}, "1 to 24 words"),
        ({"subject": [1], "relation": ["is_a"], "object": ["b"], "source": ["x"]}, "kg.parquet"),
        ({"subject": [], "relation": [], "object": [], "source": []}, "needs facts"),
    ):
        pq.write_table(pa.table(content), path)
        with pytest.raises(UserError, match=reason):
            KnowledgeGraph.load(path)
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="does not hold"):
        KnowledgeGraph.load(path)


def test_files_that_are_not_there_or_have_no_known_ending(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot be read.*build-kg"):
        KnowledgeGraph.load(tmp_path / "kg.graphml")
    with pytest.raises(UserError, match=r"should end in .graphml or .parquet"):
        KnowledgeGraph.load(tmp_path / "kg.pkl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        small_graph().save(tmp_path / "file" / "kg.graphml")


def test_a_graph_travels_to_other_processes() -> None:
    graph = small_graph()
    again = pickle.loads(pickle.dumps(graph))
    assert again.sha256 == graph.sha256
    assert again.find("excision") == "surgical excision"


def part(rank: int, edges: list[tuple[str, str, str]], **names: list[str]) -> Part:
    given = {name.replace("_", " "): others for name, others in names.items()}
    return Part(f"part {rank}", [Edge(*edge, f"part {rank}") for edge in edges], given, rank=rank)


def test_a_synonym_joins_what_sources_call_differently() -> None:
    notes = part(0, [("melanoma", "has_colour", "black")], melanoma=["malignant melanoma of skin"])
    codes = part(1, [("Malignant melanoma of skin", "coded_as", "C43")])
    for parts in ([notes, codes], [codes, notes]):
        graph = join(parts)
        assert graph.objects("melanoma", "coded_as") == ["C43"]
        assert graph.find("malignant melanoma of skin") == "melanoma"
    assert join([notes, codes]).sha256 == join([codes, notes]).sha256


def test_a_lower_rank_keeps_its_names_and_its_synonyms() -> None:
    notes = part(0, [("melanoma", "has_risk_factor", "fair skin")], melanoma=["black cancer"])
    terms = part(2, [("hypopigmentation", "is_a", "sign")], hypopigmentation=["fair skin", "black cancer"])
    graph = join([terms, notes])
    assert graph.objects("melanoma", "has_risk_factor") == ["fair skin"]
    assert graph.find("black cancer") == "melanoma"


def test_what_a_source_tells_apart_stays_apart_and_circles_end() -> None:
    apart = part(0, [("cutaneous melanoma", "is_a", "melanoma")], melanoma=["cutaneous melanoma"])
    assert join([apart]).find("cutaneous melanoma") == "cutaneous melanoma"
    one, two = part(0, [("itching", "is_a", "sign")], itching=["pruritus"]), part(0, [("pruritus", "is_a", "symptom")])
    two.names["pruritus"] = ["itching"]
    graph = join([one, two])
    assert graph.find("pruritus") == graph.find("itching") == "itching"
    assert graph.objects("itching", "is_a") == ["sign", "symptom"]
