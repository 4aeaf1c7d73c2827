"""Preference files: what is read, what is refused with its line, and how pairs become rows and micro-batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_agentrl.datamodules import PreferenceDataModule
from lit_agentrl.datamodules.pairs import Pair, collate_pairs, plan_pairs
from lit_agentrl.datamodules.preference_file import read_preferences
from lit_agentrl.errors import UserError
from lit_agentrl.models import PackedTree
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rows import Row
from lit_agentrl.types import Observation
from preference_parts import echo_pairs, pair, write_pairs


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# --- reading ---


def test_both_formats_are_read(tmp_path: Path) -> None:
    """TRL's conversational and plain ones, and a blank line between them."""
    path = tmp_path / "pairs.jsonl"
    plain = {"prompt": "Say a word.", "chosen": "one", "rejected": "two", "provenance": {"mode": "by hand"}}
    path.write_text(json.dumps(pair("Say it.", "bade", "no")) + "\n\n" + json.dumps(plain) + "\n")
    first, second = read_preferences(path)
    assert (first.system, first.turns, first.chosen, first.rejected) == (
        "Answer with one word.",
        ("Say it.",),
        "bade",
        "no",
    )
    assert (second.system, second.turns, second.chosen, second.rejected) == ("", ("Say a word.",), "one", "two")
    assert (first.place, second.place) == (f"{path}:1", f"{path}:3")


def test_several_turns_and_parts_are_read(tmp_path: Path) -> None:
    """A prompt that ends with the user's third turn; texts in parts are one text."""
    parts = [{"type": "text", "text": "se"}, {"type": "text", "text": "cond"}]
    prompt = [user("first"), assistant("a"), {"role": "user", "content": parts}, assistant("b"), user("third")]
    record = {"prompt": prompt, "chosen": [assistant([{"type": "text", "text": "yes"}])], "rejected": "no"}
    (found,) = read_preferences(write_pairs(tmp_path / "p.jsonl", [record]))
    assert found.turns == ("first", "a", "second", "b", "third")
    assert found.chosen == "yes"


GOOD = pair("Say it.", "yes", "no")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, "the field 'rejected' is missing"),
        ({"chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]}, "the field 'prompt'"),
        ([1, 2], "a pair is an object"),
        (GOOD | {"rejected": GOOD["chosen"]}, "the same answer, 'yes'"),
        (GOOD | {"rejected": " yes\n"}, "the same answer"),
        (GOOD | {"chosen": ""}, "chosen is empty"),
        (GOOD | {"rejected": [assistant("  ")]}, "rejected is empty"),
        (GOOD | {"chosen": [user("yes")]}, "one assistant message of text"),
        (GOOD | {"chosen": [assistant("yes"), user("and?"), assistant("no")]}, "one assistant message of text"),
        (GOOD | {"chosen": [assistant([{"type": "image"}])]}, "one assistant message of text"),
        (GOOD | {"chosen": None}, "a text or a list of messages, not None"),
        (GOOD | {"chosen": []}, "a text or a list of messages"),
        (GOOD | {"prompt": [{"role": "system", "content": "x"}]}, r"roles \[\]"),
        (GOOD | {"prompt": [user("x"), user("y")]}, "in turns, ending with user"),
        (GOOD | {"prompt": [user("x"), assistant("y")]}, "in turns, ending with user"),
        (GOOD | {"prompt": [user("x"), {"role": "tool", "content": "y"}, user("z")]}, "'tool'"),
        (GOOD | {"prompt": [{"role": "user"}]}, "has `role` and `content`"),
        (GOOD | {"prompt": [user("x"), "y"]}, "'y' is no message"),
        (GOOD | {"prompt": [{"role": "user", "content": 3}]}, "a list of parts"),
        (GOOD | {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, r"types \['audio'\]"),
        (GOOD | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "shows 1 images, but `images` holds 0"),
        (GOOD | {"images": "x.png"}, "`images` must be a list"),
        (GOOD | {"images": [3]}, "3 is no image"),
        (GOOD | {"images": ["nowhere.png"]}, "there is no image"),
    ],
)
def test_bad_lines_are_refused_with_their_place(tmp_path: Path, record: Any, message: str) -> None:
    """The second line is at fault, and the error says so."""
    path = write_pairs(tmp_path / "p.jsonl", [GOOD, record])
    with pytest.raises(UserError, match=message) as error:
        read_preferences(path)
    assert f"{path}:2" in str(error.value)


def test_a_cut_line_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(UserError, match="No preference file"):
        read_preferences(path)
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:40])
    with pytest.raises(UserError, match=r"p\.jsonl:2: not JSON"):
        read_preferences(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no pair"):
        read_preferences(path)


def test_an_image_is_known_by_its_content(tmp_path: Path) -> None:
    """Paths start at the file; the hash is computed where it is not given, and compared where it is."""
    (tmp_path / "lesion.png").write_bytes(b"pixels")
    sha256 = "f52e60dcb75bd2e82c137a73b0ad5c13bb2f8a9e2ff0e0a3b1e0b35fd9c93a0e"
    path = write_pairs(tmp_path / "p.jsonl", [GOOD | {"images": ["lesion.png"]}])
    (image,) = read_preferences(path)[0].images
    assert image.path == str(tmp_path / "lesion.png")
    given = {"path": str(tmp_path / "lesion.png"), "sha256": image.sha256}
    assert read_preferences(write_pairs(path, [GOOD | {"images": [given]}]))[0].images == (image,)
    with pytest.raises(UserError, match=r"p\.jsonl:1: .*not the image that the pair is about"):
        read_preferences(write_pairs(path, [GOOD | {"images": [given | {"sha256": sha256}]}]))
    (tmp_path / "lesion.png").write_bytes(b"other pixels")
    with pytest.raises(UserError, match="not the image that the pair is about"):
        read_preferences(write_pairs(path, [GOOD | {"images": [given]}]))


# --- rows ---


def rows(lm: str, path: Path, **more: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(str(path), lm, **more)
    data.setup("fit")
    return data


def test_the_layout_is_that_of_rollouts(tiny_lm: str, tmp_path: Path) -> None:
    """Context and answer are the ids that an engine would have been given and would have sampled; the loss is on the
    answer alone, its end of turn included."""
    record = {"prompt": [user("one"), assistant("two"), user("three")], "chosen": "four", "rejected": "five!"}
    data = rows(tiny_lm, write_pairs(tmp_path / "p.jsonl", [record]))
    chat = Chat(load_tokenizer(tiny_lm))
    opening = chat.opening(Observation("one"))
    context = chat.next_context(opening, chat.action_ids("two"), Observation("three"))
    for row, answer in zip(data.pairs[0], ("four", "five!"), strict=True):
        assert row.token_ids == [*context, *chat.action_ids(answer)]
        assert row.action_mask == [False] * len(context) + [True] * (len(answer) + 1)
    text = data.tokenizer.apply_chat_template([*record["prompt"], assistant("four")], tokenize=False)
    assert data.tokenizer.decode(data.pairs[0][0].token_ids) + "\n" == text


def test_inline_prompts_go_on_in_the_answer(tiny_lm: str, tmp_path: Path) -> None:
    """An observation within an answer stands there bare, as in such rollouts, and no end of turn closes the answer."""
    record = {"prompt": [user("one"), assistant("<s>"), user("found")], "chosen": "four", "rejected": "five!"}
    data = rows(tiny_lm, write_pairs(tmp_path / "p.jsonl", [record]), chat="inline")
    assert data.tokenizer.decode(data.pairs[0][0].token_ids).endswith("assistant\n<s>foundfour")


def test_rebuilt_prompts_are_one_turn(tiny_lm: str, tmp_path: Path) -> None:
    record = {"prompt": [user("one"), assistant("two"), user("three")], "chosen": "four", "rejected": "five!"}
    path = write_pairs(tmp_path / "p.jsonl", [record])
    with pytest.raises(UserError, match=r"p\.jsonl:1: a prompt of several turns"):
        rows(tiny_lm, path, chat="rebuild")


def test_long_pairs_are_left_out_whole_and_counted(tiny_lm: str, tmp_path: Path) -> None:
    """The rejected answer alone is too long: the pair goes, not the row."""
    path = write_pairs(tmp_path / "p.jsonl", [*echo_pairs(3), pair("x", "short", "long" * 60)])
    data = rows(tiny_lm, path, max_length=200)
    assert [len(each) for each in data.pairs] == [2, 2, 2]
    assert data.iteration_metrics == {"pairs": 3.0, "too_long": 1.0, "with_images": 0.0}
    with pytest.raises(UserError, match="None of the 4 pairs fits max_length=20"):
        rows(tiny_lm, path, max_length=20)


@pytest.mark.parametrize(
    ("more", "message"), [({"batch_size": 0}, "batch_size=0"), ({"max_tokens": 9}, "max_tokens=9")]
)
def test_bad_sizes_are_refused(tiny_lm: str, tmp_path: Path, more: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PreferenceDataModule(str(write_pairs(tmp_path / "p.jsonl", [GOOD])), tiny_lm, **more)


# --- micro-batches ---


def made(prompt: int, answers: tuple[int, ...], length: int = 40) -> Pair:
    """Rows of one prompt of `length` tokens; an answer is its number and a varying number of ends."""
    pair = []
    for answer in answers:
        row = Row()
        row.extend([prompt] * length)
        row.extend([100 + answer] * (3 + answer % 5), [0.0] * (3 + answer % 5))
        pair.append(row)
    return pair


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_every_pair_is_in_one_micro_batch_within_the_budget(shared: bool, size: int) -> None:
    """Prompts of all lengths, some of them shared between pairs; budgets are unique or padded tokens."""
    pairs = [made(i % 4, (2 * i, 2 * i + 1, 3 * i + 7)[:size], 20 + 13 * (i % 4)) for i in range(17)]
    plan = plan_pairs(pairs, 250, shared=shared)
    assert sorted(i for part in plan for i in part) == list(range(17))
    for part in plan:
        batch = collate_pairs([pairs[i] for i in part], pairs)
        padded = batch.token_ids.numel()
        tree = PackedTree.build(batch.token_ids, batch.lengths)
        assert len(tree) <= 250 if shared and tree.reuse >= 1.2 else padded <= 250
    if shared:
        together = plan_pairs(pairs, 10_000, shared=True)
        assert len(together) == 1
        assert [i % 4 for i in together[0]] == sorted(i % 4 for i in range(17))


def test_one_long_prompt_fits_shared_but_not_padded() -> None:
    """Two rows of 100 + 3 or 4 tokens: 107 unique ones, 208 padded."""
    pairs = [made(5, (0, 1), 100)]
    assert plan_pairs(pairs, 107, shared=True) == [[0]]
    with pytest.raises(UserError, match="max_tokens=106 is below the 107 tokens"):
        plan_pairs(pairs, 106, shared=True)
    with pytest.raises(UserError, match="max_tokens=207 is below the 208 tokens"):
        plan_pairs(pairs, 207, shared=False)


def test_pairs_that_share_little_are_planned_as_they_are_computed() -> None:
    """Answers far longer than prompts run padded, so the padded budget holds."""
    pair = made(5, (0, 1), 2)
    for row in pair:
        row.extend([7 + row.token_ids[-1]] * 50, [0.0] * 50)
    plan = plan_pairs([pair, [*pair[::-1]]], 120, shared=True)
    assert sorted(len(part) for part in plan) == [1, 1]


def test_denominators_are_those_of_the_whole_step() -> None:
    """Pairs, rows and action tokens of all micro-batches and ranks; empty rows count nowhere."""
    pairs = [made(1, (0, 1)), made(2, (2, 3)), made(3, (4, 5))]
    batch = collate_pairs(pairs[:1], pairs, num_updates=4)
    assert (batch.num_pairs, batch.num_rows, batch.rows_per_pair, batch.num_updates) == (3, 6, 2, 4)
    assert batch.num_action_tokens == 3 + 4 + 5 + 6 + 7 + 3
    assert torch.equal(batch.token_ids[0, :40], torch.ones(40, dtype=torch.int64))
