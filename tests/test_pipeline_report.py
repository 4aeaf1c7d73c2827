"""The table over stages, of made-up runs: numbers by hand, rows that cannot be compared, several seeds, escaping."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.report.intervals import t_quantile
from lit_agentrl.report.panel import make_panel
from lit_agentrl.report.seeds import over_seeds
from lit_agentrl.report.spec import Spec, read_spec
from lit_agentrl.report.summary import show

NAMES = ("base", "sft", "dpo")


def evaluate(run: Path, *metrics: dict, tasks: int = 4, ids: str = "abcd", **facts: object) -> None:
    """A run with an evaluation for each of `metrics`."""
    (run / "transcripts").mkdir(parents=True, exist_ok=True)
    for step, found in enumerate(metrics):
        record = {"name": "eval", "when": "schedule", "epoch": step, "step": step, "split": "test", "num_tasks": tasks}
        record |= {"num_episodes": tasks, "group_size": 1, "temperature": 0.0, "seconds": 1.0, "budget": {}}
        record |= {"metrics": found, **facts}
        with (run / "evaluation.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        lines = [json.dumps({"prompt_id": name}) + "\n" for name in ids]
        (run / "transcripts" / f"eval_{step:06d}.jsonl").write_text("".join(lines))


def table(metrics: list, stages: list | None = None, **more: object) -> Spec:
    return read_spec({"table": {"metrics": metrics, "stages": stages, **more}}, NAMES)


@pytest.fixture
def runs(tmp_path):
    """Base 1/4; SFT begins there and ends at 3/4; the last stage was not evaluated."""
    evaluate(tmp_path / "base", {"accuracy": 0.25, "accuracy_low": 0.05, "accuracy_high": 0.7, "words": 12.5})
    evaluate(tmp_path / "sft", {"accuracy": 0.25, "words": None}, {"accuracy": 0.75, "support": 0.5})
    return {name: tmp_path / name for name in NAMES}


def test_a_table_of_all_evaluated_stages(runs):
    """Shares in percent, with their interval where it is there; what is missing is a dash."""
    sheet = make_panel(table(["accuracy", "words", {"key": "support", "label": "facts"}]).table, runs).sheet()
    assert sheet.columns == ["stage", "accuracy", "words", "facts", "tasks"]
    assert sheet.rows == [["base", "25.0 % [5.0, 70.0]", "12.5", "-", "4"], ["sft", "75.0 %", "-", "50.0 %", "4"]]
    assert sheet.lines == []


def test_rows_are_chosen_and_named(runs):
    rows = [{"label": "before", "stage": "sft", "which": "first"}, {"label": "after", "stage": "sft"}]
    sheet = make_panel(table([{"key": "accuracy", "percent": False}], rows).table, runs).sheet()
    assert [row[:2] for row in sheet.rows] == [["before", "0.25"], ["after", "0.75"]]


def test_what_was_not_evaluated_alike_is_said(runs, tmp_path):
    evaluate(tmp_path / "dpo", {"accuracy": 1.0}, tasks=5, ids="abcde")
    (note,) = make_panel(table(["accuracy"]).table, runs).notes
    assert note == "Not evaluated alike, so that rows cannot be compared: num_tasks is base 4, sft 4, dpo 5."


def test_other_tasks_of_the_same_number_are_seen(runs, tmp_path):
    evaluate(tmp_path / "dpo", {"accuracy": 1.0}, ids="abcx")
    (note,) = make_panel(table(["accuracy"]).table, runs).notes
    assert "base, sft, dpo were not evaluated on the same tasks" in note


def test_evaluations_of_another_name_are_left_out(runs, tmp_path):
    evaluate(tmp_path / "sft", {"accuracy": 0.1}, name="easy")
    assert make_panel(table(["accuracy"], name="eval").table, runs).sheet().rows[1][1] == "75.0 %"
    assert make_panel(table(["accuracy"], name="easy").table, runs).sheet().rows == [["sft", "10.0 %", "4"]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (table(["acuracy"]), "no stage has the metric 'acuracy'. They have accuracy, accuracy_high"),
        (table(["accuracy"], ["dpo"]), "stage 'dpo' wrote no evaluation to"),
        (table(["accuracy"], name="hard"), "no stage was evaluated"),
    ],
)
def test_what_is_not_there_is_named(runs, spec, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make_panel(spec.table, runs)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]


def test_four_forms_say_the_same_and_names_mean_nothing_to_them(runs, tmp_path, capsys):
    evil = "<script>alert(1)</script>|*x*"
    report = {
        "table": {"title": f"T{evil}", "metrics": [{"key": "accuracy", "label": f"a{evil}"}], "stages": [
            {"label": evil, "stage": "base"}, "sft"]},
        "export": "sft",
    }  # fmt: skip
    folder = tmp_path / "root"
    show(read_spec(report, NAMES), runs, folder, {"sft": Path("runs/x/sft/export")})
    out = capsys.readouterr().out
    assert "Hugging Face folder of the trained policy: runs/x/sft/export" in out
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.links == []
    assert "&lt;script&gt;" in page
    assert r"\<script\>alert(1)\</script\>\|\*x\*" in text
    for written in (out, page, text):
        assert "25.0 %" in written
        assert "75.0 %" in written
    values = json.loads((folder / "report.json").read_text())
    first, second = values["table"]["rows"]
    assert first["values"]["accuracy"] == {"value": 0.25, "low": 0.05, "high": 0.7}
    assert (second["stage"], second["epoch"], second["label"]) == ("sft", 1, "sft")
    assert values["export"] == "runs/x/sft/export"


def report_of(root: Path, before: float, after: float | None, **more: object) -> Path:
    rows = [
        {"label": label, "num_tasks": 4, "values": {"accuracy": None if value is None else {"value": value}}}
        for label, value in (("sft", before), ("dpo", after))
    ]
    metrics = [{"key": "accuracy", "label": "acc", "percent": True}]
    root.mkdir()
    (root / "report.json").write_text(json.dumps({"table": {"metrics": metrics, "rows": rows} | more}))
    return root


def test_several_seeds_have_a_mean_and_students_interval(tmp_path):
    """Of 0.5, 0.6, 0.7: mean 0.6, standard error 0.1/sqrt(3), t(2) = 4.303."""
    roots = [report_of(tmp_path / str(i), v, v + d) for i, (v, d) in enumerate([(0.5, 0.1), (0.6, 0.2), (0.7, 0.3)])]
    found = over_seeds(roots)
    mean = found.mean("sft", "accuracy")
    assert mean.value == pytest.approx(0.6)
    assert mean.high - mean.value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=0.05)  # a bootstrap's standard error
    assert t_quantile(2) == pytest.approx(4.303, abs=1e-3)
    change = found.difference("dpo", "accuracy", "sft")
    assert change.value == pytest.approx(0.2)
    means, steps = found.sheets()
    assert means.rows[0][1].startswith("60.0 % [")
    assert steps.rows[0][0] == "dpo - sft"
    assert steps.rows[0][1].startswith("+20.0 points [")
    assert "| sft | 60.0 %" in found.markdown()


def test_differences_are_paired_by_seed(tmp_path):
    """Seeds that differ much and gain the same: the gain is certain although the means are not."""
    roots = [report_of(tmp_path / str(i), v, v + 0.1) for i, v in enumerate([0.1, 0.5, 0.8])]
    change = over_seeds(roots).difference("dpo", "accuracy", "sft")
    assert (change.value, change.low) == (pytest.approx(0.1), None)  # nothing varies


def test_one_seed_and_missing_numbers_are_said(tmp_path):
    found = over_seeds([report_of(tmp_path / "0", 0.5, None)])
    means, steps = found.sheets()
    assert means.rows == [["sft", "50.0 %"], ["dpo", "-"]]
    assert steps.rows == [["dpo - sft", "-"]]
    assert means.lines == ["One seed: nothing is known of others."]


def test_tables_that_differ_are_not_averaged(tmp_path):
    one = report_of(tmp_path / "0", 0.5, 0.6)
    other = report_of(tmp_path / "1", 0.5, 0.6, rows=[{"label": "sft", "num_tasks": 9, "values": {}}])
    with pytest.raises(UserError, match="has another table than"):
        over_seeds([one, other])
    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match="has no table"):
        over_seeds([tmp_path / "2"])
