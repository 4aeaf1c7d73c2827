"""Every YAML under configs/ runs: the experiments and presets with a tiny model, the pipeline from end to end."""

import json
import os
from pathlib import Path

import pytest
import yaml

from lit_agentrl.cli import main
from lit_agentrl.envs.alfworld.maker import Counts, make_games
from lit_agentrl.envs.search.facts.command import Options, make_facts
from lit_agentrl.envs.webshop.demo import write_demo
from lit_agentrl.errors import UserError
from preference_parts import mining_options
from retrieval_parts import HOTPOTQA, serving, write_corpus
from runs import ECHO, ROOT, checkpoint, metrics
from search_parts import RECORDS, write_questions
from tiny import build_tiny_lm

CONFIGS = Path(__file__).parent.parent / "configs"
SEARCH = "needs the search extra: pip install 'lit-agentrl[search]'"
ROOM = {"data.max_length": 1500, "data.max_tokens": 6000}  # the tiny model's tokens are bytes
# Recipes of whole machines: one process on the CPU, two short episodes of two prompts each.
LARGE = {
    "trainer.devices": 1,
    "trainer.strategy": "auto",
    "trainer.precision": "32-true",
    "model.dtype": "float32",
    "data.num_prompts": 2,
    "data.group_size": 2,
    "data.num_updates": 1,
    "data.rollout.max_steps": 2,
    "data.sampling.max_new_tokens": 8,
    "data.max_length": 2040,
    "data.max_tokens": 8160,
    "evaluation.num_tasks": 2,
    "evaluation.sampling.max_new_tokens": 8,
}
# The same for trees: two leaves of one tree.
FOREST = {key: value for key, value in LARGE.items() if key != "data.group_size"} | {
    "data.rollout.trees": 1,
    "data.rollout.expansions": 1,
    "evaluation.num_tasks": 1,
}
SHOP = {
    "data.environment.folder": "made-up shop",
    "data.environment.size": "small",
    "data.environment.goals": "synthetic",
    "data.environment.max_page_chars": 600,
}
SMALL: dict[str, dict[str, object]] = {
    "dpo_echo": {},
    "gigpo_alfworld_cpu": {
        "data.num_prompts": 2,
        "data.group_size": 4,
        "data.rollout.max_steps": 3,
        "data.max_length": 2040,
        "data.max_tokens": 8160,
        "evaluation.num_tasks": 2,
    },
    "gigpo_alfworld_qwen2.5_1.5b": LARGE,
    "gigpo_alfworld_qwen2.5_7b": LARGE,
    "gigpo_alfworld_warmup": {"data.source.num_tasks": 2, "data.max_length": 2040, "data.max_tokens": 8160},
    "gigpo_blackjack_qwen2.5_3b": LARGE,
    "gigpo_echo": {"data.num_prompts": 2, "evaluation.num_tasks": 2},
    "gigpo_ezpoints_qwen2.5_3b": LARGE,
    "gigpo_number_line_qwen2.5_1.5b": LARGE,
    "gigpo_sokoban": {"data.group_size": 4, "evaluation.num_tasks": 2, **ROOM},
    "gigpo_sokoban_qwen2.5_3b": LARGE,
    "gigpo_textworld": {"data.num_prompts": 2, "data.group_size": 4, "evaluation.num_tasks": 2, **ROOM},
    "gigpo_textworld_warmup": {"data.source.num_tasks": 3, "data.max_length": 2040, "data.max_tokens": 6000},
    "gigpo_webshop_qwen2.5_1.5b": LARGE | SHOP,
    "gigpo_webshop_qwen2.5_7b": LARGE | SHOP,
    "grpopp_textworld": {"data.num_prompts": 2, "data.group_size": 4, "evaluation.num_tasks": 2, **ROOM},
    "grpopp_echo": {"data.num_prompts": 2, "evaluation.num_tasks": 2},
    "textworld_warmup": {"data.source.num_tasks": 3, **ROOM},
    "tree_grpo_echo": {"data.num_prompts": 2, "evaluation.num_tasks": 2},
    "tree_grpo_facts": FOREST,
    "tree_grpo_facts_warmup": {
        "data.source.num_tasks": 2,
        "data.source.environment.max_turns": 1,
        "data.source.environment.max_observation_chars": 200,
        "data.max_length": 2040,
        "data.max_tokens": 8160,
    },
    "tree_grpo_hotpotqa": FOREST,
    "tree_grpo_qa_qwen2.5_3b": FOREST,
    "tree_grpo_web_qwen2.5_7b": FOREST,
}
DATA = {
    "dpo_echo": "echo_preferences",
    "webshop": "shop",
    "alfworld": "alfworld_games",
    "facts": "facts",
    "hotpotqa": "hotpotqa",
    "_qa_": "served_questions",
    "_web_": "library",
}
"""What the recipes with this in their names play with: a fixture that gives the options that differ."""
DERMATOLOGY = [f"experiment/{path.name}" for path in (CONFIGS / "experiment").glob("derm*.yaml")]
"""Run by test_derm_recipes.py, with a vision-language model."""
EXPERIMENTS = sorted(set((CONFIGS / "experiment").glob("*.yaml")) - set((CONFIGS / "experiment").glob("derm*.yaml")))
QUICKSTART = CONFIGS / "pipeline" / "quickstart.yaml"
PIPELINES = sorted((CONFIGS / "pipeline").glob("*.yaml"))
COMPARISONS = sorted((CONFIGS / "compare").glob("*.yaml"))


def arguments(config: Path | str, lm: str, run: Path, **more: object) -> list[str]:
    given = {
        "model.pretrained": lm,
        "trainer.default_root_dir": run,
        "trainer.max_epochs": 1,
        "transcripts.show": 0,
        **more,
    }
    return ["fit", "--config", str(config), *(word for k, v in given.items() for word in (f"--{k}", str(v)))]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_run(path, long_lm, tmp_path, request):
    """As shipped, but for the model and the size: one iteration leaves a checkpoint and an export."""
    more = dict(SMALL[path.stem])
    for fixture in [fixture for part, fixture in DATA.items() if part in path.stem]:
        more |= request.getfixturevalue(fixture)
    if "warmup" in path.stem:
        more = {key.replace("data.environment", "data.source.environment"): value for key, value in more.items()}
    main(arguments(path, long_lm, tmp_path, **more))
    assert checkpoint(tmp_path)["global_step"] >= 1
    played = [float(row["length/steps"]) for row in metrics(tmp_path) if row.get("length/steps")]
    assert all(played), "an episode without a step: the shrunken context does not hold the first prompt"
    assert (tmp_path / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_run_on_top_of_an_experiment(path, tiny_lm, tmp_path):
    """A preset changes what it names and keeps the rest of the experiment, model and adapter included."""
    words = arguments(ECHO, tiny_lm, tmp_path, **{"data.num_prompts": 2, "evaluation.num_tasks": 2})
    main([*words[:3], "--config", str(path), *words[3:]])
    assert checkpoint(tmp_path)["global_step"] >= 1
    assert all("lora_" in name for name in checkpoint(tmp_path)["state_dict"])


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_comparisons_are_understood_by_every_arm(path, tmp_path, capsys):
    """Each arm's options are parsed as `fit` would; `test_compare.py` runs one of them from end to end."""
    main(["compare", "--config", str(path), "--dry-run", f"output={tmp_path}"])
    assert capsys.readouterr().out.count("lit-agentrl fit") >= 4


def test_every_config_is_covered():
    """A new file is either run above or this list says where it is run."""
    elsewhere = {"preferences/echo.yaml"}  # the fixture `echo_preferences`, and test_mining.py
    elsewhere |= set(DERMATOLOGY)
    elsewhere |= {f"trainer/{path.name}" for path in (CONFIGS / "trainer").glob("*.yaml")}  # test_trainer_configs.py
    elsewhere |= {f"pipeline/{path.name}" for path in PIPELINES} | {f"compare/{path.name}" for path in COMPARISONS}
    found = {p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")}
    run = {f"experiment/{name}.yaml" for name in SMALL} | {
        f"model/{p.name}" for p in (CONFIGS / "model").glob("*.yaml")
    }
    assert found == run | elsewhere


@pytest.mark.slow
def test_the_quickstart_runs_from_end_to_end_and_is_not_run_twice(long_lm, tmp_path, monkeypatch, capfd):
    """All stages in processes of their own, the three numbers together, the export; the second time all is skipped."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
    sizes = {"trainer.max_epochs": 1, "evaluation.num_tasks": 2, "data.num_prompts": 2, **ROOM}
    words = [f"stages.train.options.{key}={value}" for key, value in sizes.items()]
    words += [f"stages.untrained.options.{key}={value}" for key, value in {**sizes, "evaluation.num_tasks": 3}.items()]
    words += [f"stages.warmup.options.{key}={value}" for key, value in SMALL["textworld_warmup"].items()]
    main(["pipeline", str(QUICKSTART), f"root={tmp_path}", f"base={long_lm}", *words])
    first = capfd.readouterr().out
    for label in ("untrained", "warm-started", "trained"):
        assert label in first
    assert f"{tmp_path}/train/export" in first
    assert (tmp_path / "train" / "export" / "model.safetensors").is_file()
    tasks = [
        json.loads((tmp_path / s / "evaluation.jsonl").read_text().splitlines()[0]) for s in ("untrained", "train")
    ]
    assert [task["num_tasks"] for task in tasks] == [3, 2]
    main(["pipeline", str(QUICKSTART), f"root={tmp_path}", f"base={long_lm}", *words])
    assert capfd.readouterr().out.count("finished already") == 3


def test_a_finished_stage_with_other_options_is_not_mixed_up(tmp_path, capsys):
    """The fingerprint covers command, configuration and options."""
    from lit_agentrl.pipeline import load

    _, (stage, *_) = load(QUICKSTART, [f"root={tmp_path}"])
    stage.marker.parent.mkdir(parents=True)
    stage.marker.write_text(json.dumps({"fingerprint": stage.fingerprint()}))
    assert stage.is_finished()
    with pytest.raises(SystemExit):
        main(["pipeline", str(QUICKSTART), f"root={tmp_path}", "base=another"])
    assert "other options" in capsys.readouterr().err


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_dry_run_prints_commands_and_runs_nothing(path, tmp_path, capsys):
    """The plan: every stage with its command, its seed, and what it is handed."""
    main(["pipeline", str(path), "--dry-run", f"root={tmp_path}/x", "seed=7"])
    plan = capsys.readouterr().out
    commands = [line for line in plan.splitlines() if not line.startswith(" ")]
    stages = yaml.safe_load(path.read_text())["stages"]
    assert [line.split(":")[0] for line in commands] == list(stages)
    trained = [line for line in commands if ": lit-agentrl fit" in line]
    assert trained
    assert all("--seed_everything 7" in line for line in trained)
    assert f"--model.pretrained {tmp_path}/x/" in trained[-1]
    assert plan.count("state    to do") == len(stages)
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def long_lm(tmp_path_factory):
    """The tiny model with room for the quickstart's prompts, which are some 500 bytes long."""
    return build_tiny_lm(tmp_path_factory.mktemp("long") / "lm", max_position_embeddings=2048)


@pytest.fixture
def echo_preferences(tiny_lm, tmp_path):
    """The pairs that the recipe's own mining finds where a policy speaks in words."""
    main(mining_options(tiny_lm, tmp_path / "mined"))
    return {"data.path": tmp_path / "mined" / "preferences.jsonl"}


@pytest.fixture
def shop(tmp_path):
    """A made-up catalogue."""
    write_demo(tmp_path / "shop", num_products=40)
    return {"data.environment.folder": tmp_path / "shop"}


@pytest.fixture(scope="module")
def alfworld_games(tmp_path_factory):
    """A handful of made games, two of each type to train on."""
    pytest.importorskip("alfworld", reason="makes games: needs pip install 'lit-agentrl[alfworld]'")
    folder = tmp_path_factory.mktemp("alfworld") / "games"
    make_games(folder, Counts(num_train=12, num_valid_seen=6, num_valid_unseen=0))
    return {"data.environment.data": folder}


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory):
    """What `lit-agentrl make-facts-qa data/facts --max_words 64` makes, with a twentieth of its 22,476 passages."""
    pytest.importorskip("bm25s", reason=SEARCH)
    folder = tmp_path_factory.mktemp("facts") / "facts"
    try:
        make_facts(folder, Options(num_train=20, num_val=4, num_test=4, max_words=64))
    except UserError as error:  # the packages are missing
        pytest.skip(str(error))
    passages = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(passages[::20]), encoding="utf-8")
    return folder


@pytest.fixture
def facts(facts_folder, tmp_path, monkeypatch):
    """The folder where the recipe looks for it: below the one where the command is started."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "facts").symlink_to(facts_folder)
    monkeypatch.chdir(tmp_path)
    return {}


@pytest.fixture
def hotpotqa(monkeypatch):
    """Real questions and pages, named by the one variable that the recipe reads."""
    pytest.importorskip("bm25s", reason=SEARCH)
    if not HOTPOTQA.is_dir():
        pytest.skip("the real HotpotQA questions are not beside the checkout")
    monkeypatch.setenv("HOTPOTQA_DATA", str(HOTPOTQA))
    return {}


@pytest.fixture
def served_questions(tmp_path, monkeypatch):
    """Questions as Search-R1 processes them, where the recipe looks for them, and a search server."""
    pytest.importorskip("bm25s", reason=SEARCH)
    pyarrow = pytest.importorskip("pyarrow", reason="needs the parquet extra: pip install 'lit-agentrl[parquet]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "data_source": "hotpotqa",
            "prompt": [{"role": "user", "content": f"Answer the given question. Question: {record['question']}\n"}],
            "reward_model": {"ground_truth": {"target": record["golden_answers"]}, "style": "rule"},
        }
        for record in RECORDS
    ]
    (tmp_path / "data" / "search_qa").mkdir(parents=True)
    for split in ("train", "test"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "search_qa" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    with serving(write_corpus(tmp_path / "corpus.jsonl")) as (_, url):
        yield {"data.environment.retriever.url": url}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A closed web of five pages, where the recipe looks for it."""
    pytest.importorskip("bm25s", reason=SEARCH)
    folder = tmp_path / "data" / "web"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        write_questions(folder, name=f"{split}.jsonl")
    write_corpus(folder / "corpus.jsonl")
    monkeypatch.chdir(tmp_path)
    return {}
