"""The wording of questions. The facts are the packages'; these sentences are ours."""

from __future__ import annotations

ASK = {
    "capital": ("What is the capital of {}?", "Which city is the capital of {}?"),
    "highest_point": ("What is the highest point of {}?", "Name the highest point of {}."),
    "lowest_point": ("What is the lowest point of {}?", "Name the lowest point of {}."),
    "anthem": ("What is the title of the national anthem of {}?", "Which song is the national anthem of {}?"),
    "lyricist": ("Who wrote the lyrics of the national anthem of {}?", "Who is the lyricist of the anthem of {}?"),
    "composer": ("Who composed the national anthem of {}?", "Who wrote the music of the national anthem of {}?"),
    "independence": ("What is the date of independence of {}?", "Give the date of independence of {}."),
    "holiday": ("On which day of the year is the national holiday of {}?", "When is the national holiday of {}?"),
    "local_name": ("What is the local short-form name of {}?", "In its own language, what is the short name of {}?"),
    "calling_code": ("What is the international calling code of {}?", "Give the international calling code of {}."),
    "symbol": ("What is the symbol of {}?", "Which symbol stands for {}?"),
    "cas": ("What is the CAS registry number of {}?", "Give the CAS registry number of {}."),
    "discoverer": ("Who discovered {}?", "Who was the discoverer of {}?"),
    "year": ("What is the year of discovery of {}?", "Give the year of discovery of {}."),
    "name": ("What is the name of {}?", "Give the name of {}."),
}
"""Two ways to ask for each relation, with the entity at the end, as its description can be long; `name` asks for it."""
CLUE = {
    "capital": "the country whose capital is {}",
    "highest_point": "the country whose highest point is {}",
    "lowest_point": "the country whose lowest point is {}",
    "anthem": 'the country whose national anthem is titled "{}"',
    "lyricist": "the country whose national anthem has lyrics by {}",
    "composer": "the country whose national anthem has music by {}",
    "independence": "the country that became independent on {}",
    "calling_code": "the country with the international calling code {}",
    "number": "the chemical element with atomic number {}",
    "cas": "the chemical element with the CAS registry number {}",
    "discoverer": "the chemical element discovered by {}",
}
"""How a value stands for the one entity that has it."""
LINK = {
    "longest_border": "the country that has the longest land border with {}",
    "only_neighbour": "the only country that borders {}",
    "next": "the element one atomic number above {}",
    "previous": "the element one atomic number below {}",
    "found_in": "the country of discovery of {}",
}
LARGER = {
    "area": "whichever of {} and {} has the larger area",
    "year": "whichever of the chemical elements {} and {} was discovered first",
}
"""How two entities are compared, by what is compared."""
SMALLEST_WINS = frozenset({"year"})
