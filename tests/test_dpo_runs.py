"""DPO from the command line: what must not change the weights, resuming, ranks, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lit_agentrl.cli import main
from preference_parts import dpo_options, echo_pairs, fit_pairs, write_pairs
from runs import checkpoint, metrics, run_alone
from test_resume import same


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "preferences.jsonl", echo_pairs())


@pytest.fixture(scope="module")
def plain(tiny_lm: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: one micro-batch a step, nothing shared."""
    run = tmp_path_factory.mktemp("plain")
    fit_pairs(tiny_lm, run, pairs, "--model.share_prefix=false")
    return run


def weights(run: Path) -> dict[str, Any]:
    return dict(checkpoint(run)["state_dict"])


@pytest.mark.parametrize(
    "more",
    [
        ("--data.max_tokens=256", "--model.share_prefix=false"),
        ("--model.share_prefix=true",),
        ("--data.max_tokens=256", "--model.share_prefix=true"),
        ("--model.precompute=true",),
        ("--model.reference.mode=adapter_off",),
        ("--model.gradient_checkpointing=true",),
    ],
    ids=["micro-batches", "shared", "shared-micro-batches", "precomputed", "adapter-off", "checkpointing"],
)
def test_the_same_weights(tiny_lm: str, pairs: Path, tmp_path: Path, plain: Path, more: tuple[str, ...]) -> None:
    """No split, no sharing, no way to compute the reference changes what is learnt."""
    fit_pairs(tiny_lm, tmp_path, pairs, *more)
    for name, value in weights(plain).items():
        assert_close(weights(tmp_path)[name], value, rtol=5e-3, atol=5e-5)
    assert max(float(v.abs().max()) for k, v in weights(plain).items() if "lora_B" in k) > 3e-3


def test_another_loss_gives_other_weights(tiny_lm: str, pairs: Path, tmp_path: Path, plain: Path) -> None:
    """The law above can fail."""
    fit_pairs(tiny_lm, tmp_path, pairs, '--model.losses={"simpo": 1.0}')
    assert any((weights(tmp_path)[name] - value).abs().max() > 1e-3 for name, value in weights(plain).items())


def test_it_learns_what_is_preferred(tiny_lm: str, pairs: Path, tmp_path: Path) -> None:
    """The margin grows, every pair ends on the right side, and the loss starts at log 2."""
    fit_pairs(tiny_lm, tmp_path, pairs, "--data.batch_size=7", "--trainer.max_epochs=8")
    rows = [row for row in metrics(tmp_path) if row.get("train/loss")]
    assert float(rows[0]["train/loss"]) == pytest.approx(0.693147, abs=1e-5)
    assert float(rows[-1]["train/accuracy"]) == 1.0
    assert float(rows[-1]["train/margin"]) > 0.2
    assert {name for name in rows[0] if name.startswith("train/")} == {
        f"train/{name}"
        for name in (
            *("loss", "margin", "accuracy", "length_gap"),
            *("reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"),
        )
    }


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--model.precompute=true", "--data.max_tokens=256"),
        ('--model.reference={"mode": "ema", "decay": 0.5}', '--model.losses={"sigmoid": 1.0, "nll": 0.1}'),
    ],
    ids=["frozen", "precomputed", "ema"],
)
def test_resume_equals_uninterrupted(tiny_lm: str, pairs: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Bit by bit: the order, the reference (also one that is computed anew) and the optimiser."""
    whole = fit_pairs(tiny_lm, tmp_path / "whole", pairs, *more, "--trainer.max_epochs=3")
    fit_pairs(tiny_lm, tmp_path / "part", pairs, *more, "--trainer.max_epochs=1")
    resumed = fit_pairs(tiny_lm, tmp_path / "part", pairs, *more, "--trainer.max_epochs=3", "--ckpt_path=last")
    for key in ("state_dict", "optimizer_states", "reference"):
        assert same(whole[key], resumed[key])
    assert whole["reference"]


@pytest.mark.slow
@pytest.mark.parametrize("precompute", ["true", "false"])
def test_two_gloo_ranks_train_as_one(tiny_lm: str, pairs: Path, tmp_path: Path, precompute: str) -> None:
    """Seven pairs, four a step: one rank has less to do, and in the last step one pair is left for one of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--data.max_tokens=256", "--data.batch_size=3", f"--model.precompute={precompute}")
    for run, strategy in ((one, ()), (two, ("--trainer.strategy", "ddp", "--trainer.devices", "2"))):
        code, output = run_alone(dpo_options(tiny_lm, run, pairs, *more, *strategy))
        assert code == 0, output
    for name, value in weights(one).items():
        assert_close(weights(two)[name], value, rtol=1e-3, atol=1e-5)
    for name in ("train/loss", "train/margin", "train/accuracy", "train/length_gap", "pairs"):
        first, second = ([float(row[name]) for row in metrics(run) if row.get(name)] for run in (one, two))
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5)


def test_modules_and_data_that_do_not_belong_together(
    tiny_lm: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says what to use instead."""
    options = dpo_options(tiny_lm, tmp_path / "a", pairs)
    with pytest.raises(SystemExit):
        main([*options[:3], "--model", "SFTModule", "--model.pretrained", tiny_lm, *_without_dpo(options[3:])])
    assert "use DPOModule" in capsys.readouterr().err


def _without_dpo(words: list[str]) -> list[str]:
    """Options of `fit` without the model's."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for name, value in pairs if not name.startswith("--model") for word in (name, value)]


def test_an_exported_adapter_is_its_own_reference(tiny_lm: str, pairs: Path, tmp_path: Path) -> None:
    """DPO on top of an SFT adapter: `frozen` starts at it (log 2); without the adapter lies the base model (not)."""
    fit_pairs(tiny_lm, tmp_path / "first", pairs, "--export.merge=false", "--trainer.max_epochs=4")
    more = ("--model.lora=null", "--data.batch_size=7", "--trainer.max_epochs=1")
    found = []
    for mode in ("frozen", "adapter_off"):
        run = tmp_path / mode
        fit_pairs(str(tmp_path / "first" / "export"), run, pairs, *more, f"--model.reference.mode={mode}")
        found.append(next(float(row["train/loss"]) for row in metrics(run) if row.get("train/loss")))
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    assert found[1] < 0.68
    assert torch.isfinite(torch.tensor(found)).all()
