"""An action ends with the token that completes a stop string: not a token sooner or later, and nothing is cut."""

import json
import string

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine_parts import VOCABULARY, build, engine_of, random_contexts, reference, tokens_of
from lit_agentrl.datamodules import RolloutDataModule
from lit_agentrl.envs import EchoSuite
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.sampling import Actions
from lit_agentrl.rollouts.stop_strings import StopStrings
from lit_agentrl.types import Completion, SamplingParams
from runs import fit, main, options
from tiny import byte_tokenizer

EMPTY, END = 90, 0  # a row of the embeddings that no token has, as models with padded embeddings do; a special token
EURO = "€".encode()  # three bytes


def as_byte_level(piece: bytes) -> str:
    """How a byte-level vocabulary spells some bytes."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in printable]
    return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in piece)


def byte_level(pieces: list[bytes]) -> PreTrainedTokenizerFast:
    """Token 0 is special, token i + 1 reads `pieces[i]`, which may be a part of a character."""
    vocabulary = {"<|end|>": 0} | {as_byte_level(piece): i for i, piece in enumerate(pieces, 1)}
    assert len(vocabulary) == len(pieces) + 1
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A space is a mark before a word, the first one is dropped, and unknown characters are spelt in bytes."""
    pieces = ["<unk>", "▁", "▁a", "a", "b", "ab", "▁b", ">", *(f"<0x{byte:02X}>" for byte in EURO)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


TAGS = byte_level(
    [
        b"x</",
        b"sea",
        b"rch",
        b"rch>",
        b">\n",
        b"</search>",
        b"<",
        b"/",
        b" ",
        EURO[:1],
        EURO[1:2],
        EURO[2:] + b">",
        b"b",
    ]
)
ID = {
    TAGS.decode([i]) if i not in (10, 11, 12) else f"€{i - 9}": i
    for i in range(1, 14)  # the parts of € by number
}


def slow_end(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...]) -> int | None:
    """The place of the first token with which the whole text, decoded anew, holds one of the strings."""
    texts = (
        tokenizer.decode(ids[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for n in range(1, len(ids) + 1)
    )
    return next((i for i, text in enumerate(texts) if any(s in text for s in stop)), None)


def found_end(stops: StopStrings, ids: list[int]) -> int | None:
    """Asked after every token, as the engine does."""
    return next((i for i in range(len(ids)) if stops.is_complete(ids[: i + 1])), None)


@pytest.mark.parametrize(
    ("tokens", "stop", "end"),
    [
        (["x</", "sea", "rch", ">\n", "b"], "</search>", 3),  # begins inside a token, ends inside another
        (["b", "<", "/", "sea", "rch>", "b"], "</search>", 4),
        (["b", "</search>", "b"], "</search>", 1),
        (["x</", "sea", "rch", "x</", "sea", "rch>"], "</search>", 5),  # a false start
        (["x</", "sea", " ", "rch>"], "</search>", None),
        (["b", "€1", "€2", "€3"], "€", 3),  # a character in three tokens, the last of which says more
        (["€1", "b", "€2", "€3"], "€", None),
        (["€1", "€2", "€1", "€2", "€3"], "€>", 4),  # halves before it
        (["x</", "sea", "b", " ", "b"], "b ", 3),
        (["rch", ">\n"], "h", 0),
    ],
)
def test_the_first_token_that_completes_the_string(tokens: list[str], stop: str, end: int | None) -> None:
    ids = [ID[token] for token in tokens]
    assert found_end(StopStrings([stop], TAGS), ids) == end
    assert slow_end(TAGS, ids, (stop,)) == end


def test_tokens_without_text_hide_nothing() -> None:
    """However many lie in the midst of a string; the name of a special token is not text, as for the environment."""
    ids = [ID["x</"], *[EMPTY] * 50, ID["sea"], END, ID["rch>"]]
    assert found_end(StopStrings(["</search>"], TAGS), ids) == 53
    assert found_end(StopStrings(["|>"], TAGS), ids) is None


SOUP = {
    "tags": (TAGS, [("</search>",), ("/ ", "ch>\n"), ("b b", "€>b"), (">", "€"), (" ",)]),
    "bytes": (
        byte_level([b"a", b"ab", b"b", b" ", b"a ", EURO[:1], EURO[1:], EURO[:2], EURO[2:], b"a" + EURO[:1]]),
        [("ab a",), ("€",), ("€a", "bb "), ("a€a",), ("€€",)],
    ),
    "sentencepiece": (sentencepiece_like(), [("a b",), (" a a", "b>"), ("€",), ("b ",), (" ab>", "aab"), (" ",)]),
}


@pytest.mark.parametrize("kind", SOUP)
def test_a_bounded_tail_is_enough(kind: str) -> None:
    """Random tokens, also such as no text is tokenised to, against decoding everything after every token."""
    tokenizer, stops = SOUP[kind]
    generator = np.random.default_rng(0)
    ends = []
    for stop in stops:
        quick = StopStrings(stop, tokenizer)
        for _ in range(60):
            ids = generator.integers(1, len(tokenizer) + 1, 60).tolist()  # one token too many: it has no text
            ends.append(found_end(quick, ids))
            assert ends[-1] == slow_end(tokenizer, ids, stop), (stop, ids)
    assert len({end for end in ends if end is not None}) > 20


def test_the_tail_begins_with_a_whole_character() -> None:
    """A decoder of spelt bytes gives up a whole run of them where the first is torn off: two € and a >, 7 tokens."""
    tokenizer = sentencepiece_like()
    euro, close = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in EURO]), 7
    ids = [3, *euro, *euro, close]
    assert tokenizer.decode(ids) == "a€€>"
    assert tokenizer.decode(ids[3:]) == "\ufffd" * 4 + ">"
    assert found_end(StopStrings(["€>"], tokenizer), ids) == 7


def test_most_tokens_cost_no_decoding_after_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens of 8 kinds, none of which has the end of the string: 8 times one token is decoded, never a tail."""
    decoded: list[list[int]] = []
    monkeypatch.setattr(TAGS, "decode", lambda ids, **_: decoded.append(ids) or "b")
    assert found_end(StopStrings(["</search>"], TAGS), list(range(1, 9)) * 8) is None
    assert decoded == [[i] for i in range(1, 9)]


# --- in the engine ----------------------------------------------------------------------------------------------------


def pieces() -> list[bytes]:
    """A vocabulary for the test models: words of 1 to 3 letters, no two alike, some with half a character at an end."""
    generator = np.random.default_rng(1)
    words: dict[bytes, None] = {}
    while len(words) < VOCABULARY - 1:
        word = bytes(generator.choice(list(string.ascii_lowercase.encode()), generator.integers(1, 4)).tolist())
        words[(EURO[2:] if len(words) % 9 == 1 else b"") + word + (EURO[:2] if len(words) % 9 == 0 else b"")] = None
    return list(words)


WORDS = byte_level(pieces())
PLENTY = 24
GREEDY = SamplingParams(temperature=0, max_new_tokens=PLENTY)


def stopping(*stop: str, temperature: float = 0.0, **options: object) -> SamplingParams:
    return SamplingParams(**{"temperature": temperature, "max_new_tokens": PLENTY, "stop": stop, **options})


def reading(family: str = "llama", **options: object) -> HFEngine:
    engine = engine_of(build(family), **options)
    engine.use_tokenizer(WORDS)
    return engine


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.filterwarnings("ignore:HFEngine cannot share")
def test_an_action_ends_with_the_string_wherever_it_lies(family: str) -> None:
    """Every slice of an answer's text as the stop string: within a token, across two, three and more.

    With and without other sequences, driven and recomputed: the tokens are those of the answer without a stop string,
    up to the one that completes it.
    """
    lm = build(family)
    context, *others = random_contexts(9, 14, 5)
    answer = reference(lm, context, PLENTY)
    text = WORDS.decode(answer)
    engine = reading(family)
    places = set()
    for start in range(2, 14, 3):
        for length in (1, 2, 5, 9):
            stop = text[start : start + length]
            end = slow_end(WORDS, answer, (stop,))
            if end is None or "\ufffd" in stop:
                continue
            places.add(end)
            (alone,) = engine.generate([context], stopping(stop))
            assert (alone.token_ids, alone.finish) == (answer[: end + 1], "stop")
            first, _, again, _ = engine.generate([context, others[0], context, others[1]], stopping(stop))
            assert first.token_ids == again.token_ids == alone.token_ids
    assert len(places) > 3


def test_sampled_tokens_are_those_without_a_stop_string_up_to_it() -> None:
    """Ragged contexts, one seed each, in batches of three sizes; log-probabilities stay as well."""
    contexts = random_contexts(20, 9, 33) * 4
    engine = reading()
    free = engine.generate(contexts, SamplingParams(temperature=0.9, max_new_tokens=PLENTY), seeds=range(12))
    stop = ("a", "€")
    ends = [slow_end(WORDS, completion.token_ids, stop) for completion in free]
    assert len(set(ends)) > 3
    expected = [
        (c.token_ids if end is None else c.token_ids[: end + 1], "length" if end is None else "stop")
        for c, end in zip(free, ends, strict=True)
    ]
    params = stopping(*stop, temperature=0.9)
    for size in (1, 5, 12):
        completions: list[Completion] = []
        for i in range(0, 12, size):
            completions += engine.generate(contexts[i : i + size], params, seeds=range(i, min(i + size, 12)))
        assert [(c.token_ids, c.finish) for c in completions] == expected
        for stopped, whole in zip(completions, free, strict=True):
            assert stopped.logprobs == pytest.approx(whole.logprobs[: len(stopped.logprobs)], abs=1e-5)


def test_what_the_context_holds_does_not_count() -> None:
    """Neither a string in the context, nor one that begins in the context and ends in the action."""
    lm = build()
    (context,) = random_contexts(12, seed=7)
    answer = reference(lm, context, PLENTY)
    inside, first = WORDS.decode(context[3:6]), WORDS.decode(answer[:1])
    astride = WORDS.decode(context[-1:]) + first
    text = WORDS.decode(answer)
    assert "\ufffd" not in inside + astride
    assert inside not in text
    assert astride not in text
    (completion,) = reading().generate([context], stopping(inside, astride))
    assert (completion.token_ids, completion.finish) == (answer, "length")


def test_the_limit_comes_first_or_with_the_string() -> None:
    """A string that the 7th token completes: cut after 6, stopped after 7, which are also as many as allowed."""
    (context,) = random_contexts(12)
    answer = reference(build(), context, PLENTY)
    stop = next(
        text
        for n in range(2, 8)
        if "\ufffd" not in (text := WORDS.decode(answer[n:7])) and slow_end(WORDS, answer, (text,)) == 6
    )
    engine = reading()
    for limit, finish in ((6, "length"), (7, "stop"), (8, "stop")):
        (completion,) = engine.generate([context], stopping(stop, max_new_tokens=limit))
        assert (completion.token_ids, completion.finish) == (answer[: min(limit, 7)], finish)


def test_strings_stand_beside_stop_tokens() -> None:
    """Whichever comes first ends the action."""
    (context,) = random_contexts(12)
    answer = reference(build(), context, PLENTY)
    places = [answer.index(token) for token in answer]
    early, late = sorted({place for place in places if places.count(place) == 1})[1:8:6]
    stop = WORDS.decode(answer[early : early + 3])
    end = slow_end(WORDS, answer, (stop,))
    assert end is not None
    assert early < end < late
    for token, last in ((answer[early], early), (answer[late], end)):
        for engine, ids in ((reading(stop_token_ids=[token]), ()), (reading(), (token,))):
            (completion,) = engine.generate([context], stopping(stop, stop_token_ids=ids))
            assert (completion.token_ids, completion.finish) == (answer[: last + 1], "stop")


def test_stopped_rows_are_kept_for_the_next_turn() -> None:
    """What is appended after a stop string costs only itself and the one token that was never fed."""
    lm, (context,) = build(), random_contexts(30)
    engine = reading()
    answer = reference(lm, context, PLENTY)
    stop = WORDS.decode(answer[3:5])
    (completion,) = engine.generate([context], stopping(stop))
    later = [*context, *completion.token_ids, 5, 6]
    (turn,) = engine.generate([later], GREEDY)
    assert turn.num_prefilled == 3
    assert turn.token_ids == reference(lm, later, PLENTY)


@pytest.mark.parametrize(("stop", "named"), [(("a", ""), "''"), (("\ufffd",), "U\\+FFFD")])
def test_strings_that_mean_nothing_are_refused(stop: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        reading().generate([[3]], SamplingParams(stop=stop))
    with pytest.raises(UserError, match=named):
        StopStrings(stop, WORDS)
    with pytest.raises(UserError, match=named):
        RolloutDataModule(EchoSuite(), "no tokenizer", sampling=SamplingParams(stop=stop), max_tokens=2048)


def test_strings_need_a_tokenizer() -> None:
    with pytest.raises(UserError, match=r"\('</a>',\).*use_tokenizer"):
        engine_of(build()).generate([[3]], SamplingParams(stop=("</a>",)))


def test_actions_without_strings_ask_no_tokenizer() -> None:
    actions = Actions(SamplingParams(max_new_tokens=1), seeds=[0], stop_ids=[])
    assert actions.token_ids == [[]]
    assert tokens_of(engine_of(build()).generate([[3]], SamplingParams(temperature=0, max_new_tokens=2)))


# --- in a run ---------------------------------------------------------------------------------------------------------


class VowelSuite(EchoSuite):
    """The echo task, where an answer ends with a vowel."""

    stop_strings = ("a", "e", "i", "o", "u")


def test_a_run_stops_at_the_strings_of_environment_and_options(tiny_lm: str, tmp_path) -> None:
    """The second turn's context is as long as the first, the answer and what follows: bare text, or a user turn.

    A random model stops at a vowel, a digit or upper-case letter (from the options), or its end of turn.
    """
    strings = string.digits + string.ascii_uppercase
    fit(
        tiny_lm,
        tmp_path,
        *("--trainer.max_epochs", "1", "--data.environment", "test_stop_strings.VowelSuite", "--data.chat", "inline"),
        *("--data.sampling.stop", json.dumps(list(strings)), "--data.sampling.max_new_tokens", "24"),
        *("--data.num_prompts", "8", "--data.max_length", "300"),
    )
    chat = Chat(byte_tokenizer(), "inline")
    follow = {True: len(chat.tokenizer.encode("Say it again.")), False: len(chat.delta([2], "Say it again."))}
    (path,) = (tmp_path / "transcripts").glob("iteration_*")
    lasts = set()
    for line in path.read_text().splitlines():
        steps = json.loads(line)["steps"]
        for step in steps:
            goes_on = step["action"].endswith((*strings, *VowelSuite.stop_strings))
            lasts.add(step["action"][-1:] if goes_on else "")
            assert not any(s in step["action"][:-1] for s in (*strings, *VowelSuite.stop_strings))
        if len(steps) == 2:
            first, second = steps
            goes_on = first["action"].endswith((*strings, *VowelSuite.stop_strings))
            grown = second["context_tokens"] - first["context_tokens"] - first["action_tokens"]
            assert grown == follow[goes_on], first
    assert lasts & set(strings)
    assert lasts & set(VowelSuite.stop_strings)


def test_inline_without_anything_to_interrupt_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for mode in ("inline", "append"):
        RolloutDataModule(EchoSuite(), "no tokenizer", max_tokens=2048, chat=mode)
        assert ("chat='inline'" in caplog.text) == (mode == "inline")
        caplog.clear()
    RolloutDataModule(VowelSuite(), "no tokenizer", max_tokens=2048, chat="inline")
    RolloutDataModule(EchoSuite(), "no", sampling=SamplingParams(stop_token_ids=(3,)), max_tokens=2048, chat="inline")
    assert "chat='inline'" not in caplog.text


def test_an_inline_run_has_no_memory(tiny_lm: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options(tiny_lm, tmp_path, "--data.chat", "inline", "--data.memory", "HistoryWindow"))
    assert "memory with chat='inline'" in capsys.readouterr().err
