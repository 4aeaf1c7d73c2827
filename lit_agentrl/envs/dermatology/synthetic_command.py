"""`lit-agentrl make-lesions`: synthetic lesions as files, to look at, or for other tools."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lit_agentrl.envs.dermatology.labels import CODES
from lit_agentrl.envs.dermatology.lesion_attributes import GRADES, Lesion
from lit_agentrl.envs.dermatology.lesion_render import render
from lit_agentrl.envs.dermatology.lesion_text import caption
from lit_agentrl.envs.dermatology.samples import Sample
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions
from lit_agentrl.envs.dermatology.synthetic_questions import LesionTalk, talks
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text
from lit_agentrl.types import Split

COMMAND = "lit-agentrl make-lesions"
COLUMNS = (
    "lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "source", "disease", "colours",
    "structures", "border", "symmetry", "size", "surface", "skin_tone", "caption",
)  # fmt: skip
"""The first seven are HAM10000's, of which the last three are empty: a drawing has no age."""
NOTICE = """Synthetic. These are drawings of skin lesions, made by `{command}`; no patient was photographed.
They serve to train and to test software. What a model learns on them says nothing about patients.

{options}

images/                     the pictures (PNG)
train.csv val.csv test.csv  diagnoses and attributes, in HAM10000's columns and more
conversations.json          questions and answers about the train split, in LLaVA's layout; `provenance` says which
                            answers hold a wrong fact, put in on purpose (error_rate)
"""
_SOURCE = "synthetic"
_DX = {disease: code for code, disease in CODES.items() if code != "ak"}


@dataclass(frozen=True)
class Talk:
    """What the conversations are to be like."""

    error_rate: float = 0.15
    most_turns: int = 2


def make_lesions(folder: Path, lesions: SyntheticLesions, talk: Talk = Talk()) -> None:
    """Write pictures, tables and conversations into a new folder; it is there whole, or not at all.

    Raises:
        UserError: The folder holds something already, cannot be written, or a number is out of range.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: nothing was written. Give a new one, or empty it.")
    records = talks(lesions, "train", talk.error_rate, talk.most_turns)
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "images").mkdir(parents=True)
        for split in SPLITS:
            _write_split(temporary, lesions, split)
        write_text(temporary / "conversations.json", json.dumps([_llava(record) for record in records], indent=1))
        options = json.dumps(_options(lesions, talk))
        write_text(temporary / "SYNTHETIC.txt", NOTICE.format(command=COMMAND, options=options))
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(options: list[str]) -> None:
    """`lit-agentrl make-lesions OUTPUT [--num_train 700] [--difficulty medium] [...]`."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--num_train", type=int, default=700, help="pictures to train on (default: 700)")
    parser.add_argument("--num_val", type=int, default=70, help="pictures to choose by (default: 70)")
    parser.add_argument("--num_test", type=int, default=210, help="pictures to report (default: 210)")
    parser.add_argument("--difficulty", choices=list(GRADES), default="medium", help="(default: medium)")
    parser.add_argument("--size", type=int, default=112, help="side of a picture in pixels (default: 112)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds make equal pictures (default: 0)")
    parser.add_argument("--error_rate", type=float, default=0.15, help="share of wrong answers (default: 0.15)")
    parser.add_argument("--most_turns", type=int, default=2, help="longest conversation, in questions (default: 2)")
    given = vars(parser.parse_args(options))
    output, talk = given.pop("output"), Talk(given.pop("error_rate"), given.pop("most_turns"))
    lesions = SyntheticLesions(**given)
    make_lesions(output, lesions, talk)
    count = sum(len(lesions.samples(split)) for split in SPLITS)
    print(f"{output}: {count} drawn lesions, tables and conversations. Synthetic: no patient was photographed.")


def _write_split(folder: Path, lesions: SyntheticLesions, split: Split) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample, lesion in zip(lesions.samples(split), lesions.lesions(split), strict=True):
        Image.fromarray(render(lesion, lesions.size)).save(folder / "images" / f"{sample.id}.png")
        writer.writerow(_row(sample, lesion, lesions.seed))
    write_text(folder / f"{split}.csv", table.getvalue())


def _row(sample: Sample, lesion: Lesion, seed: int) -> Iterator[str]:
    what = lesion.attributes
    yield from (f"lesion-{sample.id}", sample.id, _DX[lesion.label], _SOURCE, "", "", "", _SOURCE, lesion.label)
    yield from (
        ", ".join(what.colours),
        ", ".join(what.structures),
        what.border,
        what.symmetry,
        what.size,
        what.surface,
    )
    yield from (str(what.skin_tone), caption(what, seed))


def _llava(record: LesionTalk) -> dict[str, object]:
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(record.turns):
        messages.append({"from": "human", "value": ("" if number else "<image>\n") + turn.question})
        messages.append({"from": "gpt", "value": turn.answer.text()})
    return {
        "id": record.sample.id,
        "image": f"images/{record.sample.id}.png",
        "label": record.lesion.label,
        "conversations": messages,
        "provenance": record.provenance(),
    }


def _options(lesions: SyntheticLesions, talk: Talk) -> dict[str, object]:
    counts: Sequence[tuple[str, int]] = [(f"num_{split}", len(lesions.samples(split))) for split in SPLITS]
    chosen = {"difficulty": lesions.difficulty, "size": lesions.size, "seed": lesions.seed}
    return {**dict(counts), **chosen, **vars(talk)}
