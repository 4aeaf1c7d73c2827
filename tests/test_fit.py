"""Whole runs of the command line on a tiny model: what is written, what is learnt, what is refused."""

import contextlib
import io
import json
import logging
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_agentrl.envs import EchoSuite
from lit_agentrl.lightning_cli import quiet
from runs import ECHO, checkpoint, fit, main, metrics, options


@pytest.fixture(scope="module")
def run(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit(tiny_lm, folder)
    return folder


def test_a_fit_leaves_all_that_it_promises(run):
    """Configuration, checkpoint, export, transcripts of both iterations, evaluations before and after."""
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "export" / "model.safetensors").is_file()
    names = sorted(path.name for path in (run / "transcripts").iterdir())
    assert names == ["eval_000000.jsonl", "eval_000002.jsonl", "iteration_000000.jsonl", "iteration_000001.jsonl"]
    assert [json.loads(line)["when"] for line in (run / "evaluation.jsonl").read_text().splitlines()] == [
        "start",
        "end",
    ]
    assert len((run / "transcripts" / "iteration_000001.jsonl").read_text().splitlines()) == 8


def test_metrics_are_logged_every_iteration(run):
    rows = [row for row in metrics(run) if row.get("reward/mean")]
    assert len(rows) == 2
    for row in rows:
        # One update per iteration with the sampler's log-probabilities: the ratio is 1 up to rounding.
        assert float(row["train/ratio"]) == pytest.approx(1.0, abs=1e-4)
        assert float(row["train/entropy"]) > 0
        assert float(row["skipped_updates"]) in (0.0, 1.0)
        assert float(row["tokens/generated"]) > 0


def test_the_checkpoint_holds_the_adapter_alone(run):
    state = checkpoint(run)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)


def test_the_export_reloads_and_is_the_trained_policy(run, tiny_lm):
    """The merged folder differs from the base, has its chat template, and loads by itself."""
    trained = AutoModelForCausalLM.from_pretrained(run / "export")
    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    ids = torch.tensor([[1, 5, 9, 40]])
    assert not torch.equal(trained(ids).logits, base(ids).logits)
    assert AutoTokenizer.from_pretrained(run / "export").chat_template


def test_saved_configuration_replays(run, tmp_path):
    """`config.yaml` alone runs the same again, to the same weights."""
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)])
    first, again = checkpoint(run)["state_dict"], checkpoint(tmp_path)["state_dict"]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_evaluate_scores_without_training(run, tmp_path, capsys):
    options_ = ["--trainer.default_root_dir", str(tmp_path), "--model.pretrained", str(run / "export")]
    main(["evaluate", "--config", ECHO, *options_, "--evaluation.num_tasks", "3"])
    assert "held-out success" in capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.jsonl").read_text())
    assert record["when"] == "test"
    assert record["num_tasks"] == 3


def test_a_saved_configuration_can_be_evaluated(run, tmp_path):
    """The checkpoint of a run, on another split, with nothing but the run's own configuration."""
    given = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    main(["evaluate", *given, "--trainer.default_root_dir", str(tmp_path), "--evaluation.split", "val"])
    assert json.loads((tmp_path / "evaluation.jsonl").read_text())["split"] == "val"


def test_tensorboard_works_offline(tiny_lm, tmp_path):
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path / "tb")}}
    fit(tiny_lm, tmp_path, f"--trainer.logger={json.dumps(logger)}", "--trainer.max_epochs=1")
    assert list((tmp_path / "tb").rglob("events.out.tfevents.*"))


def test_several_updates_and_passes_per_rollout(tiny_lm, tmp_path):
    """2 updates x 2 passes x 2 iterations are 8 optimiser steps, whatever the micro-batches."""
    state = fit(tiny_lm, tmp_path, "--data.num_updates", "2", "--data.num_passes", "2", "--data.max_tokens", "256")
    assert state["global_step"] == 8


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--data.group_size", "1"], "group_size=1.*at least 2"),
        (["--data.max_tokens", "10"], "max_tokens=10 is below max_length"),
        (["--data.max_length", "4000", "--data.max_tokens", "4000"], "beyond the model's 512"),
        (["--data.group_sise", "3"], "group_sise"),
        (["--model.kl_coef", "0.1"], "needs a reference policy"),
        (["--model.pretrained", "./nowhere"], "reads like a folder"),
        (["--ckpt_path", "nothing.ckpt"], "no such file"),
        (["--trainer.reload_dataloaders_every_n_epochs", "0"], "reload_dataloaders_every_n_epochs to 1"),
        (["--data.num_updates", "3"], "num_updates=3 needs at least as many prompts"),
        (["--data.sampling.temperature", "0"], "temperature above 0"),
        (["--model.aggregation", "constant"], "max_length"),
    ],
)
def test_mistakes_end_with_one_sentence(tiny_lm, tmp_path, capsys, more, text):
    """Exit code 2, the sentence on stderr, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        main(options(tiny_lm, tmp_path, *more))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(text, error), error


def test_an_existing_run_is_not_overwritten(run, tiny_lm, capsys):
    with pytest.raises(SystemExit):
        main(options(tiny_lm, run))
    assert "already holds a run" in capsys.readouterr().err


def test_resuming_with_other_options_uses_them_and_says_so(tiny_lm, tmp_path, capsys):
    fit(tiny_lm, tmp_path, "--trainer.max_epochs", "1")
    capsys.readouterr()
    state = fit(tiny_lm, tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", "2", "--model.clip_high", "0.5")
    said = capsys.readouterr().out
    assert "model.init_args.clip_high: 0.2 -> 0.5" in said
    assert "trainer.max_epochs: 1 -> 2" in said
    assert state["epoch"] == 1


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_learning_rate_given_at_resume_is_used(tiny_lm, tmp_path, scheduled):
    """The optimiser's checkpoint would bring the old one back; a schedule keeps its place on the new one."""
    path = "lit_agentrl.methods.schedules.WarmupCosine"
    cosine = json.dumps({"class_path": path, "init_args": {"warmup_steps": 0, "total_steps": 4}})
    more = (f"--model.lr_scheduler={cosine}",) if scheduled else ()
    fit(tiny_lm, tmp_path, *more, "--trainer.max_epochs=1", "--model.optimizer.lr=1e-2")
    state = fit(tiny_lm, tmp_path, *more, "--ckpt_path=last", "--trainer.max_epochs=2", "--model.optimizer.lr=1e-3")
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3 * (0.5 if scheduled else 1.0))


def test_a_checkpoint_of_another_shape_is_refused(tiny_lm, tmp_path, capsys):
    """Weights that the checkpoint lacks would otherwise start afresh, silently."""
    fit(tiny_lm, tmp_path, "--trainer.max_epochs", "1", "--model.lora.targets", '["q_proj"]')
    with pytest.raises(SystemExit):
        main(options(tiny_lm, tmp_path, "--ckpt_path", "last"))
    assert "lacks" in capsys.readouterr().err


class BrokenSuite(EchoSuite):
    """Every third episode raises when it starts."""

    made = 0

    def make(self, task):
        environment = super().make(task)
        type(self).made += 1
        if type(self).made % 3 == 0:
            environment.reset = self._raise  # type: ignore[method-assign]
        return environment

    @staticmethod
    def _raise():
        raise RuntimeError("the world broke")


def test_broken_episodes_are_counted_and_training_goes_on(tiny_lm, tmp_path):
    fit(tiny_lm, tmp_path, "--data.environment", f"{__name__}.BrokenSuite")
    rows = [row for row in metrics(tmp_path) if row.get("reward/mean")]
    assert sum(float(row["failed"]) for row in rows) > 0
    lines = (tmp_path / "transcripts" / "iteration_000000.jsonl").read_text().splitlines()
    assert any("the world broke" in json.loads(line)["error"] for line in lines)


def test_messages_go_to_standard_error_as_it_is():
    """A program may have redirected it when it first called `main`, and closed that since."""
    shown = []
    for _ in range(2):
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            quiet()
            logging.getLogger("lit_agentrl.anything").info("told")
            shown.append(stream.getvalue())
        stream.close()
    assert shown == ["told\n"] * 2
