"""The doctor's numbers against independent computations, its verdicts on healthy and broken runs, and its command."""

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import Lfm2Config

import tiny
from lit_agentrl.cli import main
from lit_agentrl.doctor import cost as cost_file
from lit_agentrl.doctor import rows, twin
from lit_agentrl.doctor.checkup import Checkup
from lit_agentrl.doctor.cost import Cost, SideCost, measure_cost
from lit_agentrl.doctor.equality import Distance, Equality, Limits, compare, measure_equality
from lit_agentrl.doctor.memory import available_bytes, peak_bytes
from lit_agentrl.doctor.noise import Noise, Ratios, measure_noise
from lit_agentrl.doctor.passes import Passes
from lit_agentrl.doctor.recommendation import Budget, Sharing, advise
from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.models import PackedTree, PaddedModel, PrefixGroupedModel, scoring
from lit_agentrl.models.policy import Lora
from lit_agentrl.types import TrainBatch
from prefix_cases import SHAPES
from runs import ECHO, ROOT, fit
from test_configs import SMALL

CPU = torch.device("cpu")


def batch_of(*token_rows: list[int], **more: object) -> TrainBatch:
    """Rows whose every token but the first is an action."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in token_rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in token_rows])
    place = torch.arange(ids.shape[1])
    mask = (place > 0) & (place < lengths[:, None])
    zeros = torch.zeros(ids.shape)
    return TrainBatch(ids, lengths, mask, zeros, zeros, int(mask.sum()), **more)


def passes_of(lm: str, *, shape: str = "multi_turn", **options) -> Passes:
    """A real module and the rows of `prefix_cases`, weighted as the doctor weighs them."""
    module = GRPOPlusPlusModule(pretrained=lm, **options)
    module.configure_model()
    ids, lengths, targets = SHAPES[shape]()
    zeros = torch.zeros(ids.shape)
    batch = TrainBatch(ids, lengths, targets, zeros, zeros, int(targets.sum()), temperature=0.7)
    return Passes(module, nullcontext, rows.weighted(batch))


def whole(passes: Passes) -> list[list[int]]:
    return [list(range(len(passes.rows.lengths)))]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_reuse_is_counted_by_hand():
    """A prompt of 3 tokens with answers of 1 and 2: 9 row tokens, 10 padded ones, 6 unique ones; micro-batches add."""
    group = batch_of([1, 2, 3, 4], [1, 2, 3, 5, 6])
    found = rows.reuse_of([group])
    assert (found.num_rows, found.row_tokens, found.padded_tokens, found.unique_tokens) == (2, 9, 10, 6)
    assert (found.ratio, found.padded_ratio) == (9 / 6, 10 / 6)
    twice = rows.reuse_of([group, group])
    assert (twice.row_tokens, twice.padded_tokens, twice.unique_tokens) == (18, 20, 12)


def test_micro_batches_are_joined_and_ordered_and_rows_keep_what_is_theirs():
    first, second = batch_of([5, 6], [1, 2, 3]), batch_of([1, 2, 4, 7])
    first.old_logprobs = -first.token_ids.float()
    second.old_logprobs = -second.token_ids.float()
    ordered = rows.in_tree_order(rows.joined([first, second]))
    assert ordered.token_ids.tolist() == [[1, 2, 3, 0], [1, 2, 4, 7], [5, 6, 0, 0]]
    assert ordered.lengths.tolist() == [3, 4, 2]
    assert torch.equal(ordered.old_logprobs, -ordered.token_ids.float())
    assert rows.select(ordered, [2]).token_ids.tolist() == [[5, 6, 0, 0]]


@dataclasses.dataclass
class Pictures:
    """What images are to the doctor: something per row, and tokens that only look alike."""

    names: list[str]

    def rows(self, indices):
        return Pictures([self.names[i] for i in indices])

    def keys(self, token_ids, lengths):
        return token_ids + torch.tensor([[ord(name)] for name in self.names]) * 1000


@dataclasses.dataclass
class PictureBatch(TrainBatch):
    pictures: Pictures | None = None


def test_rows_with_images_are_told_apart_and_keep_their_images():
    """Equal tokens with different pictures share nothing; such micro-batches are not joined."""
    plain = batch_of([1, 2, 3], [1, 2, 4], [1, 2, 3])
    given = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    batch = PictureBatch(**given, pictures=Pictures(["a", "b", "a"]))
    assert rows.reuse_of([plain]).unique_tokens == 4
    assert rows.reuse_of([batch]).unique_tokens == 6
    assert rows.select(batch, [1, 2]).pictures.names == ["b", "a"]
    assert rows.joined([rows.select(batch, [1]), batch]) is batch


# --- memory and copies ----------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_tensors_alive_at_once():
    """4 + 8 MB, then 4 go and 2 come: 12 MB at most. What was there before does not count."""
    before = torch.zeros(1_000_000)

    def work():
        one, other = torch.empty(1_000_000), torch.empty(2_000_000)
        del one
        return other, torch.empty(500_000), before

    assert peak_bytes(work, CPU) == 12_000_000


def test_a_copy_in_another_precision_leaves_the_policy_alone(tiny_lm, monkeypatch):
    """16-bit weights keep float32 adapters, as a loaded policy does; without memory there is no copy."""
    lm = passes_of(tiny_lm, lora=Lora(r=4)).module.policy.lm
    before = {name: p.clone() for name, p in lm.named_parameters()}
    half = twin.twin_of(lm, torch.bfloat16)
    dtypes = {"lora" in name: p.dtype for name, p in half.lm.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {p.dtype for p in twin.twin_of(lm, torch.float64).lm.parameters()} == {torch.float64}
    for name, p in lm.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])
    needed = 4 * sum(p.numel() for p in lm.parameters())
    monkeypatch.setattr(twin, "available_bytes", lambda device: 1.4 * needed)
    assert twin.twin_of(lm, torch.float32) is None
    assert twin.twin_of(lm, torch.bfloat16) is not None


def test_large_models_are_compared_with_float32_or_nothing(monkeypatch, tiny_lm):
    lm = passes_of(tiny_lm).module.policy.lm
    assert twin.exact_dtype(lm, half=True) == torch.float64
    monkeypatch.setattr(twin, "LARGE", 10)
    assert twin.exact_dtype(lm, half=True) == torch.float32
    assert twin.exact_dtype(lm, half=False) is None


def test_some_memory_is_free():
    assert 2**20 < available_bytes(CPU) < 2**50


# --- equality -------------------------------------------------------------------------------------------------------


def test_gradients_are_compared_by_hand():
    """(3, 4) and (8, 6): cosine 48 / 50, norms 5 and 10; over several parameters as over one vector."""
    one, other = [torch.tensor([3.0, 4.0])], [torch.tensor([[8.0], [6.0]])]
    assert compare(one, other) == (pytest.approx(0.96), pytest.approx(1.0))
    assert compare([*one, *one], [*other, *other]) == (pytest.approx(0.96), pytest.approx(1.0))
    assert math.isnan(compare([torch.zeros(2)], other)[0])


def direct(passes: Passes, policy: PaddedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [B, L] and the gradient as one vector, of -(1/N) sum of A log p, by autograd alone."""
    batch, lm = passes.rows, policy.lm
    logp = policy(batch.token_ids, batch.lengths, targets=batch.action_mask, temperature=0.7).logprobs
    if not isinstance(policy, PrefixGroupedModel):  # row by row through the model's own forward
        logp = torch.zeros(batch.token_ids.shape, dtype=logp.dtype)
        for b, length in enumerate(batch.lengths.tolist()):
            log_p = (lm(input_ids=batch.token_ids[b : b + 1, :length]).logits[0, :-1].float() / 0.7).log_softmax(-1)
            logp[b, 1:length] = log_p.gather(1, batch.token_ids[b, 1:length, None])[:, 0]
    loss = -(batch.advantages * logp)[batch.action_mask].sum() / batch.action_mask.sum()
    trained = [p for p in lm.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    vector = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    return logp.detach(), torch.cat([g.flatten().double() for g in vector])


def broken_beyond(length: int):
    """`PackedTree.build` with the positions of later tokens off by a third: what no short start-up check can see."""
    build = PackedTree.build.__func__

    def wrong(cls, *args, **kwargs):
        tree = build(cls, *args, **kwargs)
        tree.positions = torch.where(tree.positions > length, tree.positions * 2 // 3, tree.positions)
        return tree

    return classmethod(wrong)


@pytest.mark.parametrize("is_broken", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"lora": Lora(r=4)}),
        ("qwen3", {"dtype": "bfloat16"}),
    ],
)
def test_equality_is_that_of_an_independent_computation(family, options, is_broken, tmp_path, monkeypatch):
    """Max and mean |difference|, cosine and norms from whole vectors. Right models are healthy, wrong ones are not."""
    passes = passes_of(tiny.build_tiny_lm(tmp_path, family, initializer_range=0.2), **options)
    lm = passes.module.policy.lm
    padded, grouped = PaddedModel(lm), PrefixGroupedModel(lm, min_reuse=1.0, check=False)
    if is_broken:
        monkeypatch.setattr(PackedTree, "build", broken_beyond(4))
    found = measure_equality(passes, padded, grouped, (whole(passes), whole(passes)), half="dtype" in options)
    (one, one_gradient), (other, other_gradient) = direct(passes, padded), direct(passes, grouped)
    difference = (one.double() - other.double())[passes.rows.action_mask].abs()
    rounding = 5e-2 if "dtype" in options else 5e-6  # the model's own forward rounds in its own way
    assert found.logprobs.max == pytest.approx(float(difference.max()), abs=rounding)
    assert found.logprobs.mean == pytest.approx(float(difference.mean()), abs=rounding)
    cosine = torch.nn.functional.cosine_similarity(one_gradient, other_gradient, dim=0)
    assert found.cosine == pytest.approx(float(cosine), abs=rounding)
    norms = one_gradient.norm(), other_gradient.norm()
    assert norms[0] > 1e-3
    assert found.norm_difference == pytest.approx(float((norms[1] - norms[0]).abs() / norms[0]), abs=rounding)
    assert found.is_healthy is not is_broken
    assert (found.logprobs.max > 4 * rounding) is is_broken  # there is something to measure
    assert found.exact == "float64"
    assert all(p.grad is None for p in passes.module.parameters())
    assert isinstance(passes.module.policy, PrefixGroupedModel)


def test_gradients_of_micro_batches_add_up_to_those_of_all_rows(tiny_lm):
    passes = passes_of(tiny_lm)
    padded = PaddedModel(passes.module.policy.lm, check=False)
    alone = [[b] for b in range(len(passes.rows.lengths))]
    together = passes.gradients(padded, whole(passes))
    torch.testing.assert_close(passes.gradients(padded, alone), together, rtol=0, atol=1e-6)
    torch.testing.assert_close(passes.logprobs(padded, alone), passes.logprobs(padded, whole(passes)))
    assert torch.cat([g.flatten() for g in together]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "is_healthy"),
    [
        ({}, True),
        ({"logprobs": Distance(2e-3, 0.0)}, False),
        ({"logprobs": Distance(2e-3, 0.0), "padded_rounding": Distance(1e-3, 1e-5)}, True),  # the padded one's own
        ({"logprobs": Distance(math.nan, math.nan)}, False),
        ({"cosine": 0.9}, False),
        ({"norm_difference": 0.02}, False),
        ({"grouped_rounding": Distance(1e-4, 4e-5)}, False),
        ({"padded_rounding": None, "grouped_rounding": None}, True),
    ],
)
def test_limits_of_equality(change, is_healthy):
    """Each figure alone is enough; 16 bits may hide a mistake from the first, but not from the copy."""
    usual = {
        "logprobs": Distance(1e-5, 1e-6),
        "cosine": 1.0,
        "norm_difference": 0.0,
        "limits": Limits(1e-3, 0.999, 0.01),
        "exact": "float64",
        "padded_rounding": Distance(1e-4, 1e-5),
        "grouped_rounding": Distance(1e-4, 2e-5),
    }
    assert Equality(**(usual | change)).is_healthy is is_healthy


# --- noise ----------------------------------------------------------------------------------------------------------


def sampled(passes: Passes, factor: float, count: int) -> Passes:
    """The rows, as if the sampler had given `count` action tokens `factor` times less than the policy does."""
    logp = passes.logprobs(PaddedModel(passes.module.policy.lm), whole(passes))
    for b, t in passes.rows.action_mask.nonzero()[:count].tolist():
        logp[b, t] -= math.log(factor)
    return dataclasses.replace(passes, rows=dataclasses.replace(passes.rows, old_logprobs=logp))


def test_noise_is_counted_by_hand(tiny_lm):
    """Two tokens of N at ratio 1.5: outside [0.8, 1.2], |r - 1| = 0.5, KL = 2 (0.5 - log 1.5) / N."""
    passes = sampled(passes_of(tiny_lm), 1.5, 2)
    noise = measure_noise(passes, passes.module.policy, whole(passes), 1000, "float32")
    count = int(passes.rows.action_mask.sum())
    for found in noise.sampler["float32"]:
        assert (found.num_outside, found.num_tokens) == (2, count)
        assert found.max_error == pytest.approx(0.5, abs=1e-4)
        assert found.approx_kl == pytest.approx(2 * (0.5 - math.log(1.5)) / count, rel=1e-3)
    assert noise.itself.num_outside == 0
    assert noise.itself.max_error < 1e-5
    assert not noise.is_healthy


def test_what_the_run_trains_with_decides(tiny_lm):
    """With `recompute` the sampler's log-probabilities are not what is clipped by; a wider band clips less."""
    recompute = sampled(passes_of(tiny_lm, old_logprobs="recompute"), 1.5, 2)
    assert measure_noise(recompute, recompute.module.policy, whole(recompute), 1000, "float32").is_healthy
    wide = sampled(passes_of(tiny_lm, clip_high=0.6), 1.5, 2)
    noise = measure_noise(wide, wide.module.policy, whole(wide), 1000, "float32")
    assert noise.clip == (0.2, 0.6)
    assert noise.trained.num_outside == 0


def test_noise_of_a_row_is_gspos(tiny_lm):
    """One token of a row with n of them at ratio 1.5: every token of the row is at 1.5 ** (1 / n)."""
    passes = sampled(passes_of(tiny_lm, loss="gspo", clip_low=3e-4, clip_high=4e-4), 1.5, 1)
    noise = measure_noise(passes, passes.module.policy, whole(passes), 1000, "float32")
    count = int(passes.rows.action_mask[0].sum())
    assert noise.is_per_row
    assert noise.trained.num_outside == count
    assert noise.trained.max_error == pytest.approx(1.5 ** (1 / count) - 1, rel=1e-3)


def test_bfloat16_is_scored_with_weights_in_bfloat16(tiny_lm):
    passes = sampled(passes_of(tiny_lm), 1.0, 0)
    noise = measure_noise(passes, passes.module.policy, whole(passes), 1000, "float32")
    assert set(noise.sampler) == {"float32", "bfloat16"}
    half = passes_of(tiny_lm, dtype="bfloat16")
    logp = half.logprobs(PaddedModel(half.module.policy.lm), whole(half))
    ratio = (logp - passes.rows.old_logprobs)[passes.rows.action_mask].double().exp()
    together, _ = noise.sampler["bfloat16"]
    assert together.max_error == pytest.approx(float((ratio - 1).abs().max()), rel=1e-3)
    assert together.max_error > 100 * noise.sampler["float32"][0].max_error


# --- cost -----------------------------------------------------------------------------------------------------------


def test_cost_takes_the_fastest_micro_batch_and_the_median_of_turns(tiny_lm, monkeypatch):
    """Timings are given here: padded 9 s in one micro-batch, 4 s in three, 6 s in five; shared 1, 2, 4 s."""
    passes = passes_of(tiny_lm, shape="group")  # 5 rows of 21 tokens, 14 of them shared
    lm = passes.module.policy.lm
    order = []
    shared_seconds = iter([50.0, 1.0, 2.0, 4.0])  # the first is the warm-up's

    def seconds(self, policy, plan):
        order.append(type(policy).__name__)
        if isinstance(policy, PrefixGroupedModel):
            return next(shared_seconds)
        return {1: 9.0, 3: 4.0, 5: 6.0}[len(plan)]

    monkeypatch.setattr(Passes, "seconds", seconds)
    found = measure_cost(passes, PaddedModel(lm), PrefixGroupedModel(lm, min_reuse=1.0), 1000, repeats=3)
    assert found.tried == {105: 9.0, 52: 4.0, 26: 6.0}
    assert found.padded.seconds == [4.0, 4.0, 4.0]
    assert (found.padded.budget, found.padded.num_micro_batches, found.padded.largest) == (52, 3, 42)
    assert found.grouped.seconds == [1.0, 2.0, 4.0]
    assert found.speedup == 2.0
    first = ["PaddedModel", "PrefixGroupedModel"]
    assert order[-6:] == [*first, *reversed(first), *first]
    assert (found.grouped.num_micro_batches, found.grouped.largest) == (1, 14 + 5 * 7)
    assert found.padded.peak_bytes > found.grouped.peak_bytes / 2 > 1000
    assert found.memory_ratio == found.padded.peak_bytes / found.grouped.peak_bytes


def test_no_repeat_begins_after_the_deadline(tiny_lm):
    passes = dataclasses.replace(passes_of(tiny_lm, shape="group"), deadline=0.0)
    found = measure_cost(passes, PaddedModel(passes.module.policy.lm), None, 1000, repeats=5)
    assert len(found.tried) == len(found.padded.seconds) == 1
    assert found.grouped is None
    assert found.speedup is None


def test_budgets_are_worth_trying_once(tiny_lm):
    """5 rows of 21 tokens: all in 105, two in 52, one in 21; a budget below the longest row is that row."""
    passes = passes_of(tiny_lm, shape="group")
    assert {budget: len(plan) for budget, plan in cost_file.padded_plans(passes, 1000).items()} == {
        105: 1,
        52: 3,
        26: 5,
    }
    assert {budget: len(plan) for budget, plan in cost_file.padded_plans(passes, 5).items()} == {21: 5}


# --- recommendations ------------------------------------------------------------------------------------------------

RIGHT = Equality(Distance(1e-6, 1e-7), 1.0, 0.0, Limits(1e-3, 0.999, 0.01), "", None, None)
WRONG = dataclasses.replace(RIGHT, cosine=0.5)
QUIET, LOUD = (Ratios("", "together", e, n, 100, e**2) for e, n in ((1e-6, 0), (0.5, 9)))


def side(seconds: float, peak: int, budget: int = 1000) -> SideCost:
    return SideCost([seconds], peak, budget, 1, 100)


def advice(*, equality=RIGHT, reuse=4.0, shared=(1.0, 1000), noise=None, available=None, refusal="") -> dict[str, str]:
    """What is recommended where the padded forward takes 2 s and 4000 bytes for 100 tokens."""
    grouped = None if refusal else side(*shared)
    cost = Cost(side(2.0, 4000, 50), grouped, {100: 3.0, 50: 2.0})
    sharing = Sharing(refusal, "" if refusal else "tree_merge", reuse, reuse)
    return {
        a.option: a.value
        for a in advise(sharing, None if refusal else equality, cost, noise, Budget(1000, 60, available))
    }


def noise_of(float32: Ratios, bfloat16: Ratios, configured: str) -> Noise:
    found = {"float32": [float32] * 2, "bfloat16": [bfloat16] * 2}
    return Noise(configured, "sampler", (0.2, 0.2), False, found, LOUD, QUIET)


@pytest.mark.parametrize(
    ("given", "option", "value"),
    [
        ({}, "model.share_prefix", "auto"),
        ({"refusal": "it is recurrent"}, "model.share_prefix", "auto"),
        ({"equality": WRONG}, "model.share_prefix", "false"),
        ({"shared": (3.0, 5000)}, "model.share_prefix", "false"),
        ({"shared": (3.0, 1000)}, "model.share_prefix", "auto"),  # slower, but a quarter of the memory
        ({"reuse": 1.1}, "model.share_prefix", "true"),  # the gate would keep it off
        ({"reuse": 1.1, "shared": (3.0, 5000)}, "model.share_prefix", "auto"),
        ({}, "data.max_tokens", "1000"),
        ({"available": 20_000}, "data.max_tokens", "1000"),  # 1000 bytes for 100 tokens
        ({"available": 5_000}, "data.max_tokens", "400"),  # 0.8 x 5000 / 10
        ({"equality": WRONG, "available": 10**6}, "data.max_tokens", "60"),  # 50 was faster, but rows may be 60 long
        ({"available": 500}, "data.max_tokens", "60"),
        ({"noise": noise_of(QUIET, LOUD, "float32")}, "precision", "float32, as it is"),
        (
            {"noise": noise_of(QUIET, LOUD, "bfloat16")},
            "precision",
            "--model.dtype float32 --trainer.precision 32-true",
        ),
        ({"noise": noise_of(QUIET, LOUD, "float32")}, "model.old_logprobs", "sampler"),
        ({"noise": noise_of(LOUD, LOUD, "float32")}, "model.old_logprobs", "recompute"),
    ],
)
def test_recommendations_follow_the_numbers(given, option, value):
    assert advice(**given)[option] == value


def test_nothing_is_said_of_sampling_where_nothing_was_sampled():
    assert list(advice()) == ["model.share_prefix", "data.max_tokens"]


# --- the command ----------------------------------------------------------------------------------------------------


def words(lm: str, run: Path, *more: str) -> list[str]:
    given = ["--model.pretrained", lm, "--trainer.default_root_dir", str(run), "--trainer.accelerator", "cpu"]
    return ["doctor", "--config", ECHO, *given, "--repeats", "1", "--json", str(run / "doctor.json"), *more]


def report(run: Path) -> dict:
    return json.loads((run / "doctor.json").read_text())


@pytest.fixture(scope="module")
def run(tiny_lm, tmp_path_factory):
    """A finished fit."""
    folder = tmp_path_factory.mktemp("run")
    fit(tiny_lm, folder)
    return folder


def test_a_healthy_run(tiny_lm, tmp_path, capsys):
    """Two of four prompts with four episodes each; every section has its verdict; nothing but the JSON is written."""
    main(words(tiny_lm, tmp_path, "--trainer.devices", "2"))
    out = capsys.readouterr().out
    assert "data.num_prompts: 4 -> 2" in out
    assert "trainer.devices: 2 -> 1" in out
    assert "trainer.strategy" not in out
    assert out.count("  passed") == 4
    assert "look here" not in out
    assert out.rstrip().endswith("healthy")
    found = report(tmp_path)
    assert found["is_healthy"] is True
    ratio = found["collected"]["ratio"]
    assert found["sharing"] == {
        "refusal": "",
        "backend": "tree_merge",
        "reuse": ratio,
        "measured_reuse": ratio,
        "gate": 1.2,
    }
    assert found["collected"]["num_rows"] == found["measured"]["num_rows"] == 8
    assert ratio > 2
    assert found["equality"]["logprobs"]["max"] < 1e-5
    assert set(found["noise"]["sampler"]) == {"float32", "bfloat16"}
    assert found["noise"]["sampler"]["float32"][0]["max_error"] < 1e-4
    assert found["cost"]["padded"]["seconds"] != found["cost"]["grouped"]["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == ["doctor.json"]


def test_a_wrong_shared_forward_is_found(tiny_lm, tmp_path, capsys, monkeypatch):
    """The start-up check passes (its rows are short), training would go on, the doctor exits with 1."""
    monkeypatch.setattr(PackedTree, "build", broken_beyond(50))
    with pytest.raises(SystemExit) as stop:
        main(words(tiny_lm, tmp_path))
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "look here: beyond the limits" in out
    assert "model.share_prefix: false" in out
    found = report(tmp_path)
    assert (found["is_healthy"], found["equality"]["is_healthy"]) == (False, False)
    assert found["equality"]["padded_rounding"]["max"] < 1e-5 < found["equality"]["grouped_rounding"]["max"]


def test_what_is_switched_off_does_no_harm(tiny_lm, tmp_path, capsys, monkeypatch):
    """With `share_prefix: false` the same mistake is shown, but it does not touch training."""
    monkeypatch.setattr(PackedTree, "build", broken_beyond(50))
    main(words(tiny_lm, tmp_path, "--model.share_prefix", "false"))
    assert "training is not touched" in capsys.readouterr().out
    assert report(tmp_path)["equality"]["is_healthy"] is False


@pytest.mark.slow
def test_what_the_start_up_check_refuses_is_measured_and_not_trained_with(tiny_lm, tmp_path, capsys, monkeypatch):
    """Rightly refused: shown to be wrong. Wrongly refused, as rounding in 16 bits can be: shown to be right."""
    with monkeypatch.context() as patch:
        patch.setattr(PackedTree, "build", broken_beyond(5))
        main(words(tiny_lm, tmp_path))
    assert "the start-up check refuses sharing, so training is not touched" in capsys.readouterr().out
    assert report(tmp_path)["equality"]["is_healthy"] is False
    monkeypatch.setattr(scoring, "why_sharing_is_wrong", lambda model: "it moved")
    main(words(tiny_lm, tmp_path))
    assert "refused at start-up (it moved), yet on these rows" in capsys.readouterr().out
    assert report(tmp_path)["is_healthy"] is True


def test_noisy_ratios_are_found(tiny_lm, tmp_path, capsys):
    """A clip band narrower than float32's rounding: nearly every token is outside it, and `recompute` is advised."""
    narrow = ["--model.clip_low", "1e-9", "--model.clip_high", "1e-9"]
    with pytest.raises(SystemExit) as stop:
        main(words(tiny_lm, tmp_path, *narrow))
    assert stop.value.code == 1
    assert "model.old_logprobs: recompute" in capsys.readouterr().out
    assert report(tmp_path)["noise"]["sampler"]["float32"][0]["outside"] > 0.1


@pytest.mark.filterwarnings("ignore:HFEngine cannot share")
def test_a_hybrid_is_refused_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "lfm2", Lfm2Config)
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    main(words(tiny.build_tiny_lm(tmp_path / "lm", "lfm2", **layers), tmp_path))
    assert "look here: this model does not share prefixes: it has conv layers" in capsys.readouterr().out
    found = report(tmp_path)
    assert found["is_healthy"] is True
    assert found["equality"] is None
    assert found["cost"]["grouped"] is None
    assert found["noise"]["is_healthy"] is True


@pytest.mark.slow
def test_16_bits_and_full_training(tiny_lm, tmp_path):
    """Their limits are those of 16-bit floats, and beside them stands float32."""
    main(words(tiny_lm, tmp_path, "--model.dtype", "bfloat16", "--model.lora", "null"))
    found = report(tmp_path)
    assert found["precision"] == "bfloat16"
    assert found["equality"]["limits"]["logprob"] == 0.2
    assert set(found["noise"]["sampler"]) == {"bfloat16", "float32"}
    main(words(tiny_lm, tmp_path, "--trainer.precision", "bf16-mixed"))
    assert report(tmp_path)["precision"] == "float32 under bfloat16 autocast"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_in_the_folder_is_read_and_left_alone(run, tmp_path, monkeypatch):
    """A fit's own configuration is understood, the checkpoint's weights are taken, and not a byte is written."""
    before = contents(run)
    seen = {}
    examine = Checkup._examine

    def watch(self, trainer, module, batches):
        seen.update({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
        return examine(self, trainer, module, batches)

    monkeypatch.setattr(Checkup, "_examine", watch)
    main(
        ["doctor", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--json", str(tmp_path / "doctor.json")]
    )
    assert contents(run) == before
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert seen.keys() == saved.keys()
    assert all(torch.equal(seen[name], saved[name]) for name in saved)
    assert report(tmp_path)["is_healthy"] is True


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--repeats", "0"], "repeats=0"),
        (["--seconds", "-1"], "seconds=-1"),
        (["--num_prompts", "0"], "num_prompts=0"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
        (["--nope", "1"], "nope"),
        (["--config", "nope.yaml"], "nope.yaml"),
        (["--ckpt_path", "last"], "no such file"),
    ],
)
def test_mistakes_are_one_line(more, message, tiny_lm, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words(tiny_lm, tmp_path, *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_printed_configuration(tiny_lm, capsys):
    for flag, expected in (("--help", "--seconds SECONDS"), ("--print_config", "seconds: 120.0")):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "--config", ECHO, flag])
        assert stop.value.code in (0, None)
        assert expected in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gigpo_echo", "grpopp_textworld", "textworld_warmup"])
def test_experiments_can_be_examined(name, tmp_path, capsys):
    """As shipped, but for the model and the size; supervised rows have no ratio."""
    lm = tiny.build_tiny_lm(tmp_path / "lm", max_position_embeddings=2048)
    config = ROOT / "configs" / "experiment" / f"{name}.yaml"
    sizes = [w for key, value in SMALL[name].items() if key.startswith("data") for w in (f"--{key}", str(value))]
    given = ["--model.pretrained", lm, "--repeats", "1", "--seconds", "5", "--json", str(tmp_path / "doctor.json")]
    main(["doctor", "--config", str(config), *given, *sizes])
    found = report(tmp_path)
    assert found["is_healthy"] is True
    assert (found["noise"] is None) == ("collects no rollouts" in capsys.readouterr().out)
    assert found["measured"]["num_rows"] >= 2
