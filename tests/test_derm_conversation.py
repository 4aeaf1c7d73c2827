"""Conversations about images: what a judge says of them, the panel of both kinds, and sources of supervised data."""

import json
import logging
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from derm_parts import LABELS, Pixels, answered, dialogue, episode, llava, write_image
from lit_agentrl.callbacks.records import group_records, write_records
from lit_agentrl.datamodules import CorrectTraces, LlavaConversations, Mixture
from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.envs import ConversationSuite, DermatologyPanel, EchoSuite, RecognitionSuite
from lit_agentrl.envs.dermatology import GraphFacts
from lit_agentrl.envs.dermatology.conversation import CONVERSATION_PROMPT, QUESTIONS
from lit_agentrl.envs.dermatology.labels import DISEASES
from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageRef
from lit_agentrl.intervals import bootstrap_interval
from lit_agentrl.types import Observation, Step, StopReason, Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Judged:
    support: float
    contradiction: float
    coverage: float
    num_facts: int


class Words:
    """Every word is a fact: "true" is supported, "false" contradicted; a question asks for four."""

    known = frozenset(LABELS)

    def knows(self, disease):
        return disease in self.known

    def score(self, answer, disease, question):
        assert disease in self.known
        assert question
        words = answer.split()
        count = max(1, len(words))
        true, false = words.count("true"), words.count("false")
        return Judged(true / count, false / count, min(1.0, true / 4), len(words))


def play(suite, task, reply):
    environment = suite.make(task)
    shown = environment.reset()
    return environment, shown, environment.step(reply)


def test_an_answer_is_judged_and_pays_nothing():
    suite = ConversationSuite(Pixels(question="Is it bad?", answer="It is true"), Words())
    task = suite.tasks("test")[0]
    environment, shown, (after, reward, done) = play(suite, task, "true true false so")
    assert (shown.text, shown.system, len(shown.images)) == ("Is it bad?", CONVERSATION_PROMPT, 1)
    assert (reward, done, after.valid, environment.success) == (0.0, True, True, None)
    assert environment.metrics == {
        "support": 0.5,
        "contradiction": 0.25,
        "coverage": 0.5,
        "num_facts": 4.0,
        "reference_f1": pytest.approx(2 * 1 / (4 + 3)),
    }


@pytest.mark.parametrize(
    ("reply", "num_facts"),
    [
        ("<think>false false</think> true", 1),
        ("<think>false</think><answer>true true</answer> false", 2),
        ("<think>true</think>", 0),
        ("", 0),
    ],
)
def test_thoughts_are_not_judged(reply, num_facts):
    suite = ConversationSuite(Pixels(), Words())
    environment, _, (after, _, _) = play(suite, suite.tasks("test")[0], reply)
    assert environment.metrics["num_facts"] == num_facts
    assert environment.metrics["contradiction"] == 0
    assert after.valid is (num_facts > 0)


def test_an_episode_that_was_not_answered_measured_nothing():
    suite = ConversationSuite(Pixels(), Words())
    environment = suite.make(suite.tasks("test")[0])
    environment.reset()
    before = environment.snapshot()
    assert environment.metrics == {}
    environment.step("true")
    answered_anchor = environment.anchor
    environment.restore(before)
    assert environment.metrics == {}
    assert environment.anchor != answered_anchor


def test_samples_without_a_question_are_asked_all_kinds():
    suite = ConversationSuite(Pixels(20), Words())
    questions = [suite.make(task).reset().text for task in suite.tasks("test")]
    assert set(questions) == set(QUESTIONS)
    assert [suite.sample(task).label for task in suite.tasks("test")[:4]] == sorted(LABELS)  # labels take turns
    assert list(pickle.loads(pickle.dumps(suite)).tasks("test")) == list(suite.tasks("test"))


def test_a_disease_that_the_graph_does_not_know_is_refused_before_any_episode():
    suite = ConversationSuite(Pixels(labels=["melanoma", "gout", "warts"]), Words())
    with pytest.raises(UserError, match="no facts about gout, warts"):
        suite.tasks("test")
    with pytest.raises(UserError, match="questions"):
        ConversationSuite(Pixels(), questions=["What?", " "])


def test_reference_answers_are_walkthroughs():
    suite = ConversationSuite(Pixels(question="What?", answer="A nevus."))
    ((shown, answer),) = suite.walkthrough(suite.tasks("train")[0])
    assert (shown.text, answer) == ("What?", "A nevus.")
    with pytest.raises(UserError, match="held out"):
        suite.walkthrough(suite.tasks("test")[0])
    without = ConversationSuite(Pixels())
    with pytest.raises(UserError, match="no reference answer"):
        without.walkthrough(without.tasks("train")[0])


def judged_group(suite, task, *replies):
    trajectories = []
    for reply in replies:
        environment, _, _ = play(suite, task, reply)
        trajectories.append(episode(reply, metrics=dict(environment.metrics)))
    return TrajectoryGroup(task, trajectories)


def test_a_summary_is_the_mean_over_questions():
    suite = ConversationSuite(Pixels(), Words())
    first, second, third = suite.tasks("test")[:3]
    failed = TrajectoryGroup(third, [episode("", StopReason.ENV_ERROR)])
    found = suite.summary([judged_group(suite, first, "true", "false"), judged_group(suite, second, "so"), failed])
    assert (found["support"], found["contradiction"], found["coverage"]) == (0.25, 0.25, pytest.approx(1 / 16))
    assert (found["support_low"], found["support_high"]) == bootstrap_interval([0.5, 0.0])
    assert (found["num_facts"], found["num_answered"]) == (1.0, 2.0)
    assert math.isnan(found["reference_f1"])
    assert set(suite.summary([failed])) == set(found)


# The panel


def test_a_panel_measures_both_kinds_apart():
    panel = DermatologyPanel(RecognitionSuite(Pixels(5)), ConversationSuite(Pixels(5), Words()), num_conversation=6)
    tasks = panel.tasks("test")
    assert len(tasks) == 20 + 6
    kinds = [panel.kind(task) for task in tasks]
    assert kinds[:12] == ["recognition", "conversation"] * 6
    assert {panel.kind(task) for task in panel.tasks("train")} == {"recognition"}
    named, asked = tasks[0], tasks[1]
    assert panel.make(named).reset().system != panel.make(asked).reset().system
    label = panel.recognition.sample(named).label
    found = panel.summary([answered(named, label), judged_group(panel.conversation, asked, "true false")])
    assert (found["accuracy"], found["num_recognised"], found["support"], found["num_answered"]) == (1.0, 1.0, 0.5, 1.0)
    assert set(found) == set(panel.summary([]))


def test_panels_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="num_recognition=0"):
        DermatologyPanel(RecognitionSuite(Pixels()), ConversationSuite(Pixels()), num_recognition=0)
    panel = DermatologyPanel(RecognitionSuite(Pixels()), ConversationSuite(Pixels()))
    with pytest.raises(UserError, match="is not a task"):
        panel.make("test-nothing")


def test_the_built_in_graph_judges():
    pytest.importorskip("networkx")
    facts = GraphFacts()
    suite = ConversationSuite(Pixels(labels=DISEASES, question="What is the treatment?"), facts)
    task = next(task for task in suite.tasks("test") if suite.sample(task).label == "melanoma")
    treatments = facts.scorer.graph.objects("melanoma", "treated_with")
    others = [
        name
        for disease in DISEASES
        for name in facts.scorer.graph.objects(disease, "treated_with")
        if name not in treatments
    ]
    right, _, _ = play(suite, task, f"Melanoma is treated with {treatments[0]}.")
    wrong, _, _ = play(suite, task, f"Melanoma is treated with {others[0]}.")
    assert (right.metrics["support"], right.metrics["contradiction"]) == (1.0, 0.0)
    assert right.metrics["coverage"] > 0
    assert (wrong.metrics["support"], wrong.metrics["contradiction"]) == (0.0, 1.0)
    twin = pickle.loads(pickle.dumps(suite))
    assert play(twin, task, "Nothing.")[0].metrics["num_facts"] == 0


# Sources for supervised training


def test_llava_conversations_keep_all_turns_and_show_the_image_once(tmp_path, caplog):
    write_image(tmp_path / "images" / "a.jpg")
    path = llava(
        tmp_path / "talk.json",
        [
            dialogue("1", "a.jpg", "<image>\nWhat is it?", "A nevus.", "Sure? <image>", "Yes."),
            dialogue("2", None, "What is a nevus?", "A mole."),
            dialogue("3", "gone.jpg", "What?", "That."),
        ],
    )
    first, second = LlavaConversations(path, str(tmp_path / "images")).conversations()
    assert [(shown.text, answer) for shown, answer in first] == [("What is it?", "A nevus."), ("Sure?", "Yes.")]
    assert [shown.system for shown, _ in first] == [CONVERSATION_PROMPT, ""]
    assert [len(shown.images) for shown, _ in first] == [1, 0]
    assert first[0][0].images[0].path.endswith("a.jpg")
    assert second[0][0].images == ()
    assert "1 conversations are left out, without their image: gone.jpg" in caplog.text
    with pytest.raises(UserError, match="No file"):
        LlavaConversations(str(tmp_path / "no.json"))
    only = llava(tmp_path / "only.json", [dialogue("3", "gone.jpg", "What?", "That.")])
    with pytest.raises(UserError, match="Set image_root"):
        LlavaConversations(only).conversations()


def run_of(tmp_path, suite, *files):
    """A run's folder with transcripts: each file a list of (task, reply, success)."""
    for number, episodes in enumerate(files):
        groups = []
        for task, reply, success in episodes:
            environment, shown, _ = play(suite, task, reply)
            step = Step([1], [2], [0.0], action=reply, observation=shown.text, images=shown.images)
            played = Trajectory([step], success=success, metrics=dict(environment.metrics))
            groups.append(TrajectoryGroup(task, [played]))
        write_records(tmp_path / "transcripts" / f"iteration_{number:06d}.jsonl", group_records(groups))
    return str(tmp_path)


def said(suite, task, thoughts="dark"):
    return f"<think>{thoughts}</think><answer>{suite.sample(task).label}</answer>"


def test_correct_traces_are_solved_train_episodes_the_newest_first(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    suite = RecognitionSuite(Pixels())
    one, two, three = suite.tasks("train")[:3]
    held_out = suite.tasks("test")[0]
    run = run_of(
        tmp_path,
        suite,
        [(one, said(suite, one, "old"), True), (two, said(suite, two), True), (two, "<answer>gout</answer>", False)],
        [(one, said(suite, one, "new"), True), (held_out, said(suite, held_out), True)],
        [(one, said(suite, one, "new"), True), (three, f"so {said(suite, three)}", True)],
    )
    found = {shown.state: (shown, answer) for ((shown, answer),) in CorrectTraces(suite, run).conversations()}
    assert set(found) == {one, two, three}
    assert "new" in found[one][1]
    shown = found[one][0]
    assert shown.system == suite.make(one).reset().system
    assert np.array_equal(shown.images[0], suite.make(one).reset().images[0])
    assert "1 not of the train split" in caplog.text
    assert "1 not solved" in caplog.text
    both = [c for c in CorrectTraces(suite, run, per_task=2).conversations() if c[0][0].state == one]
    assert [answer for ((_, answer),) in both] == [said(suite, one, "new"), said(suite, one, "old")]
    neat = CorrectTraces(suite, run, at_least={"format_ok": 1}).conversations()
    assert {c[0][0].state for c in neat} == {one, two}
    few = CorrectTraces(suite, run, num_traces=2, seed=1)
    assert [c[0][1] for c in few.conversations()] == [c[0][1] for c in few.conversations()]
    assert len(few.conversations()) == 2


def test_a_separator_of_lines_inside_a_text_is_text(tmp_path):
    suite = RecognitionSuite(Pixels())
    task = suite.tasks("train")[0]
    run = run_of(tmp_path, suite, [(task, said(suite, task, "dark\u2028round"), True)])
    assert "\u2028" in CorrectTraces(suite, run).conversations()[0][0][1]
    (tmp_path / "t.jsonl").write_text(json.dumps(dialogue("1", None, "q", "a\u2028b"), ensure_ascii=False))
    assert LlavaConversations(str(tmp_path / "t.jsonl")).conversations()[0][0][1] == "a\u2028b"


def test_a_trace_that_is_no_longer_right_is_left_out(tmp_path, caplog):
    """The environment is asked again: a transcript may be of other data, or of other options."""
    caplog.set_level(logging.INFO)
    suite = RecognitionSuite(Pixels())
    one, two = suite.tasks("train")[:2]
    run = run_of(tmp_path, suite, [(one, said(suite, two), True), (two, said(suite, two), True)])
    assert [c[0][0].state for c in CorrectTraces(suite, run).conversations()] == [two]
    assert "1 no longer solved when played again" in caplog.text
    with pytest.raises(UserError, match=r"No solved episode .* 2 no longer solved"):
        CorrectTraces(RecognitionSuite(Pixels(), answer_tag="final"), run).conversations()


def test_traces_of_several_turns_are_played_to_their_end(tmp_path):
    suite = EchoSuite()
    word = suite.tasks("train")[0]
    steps = [Step([1], [2], [0.0], action=word) for _ in range(2)]
    records = group_records(
        [TrajectoryGroup(word, [Trajectory(steps, success=True), Trajectory(steps[:1], success=True)])]
    )
    write_records(tmp_path / "iteration_000000.jsonl", records)
    (found,) = CorrectTraces(suite, str(tmp_path), per_task=5).conversations()
    assert [(shown.state, answer) for shown, answer in found] == [("Say it now.", word), ("Say it again.", word)]


def test_transcripts_that_are_not_there_or_not_whole(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    suite = RecognitionSuite(Pixels())
    with pytest.raises(UserError, match="holds no transcripts of training"):
        CorrectTraces(suite, str(tmp_path))
    with pytest.raises(UserError, match="per_task=0"):
        CorrectTraces(suite, str(tmp_path), per_task=0)
    task = suite.tasks("train")[0]
    run = run_of(tmp_path, suite, [(task, said(suite, task), True)])
    (file,) = (tmp_path / "transcripts").iterdir()
    file.write_text(file.read_text() + '{"prompt_id": "train-\n[]\n')
    assert len(CorrectTraces(suite, [run, str(file)]).conversations()) == 1
    assert "1 said before" in caplog.text
    assert "4 broken lines" in caplog.text


def test_transcripts_name_the_images_that_were_seen(tmp_path):
    reference = ImageRef("a.jpg", "0" * 64)
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    steps = [Step([1], [2], [0.0], images=(reference, pixels)), Step([1], [2], [0.0])]
    (record,) = group_records([TrajectoryGroup("t", [Trajectory(steps)])])
    named, drawn = json.loads(json.dumps(record))["steps"][0]["images"]
    assert named == {"path": "a.jpg", "sha256": "0" * 64}
    assert drawn["path"] == ""
    assert len(drawn["sha256"]) == 64
    assert record["steps"][1]["images"] == []
    (other,) = group_records([TrajectoryGroup("t", [Trajectory([Step([1], [2], [0.0], images=(pixels.T,))])])])
    assert other["steps"][0]["images"][0]["sha256"] != drawn["sha256"]


class Numbered(ConversationSource):
    def __init__(self, name, size):
        self.name, self.size = name, size

    def conversations(self):
        return [[(Observation(f"{self.name}{number}"), "yes")] for number in range(self.size)]


def names(mixture):
    return [conversation[0][0].text for conversation in mixture.conversations()]


@pytest.mark.parametrize(("size", "wanted"), [(500, 15), (15, 15), (4, 15), (1, 15)])
def test_a_mixture_keeps_the_first_source_whole_and_gives_the_other_its_share(size, wanted):
    found = names(Mixture([Numbered("talk", 85), Numbered("trace", size)], [0.85, 0.15]))
    assert found[:85] == [f"talk{number}" for number in range(85)]
    drawn = found[85:]
    assert len(drawn) == wanted
    counts = [drawn.count(f"trace{number}") for number in range(size)]
    assert max(counts) - min(counts) <= 1


def test_a_mixture_depends_on_its_seed_alone():
    def drawn(seed):
        return names(Mixture([Numbered("a", 10), Numbered("b", 50), Numbered("c", 50)], [0.5, 0.25, 0.25], seed))[10:]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert [text[0] for text in drawn(0)] == ["b"] * 5 + ["c"] * 5
    assert [text[1:] for text in drawn(0)[:5]] != [text[1:] for text in drawn(0)[5:]]


@pytest.mark.parametrize(
    ("sizes", "shares", "match"),
    [
        ([], [], "0 sources"),
        ([3, 3], [1.0], "each source needs one"),
        ([3, 3], [0.5, 0.4], "sum to 1, not to 0.9"),
        ([3, 3], [1.0, 0.0], "above 0"),
        ([3, 3], [1.5, -0.5], "above 0"),
        ([3, 0], [0.5, 0.5], "gave no conversation"),
        ([0, 3], [0.5, 0.5], "gave no conversation"),
    ],
)
def test_shares_that_do_not_fit_are_refused(sizes, shares, match):
    with pytest.raises(UserError, match=match):
        Mixture([Numbered("x", size) for size in sizes], shares).conversations()
