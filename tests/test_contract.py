"""The contract is kept by every method and broken by what breaks it; its table, its verdicts, its command."""

import dataclasses
import json
import math
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from contract_parts import in_this_process, options_of, words
from lit_agentrl import lightning_cli
from lit_agentrl.cli import main
from lit_agentrl.doctor.contract import data, gradients
from lit_agentrl.doctor.contract.facts import Difference, Facts, read, write
from lit_agentrl.doctor.contract.moved import move_weights
from lit_agentrl.doctor.contract.processes import Ended, command, in_processes
from lit_agentrl.doctor.contract.recorder import Recorder, units_of
from lit_agentrl.doctor.contract.run import Bench, Contract, check, did_not_end, prepared, why_not
from lit_agentrl.doctor.contract.settings import BASELINE, IN_FLOAT32, SETTINGS
from lit_agentrl.doctor.contract.settings import options_of as options_for
from lit_agentrl.doctor.contract.text import render
from lit_agentrl.doctor.contract.verdict import LIMITS, Limits, Outcome, hint, judge, limits_for
from lit_agentrl.errors import UserError
from lit_agentrl.models import PackedTree
from lit_agentrl.types import PreferenceBatch, Step, TrainBatch, Trajectory, TrajectoryGroup
from runs import ROOT, fit
from test_doctor import broken_beyond

METHODS = ("grpo", "batch_std", "tree_grpo", "gigpo", "sft", "dpo")
MORE = [pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:]]
NAMED = {setting.name: setting for setting in SETTINGS}


def contract_of(name, lm, folder, monkeypatch, *only: str) -> Contract:
    """These settings, or all of one process, run in this one."""
    return check(options_of(words(name, lm, folder), monkeypatch), 2, in_this_process(*only))


def statuses(contract: Contract) -> dict[str, str]:
    """Of the settings that were run."""
    return {o.setting.name: o.status for o in contract.outcomes if o.facts is not None}


# --- every method, in one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", *MORE])
def test_every_method_keeps_the_contract(method, tiny_lm, tmp_path, monkeypatch):
    """In float64: what is left is the float32 in which Transformers computes norms."""
    contract = contract_of(method, tiny_lm, tmp_path, monkeypatch)
    print(render(contract))
    assert set(statuses(contract).values()) == {"held"}
    assert contract.limits == LIMITS["float64"]
    base = contract.baseline
    assert base.norm > 1e-3
    assert base.rows_per_rank == [{"tree_grpo": 18, "sft": 3, "dpo": 6}.get(method, 12)]
    found = {o.setting.name: o for o in contract.outcomes}
    assert found["split"].facts.micro_batches > base.micro_batches == 1
    assert found["packed and shared"].facts.shares
    assert not base.shares
    for outcome in contract.outcomes:
        if outcome.setting.strategy == "single":
            assert outcome.loss_difference < 1e-12
            assert outcome.logged_difference < 1e-6
            assert outcome.facts.difference.largest < 1e-6
        else:
            assert (outcome.status, outcome.reason) == ("skipped", "not here")
    assert found["split"].facts.difference.largest < 1e-12


def test_float32_has_limits_and_16_bits_are_measured_against_them(tiny_lm, tmp_path, monkeypatch):
    """How far the first step is from the same in float32 says what 16 bits may differ by."""
    for dtype in ("float32", "bfloat16"):
        given = options_of(words("sft", tiny_lm, tmp_path, "--model.dtype", dtype), monkeypatch)
        contract = check(given, 2, in_this_process("packed, shared, split", "in float32"))
        assert set(statuses(contract).values()) == {"held"}
        assert contract.baseline.precision == dtype
        if dtype == "float32":
            assert (contract.limits, contract.exact) == (LIMITS["float32"], None)
        else:
            assert contract.exact is not None
            assert contract.limits == limits_for(dtype, contract.exact)
            assert contract.limits.one_minus_cosine < LIMITS["half"].one_minus_cosine / 10
            assert "in float32" in render(contract)


def test_limits_of_16_bits_by_hand():
    """Thrice what the step in float32 is away, 1 - cos nine times; between those of float32 and the loosest."""

    def limits(loss: float, one_minus_cosine: float, norm: float, largest: float) -> Limits:
        facts = found(difference=Difference(one_minus_cosine, norm, largest, "w"))
        return limits_for("bfloat16", Outcome(IN_FLOAT32, "held", facts=facts, loss_difference=loss))

    assert dataclasses.astuple(limits(1e-3, 8e-6, 2e-3, 5e-3)) == pytest.approx((3e-3, 7.2e-5, 6e-3, 1.5e-2))
    # sqrt(2 x 8e-6) = 4e-3 between the gradients: the loss and the norm could as well have been off by a part of that
    assert dataclasses.astuple(limits(0.0, 8e-6, 0.0, 5e-3)) == pytest.approx((1.5e-3, 7.2e-5, 3e-3, 1.5e-2))
    assert limits(0.0, 0.0, 0.0, 0.0) == LIMITS["float32"]
    assert limits(1.0, 1.0, 1.0, 1.0) == LIMITS["half"]
    assert limits(math.nan, math.nan, math.nan, math.nan) == LIMITS["half"]
    assert limits_for("bfloat16") == LIMITS["half"]
    assert limits_for("float64") == LIMITS["float64"]


# --- what breaks it -------------------------------------------------------------------------------------------------


def test_a_mean_over_the_micro_batch_is_found(tiny_lm, tmp_path, monkeypatch):
    """Split alone shows it; what says nothing about micro-batches holds."""
    both = ("split", "packed, shared, split")
    contract = contract_of("LocalMean", tiny_lm, tmp_path, monkeypatch, *both, "packed and shared", "checkpointing")
    assert statuses(contract) == dict.fromkeys(both, "violated") | {
        "packed and shared": "held",
        "checkpointing": "held",
    }
    assert not contract.is_kept
    text = render(contract)
    assert "the loss is a mean over a micro-batch" in text
    assert "begin with `split`" in text
    assert "the contract is broken" in text


def test_a_mean_over_the_micro_batch_is_found_in_16_bits(tiny_lm, tmp_path, monkeypatch):
    """The loosest limits would let it pass on a model that small: the loss is off by 3e-4, 1 - cos is 4e-3."""
    given = options_of(words("LocalMean", tiny_lm, tmp_path, "--model.dtype", "bfloat16"), monkeypatch)
    contract = check(given, 2, in_this_process("split", "packed and shared", "in float32"))
    assert statuses(contract) == {"split": "violated", "packed and shared": "held"}
    (split,) = [each for each in contract.outcomes if each.status == "violated"]
    assert split.loss_difference < LIMITS["half"].loss
    assert split.facts.difference.one_minus_cosine < LIMITS["half"].one_minus_cosine


def test_siblings_that_see_one_another_are_found(tiny_lm, tmp_path, monkeypatch):
    """The start-up check passes, as its rows are short."""
    given = options_of(words("grpo", tiny_lm, tmp_path), monkeypatch)
    monkeypatch.setattr(PackedTree, "build", broken_beyond(50))
    found = statuses(check(given, 2, in_this_process("packed and shared", "as configured", "split")))
    assert found == {"packed and shared": "violated", "as configured": "violated", "split": "held"}


def test_a_forward_that_is_another_when_it_is_repeated_is_found(tiny_lm, tmp_path, monkeypatch):
    found = statuses(contract_of("Forgetful", tiny_lm, tmp_path, monkeypatch, "checkpointing", "split"))
    assert found == {"checkpointing": "violated", "split": "held"}


# --- two ranks ------------------------------------------------------------------------------------------------------


BROKEN = ("RankLoss", "LocalAdvantage")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some 50 steps; a busy machine takes 20 s for one on two ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_strategies_keep_it_and_show_what_breaks_it(ranks, tiny_lm, tmp_path, monkeypatch):
    """Every method under every strategy: one start of processes serves all."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    baselines, folders = {}, {}
    few = {"sft": 1, "dpo": 1}  # the second rank has no row at all
    for method in (*METHODS, *BROKEN):
        folder = tmp_path / method
        folder.mkdir()
        given = options_of(words(method, tiny_lm, folder), monkeypatch)
        bench = Bench(folder, prepared(given, few.get(method, 3), folder), in_this_process())
        baselines[method], _ = bench.baseline()
        for setting in bench.settings:
            if setting.strategy != "single" and setting.ranks == ranks:
                folders[method, setting] = bench.prepare(setting, baselines[method])
    ended = in_processes(command([str(folder) for folder in folders.values()]), 1500)
    assert ended.code == 0, ended.output
    outcomes = {
        (method, setting.name): judge(setting, read(folder), baselines[method])
        for (method, setting), folder in folders.items()
    }
    for (method, name), outcome in outcomes.items():
        is_broken = method in BROKEN and ranks == 2
        assert outcome.status == ("violated" if is_broken else "held"), (method, name, outcome.reason)
        assert outcome.has_same_rows != (method == "LocalAdvantage" and is_broken)
        assert outcome.facts.is_sharded == (outcome.setting.strategy == "fsdp2")
        shares = outcome.facts.rows_per_rank
        assert len(shares) == ranks
        if ranks == 2:
            assert shares[0] > shares[1]  # an odd number
            assert (shares[1] == 0) == (method in few)
    if ranks == 1:
        return
    assert "depends on the rank" in hint(outcomes["RankLoss", "DDP, 2 ranks"], list(outcomes.values()))
    assert "what one rank holds" in hint(outcomes["LocalAdvantage", "DDP, 2 ranks"], list(outcomes.values()))


@pytest.mark.slow
def test_a_checkpoints_weights_are_taken_by_every_strategy(tiny_lm, tmp_path, monkeypatch):
    """Of an adapter, in one process and sharded over two ranks alike."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    fit(tiny_lm, tmp_path / "run", "--trainer.max_epochs", "1")
    last = ("--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    norms = []
    for name, more in (("fresh", ()), ("trained", last)):
        folder = tmp_path / name
        folder.mkdir()
        arguments = [*words("echo", tiny_lm, folder, *more)]
        bench = Bench(folder, prepared(options_of(arguments, monkeypatch), 3, folder), in_this_process())
        baseline, _ = bench.baseline()
        norms.append(baseline.norm)
    assert abs(norms[1] / norms[0] - 1) > 1e-3
    sharded = bench.prepare(NAMED["FSDP2, 2 ranks"], baseline)
    ended = in_processes(command([str(sharded)]), 600)
    assert ended.code == 0, ended.output
    assert judge(NAMED["FSDP2, 2 ranks"], read(sharded), baseline).status == "held"


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_exits(tiny_lm, tmp_path, monkeypatch, capsys):
    """With 1 where it is broken; the numbers are there in any case."""
    monkeypatch.setattr(lightning_cli, "check", lambda *given: check(*given, in_this_process("split")))
    target = tmp_path / "contract.json"
    main(words("sft", tiny_lm, tmp_path, "--json", str(target)))
    assert "the contract is kept" in capsys.readouterr().out
    found = json.loads(target.read_text())
    assert found["is_kept"] is True
    assert [row["setting"]["name"] for row in found["settings"]] == list(NAMED)
    assert "units" not in found["baseline"]
    with pytest.raises(SystemExit) as stop:
        main(words("LocalMean", tiny_lm, tmp_path, "--json", str(target)))
    assert stop.value.code == 1
    assert json.loads(target.read_text())["is_kept"] is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.max_length", "4"), "did not end well: error: None of the 3 conversations fits"),
        (("--model.pretrained", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_a_first_run_that_fails_is_the_users_error(more, message, tiny_lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lightning_cli, "check", lambda *given: check(*given, in_this_process("split")))
    with pytest.raises(SystemExit) as stop:
        main(words("sft", tiny_lm, tmp_path, *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_single_step_needs_something_to_be_compared_with(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Recorder(tmp_path / "no")
    (tmp_path / "split").mkdir()
    with pytest.raises(UserError, match="holds no step to compare with"):
        Recorder(tmp_path / "split")
    (tmp_path / "baseline").mkdir()
    Recorder(tmp_path / "baseline")


def test_it_is_no_job_of_many_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run it as one process"):
        check({}, 2)


def test_the_gradient_of_nothing_proves_nothing(tmp_path):
    facts = dataclasses.replace(FACTS, norm=0.0, difference=None)

    def execute(arguments, timeout):
        write(facts, tmp_path / "baseline")
        return Ended(0, "")

    with pytest.raises(UserError, match=r"norm is 0\.0 on 2 rows"):
        Bench(tmp_path, OPTIONS, execute).baseline()


# --- settings -------------------------------------------------------------------------------------------------------

OPTIONS = {
    "trainer": {"strategy": "auto", "devices": 1},
    "model": {"init_args": {"share_prefix": "auto", "gradient_checkpointing": True, "compile": False}},
    "data": {"class_path": "x.Rows", "init_args": {"max_tokens": 8192, "max_length": 1024}},
}
FACTS = Facts(
    model="M",
    precision="float32",
    device="cpu",
    ranks=1,
    is_sharded=False,
    shares=False,
    refusal="",
    micro_batches=1,
    rows_per_rank=[2],
    units=[("a", 1.0, 1.0, -3.0, 9.0), ("b", 0.0, 0.0, -2.0, 4.0)],
    longest=50,
    largest_unit=100,
    loss=2.0,
    logged=2.0,
    norm=3.0,
    num_weights=10,
    seconds=1.0,
    peak_bytes=2**30,
)


def test_settings_are_options():
    """Only what a setting is about differs from the baseline."""
    base = options_for(BASELINE, OPTIONS)
    assert base["model"]["init_args"] == {"share_prefix": False, "gradient_checkpointing": False, "compile": False}
    assert base["data"] == OPTIONS["data"]
    everything = options_for(NAMED["FSDP2, 2 ranks, all of it"], OPTIONS, FACTS)
    assert everything["model"]["init_args"] == {"share_prefix": True, "gradient_checkpointing": True, "compile": False}
    assert everything["data"]["init_args"] == {"max_tokens": 100, "max_length": 50}
    assert everything["trainer"]["devices"] == 2
    assert everything["trainer"]["strategy"]["class_path"].endswith("FSDP2Strategy")
    own = options_for(NAMED["as configured"], OPTIONS, FACTS)
    assert own["model"] == OPTIONS["model"]
    assert OPTIONS["trainer"] == {"strategy": "auto", "devices": 1}


def test_a_split_leaves_room_for_an_action():
    """The datamodule asks for it, whether anything is sampled or not."""
    data_options = {
        "class_path": "x",
        "init_args": {"max_tokens": 9, "max_length": 9, "sampling": {"max_new_tokens": 70}},
    }
    split = options_for(NAMED["split"], OPTIONS | {"data": data_options}, FACTS)
    assert split["data"]["init_args"]["max_length"] == 71
    assert split["data"]["init_args"]["max_tokens"] == 100


def test_what_cannot_be_tried_is_said(monkeypatch):
    two = NAMED["FSDP2, 2 ranks"]
    assert why_not(NAMED["split"], OPTIONS, FACTS) == ""
    quantized = OPTIONS | {"model": {"init_args": {"quantize": "nf4"}}}
    assert "4 bits" in why_not(two, quantized, FACTS)
    assert "4 bits" not in why_not(NAMED["DDP, 1 rank"], quantized, FACTS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "1 GPU" in why_not(two, OPTIONS, dataclasses.replace(FACTS, device="cuda:0"))
    monkeypatch.setattr("lit_agentrl.doctor.contract.run.available_bytes", lambda device: 2**30)
    assert why_not(two, OPTIONS, FACTS) == "2 ranks take about 2.0 GiB, 1.0 GiB are free"
    rows = OPTIONS | {"data": {"class_path": "x.Rows", "init_args": {}}}
    assert "no max_tokens" in why_not(NAMED["split"], rows, FACTS)


# --- verdicts -------------------------------------------------------------------------------------------------------

EQUAL = Difference(0.0, 0.0, 0.0, "w")


def found(**changes) -> Facts:
    return dataclasses.replace(FACTS, **({"difference": EQUAL} | changes))


def test_equal_is_held():
    outcome = judge(NAMED["checkpointing"], found(), FACTS)
    assert (outcome.status, outcome.reason) == ("held", "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 2.0005}, "the loss is off by 2.5e-04 (limit 1e-05)"),
        ({"loss": math.nan}, "the loss is off by nan"),
        ({"logged": 2.001}, "the logged loss"),
        ({"difference": Difference(1e-5, 0, 0, "w")}, "direction"),
        ({"difference": Difference(0, 2e-3, 0, "w")}, "its norm"),
        ({"difference": Difference(0, 0, 0.1, "layers.0")}, r"its largest entry (layers.0)"),
        ({"difference": Difference(math.nan, math.nan, math.nan, "w")}, "off by nan"),
        ({"units": FACTS.units[:1]}, "other rows or denominators are trained (1 for 2)"),
        ({"units": [("a", 1.1, 1.0, -3.0, 9.0), FACTS.units[1]]}, "other advantages or old log-probabilities"),
        ({"units": [("a", 1.0, 1.0, -3.0, 9.0), ("c", 0.0, 0.0, -2.0, 4.0)]}, "other rows"),
    ],
)
def test_each_difference_alone_is_a_violation(changes, said):
    outcome = judge(NAMED["checkpointing"], found(**changes), FACTS)
    assert outcome.status == "violated"
    assert said in outcome.reason


def test_rounding_of_advantages_is_no_other_row():
    units = [("a", 1.0 + 1e-7, 1.0, -3.0, 9.0), FACTS.units[1]]
    assert judge(NAMED["checkpointing"], found(units=units), FACTS).status == "held"


def test_a_setting_that_did_not_come_about_proves_nothing():
    assert judge(NAMED["split"], found(), FACTS).status == "skipped"
    assert judge(NAMED["split"], found(micro_batches=2), FACTS).status == "held"
    shared = judge(NAMED["packed and shared"], found(refusal="it has conv layers"), FACTS)
    assert (shared.status, shared.reason) == ("skipped", "this model shares no prefixes: it has conv layers")
    assert judge(NAMED["DDP, 2 ranks"], found(), FACTS).status == "failed"
    assert judge(NAMED["FSDP2, 2 ranks"], found(ranks=2), FACTS).status == "skipped"
    assert judge(NAMED["FSDP2, 2 ranks"], found(ranks=2, is_sharded=True), FACTS).status == "held"
    both = judge(NAMED["DDP, 2 ranks, all of it"], found(ranks=2, refusal="conv"), FACTS)
    assert (both.status, both.reason) == ("held", "this model shares no prefixes: conv")
    assert judge(NAMED["split"], found(loss=3.0), FACTS).status == "violated"  # shown all the same


def test_hints_begin_with_the_simplest():
    def violated(name):
        return Outcome(NAMED[name], "violated", has_same_rows=True)

    split, both, ranks = violated("split"), violated("packed, shared, split"), violated("DDP, 2 ranks")
    assert "begin with `split`" in hint(both, [split, both])
    assert "combination" in hint(both, [both])
    assert "global denominators" in hint(ranks, [split, ranks])
    everything = violated("FSDP2, 2 ranks, all of it")
    assert "begin with `FSDP2, 2 ranks`" in hint(everything, [violated("FSDP2, 2 ranks"), everything])
    assert "begin with" not in hint(everything, [ranks, everything])  # another strategy's
    assert "strategy ddp" in hint(violated("FSDP2, 1 rank"), [])
    assert "gradient_checkpointing false" in hint(violated("checkpointing"), [])
    assert "share_prefix false" in hint(violated("packed and shared"), [])
    other = Outcome(NAMED["DDP, 2 ranks"], "violated", has_same_rows=False)
    assert "distributed.gather" in hint(other, [])


def test_a_step_in_float32_that_fails_is_said():
    failed = Outcome(IN_FLOAT32, "skipped", "not enough memory")
    text = render(Contract(FACTS, limits_for("bfloat16", failed), [], 1.0, failed))
    assert "in float32: skipped: not enough memory" in text
    assert "the loosest limits of 16 bits are used" in text
    held = dataclasses.replace(failed, status="held", reason="", facts=found(), loss_difference=0.0)
    text = render(Contract(FACTS, limits_for("bfloat16", held), [], 1.0, held))
    assert "sets the limits" in text
    assert "loosest" not in text


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        (Ended(2, "x\nerror: LfmModel has no layers that could be sharded\n"), "skipped", "LfmModel has no layers"),
        (Ended(-9, ""), "skipped", "not enough memory"),
        (Ended(1, "torch.OutOfMemoryError: CUDA out of memory"), "skipped", "not enough memory"),
        (Ended(-9, "", is_late=True), "failed", "wait for one another"),
        (Ended(1, "Traceback\nKeyError: 'x'\n[rank0]: RuntimeError: closed"), "failed", "exit code 1: KeyError: 'x'"),
    ],
)
def test_runs_that_found_nothing(ended, status, said):
    outcome = did_not_end(NAMED["FSDP2, 2 ranks"], ended, 300.0)
    assert outcome.status == status
    assert said in outcome.reason
    text = render(Contract(FACTS, LIMITS["float32"], [outcome], 1.0))
    assert said in text
    assert ("the contract is kept" in text) == (status == "skipped")


def test_what_follows_a_failure_is_run_all_the_same(tmp_path):
    """Settings of as many ranks share their processes; when these die, the rest gets new ones."""
    begun = []

    def execute(arguments, timeout):
        folders = json.loads(arguments[-1])
        begun.append(len(folders))
        for folder in folders:
            if "checkpointing" in folder:
                return Ended(1, "it broke")
            write(found(micro_batches=2, shares=True), tmp_path / folder)
        return Ended(0, "")

    (tmp_path / "run").mkdir()
    bench = Bench(tmp_path / "run", OPTIONS, execute)
    outcomes = bench.outcomes(dataclasses.replace(FACTS, peak_bytes=2**60), 1.0)
    assert [o.setting for o in outcomes] == bench.settings
    by_name = {o.setting.name: o for o in outcomes}
    assert by_name["checkpointing"].reason == "exit code 1: it broke"
    assert by_name["packed and shared"].status == by_name["as configured"].status == "held"
    assert by_name["DDP, 2 ranks"].status == "skipped"
    assert begun == [7, 3]


# --- parts ----------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = None
        self.one = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        self.zero = torch.nn.Parameter(torch.zeros(3))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)


def test_gradients_are_compared_by_hand(tmp_path):
    """(3, 0, 4) with (0, 0, 0) missing, against (3, 0, 3): cosine 21 / (5 sqrt 18), norms 5 and sqrt 18, entry 1/4."""
    net = Net()
    net.zero.grad = torch.tensor([3.0, 0.0, 4.0])
    assert gradients.save(net, tmp_path) == 5.0
    net.zero.grad = torch.tensor([3.0, 0.0, 3.0])
    norm, difference = gradients.compare(net, tmp_path)
    assert norm == pytest.approx(18**0.5)
    assert difference.one_minus_cosine == pytest.approx(1 - 21 / (5 * 18**0.5))
    assert difference.norm == pytest.approx((5 - 18**0.5) / 5)
    assert (difference.largest, difference.weight) == (0.25, "zero")
    net.zero.grad[0] = math.nan
    assert math.isnan(gradients.compare(net, tmp_path)[1].one_minus_cosine)


def test_a_gradient_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="set TMPDIR"):
        gradients.save(Net(), tmp_path)


def test_weights_move_alike_and_zeros_too():
    one, other = Net(), Net()
    torch.manual_seed(3)
    move_weights(one)
    torch.manual_seed(4)
    move_weights(other)
    assert torch.equal(one.zero, other.zero)
    assert torch.equal(one.one, other.one)
    assert 0 < float((one.one.detach() - torch.tensor([3.0, 4.0])).abs().max()) < 0.2
    assert bool((one.zero != 0).all())
    assert torch.equal(one.frozen, torch.ones(2))


def batch(kind=TrainBatch, **changes):
    given = {
        "token_ids": torch.tensor([[1, 2, 3], [1, 2, 0]]),
        "lengths": torch.tensor([3, 2]),
        "action_mask": torch.tensor([[False, True, True], [False, False, False]]),
        "old_logprobs": torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, 0.0]]),
        "advantages": torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]),
        "num_action_tokens": 2,
    }
    return kind(**(given | changes))


def test_rows_are_known_by_all_that_the_loss_sees_of_them():
    (unit,) = units_of(batch())  # the second row has no loss
    assert unit[1:] == (1.0, 0.5, -3.0, 5.0)
    wider = batch(token_ids=torch.tensor([[1, 2, 3], [9, 9, 9]]))
    assert list(units_of(wider)) == [unit]
    for changes in ({"token_ids": torch.tensor([[1, 2, 4], [1, 2, 0]])}, {"num_action_tokens": 3}, {"num_rows": 2}):
        assert next(units_of(batch(**changes)))[0] != unit[0]
    (pair,) = units_of(batch(PreferenceBatch))
    swapped = batch(PreferenceBatch, token_ids=torch.tensor([[1, 2, 3], [1, 7, 0]]))
    assert next(units_of(swapped))[0] != pair[0]


def test_steps_are_paid_once_and_by_prompt_alone():
    shared = Step([1], [2], [0.0])
    group = TrajectoryGroup("p", [Trajectory([shared, Step([1, 2], [3], [0.0])]), Trajectory([shared])])
    data.pay_at_random(group, 5)
    first = [step.reward for trajectory in group.trajectories for step in trajectory.steps]
    assert first[0] == first[2] != first[1]
    data.pay_at_random(group, 5)
    assert [step.reward for trajectory in group.trajectories for step in trajectory.steps] == first
    data.pay_at_random(group, 6)
    assert shared.reward != first[0]


def test_pairs_are_cut_and_their_images_still_found(tmp_path):
    source = tmp_path / "deep" / "pairs.jsonl"
    source.parent.mkdir()
    lines = [{"images": ["a.png", {"path": "/b.png", "sha256": "x"}]}, {"prompt": "p"}, {"prompt": "q"}]
    source.write_text("\n\n".join(json.dumps(line) for line in lines))
    kept = data.first_pairs(source, 2, tmp_path / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [
        {"images": [str(source.parent / "a.png"), {"path": "/b.png", "sha256": "x"}]},
        {"prompt": "p"},
    ]


def test_a_prompt_that_was_never_played_is_not_made_up(tmp_path):
    replay = data.Replay(SimpleNamespace(), str(tmp_path), is_recording=False)
    with pytest.raises(UserError, match="Prompt 3 was not played"):
        replay.collect([SimpleNamespace(number=3)], 2, None)


def test_facts_are_read_as_they_were_written(tmp_path):
    assert read(tmp_path) is None
    for facts in (FACTS, found()):
        write(facts, tmp_path)
        assert read(tmp_path) == facts


def test_a_run_that_hangs_ends(monkeypatch):
    """And what it started with it."""
    start, script = subprocess.Popen, "sleep 60 & sleep 60"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: start(["/bin/sh", "-c", script], **more))
    began = time.monotonic()
    assert in_processes(["doctor"], 0.5).is_late
    assert time.monotonic() - began < 30
    script = "echo $RANK; exit 3"
    monkeypatch.setenv("RANK", "7")
    assert in_processes(["doctor"], 10) == Ended(3, "\n")
