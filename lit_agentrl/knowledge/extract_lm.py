"""Facts from free text by a language model; what it writes is checked against the schema and the text itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.extract import Extraction, Find, Unread, unknown_to_all
from lit_agentrl.knowledge.grammar import MOST_OBJECT_WORDS
from lit_agentrl.knowledge.names import Key, name_key
from lit_agentrl.knowledge.schema import RELATIONS, Edge
from lit_agentrl.knowledge.sentences import sentences_of

_RELATION_LINES = "\n".join(f"{item.name}: the object is {item.range}" for item in RELATIONS.values())
PROMPT = """Write down the facts of the text, one a line, as: subject | relation | object
The subject is a disease. Use the words of the text, at most {words} for an object. Use only these relations:
{relations}
Write nothing else. Write NONE if there is no such fact.

Text: {text}
Facts:
"""


def extract_with_model(
    text: str,
    source: str,
    generate: Callable[[Sequence[str]], Sequence[str]],
    find: Find = unknown_to_all,
    sentences_a_prompt: int = 4,
) -> Extraction:
    """The facts that a model finds and the checks let through; every line that they refuse is listed with the reason.

    A line counts if it is `subject | relation | object`, the relation is in the schema, the subject is known or a
    heading of the text, and all words of the object stand in the passage: what a model adds is no fact of the text.

    Args:
        text: Free text; a line `# Melanoma` names the disease that is spoken of.
        source: What the edges name as their source.
        generate: Answers to prompts, in their order.
        find: Gives the known name of a disease.
        sentences_a_prompt: How many sentences go into one prompt.

    Raises:
        UserError: `generate` gives another number of answers than prompts.
    """
    passages = _passages(text, sentences_a_prompt)
    prompts = [
        PROMPT.format(words=MOST_OBJECT_WORDS, relations=_RELATION_LINES, text=passage) for _, passage, _ in passages
    ]
    answers = generate(prompts) if prompts else []
    if len(answers) != len(prompts):
        raise UserError(
            f"`generate` gave {len(answers)} answers to {len(prompts)} prompts: it should give one for each."
        )
    found = Extraction(num_sentences=sum(count for *_, count in passages))
    headings = {name_key(item.text): item.text for item in sentences_of(text) if item.is_heading}
    for (line, passage, _), answer in zip(passages, answers, strict=True):
        edges: dict[Edge, None] = {}
        for written in filter(None, map(str.strip, answer.splitlines())):
            if written.upper() == "NONE":
                continue
            checked = _check(written, passage, headings, find)
            if isinstance(checked, str):
                found.unread.append(Unread(line, written, checked))
            else:
                edges[Edge(*checked, source, f"line {line}, by a model", None, passage)] = None
        found.edges += edges
    return found


def _passages(text: str, size: int) -> list[tuple[int, str, int]]:
    """Line, text and number of sentences of passages, each under one heading, which is part of it."""
    found: list[tuple[int, str, int]] = []
    heading = ""
    count = 0
    for sentence in sentences_of(text):
        if sentence.is_heading:
            heading, count = sentence.text, 0
        elif count % size:
            line, passage, number = found[-1]
            found[-1] = line, f"{passage} {sentence.text}", number + 1
            count += 1
        else:
            found.append((sentence.line, f"{heading}: {sentence.text}" if heading else sentence.text, 1))
            count += 1
    return found


def _check(written: str, passage: str, headings: dict[Key, str], find: Find) -> tuple[str, str, str] | str:
    """Subject, relation and object of a model's line, or why it is no fact."""
    parts = [part.strip(" .*-`\"'") for part in written.split("|")]
    if len(parts) != 3 or not all(map(name_key, parts)):
        return "it is not `subject | relation | object`"
    subject, relation, target = parts
    if (relation := relation.lower().replace(" ", "_")) not in RELATIONS:
        return "its relation is not in the schema"
    if (known := find(subject) or headings.get(name_key(subject))) is None:
        return "its subject is no known disease"
    if len(target.split()) > MOST_OBJECT_WORDS:
        return "its object is too long for a name"
    if name_key(target) == name_key(known):
        return "its object is its subject"
    if not set(name_key(target)) <= set(name_key(passage)):
        return "its object does not stand in the text"
    return known, relation, target
