"""The report of made-up runs: numbers by hand, what is said of few seeds, and names that mean something to HTML."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from lit_agentrl.errors import UserError
from lit_agentrl.report.comparison import compare_runs
from lit_agentrl.report.outcomes import flatten, read_run, task_values
from lit_agentrl.report.plot import picture
from lit_agentrl.report.render import html, markdown, show, write_report
from lit_agentrl.report.sheets import introduction, sheets, verdicts
from lit_agentrl.types import Ledger

ENTRIES = dict.fromkeys(("generated_tokens", "prefilled_tokens", "tool_calls", "seconds"), 0.0)


def write_run(folder, evaluations, options=None, metric="success"):
    """A run folder: `evaluations` are pairs of what was spent and the outcome of each task."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(options or {"evaluation": {"name": "eval"}}))
    (folder / "transcripts").mkdir()
    lines = []
    for epoch, (spent, outcomes) in enumerate(evaluations):
        episodes = [
            {"prompt_id": f"task-{i}", "success": bool(o), "stop_reason": "done"} for i, o in enumerate(outcomes)
        ]
        text = "\n".join(map(json.dumps, episodes))
        (folder / "transcripts" / f"eval_{epoch:06d}.jsonl").write_text(text)
        lines.append(
            {
                "name": "eval",
                "when": "schedule",
                "epoch": epoch,
                "step": epoch,
                "split": "test",
                "num_tasks": len(outcomes),
                "budget": ENTRIES | spent,
                "metrics": {metric: sum(outcomes) / len(outcomes)},
            }
        )
    (folder / "evaluation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def tokens(*points):
    """Evaluations by generated tokens alone."""
    return [({"generated_tokens": spent, "seconds": spent / 10}, outcomes) for spent, outcomes in points]


@pytest.fixture
def runs(tmp_path):
    """Two seeds, four tasks. Seed 0: the tree goes 0 -> 3/4 by 200, the chain 0 -> 1/4 by 100 and stays there."""
    made = {
        ("tree", 0): tokens((0, [0, 0, 0, 0]), (200, [1, 1, 1, 0])),
        ("tree", 1): tokens((0, [0, 0, 0, 0]), (400, [1, 1, 0, 0])),
        ("chain", 0): tokens((0, [0, 0, 0, 0]), (100, [1, 0, 0, 0]), (300, [1, 0, 0, 0])),
        ("chain", 1): tokens((0, [0, 0, 0, 0]), (200, [0, 1, 0, 0])),
    }
    return [
        read_run(arm, seed, write_run(tmp_path / arm / str(seed), evaluations), "success")
        for (arm, seed), evaluations in made.items()
    ]


def compared(runs, **changes):
    given = {"metric": "success", "baseline": "chain", "caps": {"generated_tokens": 200.0}, "level": None} | changes
    return compare_runs("tree_vs_chain", runs, **given)


def test_the_numbers_by_hand(runs):
    """All have 200. Tree: 3/4 and half of 2/4; chain: 1/4 and 1/4. Areas: 3/8, 1/8; 1/8 + 1/16, 1/8."""
    comparison = compared(runs)
    axis = comparison.axes[0]
    assert (axis.axis, axis.start, axis.budget) == ("generated_tokens", 0, 200)
    tree, chain = axis.arms
    assert tree.value.value == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert chain.value.value == pytest.approx(1 / 4)
    assert tree.difference.value == pytest.approx(1 / 4)
    assert tree.area.value == pytest.approx((3 / 8 + 1 / 8) / 2)
    assert chain.area.value == pytest.approx((3 / 16 + 1 / 8) / 2)
    assert tree.area_difference.value == pytest.approx(1 / 4 - 5 / 32)
    assert chain.difference is None
    assert axis.level == pytest.approx(1 / 4)
    assert tree.cost_of_level == pytest.approx(100)  # its mean is a straight line to 1/2
    assert chain.cost_of_level == pytest.approx(200)
    assert (tree.reached_by, chain.reached_by) == (2, 2)
    assert comparison.is_paired_by_task
    assert [a.axis for a in comparison.axes] == ["generated_tokens", "seconds"]
    assert any("Tool calls were not counted" in note for note in comparison.notes)
    assert comparison.costs["tree"]["generated_tokens"] == 300


def test_runs_that_end_early_are_named(runs):
    notes = compared(runs, caps={"generated_tokens": 300.0, "tool_calls": 5.0}).notes
    early = [note for note in notes if "ended before it had spent its budget" in note]
    assert [note.split(" ended")[0] for note in early] == ["tree seed 0", "chain seed 1"]


def test_what_nobody_counted_cannot_be_compared(runs):
    for run in runs:
        run.budgets = [dict(ENTRIES) for _ in run.budgets]
    with pytest.raises(UserError, match="No axis was counted"):
        compared(runs)


def test_differences_are_paired_by_seed_and_task(runs):
    """The tree solves what the chain does and more: the task that both solve adds nothing to the difference."""
    values = task_values(runs)
    at_200 = values[0][1] - (values[2][1])
    assert at_200.tolist() == [0, 1, 1, 0]
    assert not compared(runs).axes[0].arms[0].difference.is_decided
    assert "not decided, the interval contains 0" in verdicts(compared(runs))[0]


def test_pairing_sees_what_means_cannot(tmp_path):
    """Seeds differ by far more than arms; every seed gains 10 points: decided, though the arms' intervals overlap."""
    runs = []
    for seed, solved in enumerate((10, 20, 40, 55)):
        for arm, more in (("chain", 0), ("tree", 9 + seed % 2)):
            ends = [int(task < solved + more) for task in range(100)]
            folder = write_run(tmp_path / arm / str(seed), tokens((0, [0] * 100), (100, ends)))
            runs.append(read_run(arm, seed, folder, "success"))
    (tree,) = [arm for arm in compared(runs).axes[0].arms if arm.arm == "tree"]
    assert tree.difference.is_decided
    assert tree.difference.value == pytest.approx(0.095)
    assert tree.value.low < 0.35 < tree.value.high
    assert verdicts(compared(runs))[0].endswith(": higher.")


def test_one_seed_is_said_to_be_one(runs):
    comparison = compared([run for run in runs if run.seed == 0])
    assert "One seed: intervals are over tasks only" in comparison.notes[0]
    runs[0].tasks = None
    comparison = compared([run for run in runs if run.seed == 0])
    assert comparison.axes[0].arms[0].difference.low is None
    assert "not decided, nothing varies" in verdicts(comparison)[0]


def test_tasks_that_do_not_give_the_metric_are_not_used(tmp_path):
    """`metric` is no mean of episodes, or transcripts are of another evaluation."""
    folder = write_run(tmp_path / "a", tokens((0, [0, 1]), (9, [1, 1])), metric="pass_at_4")
    assert read_run("a", 0, folder, "pass_at_4").tasks is None
    folder = write_run(tmp_path / "b", tokens((0, [0, 1]), (9, [1, 1])))
    (folder / "transcripts" / "eval_000001.jsonl").write_text(
        json.dumps({"prompt_id": "task-0", "success": False, "stop_reason": "done"})
    )
    assert read_run("b", 0, folder, "success").tasks is None


@pytest.mark.parametrize(
    ("evaluations", "metric", "message"),
    [
        ([({"generated_tokens": 0}, [0])], "success", "has 1 evaluations"),
        (tokens((0, [0]), (5, [1])), "reward/mean", "metric 'reward/mean' is not in .* It has success"),
    ],
)
def test_runs_that_give_no_curve_are_refused(tmp_path, evaluations, metric, message):
    with pytest.raises(UserError, match=message):
        read_run("a", 0, write_run(tmp_path / "a", evaluations), metric)


def test_runs_without_a_ledger_are_refused(tmp_path):
    folder = write_run(tmp_path / "a", tokens((0, [0]), (5, [1])))
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    (folder / "evaluation.jsonl").write_text("\n".join(json.dumps(line | {"budget": {}}) for line in lines))
    with pytest.raises(UserError, match="keeps no ledger"):
        read_run("a", 0, folder, "success")


def test_what_differs_between_the_arms_is_listed(tmp_path):
    options = {"model": {"class_path": "M", "init_args": {"lr": 1.0}}, "seed_everything": 0}
    other = {"model": {"class_path": "M", "init_args": {"lr": 2.0}}, "seed_everything": 5}
    assert flatten(options) == {"model.class_path": "M", "model.lr": 1.0, "seed_everything": 0}
    runs = [
        read_run(arm, 0, write_run(tmp_path / arm, tokens((0, [0, 1]), (9, [1, 1])), given), "success")
        for arm, given in (("tree", options), ("chain", other))
    ]
    assert compared(runs).differences == [("model.lr", {"tree": 1.0, "chain": 2.0})]


class Tags(HTMLParser):
    """All start tags, and whatever would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]


def test_names_are_escaped_and_the_page_needs_nothing_else(runs):
    for run in runs:
        run.arm = run.arm.replace("tree", "<script>x</script> | $a_b$")
    comparison = compared(runs)
    comparison.notes.append("<b>&|")
    page = html(comparison, plot=True)
    parsed = Tags()
    parsed.feed(page)
    assert {"script", "b"}.isdisjoint(parsed.tags)
    assert parsed.links == []
    assert parsed.tags.count("svg") == 1
    assert "$a_b$, mean of 2 seeds" in page
    text = markdown(comparison, plot=True)
    assert r"\<script\>" in text
    assert r"\|" in text
    rows = [line for line in text.splitlines() if line.startswith(r"| \<script")]
    assert {row.replace(r"\|", "").count("|") for row in rows} == {8, 5}  # 7 columns on two axes; costs have 4
    assert "<svg" not in html(comparison, plot=False)


def test_the_terminal_shows_verdicts_and_no_markup(runs, capsys):
    comparison = compared(runs)
    comparison.notes.append("[bold]not markup[/bold]")
    show(comparison)
    out = capsys.readouterr().out
    assert "[bold]not markup[/bold]" in out
    assert "At 200 generated tokens tree minus chain is +25.0 points" in " ".join(out.split())


def test_pictures_are_the_same_twice_and_have_a_panel_for_each_axis(runs):
    comparison = compared(runs)
    assert picture(comparison, "svg").count(b"compared here</text>") == len(comparison.axes) == 2
    assert picture(comparison, "svg").count(b'id="axes_') == 2
    assert picture(comparison, "svg") == picture(comparison, "svg")
    assert picture(comparison, "png").startswith(b"\x89PNG")


def test_json_holds_all_numbers(runs, tmp_path):
    write_report(compared(runs), tmp_path / "out", plot=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["axes"][0]["curves"]["tree"] == [[[0, 0], [200, 0.75]], [[0, 0], [400, 0.5]]]
    assert report["axes"][0]["arms"][0]["difference"]["value"] == pytest.approx(0.25)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]


def test_intervals_of_shares_stay_inside_and_other_metrics_keep_their_unit(runs):
    cells = [cell for sheet in sheets(compared(runs)) for row in sheet.rows for cell in row]
    assert any(cell.startswith("50.0 % [0.0, 100.0]") for cell in cells)
    assert "success on 4 held-out tasks, baseline chain, seeds 0, 1." in introduction(compared(runs))[0]
    axis = compared(runs, metric="environment/f1").axes[0]
    assert np.isfinite(axis.arms[0].value.value)
    cells = [cell for sheet in sheets(compared(runs, metric="environment/f1")) for row in sheet.rows for cell in row]
    assert any(cell.startswith("+0.25 [") for cell in cells)


def test_the_ledger_has_the_entries_that_are_compared():
    assert set(ENTRIES) - {"seconds"} <= set(Ledger.__dataclass_fields__)
