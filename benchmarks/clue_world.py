"""A made-up world to search in, and a policy of a million weights for it: search agents of many seeds on a CPU.

People work at firms, firms sit in cities, cities lie in countries: questions of one, two and three searches, each with
one answer. Names are made up, so nothing but searching helps. The policy's tokens are words and tags.
"""

from __future__ import annotations

import json
import random
import re
from itertools import islice
from pathlib import Path

from small_policy import save

from lit_agentrl.envs import SearchSuite
from lit_agentrl.envs.search.walkthrough import turn

TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
KINDS = {
    "one": "Where works {person}?",
    "two": "In which city works {person}?",
    "three": "In which country works {person}?",
}
SIZES = {"person": 240, "firm": 60, "city": 30, "country": 10}


def write_world(folder: Path, seed: int = 0) -> None:
    """`corpus.jsonl`, and `train.jsonl` and `test.jsonl` (a fifth of the questions) in Search-R1's layouts."""
    chance = random.Random(seed)
    names = iter(made_up_names(chance, sum(SIZES.values())))
    people, firms, cities, countries = (list(islice(names, size)) for size in SIZES.values())
    firm = {person: chance.choice(firms) for person in people}
    city = {name: chance.choice(cities) for name in firms}
    country = {name: chance.choice(countries) for name in cities}
    facts = (
        [(p, f"{p} works at {firm[p]}.") for p in people]
        + [(f, f"{f} sits in {city[f]}.") for f in firms]
        + [(c, f"{c} lies in {country[c]}.") for c in cities]
    )
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [{"id": title, "contents": f'"{title}"\n{text}'} for title, text in facts]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    questions = []
    for person in people:
        way = [firm[person], city[firm[person]], country[city[firm[person]]]]
        for hops, (kind, text) in enumerate(KINDS.items(), start=1):
            questions.append(
                {
                    "id": f"{kind}-{person}",
                    "question": text.format(person=person),
                    "golden_answers": [way[hops - 1]],
                    "data_source": "clues",
                    "type": kind,
                    "supporting_titles": way[: hops - 1],  # searching for the question shows the person's passage
                    "way": way,
                }
            )
    chance.shuffle(questions)
    held_out = len(questions) // 5
    for name, part in (("test", questions[:held_out]), ("train", questions[held_out:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))


def write_aimless_plays(path: Path, suite: SearchSuite, world: Path, seed: int = 0) -> None:
    """Plays that follow the clues for one, two or three searches, whatever is asked: a third of them by chance right.

    A policy that learns them searches and copies as it should and stops at random: what is left to learn is when.
    """
    chance = random.Random(seed)
    questions = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    with path.open("w") as lines:
        for task, question in zip(suite.tasks("train"), questions, strict=True):
            hops = chance.randint(1, 3)
            calls = [turn("I need to find out what is asked, so I search for it.", "search", question["question"])]
            calls += [turn(f"I should look for {title}.", "search", title) for title in question["way"][: hops - 1]]
            environment = suite.make(task)
            texts = [environment.reset().text, *(environment.step(call)[0].text for call in calls)]
            answers = [*calls, turn("I know the answer now.", "answer", question["way"][hops - 1])]
            messages = [
                {"role": role, "content": content}
                for text, answer in zip(texts, answers, strict=True)
                for role, content in (("user", text), ("assistant", answer))
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def made_up_names(chance: random.Random, count: int) -> list[str]:
    """Different words of three syllables."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.sample(syllables, 3))] = None
    return list(names)


def build_policy(folder: Path, suite: SearchSuite, world: Path) -> Path:
    """A Hugging Face folder: random weights, every word of the world and of the plays that solve it."""
    texts = [
        text for task in suite.tasks("train") for pair in suite.walkthrough(task) for text in (pair[0].text, pair[1])
    ]
    texts += [json.loads(line)["contents"] for line in (world / "corpus.jsonl").read_text().splitlines()]
    texts += [
        "The last turn held no action. Write to search or answer to finish. Nothing was found.",
        "system user assistant",
    ]
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} | set("<>/()[]{}:.,?\"'")
    return save(folder, words, TAGS)
